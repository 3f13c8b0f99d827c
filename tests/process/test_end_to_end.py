"""A life of a model through nnU-Net's own console commands: train, be killed, continue, validate, predict, export,
install and predict elsewhere. By both routes: with a trainer of this plugin, and with plans that carry XAttnRes.

The last command, and the training that is killed, run in processes of their own, as a user's do. The others run in this
process.
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
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from helpers.in_process import InProcess
from helpers.phantom_dataset import PHANTOM, plans_file, read_plans
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import end_process_group
from nnunet_xattnres.nnunet.commands import Model, NnUNet, find_command
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory

pytestmark = pytest.mark.feature("Train, continue, validate, predict, export, install")

PROBABILITIES = "--save_probabilities"


@pytest.fixture
def here(nnunet: NnUNet, tmp_path: Path) -> InProcess:
    """The phantoms in a working directory of the test's own, with a small fold."""
    here = InProcess(tmp_path / "here", "cpu")
    here.raw.parent.mkdir()
    here.raw.symlink_to(nnunet.raw)
    shutil.copytree(nnunet.preprocessed, here.preprocessed)
    splits = [{"train": ["phantom_000", "phantom_001"], "val": ["phantom_002"]}]
    write_json_atomically(splits, here.preprocessed / PHANTOM / "splits_final.json")
    return here


@pytest.fixture
def without_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command gets the variable that leads to the trainers of this plugin."""
    folders = NnUNet.folders

    def without_variable(nnunet: NnUNet) -> dict[str, str]:
        return {name: value for name, value in folders(nnunet).items() if name != "nnUNet_extTrainer"}

    monkeypatch.setattr(NnUNet, "folders", without_variable)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own trainers, which set 250 and 50 iterations, in this process."""
    for name in ("num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        two = property(lambda trainer: 2, lambda trainer, value: None)
        monkeypatch.setattr(nnUNetTrainer, name, two, raising=False)


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


def read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """Segmentations and probabilities. The first may be of background alone after so short a training."""
    segmentations = {file.name: sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in folder.glob("*.nii.gz")}
    probabilities = {file.name: np.load(file)["probabilities"] for file in folder.glob("*.npz")}
    assert all(array.std() > 0 for array in probabilities.values())
    return segmentations | probabilities


@pytest.mark.long
@pytest.mark.parametrize(
    "trainer, configuration",
    [
        ("nnUNetTrainerXAttnRes", "2d_small"),
        pytest.param("nnUNetTrainerXAttnResBlockInput", "3d_small", marks=pytest.mark.slow),
    ],
)
def test_a_life_of_a_model(here: InProcess, tmp_path: Path, trainer: str, configuration: str):
    model = Model(PHANTOM, configuration, trainer)
    train = tuple(model.train_command("0", "cpu"))
    fold = model.folder(here.results) / "fold_0"

    # It writes a checkpoint after every epoch.
    set_num_epochs(here, configuration, 20)
    killed = train_until_killed(here, train, fold / "checkpoint_latest.pth")
    done = killed["current_epoch"]
    recorded = RoutingHistory.read(fold / RECORD).epochs
    left = fold / ".nnunet_xattnres_left"
    left.mkdir()
    (left / "checkpoint_latest.pth").write_bytes(b"half a checkpoint")

    set_num_epochs(here, configuration, done + 2)
    here.run(*train, "--c", "--npz", log="continue")
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

    validated = read_predictions(fold / "validation")
    assert validated.keys() == {"phantom_002.nii.gz", "phantom_002.npz"}
    shutil.rmtree(fold / "validation")
    here.run(*train, "--val", "--npz", log="validate")
    assert_equal(read_predictions(fold / "validation"), validated)

    assert_predicts_elsewhere(here, model, tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("without_trainers", "short_epochs")
def test_a_life_of_a_model_of_plans_that_carry_xattnres(
    here: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("nnUNet_preprocessed", str(here.preprocessed))
    assert main(["plans", "-d", "901", "-c", "2d_small"]) == 0
    model = Model(PHANTOM, "2d_small", "nnUNetTrainer_1epoch", "nnUNetXAttnResPlans")
    here.run(*model.train_command("0", "cpu"), log="train")
    fold = model.folder(here.results) / "fold_0"
    trained = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert any(key.startswith("xattnres.") for key in trained["network_weights"])
    assert read_predictions(fold / "validation").keys() == {"phantom_002.nii.gz"}
    assert_predicts_elsewhere(here, model, tmp_path)


def assert_predicts_elsewhere(here: NnUNet, model: Model, tmp_path: Path) -> None:
    """Where nothing else is, the exported and installed model predicts what it does here."""
    images = tmp_path / "images"
    images.mkdir()
    whole = sitk.ReadImage(here.raw / PHANTOM / "imagesTr" / "phantom_002_0000.nii.gz")
    sitk.WriteImage(whole[:, :, 16:24], images / "part_0000.nii.gz")
    predicted, installed = tmp_path / "predicted", tmp_path / "installed"
    folder = ("-m", str(model.folder(here.results)), "-i", str(images), "-o", str(predicted), "-f", "0")
    here.run("nnUNetv2_predict_from_modelfolder", *folder, "-device", "cpu", PROBABILITIES, log="predict")
    predictions = read_predictions(predicted)
    assert predictions.keys() == {"part.nii.gz", "part.npz"}
    assert predictions["part.nii.gz"].shape == (8, *whole.GetSize()[1::-1])

    archive = tmp_path / "model.zip"
    which = ("-d", "901", "-c", model.configuration, "-f", "0", "-tr", model.trainer, "-p", model.plans)
    here.run("nnUNetv2_export_model_to_zip", *which, "-o", str(archive), log="export")
    elsewhere = NnUNet(tmp_path / "elsewhere", "cpu")
    elsewhere.results.mkdir(parents=True)
    InProcess(elsewhere.workdir, "cpu").run("nnUNetv2_install_pretrained_model_from_zip", str(archive), log="install")
    alone = {"nnUNet_npp": "0", "nnUNet_nps": "0"}
    predict = model.predict_command(("0",), images, installed, "cpu", PROBABILITIES)
    elsewhere.run(*predict, log="predict", environment=alone)
    assert_equal(read_predictions(installed), predictions)


def assert_equal(these: dict[str, np.ndarray], those: dict[str, np.ndarray]) -> None:
    assert these.keys() == those.keys()
    for name, array in those.items():
        # The last digits may differ between processes. nnU-Net adds logits in half precision, which enlarges that.
        np.testing.assert_allclose(these[name], array, rtol=0, atol=2e-3, err_msg=name)
