"""The phantom dataset: nnU-Net accepts it, and it needs a network rather than a threshold."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import gaussian_filter, label

from nnunet_xattnres.nnunet.phantom import LABELS, phantom_case, write_phantom_dataset


@pytest.fixture(scope="module")
def cases():
    return [phantom_case(np.random.default_rng([7, number])) for number in range(4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset900_Phantom"
    write_phantom_dataset(folder, num_cases=2, seed=7)
    return folder


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_nnunet_accepts_the_dataset(dataset):
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    assert dataset_json["labels"] == LABELS
    assert dataset_json["numTraining"] == 2
    images = sorted((dataset / "imagesTr").iterdir())
    references = sorted((dataset / "labelsTr").iterdir())
    assert len(images) == len(references) == 2
    for image, reference in zip(images, references, strict=True):
        assert image.name == reference.name.replace(".nii.gz", "_0000.nii.gz")
        assert check_cases([str(image)], str(reference), 1, SimpleITKIO)
        assert verify_labels(str(reference), SimpleITKIO, [0, 1, 2])


def test_cases_depend_on_seed_and_number_only(dataset, tmp_path):
    write_phantom_dataset(tmp_path / "again", num_cases=2, seed=7)
    write_phantom_dataset(tmp_path / "other", num_cases=1, seed=8)
    for file in ("imagesTr/phantom_001_0000.nii.gz", "labelsTr/phantom_001.nii.gz"):
        np.testing.assert_array_equal(read(dataset / file), read(tmp_path / "again" / file))
    first = "imagesTr/phantom_000_0000.nii.gz"
    assert not np.array_equal(read(dataset / first), read(tmp_path / "other" / first))


def test_every_case_has_one_organ_of_two_parts(cases):
    for _, segmentation in cases:
        assert set(np.unique(segmentation)) == {0, 1, 2}
        components, _ = label(segmentation > 0)
        assert np.bincount(components.ravel())[1:].max() > 0.95 * np.sum(segmentation > 0)


def test_cases_differ_in_shape_and_organ_size(cases):
    assert len({image.shape for image, _ in cases}) > 1
    volumes = [np.sum(segmentation > 0) for _, segmentation in cases]
    assert max(volumes) > 1.3 * min(volumes)


def test_the_organ_cannot_be_had_by_thresholds(cases):
    for image, segmentation in cases:
        organ = segmentation > 0
        smooth = gaussian_filter(image, 1)
        edges = np.percentile(smooth, np.arange(0, 101, 4))
        best = max(
            2 * np.sum(organ & found) / (organ.sum() + found.sum())
            for number, lower in enumerate(edges)
            for upper in edges[number + 1 :]
            for found in [(smooth >= lower) & (smooth <= upper)]
        )
        assert best < 0.6


def test_the_organ_is_brighter_than_what_surrounds_it(cases):
    for image, segmentation in cases:
        organ = segmentation > 0
        around = (gaussian_filter(organ.astype(float), 2) > 0.02) & ~organ
        assert image[organ].mean() > image[around].mean() + 50
