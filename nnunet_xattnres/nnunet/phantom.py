"""A small 3D phantom dataset, for training without data and without a network connection.

Every case shows a body with a bright rim and texture inside, a bent organ of two parts (head and tail, the labels),
and structures that have the organ's brightness but not its shape. A bias field and noise are added. Pose, size, bend,
warp and contrast vary from case to case.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

MEDIAN_SHAPE = (40, 56, 40)
SPACING = (1.2, 1.0, 1.0)
LABELS = {"background": 0, "head": 1, "tail": 2}

Volume = NDArray[np.floating]
Points = NDArray[np.floating]


@dataclass(frozen=True)
class Tube:
    """A structure along a centre line: its points in mm [n, 3], and the radius in mm at each point [n]."""

    centre_line: Points
    radius: NDArray[np.floating]

    def covers(self, points: Points) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
        """Whether each point [m, 3] lies inside, and its position along the centre line from 0 to 1 [m]."""
        distance, nearest = cKDTree(self.centre_line).query(points)
        return distance < self.radius[nearest], nearest / (len(self.radius) - 1)


def write_phantom_dataset(folder: Path, num_cases: int, seed: int) -> None:
    """Write `num_cases` phantom cases (about 40 x 56 x 40 voxels of 1.2 x 1 x 1 mm) in nnU-Net's raw format.

    A case depends only on `seed` and its own number, not on `num_cases`.
    """
    images, labels = folder / "imagesTr", folder / "labelsTr"
    images.mkdir(parents=True)
    labels.mkdir()
    for number in range(num_cases):
        image, segmentation = phantom_case(np.random.default_rng([seed, number]))
        _write_nifti(image.astype(np.float32), images / f"phantom_{number:03d}_0000.nii.gz")
        _write_nifti(segmentation, labels / f"phantom_{number:03d}.nii.gz")
    generate_dataset_json(
        str(folder),
        channel_names={0: "phantom"},
        labels=dict(LABELS),
        num_training_cases=num_cases,
        file_ending=".nii.gz",
        dataset_name="Phantom",
        description=f"Synthetic shapes, seed {seed}",
        license="CC0",
        converted_by="nnunet-xattnres",
    )


def phantom_case(rng: np.random.Generator) -> tuple[Volume, NDArray[np.uint8]]:
    """Draw one case: the image and its labels, both [z, y, x]."""
    shape = tuple(int(size + rng.integers(-4, 5)) for size in MEDIAN_SHAPE)
    points = _warped_positions(shape, rng)
    body_radius = np.array([21.0, 25.0, 18.0]) * rng.uniform(0.9, 1.05, 3)
    depth = 1 - np.linalg.norm(points / body_radius, axis=-1)  # 0 on the surface, 1 in the centre
    tissue = 0.35 + 0.05 * _smooth_field(shape, 2.0, rng)
    image = np.where(depth > 0, tissue, 0.02)
    image = np.where((depth > 0) & (depth < rng.uniform(0.08, 0.16)), 0.9, image)

    organ_brightness = rng.uniform(0.6, 0.7)
    for _ in range(rng.integers(2, 4)):
        inside, _ = _distractor(rng).covers(points)
        image = np.where(inside & (depth > 0.16), organ_brightness + rng.uniform(-0.05, 0.05), image)
    inside, along = _organ(rng).covers(points)
    segmentation = np.where(inside, np.where(along < rng.uniform(0.4, 0.5), 1, 2), 0)
    # nnU-Net mirrors patches: only brightness can tell the two ends of the organ apart.
    image = np.where(segmentation == 1, organ_brightness + 0.12, image)
    image = np.where(segmentation == 2, organ_brightness - 0.08, image)

    image = gaussian_filter(image, 0.6)  # partial volume
    image = image * np.exp(0.25 * _smooth_field(shape, 14.0, rng))  # bias field
    image = image + rng.normal(0, rng.uniform(0.03, 0.05), shape)
    return 1000 * image, segmentation.astype(np.uint8)


def _warped_positions(shape: tuple[int, ...], rng: np.random.Generator) -> Points:
    """The position of every voxel in the upright body, in mm from its centre [*shape, 3]: pose, size, a smooth warp."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    positions = (grid - (np.array(shape) - 1) / 2) * SPACING + rng.uniform(-2.5, 2.5, 3)
    pose = Rotation.from_euler("zyx", rng.uniform(-20, 20, 3), degrees=True)
    positions = pose.apply(positions.reshape(-1, 3)).reshape(*shape, 3) / rng.uniform(0.88, 1.12)
    return positions + 1.5 * np.stack([_smooth_field(shape, 6.0, rng) for _ in range(3)], axis=-1)


def _organ(rng: np.random.Generator) -> Tube:
    """A bent tube that tapers from a thick head to a thin tail. It lies on the same side of the body in every case."""
    along = np.linspace(0, 1, 100)
    angle = np.pi * rng.uniform(0.75, 1.0) * (along - 0.5)
    bend = rng.uniform(9.0, 11.0)
    centre_line = np.stack(
        [
            rng.uniform(3.0, 5.0) * np.sin(np.pi * along) - 2.0,
            1.25 * bend * np.sin(angle),
            bend * np.cos(angle) - rng.uniform(8.0, 10.0),
        ],
        axis=-1,
    )
    radius = rng.uniform(4.0, 5.0) * (1 - along) + rng.uniform(2.2, 2.8) * along
    return Tube(centre_line + rng.uniform(-2.0, 2.0, 3), radius)


def _distractor(rng: np.random.Generator) -> Tube:
    """A straight vessel or a short lump, at a random place in the body and in a random direction."""
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    steps = np.linspace(-0.5, 0.5, 50)[:, None] * rng.choice([3.0, 30.0])
    radius = rng.uniform(1.8, 4.0)
    return Tube(rng.uniform(-13, 13, 3) + steps * direction, np.full(len(steps), radius))


def _smooth_field(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> Volume:
    """Smooth random values [*shape] with zero mean and unit variance. sigma: of the smoothing, in voxels."""
    field = gaussian_filter(rng.normal(size=shape), sigma)
    return (field - field.mean()) / field.std()


def _write_nifti(array: NDArray[np.generic], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path))
