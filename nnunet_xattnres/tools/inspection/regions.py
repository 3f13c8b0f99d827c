"""Mean weights of the voxels of every predicted label, separately for its interior and its boundary."""

from collections.abc import Iterator, Mapping
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_xattnres.routing.recording import DECIMALS

PLACES = ("interior", "boundary")
FOREGROUND = slice(2, None)  # two places of the background come first

Volume = NDArray[np.floating]
LabelMap = NDArray[np.integer]


class Regions:
    """Sets of voxels over which weights are averaged: the interior and the boundary of every predicted label.

    A boundary voxel has a neighbour with another label. Only voxels inside the network's input count: nnU-Net crops an
    image to its nonzero part.

    prediction: label map [z, y, x]. inside: True where the network has seen the image. labels: the names of the values.
    voxels: the number of voxels by label and place. Empty sets are left out.
    """

    def __init__(self, prediction: LabelMap, inside: NDArray[np.bool_], labels: Mapping[int, str]) -> None:
        self._inside = inside
        self._index = 2 * prediction[inside].astype(np.intp) + on_boundary(prediction)[inside]
        self._counts = np.bincount(self._index, minlength=2)
        self._names = {value: labels.get(value, f"label {value}") for value in range((len(self._counts) + 1) // 2)}
        self.voxels: dict[str, dict[str, int]] = {}
        for region, label, place in self._regions():
            self.voxels.setdefault(label, {})[place] = int(self._counts[region])

    def means(self, weight_map: Volume) -> dict[str, dict[str, float]]:
        """The mean weight by label and place. Empty sets are left out."""
        sums = self._sums(weight_map)
        means: dict[str, dict[str, float]] = {}
        for region, label, place in self._regions():
            means.setdefault(label, {})[place] = round(float(sums[region] / self._counts[region]), DECIMALS)
        return means

    def foreground_mean(self, weight_map: Volume) -> float:
        """The mean weight over all predicted labels except the background. NaN where nothing else is predicted."""
        number = self._counts[FOREGROUND].sum()
        return float(self._sums(weight_map)[FOREGROUND].sum() / number) if number else nan

    def _sums(self, weight_map: Volume) -> NDArray[Any]:
        return np.bincount(self._index, weights=weight_map[self._inside], minlength=2)

    def _regions(self) -> Iterator[tuple[int, str, str]]:
        for region in np.flatnonzero(self._counts):
            yield int(region), self._names[int(region) // 2], PLACES[int(region) % 2]


def on_boundary(labels: LabelMap) -> NDArray[np.bool_]:
    """True for voxels that have a neighbour, along any axis, with another label."""
    boundary = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        differs = np.diff(labels.astype(np.int32), axis=axis) != 0
        before, after = [slice(None)] * labels.ndim, [slice(None)] * labels.ndim
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        boundary[tuple(before)] |= differs
        boundary[tuple(after)] |= differs
    return boundary
