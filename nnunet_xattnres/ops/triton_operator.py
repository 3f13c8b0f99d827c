"""The Triton backend: a registered operator, its gradients, and the function around it."""

from collections.abc import Sequence
from functools import cache, reduce
from math import prod
from typing import Any

import torch
import triton
from packaging.version import Version
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops.alignment import project
from nnunet_xattnres.ops.context import is_exporting, log_fallback
from nnunet_xattnres.ops.flops import interpolation_flops, register_flop_formula
from nnunet_xattnres.ops.interpolation import upsampling_factors
from nnunet_xattnres.ops.reference import EPS, Candidate, Upsampled, computed, scaled_query
from nnunet_xattnres.ops.streaming import attend_streaming
from nnunet_xattnres.ops.triton_kernels import INTERPRETED, MAX_CHANNELS, MAX_ELEMENTS, mix, mix_gradients

Shape = Sequence[int]

# Written out, because older PyTorch cannot infer them from annotations with collections.abc.Sequence.
FORWARD_SCHEMA = "(Tensor query, Tensor[] coarse, Tensor[] fine, SymInt[] size, float eps) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor query, Tensor[] coarse, Tensor[] fine, float eps) -> (Tensor, Tensor[], Tensor[])"
)
# "NVIDIA GPUs (Compute Capability 8.0+)", https://github.com/triton-lang/triton#compatibility. What PyTorch calls the
# capability of an AMD GPU is higher.
OLDEST_CAPABILITY = (8, 0)
# Earlier ones have no matrix products of few channels, nor in double precision.
OLDEST_TRITON = "3.5"


def attend_triton(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference` in Triton kernels, which read projected candidates at their own resolutions.

    For the backward pass, the query and the projected candidates at their own resolutions are kept.

    `attend_streaming` takes over where the kernels cannot run, see `check_device`, and what they do not
    compute: query fields and separate keys (block level), more than 512 channels, and 2^31 or more elements per batch
    item. It says so once in the log. It also takes over exports, because an exported graph must run without this
    package.

    Raises `XAttnResError` for a candidate that is finer than the target.
    """
    if is_exporting():
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    if problem := _why_not(query.device.type) or _beyond_kernels(query, size, key_channels):
        log_fallback(problem)
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    coarse, fine = [], []
    for features, projection, _ in computed(candidates):
        if any(factor > 1 for factor in upsampling_factors(features.shape[2:], size)):
            coarse.append(_project_channels_last(features, projection))
        else:
            fine.append(project(features, projection))
    dtype = reduce(torch.promote_types, [source.dtype for source in (*coarse, *fine)])
    coarse, fine = ([source.to(dtype) for source in sources] for sources in (coarse, fine))
    return attend_upsampled(scaled_query(query, norm_scale), coarse, fine, size, eps)


def _project_channels_last(features: Tensor, projection: Tensor | None) -> Tensor:
    """(B, C_k, *source_size) -> (B, *source_size, C_t), as the matrix product comes out."""
    voxels = features.flatten(2).mT
    if projection is not None:
        voxels = torch.bmm(voxels, projection.T.expand(len(features), -1, -1))
    return voxels.unflatten(1, features.shape[2:])


def check_device(device: str) -> None:
    """Raise `XAttnResError` for a device, by its type, that Triton has no kernels for, and for a Triton too old.

    Neither matters to Triton's interpreter. A GPU is the current one. Where there is none, PyTorch refuses the device
    itself.
    """
    if INTERPRETED:
        return
    if device in ("cpu", "mps"):
        raise XAttnResError(f"the backend 'triton' needs CUDA, and the network is on {device}: use the backend 'auto'")
    if _is_too_old(triton.__version__):
        raise XAttnResError(
            f"the backend 'triton' needs Triton {OLDEST_TRITON} (PyTorch 2.9), and {triton.__version__} is installed: "
            "update PyTorch, or use the backend 'auto'"
        )
    if device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST_CAPABILITY:
            needed, here = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
            raise XAttnResError(
                f"the backend 'triton' needs a GPU of compute capability {needed}, and {here} is that of this GPU: use "
                "the backend 'auto'"
            )


# Every call of the attention asks, and to read a version takes time.
@cache
def _is_too_old(version: str) -> bool:
    return Version(version) < Version(OLDEST_TRITON)


# A graph holds what is known when it is compiled.
@torch.compiler.assume_constant_result
def _why_not(device: str) -> str:
    """The message of `check_device`. Empty where the kernels can run."""
    try:
        check_device(device)
    except XAttnResError as error:
        return str(error)
    return ""


def _beyond_kernels(query: Tensor, size: Sequence[int], key_channels: int | None) -> str:
    beyond_stage_level = query.ndim > 1 or key_channels is not None
    if beyond_stage_level or len(query) > MAX_CHANNELS or len(query) * prod(size) > MAX_ELEMENTS:
        return f"the backend 'triton' computes the stage level, up to {MAX_CHANNELS} channels and 2^31 elements"
    return ""


# `custom_op`, not `triton_op`: torch.compile must not look inside, because it may keep aligned sources for the backward
# pass. It could not trace kernels under Triton's interpreter either, and the tests run those.
@torch.library.custom_op("nnunet_xattnres::attend_upsampled", mutates_args=(), schema=FORWARD_SCHEMA)
def attend_upsampled(
    query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], size: Sequence[int], eps: float
) -> Tensor:
    """The attention over sources of one dtype: `coarse` ones, each upsampled to `size`, and `fine` ones of that size.

    query: w * g, (C,). coarse: (B, *source_size, C). fine: (B, C, *size). All arithmetic is in float32, or in float64
    where an argument is, with or without autocast.
    """
    return mix(query.contiguous(), _contiguous(coarse), _contiguous(fine), size, eps)


@torch.library.custom_op("nnunet_xattnres::attend_upsampled_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def attend_upsampled_backward(
    gradient: Tensor, query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of `attend_upsampled` with respect to query and sources."""
    return mix_gradients(gradient.contiguous(), query.contiguous(), _contiguous(coarse), _contiguous(fine), eps)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


@attend_upsampled.register_fake
def _(query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    one = (*coarse, *fine)[0]
    return one.new_empty(one.shape[0], query.shape[0], *size)


@attend_upsampled_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    of_coarse, of_fine = ([source.new_empty(source.shape) for source in sources] for sources in (coarse, fine))
    return query.new_empty(query.shape), of_coarse, of_fine


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[int], float], output: Tensor
) -> None:
    query, coarse, fine, _, ctx.eps = inputs
    ctx.coarse = len(coarse)
    ctx.save_for_backward(query, *coarse, *fine)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], None, None]:
    query, *sources = ctx.saved_tensors
    coarse, fine = sources[: ctx.coarse], sources[ctx.coarse :]
    return *attend_upsampled_backward(gradient, query, coarse, fine, ctx.eps), None, None


attend_upsampled.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_upsampled)
def _flops(query: Shape, coarse: list[Shape], fine: list[Shape], size: Shape, eps: float, **_: object) -> int:
    return _interpolation_flops(coarse, size)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_upsampled_backward)
def _backward_flops(
    gradient: Shape, query: Shape, coarse: list[Shape], fine: list[Shape], eps: float, **_: object
) -> int:
    # The sources are interpolated again, and then their gradients.
    return 2 * _interpolation_flops(coarse, gradient[2:])


def _interpolation_flops(coarse: list[Shape], size: Shape) -> int:
    channels_first = [(batch_size, channels, *source_size) for batch_size, *source_size, channels in coarse]
    return sum(interpolation_flops([shape], shape[1], size) for shape in channels_first)
