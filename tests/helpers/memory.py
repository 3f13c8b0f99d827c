"""Memory in tests: what a computation keeps, and limits of the process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


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


def peak_bytes(compute: Callable[[], object]) -> int:
    """How many more bytes of tensors there are at most during a computation than before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = compute()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


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
