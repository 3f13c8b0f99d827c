"""The attention weights of the calls of a network, computed beside the network's own output."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nnunet_xattnres.ops.reference import Attention
from nnunet_xattnres.ops.streaming import streaming_weights

# A function that is called with a target and the weights of one call, (K, B, *size). They sum to 1 over the K sources.
Receiver = Callable[[str, Tensor], None]


@contextmanager
def collected(attentions: Mapping[str, nn.Module], receive: Receiver) -> Iterator[None]:
    """Inside the `with` block, give the weights of every call to `receive`. attentions: modules by target."""
    backends: dict[str, Attention] = {target: module.attend for target, module in attentions.items()}  # type: ignore
    for target, module in attentions.items():
        module.attend = _also_collecting(backends[target], target, receive)  # type: ignore
    try:
        yield
    finally:
        for target, module in attentions.items():
            module.attend = backends[target]  # type: ignore


def _also_collecting(attend: Attention, target: str, receive: Receiver) -> Attention:
    def attend_and_collect(*arguments: Any, **options: Any) -> Tensor:
        receive(target, streaming_weights(*arguments, **options))
        return attend(*arguments, **options)

    return attend_and_collect
