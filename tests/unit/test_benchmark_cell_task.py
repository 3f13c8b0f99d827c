"""One cell: which commands of nnU-Net are run, and what is recorded."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from helpers.benchmark import CELL, folder_of_cell, write_final_checkpoint
from nnunet_xattnres.benchmark import cell_task
from nnunet_xattnres.benchmark.cell_task import CellTask, run_cell
from nnunet_xattnres.benchmark.cells import FINISHED
from nnunet_xattnres.benchmark.locks import locked
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet


class Commands(list):
    """Pairs of a command and its log. results: by command, what happens when it is run."""

    results: dict


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """nnU-Net's commands of a cell, noted instead of run."""

    def run(self, *command, log, environment):
        assert command[:3] == (sys.executable, "-m", "nnunet_xattnres.benchmark.launch")
        seed, lock, folder, *own = command[3:]
        assert (int(seed), folder, self.keep_open) == (CELL.seed, str(CELL.folder(tmp_path)), (int(lock),))
        assert environment == {"nnUNet_results": str(CELL.results(tmp_path))}
        noted.append((own, log))
        results[own[0]]()

    def train():
        write_final_checkpoint(folder_of_cell(tmp_path))
        write_validation(tmp_path)

    def predict():
        (folder_of_cell(tmp_path) / "test.incomplete").mkdir()

    noted = Commands()
    results = noted.results = {"nnUNetv2_train": train, "nnUNetv2_predict": predict}
    monkeypatch.setattr(NnUNet, "run", run)
    return noted


def write_validation(root):
    (folder_of_cell(root) / "validation").mkdir()
    (folder_of_cell(root) / "validation" / "summary.json").write_text("{}")


def test_a_cell_is_trained_predicted_and_recorded_once(commands, tmp_path):
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    (train, _), (predict, _) = commands
    model = ["-tr", "nnUNetTrainerPlanned", "-p", "nnUNetPlans", "-device", "cpu"]
    assert train == ["nnUNetv2_train", "Dataset123_Tiny", "small_wide", "1", *model]
    assert predict[:3] == ["nnUNetv2_predict", "-i", str(tmp_path / "nnUNet_raw" / "Dataset123_Tiny" / "imagesTs")]
    record = CELL.record(tmp_path)
    assert (record["state"], record["epochs"], record["seconds_per_epoch"]) == (FINISHED, 3, 3.0)
    assert (CELL.folder(tmp_path) / "test").is_dir()
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert len(commands) == 2


def test_a_cell_records_what_its_training_has_recorded(commands, tmp_path):
    costs = {"peak_memory_gb": 1.5, "devices": ["2 x A100", "2 x H100"], "versions": ["torch 2.8", "torch 2.9"]}
    (folder_of_cell(tmp_path) / "costs.json").write_text(json.dumps(costs))
    run_cell(tmp_path, CELL, "cuda", num_gpus=2)
    record = CELL.record(tmp_path)
    # The median time per epoch is neither device's.
    assert (record["peak_memory_gb"], record["device"]) == (1.5, "2 x A100 and 2 x H100")
    # They are those of the processes that have trained, and not of this one.
    assert record["versions"] == "torch 2.8 and torch 2.9"


def test_an_interrupted_training_is_continued(commands, tmp_path):
    (folder_of_cell(tmp_path) / "checkpoint_latest.pth").touch()
    run_cell(tmp_path, CELL, "cuda", num_gpus=2)
    (train, _), _ = commands
    assert train[-3:] == ["-num_gpus", "2", "--c"]


def test_an_interrupted_validation_is_repeated_without_training(commands, tmp_path):
    write_final_checkpoint(folder_of_cell(tmp_path))
    commands.results["nnUNetv2_train"] = lambda: write_validation(tmp_path)
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    (train, _), _ = commands
    assert train[-1] == "--val"
    assert CELL.state(tmp_path) == FINISHED


def test_the_validation_of_another_training_is_not_taken_for_its_own(commands, tmp_path):
    write_validation(tmp_path)
    commands.results["nnUNetv2_train"] = lambda: write_final_checkpoint(folder_of_cell(tmp_path))
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert not CELL.is_validated(tmp_path)


def test_an_interrupted_prediction_is_repeated_alone(commands, tmp_path):
    write_final_checkpoint(folder_of_cell(tmp_path))
    write_validation(tmp_path)
    (folder_of_cell(tmp_path) / "test.incomplete").mkdir()
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    ((predict, _),) = commands
    assert predict[0] == "nnUNetv2_predict"


def test_a_failed_cell_says_why_and_keeps_the_log_of_every_attempt(commands, tmp_path):
    def fail():
        log = tmp_path / "logs" / f"{commands[-1][1]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        raise XAttnResError("out of\nluck")

    commands.results["nnUNetv2_train"] = fail
    for _ in range(2):
        run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert CELL.record(tmp_path)["reason"] == "out of luck"
    assert [log.name for log in sorted(CELL.logs(tmp_path).iterdir())] == ["train_1.log", "train_2.log"]


def test_a_checkpoint_of_the_benchmarks_is_not_trusted_either(commands, tmp_path):
    write_final_checkpoint(folder_of_cell(tmp_path), extra=Path("here"))
    write_validation(tmp_path)
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    reason = CELL.record(tmp_path)["reason"]
    assert reason.startswith(f"{CELL.folder(tmp_path) / 'checkpoint_final.pth'} holds pathlib.")
    assert reason.endswith("let its trainer store numbers and tensors only")


def test_a_cell_that_another_process_runs_is_left_alone(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(cell_task, "SECONDS_FOR_A_LOOK", 0.1)
    with locked(CELL.lock(tmp_path), 0):
        run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert commands == []
    assert CELL.record(tmp_path) == {}


def test_a_job_gets_its_share_of_the_machine(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    CellTask()(tmp_path, CELL, 1, {"OMP_NUM_THREADS": "7"})
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("environment", "has_gpu", "num_gpus", "expected"),
    [
        ({}, True, 1, "12"),
        ({"SLURM_CPUS_PER_TASK": "8"}, True, 1, "8"),
        ({"SLURM_CPUS_PER_TASK": "8"}, True, 4, "2"),
        ({"SLURM_CPUS_PER_TASK": "1"}, False, 1, "1"),
        ({"SLURM_CPUS_PER_TASK": "8", "nnUNet_n_proc_DA": "20"}, True, 1, "20"),
    ],
)
def test_augmentation_workers_follow_the_cores_of_a_job(environment, has_gpu, num_gpus, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {**environment})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(cell_task, "run_cell", lambda *given: None)
    CellTask()(Path(), CELL, num_gpus, {})
    assert os.environ["nnUNet_n_proc_DA"] == expected
