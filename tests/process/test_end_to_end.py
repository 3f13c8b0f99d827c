"""A life of a model through nnU-Net's own console commands: train, be killed, continue, validate, predict, export,
install and predict elsewhere.

The first and the last command run in processes of their own, as a user's do. The others run in this process.
"""

import shutil
import signal
import subprocess
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from helpers.in_process import InProcess
from helpers.phantom_dataset import PHANTOM, plans_file, read_plans
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import end_process_group
from nnunet_xattnres.nnunet.commands import NnUNet, find_command
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory

pytestmark = pytest.mark.feature("Train, continue, validate, predict, export, install")


def set_num_epochs(nnunet: NnUNet, configuration: str, num_epochs: int) -> None:
    plans = read_plans(nnunet)
    plans["configurations"][configuration]["training"]["num_epochs"] = num_epochs
    write_json_atomically(plans, plans_file(nnunet))


def train_until_killed(nnunet: NnUNet, command: tuple[str, ...], checkpoint: Path) -> dict[str, Any]:
    """Send SIGKILL once there is a checkpoint to continue from. Returns what it holds."""
    environment = nnunet.environment() | {"nnUNet_n_proc_DA": "0"}
    training = subprocess.Popen([find_command(command[0]), *command[1:]], env=environment, start_new_session=True)
    try:
        while not checkpoint.exists():
            assert training.poll() is None
            sleep(0.05)
    finally:
        training.kill()
        end_process_group(training)
    assert training.returncode == -signal.SIGKILL
    return torch.load(checkpoint, weights_only=False)


def read_segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.long
@pytest.mark.parametrize(
    "trainer, configuration",
    [
        ("nnUNetTrainerXAttnRes", "2d_small"),
        pytest.param("nnUNetTrainerXAttnResBlockInput", "3d_small", marks=pytest.mark.slow),
    ],
)
def test_a_life_of_a_model(nnunet: NnUNet, tmp_path: Path, trainer: str, configuration: str):
    here = InProcess(tmp_path / "here", "cpu")
    here.raw.parent.mkdir()
    here.raw.symlink_to(nnunet.raw)
    shutil.copytree(nnunet.preprocessed, here.preprocessed)
    splits = [{"train": ["phantom_000", "phantom_001"], "val": ["phantom_002"]}]
    write_json_atomically(splits, here.preprocessed / PHANTOM / "splits_final.json")
    train = ("nnUNetv2_train", "901", configuration, "0", "-tr", trainer, "-device", "cpu")
    model = here.results / PHANTOM / f"{trainer}__nnUNetPlans__{configuration}"
    fold = model / "fold_0"

    # It writes a checkpoint after every epoch.
    set_num_epochs(here, configuration, 20)
    killed = train_until_killed(here, train, fold / "checkpoint_latest.pth")
    done = killed["current_epoch"]
    recorded = RoutingHistory.read(fold / RECORD).epochs
    left = fold / ".nnunet_xattnres_left"
    left.mkdir()
    (left / "checkpoint_latest.pth").write_bytes(b"half a checkpoint")

    set_num_epochs(here, configuration, done + 2)
    here.run(*train, "--c", log="continue")
    continued = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert killed["trainer_name"] == continued["trainer_name"] == trainer
    assert continued["current_epoch"] == done + 2
    assert len(continued["logging"]["train_losses"]) == done + 2
    assert continued["logging"]["train_losses"][:done] == killed["logging"]["train_losses"]
    assert not list(fold.glob(".nnunet_xattnres_*"))
    read = RoutingHistory.read(fold / RECORD).epochs
    assert list(read) == list(range(done + 2))
    assert all(read[epoch] == recorded[epoch] for epoch in range(done))
    assert read[done - 1] != read[done]

    validated = read_segmentations(fold / "validation")
    assert validated.keys() == {"phantom_002.nii.gz"}
    shutil.rmtree(fold / "validation")
    here.run(*train, "--val", log="validate")
    assert_equal(read_segmentations(fold / "validation"), validated)

    images = tmp_path / "images"
    images.mkdir()
    whole = sitk.ReadImage(here.raw / PHANTOM / "imagesTr" / "phantom_002_0000.nii.gz")
    sitk.WriteImage(whole[:, :, 16:24], images / "part_0000.nii.gz")
    folders = ("-i", str(images), "-f", "0", "-device", "cpu")
    predicted = tmp_path / "predicted"
    here.run("nnUNetv2_predict_from_modelfolder", "-m", str(model), *folders, "-o", str(predicted), log="predict")
    segmentations = read_segmentations(predicted)
    assert segmentations["part.nii.gz"].shape == (8, *whole.GetSize()[1::-1])

    archive = tmp_path / "model.zip"
    which = ("-d", "901", "-c", configuration, "-f", "0", "-tr", trainer)
    here.run("nnUNetv2_export_model_to_zip", *which, "-o", str(archive), log="export")
    elsewhere = NnUNet(tmp_path / "elsewhere", "cpu")
    elsewhere.results.mkdir(parents=True)
    InProcess(elsewhere.workdir, "cpu").run("nnUNetv2_install_pretrained_model_from_zip", str(archive), log="install")
    installed = tmp_path / "installed"
    by_name = ("nnUNetv2_predict", "-d", PHANTOM, "-c", configuration, "-tr", trainer)
    alone = {"nnUNet_npp": "0", "nnUNet_nps": "0"}
    elsewhere.run(*by_name, *folders, "-o", str(installed), log="predict", environment=alone)
    assert_equal(read_segmentations(installed), segmentations)


def assert_equal(these: dict[str, np.ndarray], those: dict[str, np.ndarray]) -> None:
    assert these.keys() == those.keys()
    assert all(np.array_equal(these[name], those[name]) for name in those)
