"""Attention over aligned candidates at every position: out(p) = sum_k a_k(p) value_k(p).

    keys     K_k = g * key_k / sqrt( mean_c(key_k^2) + eps )  RMSNorm over channels, per position
    scores   e_k(p) = < w , K_k(p) >                          w: the query, g: the norm's scale
    weights  a_k(p) = softmax over k of e_k(p)

At stage level (XAttnRes, arXiv 2604.03297, after Attention Residuals, arXiv 2603.15031) key_k and value_k are both the
aligned candidate v_k, and w is one learned vector, the pseudo-query. At block level w is a field, w(p), and memory
entries bring keys of their own. Three backends compute this function: `reference`, as plain as the formulas;
`streaming`, which never holds the stack of aligned candidates; and, in `kernels`, `triton`, which does so on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nnunet_xattnres.alignment import Slab, SlabAlignment, align, slabs
from nnunet_xattnres.errors import XAttnResError

EPS = 1e-6

# How many numbers of aligned candidates the streaming backend holds at once. On a CPU 2**21 to 2**23 were equally fast;
# with other work on the cores, fewer and larger operations wait less for each other. Elsewhere launches cost more.
SLAB_NUMBERS = {"cpu": 2**23}
SLAB_NUMBERS_ELSEWHERE = 2**28


class Candidate(NamedTuple):
    """Something to read from: features (B, C_k, *source_size) and the projection (C_t, C_k) that aligns its channels.

    Without a projection the features enter as they are (C_k = C_t).
    """

    features: Tensor
    projection: Tensor | None


class Attention(Protocol):
    """What a backend computes.

    query: w, a vector (C_key,) or a field (B, C_key, *size). norm_scale: g, (C_key,). size: the target's spatial size.
    candidates: what is read, C_t channels each once it is aligned.
    key_channels: None where an aligned candidate is key and value at once (C_key = C_t); else its first `key_channels`
        are the key and the others the value.
    Returns (B, C_value, *size), in the dtype of the aligned candidates.
    """

    def __call__(
        self,
        query: Tensor,
        norm_scale: Tensor,
        candidates: Sequence[Candidate],
        size: Sequence[int],
        key_channels: int | None = None,
        eps: float = EPS,
    ) -> Tensor: ...


def attend_reference(
    query: Tensor,
    norm_scale: Tensor,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The formulas as they stand; see `Attention`."""
    aligned = torch.stack([align(candidate.features, candidate.projection, size) for candidate in candidates])
    keys, values = (aligned, aligned) if key_channels is None else aligned.tensor_split([key_channels], dim=2)
    with _without_autocast(values):
        weights = attention_weights(query, norm_scale, keys, eps)
        mixture = (weights.unsqueeze(2) * values.to(weights.dtype)).sum(dim=0)
    return mixture.to(values.dtype)


def attention_weights(query: Tensor, norm_scale: Tensor, keys: Tensor, eps: float = EPS) -> Tensor:
    """a_k(p) for a stack of keys before the norm: (K, B, C_key, *size) -> (K, B, *size), at least float32."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    keys = keys * torch.rsqrt(keys.square().mean(dim=2, keepdim=True) + eps)
    query = scaled(query, norm_scale)
    scores = torch.einsum("c,kbc...->kb...", query, keys) if query.ndim == 1 else (query * keys).sum(dim=2)
    return scores.softmax(dim=0)


def attend_streaming(
    query: Tensor,
    norm_scale: Tensor,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference`, slab by slab, forward and backward.

    Only the candidates as they are given, at their own resolutions, and the query are kept for the backward pass,
    which aligns every slab once more.
    """
    features, projections = zip(*candidates, strict=True)
    sources = _distinct([*features, *projections])
    return _StreamingAttention.apply(scaled(query, norm_scale), tuple(size), key_channels, eps, *sources)


def _attend_triton() -> Attention:
    # Imported on request: Triton is not everywhere, and takes its time.
    try:
        from nnunet_xattnres.kernels import attend_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise XAttnResError(
            "the backend 'triton' needs Triton, which is not installed: pip install triton, or use 'auto'"
        ) from error
    return attend_triton


# Functions that return the backend.
ATTENTION_BACKENDS: dict[str, Callable[[], Attention]] = {
    "reference": lambda: attend_reference,
    "streaming": lambda: attend_streaming,
    "triton": _attend_triton,
}


def attention_backend(name: str) -> Attention:
    """The function that computes the attention. Raises `XAttnResError` for a backend that is not available here."""
    if name == "auto":
        name = "streaming"
    if name not in ATTENTION_BACKENDS:
        raise XAttnResError(
            f"the backend {name!r} is not available here: use 'auto' or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    return ATTENTION_BACKENDS[name]()


class _StreamingAttention(torch.autograd.Function):
    """Attention whose softmax, and whose whole backward pass, see one slab of positions at a time.

    query: w * g. sources: all features, then all projections.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, size: tuple[int, ...], key_channels: int | None, eps: float, *sources: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, *sources)
        ctx.arguments = size, key_channels, eps
        with _without_autocast(query):
            call = _StreamingCall(query, size, key_channels, eps, sources)
            mixture = call.new_mixture()
            for slab in call.slabs():
                aligned = call.align(slab)
                weights = aligned.scores.softmax(dim=0)
                slab.of(mixture).copy_(_weighted_sum(weights, aligned.values))
        return mixture

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, *sources = ctx.saved_tensors
        with _without_autocast(query):
            size, key_channels, eps = ctx.arguments
            call = _StreamingCall(query, size, key_channels, eps, sources)
            query_gradient = torch.zeros_like(call.query)
            for alignment in call.alignments:
                alignment.start_gradients()
            for slab in call.slabs():
                aligned = call.align(slab)
                gradient = slab.of(gradients[0]).to(call.query.dtype)
                weights = aligned.scores.softmax(dim=0)
                # out = sum_k a_k v_k and a = softmax(e): da_k = <dout, v_k>, de_k = a_k (da_k - sum_j a_j da_j).
                weight_gradients = torch.stack([_dot(gradient, value) for value in aligned.values])
                score_gradients = weights * (weight_gradients - (weights * weight_gradients).sum(dim=0))
                # e_k = r_k <q, key_k> with r_k = (mean_c key_k^2 + eps)^(-1/2): de_k/dq = r_k key_k and
                # de_k/dkey_k = r_k q - e_k r_k^2 key_k / C.
                along_query = score_gradients * aligned.inverse_rms
                along_key = along_query * aligned.scores * aligned.inverse_rms / aligned.keys[0].shape[1]
                for k, (key, alignment) in enumerate(zip(aligned.keys, call.alignments, strict=True)):
                    call.add_to_query(query_gradient, slab, along_query[k], key)
                    key_gradient = along_query[k].unsqueeze(1) * aligned.query - along_key[k].unsqueeze(1) * key
                    value_gradient = weights[k].unsqueeze(1) * gradient
                    alignment.accumulate_gradients(slab, call.join(key_gradient, value_gradient))
        features_gradients = [alignment.features_gradient for alignment in call.alignments]
        projection_gradients = [alignment.projection_gradient for alignment in call.alignments]
        return (
            query_gradient.to(query.dtype),
            None,
            None,
            None,
            *(
                None if gradient is None else gradient.to(source.dtype)
                for source, gradient in zip(sources, [*features_gradients, *projection_gradients], strict=True)
            ),
        )


class _AlignedSlab(NamedTuple):
    """What the attention sees of one slab.

    query: broadcasts against the keys. keys, values: a tensor (B, C, *slab size) per candidate.
    inverse_rms, scores: (K, B, *slab size).
    """

    query: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    inverse_rms: Tensor
    scores: Tensor


class _StreamingCall:
    """The arguments of one call, ready for arithmetic in float32 (float64 where the query is)."""

    def __init__(
        self,
        query: Tensor,
        size: tuple[int, ...],
        key_channels: int | None,
        eps: float,
        sources: Sequence[Tensor | None],
    ) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        count = len(sources) // 2
        self.query = query.to(dtype)
        self.size = size
        self.key_channels = key_channels
        self.eps = eps
        self.alignments = [
            SlabAlignment(features, projection, size, dtype)
            for features, projection in zip(sources[:count], sources[count:], strict=True)
            if features is not None
        ]

    def new_mixture(self) -> Tensor:
        # The last candidate is the stage's own input where there is one, and never an image in another precision.
        last = self.alignments[-1]
        value_channels = last.aligned_channels - (self.key_channels or 0)
        return last.features.new_empty(last.features.shape[0], value_channels, *self.size)

    def slabs(self) -> Iterator[Slab]:
        numbers = SLAB_NUMBERS.get(self.query.device.type, SLAB_NUMBERS_ELSEWHERE)
        first = self.alignments[0]
        positions = max(1, numbers // (len(self.alignments) * first.aligned_channels))
        return slabs(first.features.shape[0], self.size, positions)

    def align(self, slab: Slab) -> _AlignedSlab:
        aligned = [alignment.align(slab) for alignment in self.alignments]
        keys = values = aligned
        if self.key_channels is not None:
            keys = [both[:, : self.key_channels] for both in aligned]
            values = [both[:, self.key_channels :] for both in aligned]
        inverse_rms = torch.stack([torch.rsqrt(_dot(key, key) / key.shape[1] + self.eps) for key in keys])
        if self.query.ndim == 1:
            query = self.query.view(-1, *(1,) * len(self.size))
            scores = torch.stack([torch.einsum("c,bc...->b...", self.query, key) for key in keys])
        else:
            query = slab.of(self.query)
            scores = torch.stack([_dot(query, key) for key in keys])
        return _AlignedSlab(query, keys, values, inverse_rms, scores * inverse_rms)

    def add_to_query(self, query_gradient: Tensor, slab: Slab, weight: Tensor, key: Tensor) -> None:
        """Add weight(p) key(p) to the query's gradient, at p or, for a vector, over all positions."""
        if self.query.ndim == 1:
            query_gradient += torch.einsum("b...,bc...->c", weight, key)
        else:
            slab.of(query_gradient).addcmul_(weight.unsqueeze(1), key)

    def join(self, key_gradient: Tensor, value_gradient: Tensor) -> Tensor:
        """The gradient of an aligned candidate from those of its two roles."""
        if self.key_channels is None:
            return key_gradient.add_(value_gradient)
        return torch.cat((key_gradient, value_gradient), dim=1)


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repeated tensors: torch.compile does not trace a function that is given one twice."""
    seen: set[int] = set()
    distinct: list[Tensor | None] = []
    for tensor in tensors:
        distinct.append(tensor.view_as(tensor) if tensor is not None and id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return distinct


def scaled(query: Tensor, norm_scale: Tensor) -> Tensor:
    """w * g, the only way in which the norm's scale enters."""
    return query * norm_scale.view(-1, *(1,) * (query.ndim - 2)) if query.ndim > 1 else query * norm_scale


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Full precision for norms, scores and softmax: squares overflow float16 above 255."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """< a , b > over channels: (B, C, *size) twice -> (B, *size)"""
    return (a * b).sum(dim=1)


def _weighted_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    total = weights[0].unsqueeze(1) * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.addcmul_(weight.unsqueeze(1), value)
    return total
