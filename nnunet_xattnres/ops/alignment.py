"""Spatial alignment and channel projection: v = Proj(Resize(h)).

A source is finer than its target along all spatial axes or along none, by integer factors (products of nnU-Net's
strides). Resize is linear interpolation (align_corners=False) towards finer resolutions and the area average towards
coarser ones. Proj is a 1x1 convolution without bias. They commute, so the cheaper one goes first.

Shapes: features (B, C_k, *source_size), projection (C_t, C_k) or None for the identity, aligned (B, C_t, *size).
Sizes have two or three axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_xattnres.common.errors import XAttnResError


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


def align(features: Tensor, projection: Tensor | None, size: Sequence[int]) -> Tensor:
    """v = Proj(Resize(h)), the cheaper operation first. (B, C_k, *source_size) -> (B, C_t, *size)"""
    if is_finer(features.shape[2:], size):
        return project(resize(features, size), projection)
    return resize(project(features, projection), size)


def _average(features: Tensor, size: Sequence[int]) -> Tensor:
    factors = [source // target for source, target in zip(features.shape[2:], size, strict=True)]
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    return pool(features, kernel_size=factors)
