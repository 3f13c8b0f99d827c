"""Dice, NSD and HD95 of shapes whose distances are known."""

import math

import numpy as np
import pytest

from nnunet_xattnres.benchmark.metrics import measure
from nnunet_xattnres.nnunet.datasets import labels_or_regions


def ball(radius: float, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    centred = (np.arange(size) - size // 2 for size in shape)
    axes = np.meshgrid(*(places * step for places, step in zip(centred, spacing, strict=True)), indexing="ij")
    return sum(axis**2 for axis in axes) <= radius**2


def test_concentric_balls_in_an_anisotropic_image():
    spacing, shape = (2.5, 1.0, 0.8), (28, 70, 86)
    small, large = ball(20, spacing, shape), ball(26, spacing, shape)
    metrics = measure(small, large, spacing, 3.0)
    # 2 * 20^3 / (20^3 + 26^3); surfaces 6 mm apart.
    assert metrics.dice == pytest.approx(0.6255, abs=0.005)
    assert metrics.hd95 == pytest.approx(6, abs=1)
    assert metrics.nsd == 0
    assert measure(small, large, spacing, 8.0).nsd == 1
    assert measure(large, small, spacing, 3.0).hd95 == metrics.hd95


def test_a_box_moved_along_the_coarse_axis():
    reference, prediction = np.zeros((2, 30, 60, 60), bool)
    reference[5:15, 10:50, 10:50] = True
    prediction[7:17, 10:50, 10:50] = True
    spacing = (3.0, 1.0, 1.0)
    assert measure(reference, prediction, spacing, 6.0).nsd == 1
    metrics = measure(reference, prediction, spacing, 5.0)
    assert metrics.dice == pytest.approx(0.8)
    assert metrics.hd95 == pytest.approx(6)
    # Wrong of 2 * 8000 mm2: the end faces outside the other box, 40 mm x 40 mm, and of those inside it what is
    # more than 5 mm from its sides, 30 mm x 30 mm.
    assert metrics.nsd == pytest.approx(1 - 2 * (1600 + 900) / 16000, abs=0.03)


def test_squares_in_two_dimensions():
    reference, prediction = np.zeros((2, 50, 50), bool)
    reference[10:30, 10:30] = True
    prediction[10:30, 13:33] = True
    metrics = measure(reference, prediction, (1.0, 2.0), 1.0)
    assert metrics.dice == pytest.approx(0.85)
    assert metrics.hd95 == pytest.approx(6)
    assert 0 < metrics.nsd < 1
    assert measure(reference, prediction, (1.0, 2.0), 6.0).nsd == 1


def test_what_is_defined_of_empty_masks():
    nothing, something = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    both = measure(nothing, nothing, (1, 1, 1), 1.0)
    assert np.isnan([both.dice, both.nsd, both.hd95]).all()
    for reference, prediction in ((nothing, something), (something, nothing)):
        one = measure(reference, prediction, (1, 1, 1), 1.0)
        assert (one.dice, one.nsd, one.hd95) == (0.0, 0.0, math.inf)
    # A surface at the border of the image is one.
    whole = measure(something, something, (1, 1, 1), 0.0)
    assert (whole.dice, whole.nsd, whole.hd95) == (1.0, 1.0, 0.0)


def test_labels_and_regions():
    labels = {"background": 0, "whole": [1, 2], "core": [2], "rim": 1, "ignore": 3}
    assert labels_or_regions(labels) == {"whole": (1, 2), "core": (2,), "rim": (1,)}
