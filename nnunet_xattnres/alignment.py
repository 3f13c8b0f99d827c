"""Spatial alignment and channel projection: v = Proj(Resize(h)).

A source is finer or equal, or coarser or equal, than its target along all spatial axes at once, by integer
factors (products of nnU-Net's strides). Resize is linear interpolation (align_corners=False) towards finer
resolutions and the area average towards coarser ones; Proj is a 1x1 convolution without bias. They commute, so the
cheaper one always goes first.

Shapes: features (B, C_k, *source_size), projection (C_t, C_k) or None for the identity, aligned (B, C_t, *size);
sizes have two or three axes.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_xattnres.errors import XAttnResError


def is_finer(source_size: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a source of `source_size` must be averaged down to `size`; False if it is equal or coarser.

    Raises `XAttnResError` where no integer factors lead from one to the other.
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
    return torch.einsum("tk,bk...->bt...", projection, features)


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize: (bi/tri)linear up, area average down. (B, C, *source_size) -> (B, C, *size)"""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    if is_finer(features.shape[2:], size):
        return _average(features, size)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(features, size=tuple(size), mode=mode, align_corners=False)


def align(features: Tensor, projection: Tensor | None, size: Sequence[int]) -> Tensor:
    """v = Proj(Resize(h)), the cheaper one first."""
    if is_finer(features.shape[2:], size):
        return project(resize(features, size), projection)
    return resize(project(features, projection), size)


def _average(features: Tensor, size: Sequence[int]) -> Tensor:
    factors = [source // target for source, target in zip(features.shape[2:], size, strict=True)]
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    return pool(features, kernel_size=factors)


class Slab(NamedTuple):
    """A part of a target that is computed at once: some batch items, some rows (of the first spatial axis)."""

    items: slice
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor (B, C, *size)."""
        return tensor[self.items, :, self.rows]


def slabs(batch_size: int, size: Sequence[int], max_positions: int) -> Iterator[Slab]:
    """Cut a target into slabs of about `max_positions` positions: whole batch items if they fit, else rows of one."""
    items = max(1, max_positions // prod(size))
    rows = min(size[0], max(1, max_positions // prod(size[1:])))
    for item in range(0, batch_size, items):
        for row in range(0, size[0], rows):
            yield Slab(slice(item, min(item + items, batch_size)), slice(row, min(row + rows, size[0])))


class SlabAlignment:
    """`align` for one slab of the target at a time, and its adjoint, which accumulates the gradients.

    Resizing by integer factors is a small banded matrix per axis, so aligning is a chain of matrix products, and the
    adjoint is the chain of their transposes: exact and deterministic. `dtype` is that of all arithmetic.
    """

    def __init__(self, features: Tensor, projection: Tensor | None, size: Sequence[int], dtype: torch.dtype) -> None:
        self.features = features
        self.projection = None if projection is None else projection.to(dtype)
        self.dtype = dtype
        self.aligned_channels = features.shape[1] if projection is None else projection.shape[0]
        self.source_size = features.shape[2:]
        self.finer = is_finer(self.source_size, size)
        self.row_factor = max(size[0], self.source_size[0]) // min(size[0], self.source_size[0])
        self.matrices = [
            None if source == target else _resize_matrix(source, target, dtype, features.device)
            for source, target in zip(self.source_size, size, strict=True)
        ]

    def align(self, slab: Slab) -> Tensor:
        """(B, C_t, *size) restricted to `slab`."""
        features = self._source_slab(slab).of(self.features).to(self.dtype)
        if self.finer:
            return project(self._resize(features, slab), self.projection)
        return self._resize(project(features, self.projection), slab)

    def start_gradients(self) -> None:
        self.features_gradient = torch.zeros_like(self.features, dtype=self.dtype)
        self.projection_gradient = None if self.projection is None else torch.zeros_like(self.projection)

    def accumulate_gradients(self, slab: Slab, gradient: Tensor) -> None:
        """Add what a gradient with respect to the aligned slab contributes to features and projection."""
        source_slab = self._source_slab(slab)
        features = source_slab.of(self.features).to(self.dtype)
        if self.finer:
            self._accumulate_projection_gradient(gradient, self._resize(features, slab))
            gradient = self._resize_adjoint(self._project_adjoint(gradient), slab)
        else:
            gradient = self._resize_adjoint(gradient, slab)
            self._accumulate_projection_gradient(gradient, features)
            gradient = self._project_adjoint(gradient)
        source_slab.of(self.features_gradient).add_(gradient)

    def _source_slab(self, slab: Slab) -> Slab:
        """The part of the source that a slab of the target is computed from."""
        start, stop, factor = slab.rows.start, slab.rows.stop, self.row_factor
        if factor == 1:
            return slab
        if self.finer:
            return Slab(slab.items, slice(start * factor, stop * factor))
        # Target row r lies at source row (r + 1/2) / factor - 1/2, between the two source rows that it mixes.
        first = (2 * start + 1 - factor) // (2 * factor)
        last = (2 * stop - 1 - factor) // (2 * factor) + 1
        return Slab(slab.items, slice(max(first, 0), min(last + 1, self.source_size[0])))

    def _slab_matrices(self, slab: Slab) -> list[Tensor | None]:
        rows, *others = self.matrices
        if rows is not None:
            rows = rows[slab.rows, self._source_slab(slab).rows]
        return [rows, *others]

    def _resize(self, features: Tensor, slab: Slab) -> Tensor:
        return _apply_per_axis(self._slab_matrices(slab), features, last_axis_first=self.finer)

    def _resize_adjoint(self, gradient: Tensor, slab: Slab) -> Tensor:
        transposed = [None if matrix is None else matrix.T for matrix in self._slab_matrices(slab)]
        return _apply_per_axis(transposed, gradient, last_axis_first=not self.finer)

    def _project_adjoint(self, gradient: Tensor) -> Tensor:
        return project(gradient, None if self.projection is None else self.projection.T)

    def _accumulate_projection_gradient(self, gradient: Tensor, projected_from: Tensor) -> None:
        if self.projection_gradient is not None:
            self.projection_gradient += torch.einsum("bt...,bk...->tk", gradient, projected_from)


def _resize_matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (target, source) of Resize along one axis: its columns are the resized unit vectors."""
    units = torch.eye(source, dtype=dtype, device=device)[:, None]
    if source > target:
        return F.avg_pool1d(units, source // target)[:, 0].T.contiguous()
    return F.interpolate(units, size=target, mode="linear", align_corners=False)[:, 0].T.contiguous()


def _apply_per_axis(matrices: Sequence[Tensor | None], features: Tensor, last_axis_first: bool) -> Tensor:
    """Multiply every spatial axis of features (B, C, *size) by its matrix, in the order in which less is computed."""
    axes = list(enumerate(matrices, start=2))
    for axis, matrix in reversed(axes) if last_axis_first else axes:
        if matrix is None:
            continue
        if axis == features.ndim - 1:
            features = features @ matrix.T
        else:
            shape = features.shape
            resized = matrix @ features.reshape(prod(shape[:axis]), shape[axis], -1)
            features = resized.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return features
