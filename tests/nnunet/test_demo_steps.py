"""The steps of the demo, with nnU-Net's commands noted instead of run."""

import json
import os
from dataclasses import asdict

import numpy as np
import pytest

from helpers.plans import ISOTROPIC, planned
from helpers.tiny_dataset import write_image, write_msd_task, write_raw_dataset
from helpers.training import run_in_threads
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.datasets import read_dataset
from nnunet_xattnres.tools.demo import BUDGET, Demo, check_trainer, run_demo

TRAINER = "nnUNetTrainerXAttnRes"


def test_unknown_trainer_is_refused_before_anything_is_converted(tmp_path):
    data = write_msd_task(tmp_path / "Task12_Tiny")
    with pytest.raises(XAttnResError, match=TRAINER):
        run_demo(data, tmp_path / "work", "nnUNetTrainerXAtnRes", baseline=False)
    assert not (tmp_path / "work").exists()


def test_trainer_without_the_mixin_is_said_to_ignore_the_budget(capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    check_trainer(TRAINER)
    assert "nnUNet_extTrainer" not in os.environ
    assert capsys.readouterr().out == ""
    check_trainer("nnUNetTrainerDA5")
    assert "ignores" in capsys.readouterr().out


def test_unwritable_workdir(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(XAttnResError, match="--workdir"):
        run_demo(raw, tmp_path / "file" / "work", TRAINER, baseline=False)


def test_a_workdir_that_is_nnunets_own(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(
        XAttnResError, match=r"\(nnUNet_raw\): choose another --workdir, such as --workdir xattnres_demo"
    ):
        run_demo(raw, tmp_path, TRAINER, baseline=False)


class RecordingNnUNet(NnUNet):
    """Notes the commands instead of running them."""

    def __init__(self, workdir):
        super().__init__(workdir, "cpu")
        object.__setattr__(self, "commands", [])

    def run(self, *command, log, environment=None):
        self.commands.append(command)


@pytest.fixture
def raw(tmp_path):
    return write_raw_dataset(tmp_path / "data" / "Dataset123_Tiny")


@pytest.fixture
def nnunet(tmp_path, monkeypatch):
    nnunet = RecordingNnUNet(tmp_path / "work")
    nnunet.workdir.mkdir()
    run_in_threads(nnunet, monkeypatch)
    return nnunet


@pytest.fixture
def preprocessed(nnunet, raw):
    """A demo whose first two steps have their results."""
    demo = Demo(nnunet, read_dataset(raw), num_steps=7)
    nnunet.raw.mkdir()
    demo.raw_dataset.symlink_to(raw)
    references = demo.preprocessed_dataset / "gt_segmentations"
    references.mkdir(parents=True)
    for label in (raw / "labelsTr").iterdir():
        (references / label.name).symlink_to(label)
    splits = [{"train": ["case_0", "case_1", "case_2"], "val": ["case_3", "case_4"]}]
    (demo.preprocessed_dataset / "splits_final.json").write_text(json.dumps(splits))
    return demo


def checkpoint(demo, name, trainer=TRAINER):
    path = demo.nnunet.results / "Dataset123_Tiny" / f"{trainer}__nnUNetPlans__3d_fullres_demo" / "fold_0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_preprocessing_is_recognised_when_complete(preprocessed):
    preprocessed.plan_and_preprocess()
    assert preprocessed.nnunet.commands == []
    (preprocessed.preprocessed_dataset / "gt_segmentations" / "case_4.nii.gz").unlink()
    preprocessed.plan_and_preprocess()
    [command] = preprocessed.nnunet.commands
    assert command[:5] == ("nnUNetv2_plan_and_preprocess", "-d", "123", "-c", "3d_fullres")


def test_images_of_one_slice_use_the_2d_configuration(preprocessed, raw):
    for image in (raw / "imagesTr").iterdir():
        write_image(image, np.zeros((1, 9, 10), np.float32))
    assert preprocessed.planned_configuration == "2d"


def test_training_starts_continues_or_is_finished(preprocessed):
    preprocessed.train(TRAINER)
    checkpoint(preprocessed, "checkpoint_best.pth")
    preprocessed.train(TRAINER)
    checkpoint(preprocessed, "checkpoint_final.pth")
    preprocessed.train(TRAINER)
    first, second = preprocessed.nnunet.commands
    where = ("Dataset123_Tiny", "3d_fullres_demo", "0")
    start = ("nnUNetv2_train", *where, "-tr", TRAINER, "-p", "nnUNetPlans", "-device", "cpu")
    assert first == start
    assert second == (*start, "--c")


def test_prediction_is_repeated_only_after_a_new_training(preprocessed):
    final = checkpoint(preprocessed, "checkpoint_final.pth")
    predictions = preprocessed.output / "predictions" / TRAINER
    commands = preprocessed.nnunet.commands

    incomplete = predictions.with_name(f"{TRAINER}.incomplete")
    run = preprocessed.nnunet.run

    def run_and_write(*command, log, environment=None):
        run(*command, log=log)
        incomplete.mkdir(parents=True)

    object.__setattr__(preprocessed.nnunet, "run", run_and_write)
    preprocessed.predict(TRAINER)
    preprocessed.predict(TRAINER)
    assert len(commands) == 1
    assert predictions.is_dir()
    assert {path.name for path in preprocessed.held_out_images.iterdir()} == {
        "case_3_0000.nii.gz",
        "case_4_0000.nii.gz",
    }
    assert {path.name for path in preprocessed.held_out_references.iterdir()} == {"case_3.nii.gz", "case_4.nii.gz"}
    later = predictions.stat().st_mtime + 10
    os.utime(final, (later, later))
    preprocessed.predict(TRAINER)
    assert len(commands) == 2


def test_added_configuration_is_kept(preprocessed):
    plans = planned(ISOTROPIC[:4], [40, 56, 40])
    plans["configurations"]["3d_fullres"] = plans["configurations"].pop("full")
    preprocessed.plans_file.write_text(json.dumps(plans))
    preprocessed.add_configuration()
    added = json.loads(preprocessed.plans_file.read_text())
    small = added["configurations"]["3d_fullres_demo"]
    assert small["training"] == asdict(BUDGET)
    assert small["batch_size"] >= 2
    small["batch_size"] = 3
    preprocessed.plans_file.write_text(json.dumps(added))
    preprocessed.add_configuration()
    assert json.loads(preprocessed.plans_file.read_text()) == added


def test_damaged_files_are_said_in_one_line(preprocessed):
    (preprocessed.preprocessed_dataset / "splits_final.json").write_text('[{"train"')
    preprocessed.plans_file.write_text("{")
    summary = preprocessed.output / "predictions" / TRAINER / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text("{")
    begin_again = f"delete {preprocessed.preprocessed_dataset} and {preprocessed.nnunet.results / 'Dataset123_Tiny'}, "
    for step, remedy in (
        (preprocessed.add_configuration, begin_again),
        (lambda: preprocessed.predict(TRAINER), begin_again),
        (lambda: preprocessed.report([TRAINER]), "delete it, run again"),
    ):
        with pytest.raises(XAttnResError) as error:
            step()
        assert remedy in str(error.value)
        assert "\n" not in str(error.value)
