"""The Triton backend: a registered operator, its gradients, and the function around it."""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops.alignment import project
from nnunet_xattnres.ops.flops import interpolation_flops, register_flop_formula
from nnunet_xattnres.ops.interpolation import upsampling_factors
from nnunet_xattnres.ops.reference import EPS, Candidate, is_exporting, scaled_query
from nnunet_xattnres.ops.streaming import attend_streaming
from nnunet_xattnres.ops.triton_kernels import INTERPRETED, MAX_CHANNELS, MAX_ELEMENTS, mix, mix_gradients

# Written out, because older PyTorch cannot infer them from annotations with collections.abc.Sequence.
FORWARD_SCHEMA = "(Tensor query, Tensor[] sources, SymInt[] size, float eps) -> Tensor"
BACKWARD_SCHEMA = "(Tensor gradient, Tensor query, Tensor[] sources, float eps) -> (Tensor, Tensor[])"


def attend_triton(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference` in Triton kernels, which read projected candidates at their own resolutions.

    For the backward pass, the query and the projected candidates at their own resolutions are kept.

    `attend_streaming` takes over what the kernels do not compute: query fields and separate keys (block level), more
    than 512 channels, and 2^31 or more elements per batch item. It also takes over exports, because an exported graph
    must run without this package.

    Raises `XAttnResError` as `check_device` does, and for a candidate that is finer than the target.
    """
    if is_exporting():
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    check_device(query.device.type)
    beyond_stage_level = query.ndim > 1 or key_channels is not None
    if beyond_stage_level or len(query) > MAX_CHANNELS or _largest_offset(candidates, size) > MAX_ELEMENTS:
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    for candidate in candidates:
        upsampling_factors(candidate.features.shape[2:], size)
    sources = [project(candidate.features, candidate.projection) for candidate in candidates]
    dtype = reduce(torch.promote_types, [source.dtype for source in sources])
    return attend_upsampled(scaled_query(query, norm_scale), [source.to(dtype) for source in sources], size, eps)


def check_device(device: str) -> None:
    """Raise `XAttnResError` for a device that Triton has no kernels for, except under its interpreter."""
    if device in ("cpu", "mps") and not INTERPRETED:
        raise XAttnResError(f"the backend 'triton' needs CUDA, and the network is on {device}: use the backend 'auto'")


def _largest_offset(candidates: Sequence[Candidate], size: Sequence[int]) -> int:
    features, projection = candidates[0]
    channels = features.shape[1] if projection is None else len(projection)
    return max(channels, 2 * len(features)) * prod(size)


# `custom_op`, not `triton_op`: torch.compile must not look inside, because it may keep aligned sources for the backward
# pass. It could not trace kernels under Triton's interpreter either, and the tests run those.
@torch.library.custom_op("nnunet_xattnres::attend_upsampled", mutates_args=(), schema=FORWARD_SCHEMA)
def attend_upsampled(query: Tensor, sources: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    """The attention over `sources`, (B, C, *source_size) and of one dtype, each upsampled to `size`.

    query: w * g, (C,). All arithmetic is in float32, or in float64 where an argument is, with or without autocast.
    """
    return mix(query.contiguous(), [source.contiguous() for source in sources], size, eps)


@torch.library.custom_op("nnunet_xattnres::attend_upsampled_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def attend_upsampled_backward(
    gradient: Tensor, query: Tensor, sources: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of `attend_upsampled` with respect to query and sources."""
    return mix_gradients(gradient.contiguous(), query.contiguous(), [source.contiguous() for source in sources], eps)


@attend_upsampled.register_fake
def _(query: Tensor, sources: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    return sources[0].new_empty(*sources[0].shape[:2], *size)


@attend_upsampled_backward.register_fake
def _(gradient: Tensor, query: Tensor, sources: Sequence[Tensor], eps: float) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), [
        torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[int], float], output: Tensor) -> None:
    query, sources, _, ctx.eps = inputs
    ctx.save_for_backward(query, *sources)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[Tensor], None, None]:
    query, *sources = ctx.saved_tensors
    query_gradient, source_gradients = attend_upsampled_backward(gradient, query, sources, ctx.eps)
    return query_gradient, source_gradients, None, None


attend_upsampled.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_upsampled)
def _flops(query: Sequence[int], sources: Sequence[Sequence[int]], size: Sequence[int], eps: float, **_: object) -> int:
    return interpolation_flops(sources, query[0], size)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_upsampled_backward)
def _backward_flops(
    gradient: Sequence[int], query: Sequence[int], sources: Sequence[Sequence[int]], eps: float, **_: object
) -> int:
    # The sources are interpolated again, and then their gradients.
    return 2 * interpolation_flops(sources, query[0], gradient[2:])
