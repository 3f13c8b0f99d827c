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

# On a CPU, an axis of at least so many targets is interpolated in blocks of BLOCK. On two threads the attention took,
# forward and backward, 0.89 of its time with 64 x 192 x 192 targets and 0.86 with 20 x 320 x 256. The adjoint was
# slower in blocks than as one dense product.
MIN_TARGETS_IN_BLOCKS = 160
BLOCK = 32


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
    # An einsum would keep a copy of the features, their axes in another order, for the backward pass.
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


def average_if_finer(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize where it goes down: (B, C, *source_size) -> (B, C, *size), or the features themselves."""
    return _average(features, size) if is_finer(features.shape[2:], size) else features


def align(features: Tensor, projection: Tensor | None, size: Sequence[int]) -> Tensor:
    """v = Proj(Resize(h)), the cheaper one first."""
    return resize(project(average_if_finer(features, size), projection), size)


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
    """A candidate aligned to one slab of the target at a time, and the adjoint, which accumulates the gradients.

    Linear interpolation by integer factors is a banded matrix W per axis, so that aligning is a chain of matrix
    products and the adjoint the chain of their transposes: exact and deterministic. `partial` leaves the last axis at
    the source's resolution, because what the attention needs of v(x) = sum_i W[x, i] u_i can be had from the u_i, at
    a fraction of the positions:

        < w , v(x) >  = sum_i W[x, i] < w , u_i >
        | v(x) |^2    = sum_i W[x, i]^2 |u_i|^2 + 2 W[x, i] W[x, i+1] < u_i , u_(i+1) >

    for W is banded: a position lies between two neighbours.

    features: (B, C_k, *source_size), nowhere finer than the target. projection: (C_t, C_k) or None for the identity.
    size: the target's. dtype: of all arithmetic. expand_last_axis: let `partial` expand the last axis too.
    """

    def __init__(
        self,
        features: Tensor,
        projection: Tensor | None,
        size: Sequence[int],
        dtype: torch.dtype,
        expand_last_axis: bool,
    ) -> None:
        self.features = features
        self.projection = None if projection is None else projection.to(dtype)
        self.dtype = dtype
        self.channels = features.shape[1] if projection is None else projection.shape[0]
        self.source_rows = features.shape[2]
        self.row_factor = size[0] // self.source_rows
        self.is_resized = tuple(features.shape[2:]) != tuple(size)
        # As a whole where slabs share source rows; else slab by slab, without holding another feature map.
        self.source = project(features.to(dtype), self.projection) if self.is_resized else features
        (source_rows, rows), *others = zip(features.shape[2:], size, strict=True)
        self.rows = None if source_rows == rows else _interpolation_matrix(source_rows, rows, self.source)
        self.others = [
            None if source == target else _interpolation(source, target, self.source) for source, target in others
        ]
        self.last = None if expand_last_axis else self.others.pop()
        if self.last is not None:
            last = self.last.adjoint.matrix.T
            self.last_of_products = torch.cat((last.square(), 2 * last[:, :-1] * last[:, 1:]), dim=1)

    def partial(self, slab: Slab) -> Tensor:
        """The u_i: aligned to the slab but for the last axis. (B, C_t, rows, ..., source's extent)"""
        source = self._source_slab(slab).of(self.source)
        if self.is_resized:
            for axis, interpolation in self._interpolations(slab):
                source = interpolation.forward.multiply(source, axis)
            return source
        return project(source.to(self.dtype), self.projection)

    def expand(self, partial: Tensor) -> Tensor:
        """The last axis of something linear in the u_i, interpolated."""
        return partial if self.last is None else self.last.forward.multiply(partial, partial.ndim - 1)

    def squared_norm(self, partial: Tensor) -> Tensor:
        """| v |^2 over channels: the u_i (B, C, ..., I) -> (B, ..., X)

        Exact to some roundings of max |u_i|^2, not of | v |^2: where neighbours are nearly opposite in all channels,
        what lies between them is a small difference of large numbers, and below about 1e-6 max |u_i|^2 (in float32)
        the result is noise of that size, or 0.
        """
        if self.last is None:
            return dot(partial, partial)
        products = torch.cat((dot(partial, partial), dot(partial[..., :-1], partial[..., 1:])), dim=-1)
        # Rounding can make a vanishing norm negative.
        return (products @ self.last_of_products.T).clamp_(min=0)

    def start_gradients(self, of_features: bool, of_projection: bool) -> None:
        """Say which gradients are wanted; the others are not computed."""
        self.source_gradient: Tensor | None = None
        self.projection_gradient: Tensor | None = None
        self.has_gradients = of_features or of_projection
        self.has_features_gradient = of_features
        if of_features or (of_projection and self.is_resized):
            # Slabs share no rows of an unresized source. In its own precision, then: no sum can round.
            allocate = torch.zeros_like if self.is_resized else torch.empty_like
            self.source_gradient = allocate(self.source)
        if of_projection and self.projection is not None:
            self.projection_gradient = torch.zeros_like(self.projection)

    def expand_adjoint(self, gradient: Tensor) -> Tensor:
        return gradient if self.last is None else self.last.adjoint.multiply(gradient, gradient.ndim - 1)

    def add_squared_norm_adjoint(self, gradient: Tensor, partial: Tensor, partial_gradient: Tensor) -> None:
        """Add to the gradient of the u_i what a gradient (B, ..., X) of `squared_norm` contributes."""
        if self.last is None:
            partial_gradient.addcmul_(partial, gradient.unsqueeze(1), value=2)
            return
        extent = partial.shape[-1]
        own, of_neighbours = (gradient @ self.last_of_products).unsqueeze(1).tensor_split([extent], dim=-1)
        partial_gradient.addcmul_(partial, own, value=2)
        partial_gradient[..., :-1].addcmul_(partial[..., 1:], of_neighbours)
        partial_gradient[..., 1:].addcmul_(partial[..., :-1], of_neighbours)

    def accumulate_gradients(self, slab: Slab, gradient: Tensor) -> None:
        """Take in the gradient of `partial`."""
        source_slab = self._source_slab(slab)
        if self.is_resized:
            for axis, interpolation in reversed(self._interpolations(slab)):
                gradient = interpolation.adjoint.multiply(gradient, axis)
            of_slab: Tensor | None = gradient
        else:
            of_slab = self._project_adjoint(gradient, source_slab.of(self.features))
        if of_slab is not None and self.source_gradient is not None:
            sum_of_slabs = source_slab.of(self.source_gradient)
            sum_of_slabs.add_(of_slab) if self.is_resized else sum_of_slabs.copy_(of_slab)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of features and projection, after all slabs."""
        if self.is_resized and self.source_gradient is not None:
            return self._project_adjoint(self.source_gradient, self.features), self.projection_gradient
        return self.source_gradient, self.projection_gradient

    def _source_slab(self, slab: Slab) -> Slab:
        """The part of the source that a slab of the target is computed from."""
        if self.row_factor == 1:
            return slab
        # Target row r lies at source row (r + 1/2) / factor - 1/2, between the two source rows that it mixes.
        first = (2 * slab.rows.start + 1 - self.row_factor) // (2 * self.row_factor)
        last = (2 * slab.rows.stop - 1 - self.row_factor) // (2 * self.row_factor) + 1
        return Slab(slab.items, slice(max(first, 0), min(last + 1, self.source_rows)))

    def _interpolations(self, slab: Slab) -> list[tuple[int, "Interpolation"]]:
        """What `partial` does to a slab, axis by axis."""
        rows = None if self.rows is None else _dense(self.rows[slab.rows, self._source_slab(slab).rows])
        return [(axis, each) for axis, each in enumerate([rows, *self.others], start=2) if each is not None]

    def _project_adjoint(self, gradient: Tensor, projected_from: Tensor) -> Tensor | None:
        """Take in the projection's gradient and return that of the features, if wanted."""
        if self.projection_gradient is not None:
            projected_from = projected_from.to(self.dtype).flatten(2)
            self.projection_gradient += (gradient.flatten(2) @ projected_from.mT).sum(dim=0)
        if not self.has_features_gradient:
            return None
        return project(gradient, None if self.projection is None else self.projection.T)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """< a , b > over channels: (B, C, *size) twice -> (B, *size)"""
    return (a * b).sum(dim=1)


class AxisMatrix(NamedTuple):
    """Multiplies an axis by a matrix; by a banded one block by block, for all its blocks are alike.

    matrix: (outputs, inputs). in_blocks: it is one block's, and its columns are the block's own inputs and one
    neighbour on either side; beyond the ends of the axis the outermost input is repeated.
    """

    matrix: Tensor
    in_blocks: bool = False

    def multiply(self, features: Tensor, axis: int) -> Tensor:
        if self.in_blocks:
            seen = self.matrix.shape[1]
            own = seen - 2
            blocks = _with_repeated_ends(features, axis).unfold(axis, seen, own).movedim(-1, axis + 1)
        else:
            blocks = features.unsqueeze(axis)
        if axis == features.ndim - 1:
            # As one flat product: PyTorch would multiply overlapping blocks one by one.
            product = blocks.reshape(-1, blocks.shape[-1]) @ self.matrix.T
            return product.reshape(*features.shape[:-1], -1)
        product = self.matrix @ blocks.flatten(axis + 2)
        return product.reshape(*features.shape[:axis], -1, *features.shape[axis + 1 :])


class Interpolation(NamedTuple):
    """Resize along one axis, towards the finer, and its adjoint."""

    forward: AxisMatrix
    adjoint: AxisMatrix


def _interpolation(source: int, target: int, like: Tensor) -> Interpolation:
    """In blocks where that is faster: a target depends on two sources, however many there are."""
    dense = _dense(_interpolation_matrix(source, target, like))
    factor = target // source
    in_blocks = like.device.type == "cpu" and target >= MIN_TARGETS_IN_BLOCKS
    if not in_blocks or target % BLOCK or BLOCK % factor:
        return dense
    # Of a block's sources and the one on either side.
    seen = BLOCK // factor + 2
    matrix = _interpolation_matrix(seen, seen * factor, like)[factor:-factor]
    return dense._replace(forward=AxisMatrix(matrix, in_blocks=True))


def _dense(matrix: Tensor) -> Interpolation:
    return Interpolation(AxisMatrix(matrix), AxisMatrix(matrix.T))


def _interpolation_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of Resize along one axis: its columns are the resized unit vectors."""
    units = torch.eye(source, dtype=like.dtype, device=like.device)[:, None]
    return F.interpolate(units, size=target, mode="linear", align_corners=False)[:, 0].T.contiguous()


def _with_repeated_ends(features: Tensor, axis: int) -> Tensor:
    """An axis with its first and last position twice, as linear interpolation sees it."""
    last = features.shape[axis] - 1
    return torch.cat((features.narrow(axis, 0, 1), features, features.narrow(axis, last, 1)), dim=axis)
