"""The Triton backend: one registered operator, its gradients, and the function around it."""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from nnunet_xattnres.alignment import average_if_finer, project
from nnunet_xattnres.attention import EPS, Candidate, attend_streaming, is_exporting, scaled
from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.kernels.triton_attention import INTERPRETED, MAX_CHANNELS, MAX_NUMBERS, mix, mix_gradients


def attend_triton(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference`, in Triton kernels that read projected candidates at their own resolutions.

    Kept for the backward pass are the query and the projected candidates, coarser ones at their own resolution.
    What the kernels do not compute, `attend_streaming` does: query fields and keys apart from values (block level),
    more than 512 channels, and feature maps of 2^31 numbers a batch item. So it does in an exported graph, which is to
    run without this package.

    Raises `XAttnResError` where `check_device` does.
    """
    if is_exporting():
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    check_device(query.device.type)
    beyond_stage_level = query.ndim > 1 or key_channels is not None
    if beyond_stage_level or len(query) > MAX_CHANNELS or _largest_offset(candidates, size) > MAX_NUMBERS:
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    sources = [_projected(candidate, size) for candidate in candidates]
    dtype = reduce(torch.promote_types, [source.dtype for source in sources])
    return attend_upsampled(scaled(query, norm_scale), [source.to(dtype) for source in sources], size, eps)


def check_device(device: str) -> None:
    """Raise `XAttnResError` on a CPU, except under Triton's interpreter."""
    if device == "cpu" and not INTERPRETED:
        raise XAttnResError("the backend 'triton' needs a GPU, and the network is on the CPU: use the backend 'auto'")


def _largest_offset(candidates: Sequence[Candidate], size: Sequence[int]) -> int:
    features, projection = candidates[0]
    channels = features.shape[1] if projection is None else len(projection)
    return max(channels, 2 * len(features)) * prod(size)


def _projected(candidate: Candidate, size: Sequence[int]) -> Tensor:
    """A candidate with the target's channels, at the target's resolution or at its own if that is coarser."""
    return project(average_if_finer(candidate.features, size), candidate.projection)


# `custom_op`, not `triton_op`: what torch.compile cannot look into, it cannot decide to keep aligned sources of for the
# backward pass, and a kernel under Triton's interpreter, which the tests need, cannot be traced at all.
@torch.library.custom_op("nnunet_xattnres::attend_upsampled", mutates_args=())
def attend_upsampled(query: Tensor, sources: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    """The attention over `sources`, (B, C, *source_size) and of one dtype, each upsampled to `size`.

    query: w * g, (C,). Arithmetic is in float32 (float64 where an argument is), with or without autocast.
    """
    return mix(query.contiguous(), [source.contiguous() for source in sources], size, eps)


@torch.library.custom_op("nnunet_xattnres::attend_upsampled_backward", mutates_args=())
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
