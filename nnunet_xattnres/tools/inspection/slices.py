"""Slices of volumes, oriented as radiologists view them."""

from typing import Any

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.configuration import ANISO_THRESHOLD
from numpy.typing import NDArray

# In every plane, rows and columns run towards two of these directions: inferior, posterior, left.
DIRECTIONS = axcodes2ornt("IPL")
PLANES = ("axial", "coronal", "sagittal")


class Slice:
    """The slice of a case that pictures show.

    Axial and coronal slices show the patient's right on the left. Sagittal slices show the front on the left. Axial
    slices show the front at the top, the others the head.

    The slice is axial. If the voxels are so thick along one axis that nnU-Net calls the image anisotropic, it is in the
    plane of acquisition instead. The slice with the largest foreground is shown, or the middle one without foreground.

    foreground: nonzero where a label is predicted.
    name: the plane, and the voxel index (from zero) along the axis i, j or k of the file. Empty if there is one slice.
    spacing: of rows and columns in mm.
    """

    def __init__(self, foreground: nibabel.Nifti1Image) -> None:
        self._turn = ornt_transform(io_orientation(foreground.affine), DIRECTIONS)
        turned = self._turned(foreground)
        axes = self._turn[:, 0].astype(int)  # for every axis of the file, the axis of the turned volume
        spacing = np.empty(3)
        spacing[axes] = voxel_sizes(foreground.affine)
        thickness = np.where(np.equal(turned.shape, 1), np.inf, spacing)
        self._axis = int(thickness.argmax()) if thickness.max() > ANISO_THRESHOLD * thickness.min() else 0
        across = tuple(axis for axis in range(3) if axis != self._axis)
        areas = np.count_nonzero(turned, axis=across)
        self._index = int(areas.argmax()) if areas.any() else len(areas) // 2
        self.spacing = float(spacing[across[0]]), float(spacing[across[1]])
        file_axis = int(np.flatnonzero(axes == self._axis)[0])
        file_index = self._index if self._turn[file_axis, 1] > 0 else len(areas) - 1 - self._index
        self.name = f"{PLANES[self._axis]} slice, {'ijk'[file_axis]} = {file_index}" if len(areas) > 1 else ""

    def of(self, volume: nibabel.Nifti1Image) -> NDArray[Any]:
        """The slice of a volume in the geometry of `foreground`, [row, column]."""
        return self._turned(volume).take(self._index, axis=self._axis)

    def _turned(self, volume: nibabel.Nifti1Image) -> NDArray[Any]:
        return apply_orientation(np.atleast_3d(np.asarray(volume.dataobj)), self._turn)
