"""Memory in tests: what a computation keeps, and limits of the process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


def saved_bytes(compute: Callable[[], object], given: Iterable[Tensor]) -> int:
    """What a computation keeps for its backward pass, apart from what it was given."""
    pointers = {tensor.data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in pointers:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(saved.values())


def peak_and_live_bytes(compute: Callable[[], object]) -> tuple[int, int]:
    """How many more bytes of tensors there are than before a computation: at most, and while its result is held.

    The second is without the result. It sees what is kept in any way, other than PyTorch's hooks for saved tensors.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = compute()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = list(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))
    storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tree_leaves(result)}
    return max(totals), totals[-1] - sum(storage.nbytes() for storage in storages.values())


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """This process with a limit of the operating system's. kind: one of `resource.RLIMIT_*`."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
