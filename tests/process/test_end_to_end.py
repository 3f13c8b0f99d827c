"""A life of a model through nnU-Net's own console commands, once as commands and once in this process: train, continue,
validate, predict, export, install."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from helpers.in_process import InProcess
from helpers.phantom_dataset import PHANTOM, plans_file, read_plans
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory

pytestmark = pytest.mark.feature("Train, continue, validate, predict, export, install")


def read_segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize(
    "run_by, trainer, configuration",
    [
        pytest.param(NnUNet, "nnUNetTrainerXAttnRes", "2d_small", marks=pytest.mark.long),
        (InProcess, "nnUNetTrainerXAttnResBlockInput", "3d_small"),
    ],
)
def test_train_continue_validate_predict_export_install(
    nnunet: NnUNet, tmp_path: Path, run_by: type[NnUNet], trainer: str, configuration: str
):
    workdir = run_by(tmp_path / "workdir", "cpu")
    shutil.copytree(nnunet.raw, workdir.raw)
    shutil.copytree(nnunet.preprocessed, workdir.preprocessed)

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
    by_name = ("nnUNetv2_predict", "-d", PHANTOM, "-c", configuration, "-tr", trainer)
    # Has no mode without worker processes.
    by_folder = ("nnUNetv2_predict_from_modelfolder", "-m", str(model))
    predict = by_folder if run_by is NnUNet else by_name
    workdir.run(*predict, *folders, "-o", str(predicted), log="predict")
    segmentations = read_segmentations(predicted)
    assert segmentations.keys() == validated.keys()

    archive = tmp_path / "model.zip"
    which = ("-d", "901", "-c", configuration, "-f", "0", "-tr", trainer)
    workdir.run("nnUNetv2_export_model_to_zip", *which, "-o", str(archive), log="export")
    elsewhere = run_by(tmp_path / "elsewhere", "cpu")
    elsewhere.results.mkdir(parents=True)
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", str(archive), log="install")
    installed = tmp_path / "installed"
    elsewhere.run(*by_name, *folders, "-o", str(installed), log="predict")
    reproduced = read_segmentations(installed)
    assert reproduced.keys() == segmentations.keys()
    assert all(np.array_equal(reproduced[name], segmentations[name]) for name in segmentations)
