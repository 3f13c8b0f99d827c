"""Memory in tests: what a computation keeps, and limits of the process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
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


def live_bytes(compute: Callable[[], object], given: Iterable[Tensor]) -> int:
    """What a computation allocates and does not free while its result is held, apart from the result.

    It sees what is kept in any way, other than PyTorch's hooks for saved tensors. given: tensors that exist before.
    """
    allocated = _Allocated()
    with allocated:
        result = compute()
    others = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in (*given, *tree_leaves(result))}
    live = {cdata: nbytes for cdata, (storage, nbytes) in allocated.storages.items() if not storage.expired()}
    return sum(nbytes for cdata, nbytes in live.items() if cdata not in others)


class _Allocated(TorchDispatchMode):
    """Collects the storages of all results of PyTorch's operators, without holding them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                weak = StorageWeakRef(storage)
                self.storages[weak.cdata] = weak, storage.nbytes()
        return result


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
