"""A life of a model through nnU-Net's own console commands: train, continue, validate, predict, export, install."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import PHANTOM, plans_file, read_plans

from nnunet_xattnres.commands import NnUNet
from nnunet_xattnres.plans import write_json_atomically
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory

pytestmark = pytest.mark.feature("Train, continue, validate, predict, export, install")


@pytest.fixture
def workdir(nnunet: NnUNet, tmp_path_factory: pytest.TempPathFactory) -> NnUNet:
    """A copy of the planned and preprocessed dataset whose plans and results are the test's own."""
    copy = NnUNet(tmp_path_factory.mktemp("end_to_end"), "cpu")
    shutil.copytree(nnunet.raw, copy.raw)
    shutil.copytree(nnunet.preprocessed, copy.preprocessed)
    return copy


def read_segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize(
    "trainer, configuration",
    [("nnUNetTrainerXAttnRes", "2d_small"), ("nnUNetTrainerXAttnResBlockInput", "3d_small")],
)
def test_train_continue_validate_predict_export_install(
    workdir: NnUNet, tmp_path: Path, trainer: str, configuration: str
):
    train = ("nnUNetv2_train", "901", configuration, "0", "-tr", trainer, "-device", "cpu")
    model = workdir.results / PHANTOM / f"{trainer}__nnUNetPlans__{configuration}"
    checkpoint = model / "fold_0" / "checkpoint_final.pth"

    workdir.run(*train, log="train")
    first = torch.load(checkpoint, weights_only=False)
    assert first["trainer_name"] == trainer
    assert first["current_epoch"] == 1
    record = model / "fold_0" / RECORD
    read_at_first = RoutingHistory.read(record).epochs

    plans = read_plans(workdir)
    plans["configurations"][configuration]["training"]["num_epochs"] = 2
    write_json_atomically(plans, plans_file(workdir))
    workdir.run(*train, "--c", log="continue")
    second = torch.load(checkpoint, weights_only=False)
    assert second["current_epoch"] == 2
    assert len(second["logging"]["train_losses"]) == 2
    assert second["logging"]["train_losses"][0] == first["logging"]["train_losses"][0]

    read = RoutingHistory.read(record).epochs
    assert list(read) == [0, 1]
    assert read[0] == read_at_first[0] != read[1]

    validation = model / "fold_0" / "validation"
    validated = read_segmentations(validation)
    assert validated
    shutil.rmtree(validation)
    workdir.run(*train, "--val", log="validate")
    again = read_segmentations(validation)
    assert again.keys() == validated.keys()
    assert all(np.array_equal(again[name], validated[name]) for name in validated)

    images = tmp_path / "images"
    images.mkdir()
    for name in validated:
        source = workdir.raw / PHANTOM / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz")
        shutil.copy(source, images / source.name)
    folders = ("-i", str(images), "-f", "0", "-device", "cpu")
    predicted = tmp_path / "predicted"
    workdir.run("nnUNetv2_predict_from_modelfolder", *folders, "-m", str(model), "-o", str(predicted), log="predict")
    segmentations = read_segmentations(predicted)
    assert segmentations.keys() == validated.keys()

    archive = tmp_path / "model.zip"
    which = ("-d", "901", "-c", configuration, "-f", "0", "-tr", trainer)
    workdir.run("nnUNetv2_export_model_to_zip", *which, "-o", str(archive), log="export")
    elsewhere = NnUNet(tmp_path / "elsewhere", "cpu")
    elsewhere.results.mkdir(parents=True)
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", str(archive), log="install")
    installed = tmp_path / "installed"
    predict = ("nnUNetv2_predict", "-d", PHANTOM, "-c", configuration, "-tr", trainer)
    elsewhere.run(*predict, *folders, "-o", str(installed), log="predict")
    reproduced = read_segmentations(installed)
    assert reproduced.keys() == segmentations.keys()
    assert all(np.array_equal(reproduced[name], segmentations[name]) for name in segmentations)
