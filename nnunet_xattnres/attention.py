"""Pseudo-query attention over aligned candidates: out(p) = sum_k a_k(p) v_k(p).

    keys     K_k = g * v_k / sqrt( mean_c(v_k^2) + eps )     RMSNorm over channels, per position
    scores   e_k(p) = < w , K_k(p) >                          w: the pseudo-query, g: the norm's scale
    weights  a_k(p) = softmax over k of e_k(p)

(XAttnRes, arXiv 2604.03297, after Attention Residuals, arXiv 2603.15031.) Two backends compute this function:
`reference`, as plain as the formulas, and `streaming`, which never holds the stack of aligned candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_xattnres.alignment import Slab, SlabAlignment, align, slabs
from nnunet_xattnres.errors import XAttnResError

EPS = 1e-6

# How many numbers of aligned candidates the streaming backend holds at once: on a CPU they should stay in its caches;
# elsewhere few large kernels are faster than many small ones.
SLAB_NUMBERS = {"cpu": 2**21}
SLAB_NUMBERS_ELSEWHERE = 2**28


class Candidate(NamedTuple):
    """Something to read from: features (B, C_k, *source_size) and the projection (C_t, C_k) that aligns its channels.

    Without a projection the features enter as they are (C_k = C_t).
    """

    features: Tensor
    projection: Tensor | None


Attention = Callable[[Tensor, Tensor, Sequence[Candidate], Sequence[int]], Tensor]


def attend_reference(query: Tensor, norm_scale: Tensor, candidates: Sequence[Candidate], size: Sequence[int]) -> Tensor:
    """The formulas as they stand.

    query, norm_scale: w and g, (C_t,). candidates: see `Candidate`. size: the target's spatial size.
    Returns (B, C_t, *size) in the dtype of the aligned candidates.
    """
    values = torch.stack([align(candidate.features, candidate.projection, size) for candidate in candidates])
    with _without_autocast(values):
        weights = attention_weights(query, norm_scale, values)
        mixture = (weights.unsqueeze(2) * values.to(weights.dtype)).sum(dim=0)
    return mixture.to(values.dtype)


def attention_weights(query: Tensor, norm_scale: Tensor, values: Tensor) -> Tensor:
    """a_k(p) for stacked aligned candidates v: (K, B, C, *size) -> (K, B, *size), at least float32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    keys = values * torch.rsqrt(values.square().mean(dim=2, keepdim=True) + EPS)
    scores = torch.einsum("c,kbc...->kb...", query * norm_scale, keys)
    return scores.softmax(dim=0)


def attend_streaming(query: Tensor, norm_scale: Tensor, candidates: Sequence[Candidate], size: Sequence[int]) -> Tensor:
    """`attend_reference`, slab by slab, forward and backward.

    Only the candidates as they are given, at their own resolutions, are kept for the backward pass, which aligns
    every slab once more.
    """
    features, projections = zip(*candidates, strict=True)
    return _StreamingAttention.apply(query * norm_scale, tuple(size), *features, *projections)


ATTENTION_BACKENDS: dict[str, Attention] = {"reference": attend_reference, "streaming": attend_streaming}


def attention_backend(name: str) -> Attention:
    """The function that computes the attention. Raises `XAttnResError` for a backend that is not available here."""
    if name == "auto":
        name = "streaming"
    if name not in ATTENTION_BACKENDS:
        raise XAttnResError(
            f"the backend {name!r} is not available here: use 'auto' or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    return ATTENTION_BACKENDS[name]


class _StreamingAttention(torch.autograd.Function):
    """Pseudo-query attention whose softmax, and whose whole backward pass, see one slab of positions at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, size: tuple[int, ...], *sources: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, *sources)
        ctx.size = size
        with _without_autocast(query):
            query, alignments = _prepare(query, size, sources)
            target = alignments[0].features
            mixture = target.new_empty(target.shape[0], query.shape[0], *size)
            for slab in _slabs(query, size, alignments):
                values = [alignment.align(slab) for alignment in alignments]
                weights = _inverse_rms_and_scores(query, values)[1].softmax(dim=0)
                slab.of(mixture).copy_(_weighted_sum(weights, values))
        return mixture

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, *sources = ctx.saved_tensors
        with _without_autocast(query):
            query, alignments = _prepare(query, ctx.size, sources)
            query_gradient = torch.zeros_like(query)
            for alignment in alignments:
                alignment.start_gradients()
            for slab in _slabs(query, ctx.size, alignments):
                gradient = slab.of(gradients[0]).to(query.dtype)
                values = [alignment.align(slab) for alignment in alignments]
                inverse_rms, scores = _inverse_rms_and_scores(query, values)
                weights = scores.softmax(dim=0)
                # out = sum_k a_k v_k and a = softmax(e): da_k = <dout, v_k>, de_k = a_k (da_k - sum_j a_j da_j).
                weight_gradients = torch.stack([_dot(gradient, value) for value in values])
                score_gradients = weights * (weight_gradients - (weights * weight_gradients).sum(dim=0))
                # e_k = r_k <q, v_k> with r_k = (mean_c v_k^2 + eps)^(-1/2): de_k/dq = r_k v_k and
                # de_k/dv_k = r_k q - e_k r_k^2 v_k / C.
                along_query = score_gradients * inverse_rms
                along_value = along_query * scores * inverse_rms / query.shape[0]
                for k, (alignment, value) in enumerate(zip(alignments, values, strict=True)):
                    query_gradient += torch.einsum("b...,bc...->c", along_query[k], value)
                    value_gradient = weights[k].unsqueeze(1) * gradient
                    value_gradient += along_query[k].unsqueeze(1) * _per_channel(query, value)
                    value_gradient -= along_value[k].unsqueeze(1) * value
                    alignment.accumulate_gradients(slab, value_gradient)
        source_gradients = [a.features_gradient for a in alignments] + [a.projection_gradient for a in alignments]
        return (
            query_gradient.to(ctx.saved_tensors[0].dtype),
            None,
            *(
                None if gradient is None else gradient.to(source.dtype)
                for source, gradient in zip(sources, source_gradients, strict=True)
            ),
        )


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Full precision for norms, scores and softmax: squares overflow float16 above 255."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()


def _prepare(
    query: Tensor, size: tuple[int, ...], sources: Sequence[Tensor | None]
) -> tuple[Tensor, list[SlabAlignment]]:
    """Query and alignments, ready for arithmetic in float32 (float64 where the query is)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    count = len(sources) // 2
    return query.to(dtype), [
        SlabAlignment(features, projection, size, dtype)
        for features, projection in zip(sources[:count], sources[count:], strict=True)
        if features is not None
    ]


def _slabs(query: Tensor, size: tuple[int, ...], alignments: list[SlabAlignment]) -> Iterator[Slab]:
    numbers = SLAB_NUMBERS.get(query.device.type, SLAB_NUMBERS_ELSEWHERE)
    positions = max(1, numbers // (len(alignments) * query.shape[0]))
    return slabs(alignments[0].features.shape[0], size, positions)


def _inverse_rms_and_scores(query: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """r_k(p) and e_k(p), (K, B, *slab size) each."""
    channels = query.shape[0]
    inverse_rms = torch.stack([torch.rsqrt(_dot(value, value) / channels + EPS) for value in values])
    scores = torch.stack([torch.einsum("c,bc...->b...", query, value) for value in values]) * inverse_rms
    return inverse_rms, scores


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """< a , b > over channels: (B, C, *size) twice -> (B, *size)"""
    return (a * b).sum(dim=1)


def _weighted_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    total = weights[0].unsqueeze(1) * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.addcmul_(weight.unsqueeze(1), value)
    return total


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector (C,), shaped to broadcast against (B, C, *size)."""
    return vector.view(1, -1, *(1,) * (like.ndim - 2))
