"""Maps as NIfTI images that viewers lay over the image that they belong to."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform
from numpy.typing import NDArray


def as_nifti(volume: NDArray[Any], properties: dict[str, Any], image: Path) -> nibabel.Nifti1Image:
    """A volume [z, y, x] as a float32 NIfTI image in the geometry of `image`.

    properties: of `image`, from the reader of nnU-Net that also defines the axes of `volume`.
    """
    nifti = nibabel.Nifti1Image(volume.astype(np.float32, copy=False).T, _affine(properties))
    if not image.name.endswith((".nii", ".nii.gz")):
        return nifti
    original = nibabel.load(image)
    if _is_reoriented(properties):
        turned = ornt_transform(io_orientation(nifti.affine), io_orientation(original.affine))
        nifti = nifti.as_reoriented(turned)
    # The affine and the codes of its coordinate system are copied exactly. The display range is that of the image.
    header = original.header.copy()
    header.set_data_dtype(np.float32)
    header["cal_min"] = header["cal_max"] = 0
    return nibabel.Nifti1Image(np.asarray(nifti.dataobj).reshape(original.shape[:3]), original.affine, header)


def _is_reoriented(properties: dict[str, Any]) -> bool:
    return "reoriented_affine" in properties.get("nibabel_stuff", {}) or "original_orientation" in properties.get(
        "sitk_stuff", {}
    )


def _affine(properties: dict[str, Any]) -> NDArray[np.floating]:
    """From voxels [x, y, z] to the coordinates of NIfTI in mm."""
    if "nibabel_stuff" in properties:
        affines = properties["nibabel_stuff"]
        return affines.get("reoriented_affine", affines["original_affine"])
    affine = np.diag([*properties["spacing"][::-1], 1.0])
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        axes = len(geometry["spacing"])
        affine = np.eye(4)
        affine[:axes, :axes] = np.reshape(geometry["direction"], (axes, axes)) * geometry["spacing"]
        affine[:axes, 3] = geometry["origin"]
    # ITK's x and y axes point in the opposite direction. Viewers read formats without orientation with ITK.
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
