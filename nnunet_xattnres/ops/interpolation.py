"""Linear interpolation by integer factors, as a product with a banded matrix per axis."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops.context import is_exporting

# On a CPU, a target axis of at least MIN_EXTENT_FOR_BLOCKS voxels is interpolated in blocks of BLOCK voxels. On two
# threads, forward and backward pass of the attention then took 0.89 of the time for 64 x 192 x 192 voxels and 0.86 for
# 20 x 320 x 256. The adjoint was slower in blocks than as one dense product.
MIN_EXTENT_FOR_BLOCKS = 160
BLOCK = 32


class AxisMatrix(NamedTuple):
    """A matrix that multiplies one axis of a tensor, as a whole or block by block.

    matrix: (outputs, inputs), of the axis or of one block.
    in_blocks: whether the axis is cut into blocks, which all have the same matrix. The inputs of a block are its own
        voxels and one neighbour on either side. Beyond the ends of the axis, the outermost voxel is repeated.
    """

    matrix: Tensor
    in_blocks: bool = False

    def multiply(self, features: Tensor, axis: int) -> Tensor:
        if self.in_blocks:
            seen = self.matrix.shape[1]
            own = seen - 2
            blocks = _repeat_ends(features, axis).unfold(axis, seen, own).movedim(-1, axis + 1)
        else:
            blocks = features.unsqueeze(axis)
        if axis == features.ndim - 1:
            # As one product with a flat matrix: PyTorch would multiply overlapping blocks one by one.
            product = blocks.reshape(-1, blocks.shape[-1]) @ self.matrix.T
            return product.reshape(*features.shape[:-1], -1)
        product = self.matrix @ blocks.flatten(axis + 2)
        return product.reshape(*features.shape[:axis], -1, *features.shape[axis + 1 :])


class Interpolation(NamedTuple):
    """Linear interpolation of one axis, and its adjoint."""

    forward: AxisMatrix
    adjoint: AxisMatrix


def upsampling_factors(source_size: Sequence[int], size: Sequence[int]) -> list[int]:
    """The integer factors from `source_size` to `size`, axis by axis.

    Raises `XAttnResError` if the target is not an integer multiple along every axis.
    """
    axes = list(zip(source_size, size, strict=True))
    if any(target % source for source, target in axes):
        raise XAttnResError(
            f"cannot interpolate features of size {tuple(source_size)} to {tuple(size)}: average finer features first"
        )
    return [target // source for source, target in axes]


def axis_interpolation(source: int, target: int, like: Tensor) -> Interpolation:
    """From `source` voxels to `target` voxels, in blocks where that is faster. like: gives dtype and device."""
    dense = dense_interpolation(interpolation_matrix(source, target, like))
    factor = target // source
    in_blocks = like.device.type == "cpu" and target >= MIN_EXTENT_FOR_BLOCKS
    # The older ONNX exporter does not know overlapping blocks.
    if not in_blocks or is_exporting() or target % BLOCK or BLOCK % factor:
        return dense
    # The voxels of a block, and one neighbour on either side.
    seen = BLOCK // factor + 2
    matrix = interpolation_matrix(seen, seen * factor, like)[factor:-factor]
    return dense._replace(forward=AxisMatrix(matrix, in_blocks=True))


def dense_interpolation(matrix: Tensor) -> Interpolation:
    """matrix: (target, source)."""
    return Interpolation(AxisMatrix(matrix), AxisMatrix(matrix.T))


def interpolation_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of linear interpolation. Its columns are the interpolated unit vectors."""
    units = torch.eye(source, dtype=like.dtype, device=like.device)[:, None]
    return F.interpolate(units, size=target, mode="linear", align_corners=False)[:, 0].T.contiguous()


def _repeat_ends(features: Tensor, axis: int) -> Tensor:
    """Repeats the first and the last voxel of an axis, as linear interpolation does."""
    last = features.shape[axis] - 1
    return torch.cat((features.narrow(axis, 0, 1), features, features.narrow(axis, last, 1)), dim=axis)
