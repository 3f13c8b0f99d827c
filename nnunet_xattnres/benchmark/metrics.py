"""How good a predicted segmentation is: Dice, NSD and HD95 of two masks.

Normalised surface Dice (NSD) and the 95th percentile of the Hausdorff distance (HD95) are MONAI's, in the image's
spacing. Definitions, for a label or region of a case:

- Reference and prediction both empty: Dice, NSD and HD95 are undefined.
- One of them empty: Dice and NSD are 0, HD95 is infinite.
- NSD weights surface elements by their area, as DeepMind's surface-distance does. An element is right if it is at most
  the dataset's tolerance away from the other surface.
- HD95 is the larger of both directions' 95th percentiles over boundary voxels.
"""

from dataclasses import dataclass
from math import inf, nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metrics:
    """Metrics of a label of a case. dice, nsd: 0 to 1. hd95: in mm. NaN if undefined."""

    dice: float
    nsd: float
    hd95: float
    reference_voxels: int
    predicted_voxels: int


def measure(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...], tolerance: float
) -> Metrics:
    """Compare two masks of the same two- or three-dimensional shape.

    spacing: of every axis, in mm. tolerance: largest distance of right surface elements, in mm.
    """
    voxels = int(reference.sum()), int(prediction.sum())
    if not any(voxels):
        return Metrics(nan, nan, nan, *voxels)
    if not all(voxels):
        return Metrics(0.0, 0.0, inf, *voxels)
    dice = 2 * int((reference & prediction).sum()) / sum(voxels)
    return Metrics(dice, *_surface_metrics(reference, prediction, spacing, tolerance), *voxels)


def _surface_metrics(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...], tolerance: float
) -> tuple[float, float]:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    masks = {
        "y_pred": torch.from_numpy(prediction)[None, None],
        "y": torch.from_numpy(reference)[None, None],
    }
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    nsd = compute_surface_dice(**masks, class_thresholds=[tolerance], use_subvoxels=True, **options)
    hd95 = compute_hausdorff_distance(**masks, percentile=95, **options)
    return nsd.item(), hd95.item()
