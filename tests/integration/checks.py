"""What holds for everything that nnU-Net has trained and predicted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from integration.pipeline import Experiment

Record = Callable[[str, object], None]


def check_model(experiment: Experiment, configuration: str) -> Path:
    """One that has been trained on a single fold: checkpoint, validation, predictions of the test set (returned)."""
    (fold,) = experiment.train_all(configuration)
    check_checkpoint(experiment, fold)
    check_segmentations(experiment, fold / "validation", experiment.raw / "imagesTr")
    predictions = experiment.predict(configuration)
    check_predictions(experiment, predictions)
    return predictions


def check_checkpoint(experiment: Experiment, fold: Path) -> None:
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == experiment.trainer
    assert any(name.startswith("xattnres.") for name in checkpoint["network_weights"])


def check_predictions(experiment: Experiment, predictions: Path) -> None:
    assert experiment.cases(predictions) == experiment.cases(experiment.raw / "labelsTs")
    check_segmentations(experiment, predictions, experiment.raw / "imagesTs")


def check_segmentations(experiment: Experiment, segmentations: Path, images: Path) -> None:
    """The geometry of the images; labels that the dataset has, other than the ignore label."""
    ending = experiment.dataset_json["file_ending"]
    for case in experiment.cases(segmentations):
        segmentation = sitk.ReadImage(segmentations / f"{case}{ending}")
        check_geometry(segmentation, sitk.ReadImage(images / f"{case}_0000{ending}"))
        assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= set(experiment.labels.all_labels)


def check_geometry(segmentation: sitk.Image, image: sitk.Image) -> None:
    assert segmentation.GetSize() == image.GetSize()
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(segmentation, geometry)() == pytest.approx(getattr(image, geometry)(), abs=1e-5)


def check_probabilities(experiment: Experiment, folder: Path) -> None:
    """Of every case: one map per class or region, from which its segmentation follows."""
    cases = experiment.cases(folder)
    assert {file.stem for file in folder.glob("*.npz")} == {file.stem for file in folder.glob("*.pkl")} == cases
    for case in cases:
        with np.load(folder / f"{case}.npz") as file:
            probabilities = file["probabilities"].astype(np.float32)
        assert len(probabilities) == experiment.labels.num_segmentation_heads
        assert 0 <= probabilities.min() < probabilities.max() <= 1
        if not experiment.labels.has_regions:
            assert probabilities.sum(0) == pytest.approx(1, abs=1e-2)
        segmentation = sitk.GetArrayFromImage(
            sitk.ReadImage(folder / f"{case}{experiment.dataset_json['file_ending']}")
        )
        expected = experiment.labels.convert_probabilities_to_segmentation(probabilities)
        assert np.mean(segmentation == expected) > 0.999


def check_test_set(experiment: Experiment, predictions: Path, record_property: Record) -> None:
    check_predictions(experiment, predictions)
    check_better_than_chance(experiment, experiment.evaluate(predictions), experiment.raw / "labelsTs", record_property)


def check_better_than_chance(experiment: Experiment, dice: float, references: Path, record_property: Record) -> None:
    chance = experiment.chance(references)
    record_property("result", f"{dice:.2f} ({chance:.2f})")
    assert dice > chance
