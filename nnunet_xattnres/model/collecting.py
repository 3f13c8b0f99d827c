"""What can be done around the calls of a network's attention: collect their weights, leave sources out.

The function that computes the attention is wrapped. No backend knows of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nnunet_xattnres.ops.reference import EPS, Attention, Candidate
from nnunet_xattnres.ops.streaming import streaming_weights

# A function that is called with a target and the weights of one call, (K, B, *size). They sum to 1 over the K sources.
# The weight of a source that is left out is 0. A call whose only source is left out has no weights.
Receiver = Callable[[str, Tensor], None]


@contextmanager
def collected(attentions: Mapping[str, nn.Module], receive: Receiver) -> Iterator[None]:
    """Inside the `with` block, give the weights of every call to `receive`. attentions: modules by target."""
    before = {target: module.attend for target, module in attentions.items()}
    for target, module in attentions.items():
        wrapped = _wrapped(module)
        module.attend = replace(wrapped, receivers=(*wrapped.receivers, (target, receive)))  # type: ignore[assignment]
    try:
        yield
    finally:
        for target, module in attentions.items():
            module.attend = before[target]


@contextmanager
def left_out(attention: nn.Module, source: int) -> Iterator[None]:
    """Inside the `with` block, leave the candidate of this index out. It then has no part in the softmax."""
    before = attention.attend
    wrapped = _wrapped(attention)
    attention.attend = replace(wrapped, left_out=wrapped.left_out | {source})  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.attend = before


def left_out_now(attention: nn.Module) -> frozenset[int]:
    """The indices of the candidates that are left out at present."""
    return _wrapped(attention).left_out


@dataclass(frozen=True)
class _Wrapped:
    """An `Attention` that leaves candidates out, and gives the weights to receivers, each with its target."""

    attend: Attention
    left_out: frozenset[int] = frozenset()
    receivers: tuple[tuple[str, Receiver], ...] = ()

    def __call__(
        self,
        query: Tensor,
        norm_scale: Tensor | None,
        candidates: Sequence[Candidate],
        size: Sequence[int],
        key_channels: int | None = None,
        eps: float = EPS,
    ) -> Tensor:
        kept = [candidate for k, candidate in enumerate(candidates) if k not in self.left_out]
        if self.receivers and kept:
            weights = streaming_weights(query, norm_scale, kept, size, key_channels, eps)
            for k in sorted(self.left_out):
                weights = torch.cat((weights[:k], torch.zeros_like(weights[:1]), weights[k:]))
            for target, receive in self.receivers:
                receive(target, weights)
        if not kept:
            # Residual fusion adds this to its input. There are no weights.
            return query.new_zeros(len(candidates[0].features), len(query), *size)
        return self.attend(query, norm_scale, kept, size, key_channels, eps)


def _wrapped(attention: nn.Module) -> _Wrapped:
    attend: Attention | _Wrapped = attention.attend  # type: ignore[assignment]
    return attend if isinstance(attend, _Wrapped) else _Wrapped(attend)
