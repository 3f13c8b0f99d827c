"""Spatial alignment and channel projection: v = Proj(Resize(h)).

A source is finer than its target along all spatial axes or along none, by integer factors (products of nnU-Net's
strides). Resize is linear interpolation (align_corners=False) towards finer resolutions and the area average towards
coarser ones. Proj is a 1x1 convolution without bias. They commute, so the cheaper one goes first.

Shapes: features (B, C_k, *source_size), projection (C_t, C_k) or None for the identity, aligned (B, C_t, *size).
Sizes have two or three axes.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.ops.context import is_exporting, without_autocast


def is_finer(source_size: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a source of `source_size` is finer than `size`, so that Resize averages it. False if equal or coarser.

    Raises `XAttnResError` if one size is not an integer multiple of the other along every axis.
    """
    axes = list(zip(source_size, size, strict=True))
    if all(target % source == 0 for source, target in axes):
        return False
    if all(source % target == 0 for source, target in axes):
        return True
    raise XAttnResError(
        f"cannot align features of size {tuple(source_size)} to {tuple(size)}: one must be an integer multiple of "
        "the other along every axis; give the network an input whose size is divisible by its strides"
    )


def project(features: Tensor, projection: Tensor | None) -> Tensor:
    """Proj: a 1x1 convolution without bias. (B, C_k, *size) -> (B, C_t, *size)"""
    if projection is None:
        return features
    # As a batched matrix product: an einsum would keep a permuted copy of the features for the backward pass.
    projected = torch.bmm(projection.expand(features.shape[0], -1, -1), features.flatten(2))
    return projected.unflatten(2, features.shape[2:])


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize: (bi/tri)linear up, area average down. (B, C, *source_size) -> (B, C, *size)"""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    if is_finer(features.shape[2:], size):
        return _average(features, size)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(features, size=tuple(size), mode=mode, align_corners=False)


def averaged(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize towards `size` where the features are finer. Others are given as they are."""
    return resize(features, size) if is_finer(features.shape[2:], size) else features


def align(features: Tensor, projection: Tensor | None, size: Sequence[int]) -> Tensor:
    """v = Proj(Resize(h)), the cheaper operation first. (B, C_k, *source_size) -> (B, C_t, *size)"""
    if is_finer(features.shape[2:], size):
        return project(resize(features, size), projection)
    return resize(project(features, projection), size)


def _average(features: Tensor, size: Sequence[int]) -> Tensor:
    factors = [source // target for source, target in zip(features.shape[2:], size, strict=True)]
    if is_exporting():
        # An exported graph must run without this package.
        return _pool(features, factors)
    return _Average.apply(features, factors)


def _pool(features: Tensor, factors: Sequence[int]) -> Tensor:
    return (F.avg_pool2d if len(factors) == 2 else F.avg_pool3d)(features, kernel_size=list(factors))


@torch.library.custom_op(
    "nnunet_xattnres::average_on_cpu",
    mutates_args=(),
    schema="(Tensor features, SymInt[] factors) -> Tensor",
    device_types="cpu",
)
def average_on_cpu(features: Tensor, factors: Sequence[int]) -> Tensor:
    """The area average in compiled loops, which take a fifth of the time of PyTorch's in 2D, and half of it in 3D."""
    return native_library.average(features.contiguous(), factors)


@average_on_cpu.register_fake
def _(features: Tensor, factors: Sequence[int]) -> Tensor:
    sizes = [source // factor for source, factor in zip(features.shape[2:], factors, strict=True)]
    return features.new_empty(*features.shape[:2], *sizes)


class _Average(torch.autograd.Function):
    """The area average, of which nothing is kept for the backward pass.

    PyTorch's own keeps its input. Under autocast that may be a float32 copy.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, factors: Sequence[int]) -> Tensor:
        ctx.factors = factors
        # PyTorch averages three axes in half precision on GPUs only.
        on_cpu = features.device.type == "cpu"
        dtype = torch.promote_types(features.dtype, torch.float32) if on_cpu else features.dtype
        with without_autocast(features):
            given = features.to(dtype)
            if on_cpu and native_library.is_available():
                return average_on_cpu(given, factors).to(features.dtype)
            return _pool(given, factors).to(features.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        spread = F.interpolate(gradients[0] / prod(ctx.factors), scale_factor=ctx.factors, mode="nearest")
        return spread, None
