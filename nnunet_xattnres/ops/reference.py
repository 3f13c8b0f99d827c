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
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_xattnres.ops.alignment import align
from nnunet_xattnres.ops.context import is_exporting, without_autocast

EPS = 1e-6


class Candidate(NamedTuple):
    """What a target can read: features h_k (B, C_k, *source_size) and the projection (C_t, C_k) of its channels.

    The features are at the target's resolution or at a coarser one. Without a projection, C_k = C_t.

    averaged_from: what the features are the area average of, (B, C_k, *finer_size), or None. A backend can keep it for
        the backward pass in place of the features, which it then averages once more.
    """

    features: Tensor
    projection: Tensor | None
    averaged_from: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Upsampled:
    """The output of a transposed convolution whose steps are as long as its kernel: described, and not computed.

    It is one more candidate, at the target's resolution and without a projection. A backend can compute it once more in
    the backward pass, so that it need not be kept. It is no tuple, because PyTorch's hooks of modules take the tensors
    in a tuple for features.

    features: (B, C_in, *source_size). weight: (C_in, C_t, *steps). bias: (C_t,) or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def size(self) -> tuple[int, ...]:
        axes = zip(self.features.shape[2:], self.weight.shape[2:], strict=True)
        return tuple(extent * step for extent, step in axes)


def upsample(described: Upsampled) -> Tensor:
    """The output that is described: (B, C_t, *size)"""
    transposed_convolution = F.conv_transpose2d if described.features.ndim == 4 else F.conv_transpose3d
    steps = described.weight.shape[2:]
    return transposed_convolution(described.features, described.weight, described.bias, stride=steps)


def upsample_gradients(
    gradient: Tensor, features: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `upsample` with respect to features, weight and bias, where `wanted`."""
    axes = features.ndim - 2
    return torch.ops.aten.convolution_backward(
        gradient,
        features,
        weight,
        [weight.shape[1]],
        weight.shape[2:],
        padding=[0] * axes,
        dilation=[1] * axes,
        transposed=True,
        output_padding=[0] * axes,
        groups=1,
        output_mask=list(wanted),
    )


def computed(candidates: Sequence[Candidate | Upsampled]) -> list[Candidate]:
    """The candidates, those that are described computed."""
    return [Candidate(upsample(each), None) if isinstance(each, Upsampled) else each for each in candidates]


class Attention(Protocol):
    """The function that every backend computes.

    query: w, a vector (C_key,) or a field (B, C_key, *size).
    norm_scale: g, (C_key,), or None if the query is w * g already.
    candidates: the h_k and their projections. Aligned candidates v_k have C_t channels. The last one may be described
        as `Upsampled`.
    size: the spatial size of the target.
    key_channels: None if v_k is both key and value (C_key = C_t). Otherwise the first `key_channels` channels of v_k
        are the key and the others are the value.
    eps: of the norm.

    Returns out, (B, C_value, *size), in the dtype of the last candidate. It is computed in float32 or float64, so that
    in half precision it is finite wherever the mixture is within that precision's range.
    """

    def __call__(
        self,
        query: Tensor,
        norm_scale: Tensor | None,
        candidates: Sequence[Candidate | Upsampled],
        size: Sequence[int],
        key_channels: int | None = None,
        eps: float = EPS,
    ) -> Tensor: ...


def attend_reference(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The formulas, line by line. For the arguments see `Attention`."""
    candidates = computed(candidates)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Under autocast too. Squares overflow float16 above 255, and a v_k may exceed it where the mixture does not.
    with without_autocast(query):
        given = [(each.features.to(dtype), each.projection) for each in candidates]
        aligned = torch.stack([align(h, None if P is None else P.to(dtype), size) for h, P in given])  # v_k
        keys, values = (aligned, aligned) if key_channels is None else aligned.tensor_split([key_channels], dim=2)
        weights = attention_weights(query, norm_scale, keys, eps)  # a_k
        mixture = (weights.unsqueeze(2) * values).sum(dim=0)
    return mixture.to(candidates[-1].features.dtype)


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


def scaled_query(query: Tensor, norm_scale: Tensor | None) -> Tensor:
    """w * g: only this product enters the attention."""
    if norm_scale is None:
        return query
    return query * norm_scale.view(-1, *(1,) * (query.ndim - 2)) if query.ndim > 1 else query * norm_scale
