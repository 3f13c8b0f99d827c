"""The attention over candidates, written as its formulas. Every backend computes this function.

    aligned  v_k = Proj_k( Resize( h_k ) )                    spatial alignment, then 1x1 channel projection
    keys     K_k = g * v_k / sqrt( mean_c(v_k^2) + eps )      RMSNorm over channels, per position, with scale g
    scores   e_k(p) = < w , K_k(p) >                          w: the query
    weights  a_k(p) = softmax over k of e_k(p)
    output   out(p) = sum_k a_k(p) v_k(p)

This is the stage level (XAttnRes, arXiv 2604.03297, after Attention Residuals, arXiv 2603.15031): w is one learned
vector, the pseudo-query. At block level, w is a field w(p). In DKVMR, the aligned candidate consists of a key and a
value: K_k is computed from the key, and out from the value.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnunet_xattnres.ops.alignment import align

EPS = 1e-6


class Candidate(NamedTuple):
    """What a target can read: features h_k (B, C_k, *source_size) and the projection (C_t, C_k) of its channels.

    The features are at the target's resolution or at a coarser one. Without a projection, C_k = C_t.
    """

    features: Tensor
    projection: Tensor | None


class Attention(Protocol):
    """The function that every backend computes.

    query: w, a vector (C_key,) or a field (B, C_key, *size).
    norm_scale: g, (C_key,), or None if the query is w * g already.
    candidates: the h_k and their projections. Aligned candidates v_k have C_t channels.
    size: the spatial size of the target.
    key_channels: None if v_k is both key and value (C_key = C_t). Otherwise the first `key_channels` channels of v_k
        are the key and the others are the value.
    eps: of the norm.

    Returns out, (B, C_value, *size), in the dtype of the aligned candidates.
    """

    def __call__(
        self,
        query: Tensor,
        norm_scale: Tensor | None,
        candidates: Sequence[Candidate],
        size: Sequence[int],
        key_channels: int | None = None,
        eps: float = EPS,
    ) -> Tensor: ...


def attend_reference(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The formulas, line by line. For the arguments see `Attention`."""
    aligned = torch.stack([align(candidate.features, candidate.projection, size) for candidate in candidates])  # v_k
    keys, values = (aligned, aligned) if key_channels is None else aligned.tensor_split([key_channels], dim=2)
    with without_autocast(values):
        weights = attention_weights(query, norm_scale, keys, eps)  # a_k
        mixture = (weights.unsqueeze(2) * values.to(weights.dtype)).sum(dim=0)
    return mixture.to(values.dtype)


def attention_weights(query: Tensor, norm_scale: Tensor | None, keys: Tensor, eps: float = EPS) -> Tensor:
    """a_k(p) of a stack of keys before the norm: (K, B, C_key, *size) -> (K, B, *size), in float32 or float64."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    keys = keys * inverse_rms(keys.square().mean(dim=2, keepdim=True), eps)  # K_k / g
    query = scaled_query(query, norm_scale).to(keys.dtype)  # < w , K_k > = < w * g , K_k / g >
    scores = torch.einsum("c,kbc...->kb...", query, keys) if query.ndim == 1 else (query * keys).sum(dim=2)
    return scores.softmax(dim=0)


def inverse_rms(mean_square: Tensor, eps: float) -> Tensor:
    """1 / sqrt( mean_square + eps )"""
    if is_exporting():
        # The same function: PyTorch's ONNX exporter takes a summand of 1e-8 for zero and drops it.
        return torch.rsqrt(mean_square / eps + 1) / sqrt(eps)
    return torch.rsqrt(mean_square + eps)


def is_exporting() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace is recording a forward pass."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def scaled_query(query: Tensor, norm_scale: Tensor | None) -> Tensor:
    """w * g: only this product enters the attention."""
    if norm_scale is None:
        return query
    return query * norm_scale.view(-1, *(1,) * (query.ndim - 2)) if query.ndim > 1 else query * norm_scale


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for norms, scores and softmax: squares overflow float16 above 255."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()
