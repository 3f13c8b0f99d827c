"""Images for tests."""

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
from scipy.spatial.transform import Rotation

from nnunet_xattnres.nnunet.phantom import phantom_case


@cache
def phantom() -> np.ndarray:
    """[x, y, z], around the organ, about 32 x 40 x 20 voxels"""
    image, _ = phantom_case(np.random.default_rng([0, 0]))
    z, y, x = (extent // 2 for extent in image.shape)
    return image[z - 10 : z + 10, y - 20 : y + 20, x - 16 : x + 16].T.astype(np.float32)


def write_oblique_phantom(folder: Path, name: str = "case") -> Path:
    """A phantom in an oblique, flipped and anisotropic geometry, with a margin that nnU-Net crops."""
    data = np.pad(phantom()[:, :, ::2], ((3, 5), (0, 4), (2, 1)))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 100), degrees=True).as_matrix() @ np.diag((-1.1, 0.9, 2.4))
    affine[:3, 3] = (12.5, -80.25, 33.0)
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, affine)
    image.header["cal_max"] = 500
    nibabel.save(image, folder / f"{name}_0000.nii.gz")
    return folder / f"{name}_0000.nii.gz"
