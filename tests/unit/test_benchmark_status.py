"""What `benchmark status` shows: the progress in nnU-Net's logs, and the states of a matrix."""

import os
from dataclasses import replace

import pytest

from helpers.benchmark import CELL, folder_of_cell
from nnunet_xattnres.benchmark.cells import FAILED, FINISHED, PREPARATION_LOCK, write_cells
from nnunet_xattnres.benchmark.locks import locked
from nnunet_xattnres.benchmark.status import TrainingLogs, progress
from nnunet_xattnres.cli import main

LOG = """
2026-11-23 16:00:00.1: Epoch 0
2026-11-23 16:00:00.2: Current learning rate: 0.01
2026-11-23 16:01:00.1: train_loss -0.1
2026-11-23 16:01:00.1: Pseudo dice [np.float32(0.25), np.float32(0.75)]
2026-11-23 16:01:00.1: Epoch time: 60.0 s
2026-11-23 16:01:00.1: Yayy! New best EMA pseudo Dice: 0.5
2026-11-23 16:01:00.2:
2026-11-23 16:01:00.2: Epoch 1
"""


def test_progress_is_read_from_nnunets_log(tmp_path):
    assert progress(tmp_path, CELL).line == "epoch 1/3, pseudo-Dice -"
    log = folder_of_cell(tmp_path) / "training_log_2026_11_23_16_00_00.txt"
    log.write_text(LOG)
    assert progress(tmp_path, CELL).line == "epoch 2/3, pseudo-Dice 0.500, 2 min of training left"
    # Interrupted before it ended, and continued from the checkpoint of the first epoch.
    second = folder_of_cell(tmp_path) / "training_log_2026_11_23_17_00_00.txt"
    second.write_text(LOG.replace("Epoch 1", "Epoch 2").replace("Epoch 0", "Epoch 1").replace("0.75", "0.95"))
    os.utime(log, (0, 0))
    assert progress(tmp_path, CELL).line == "epoch 3/3, pseudo-Dice 0.600, 1 min of training left"


def test_only_what_was_appended_to_a_log_is_read(tmp_path):
    log = folder_of_cell(tmp_path) / "training_log_1.txt"
    log.write_text(LOG)
    logs = TrainingLogs(tmp_path, CELL)
    assert logs.progress().line == "epoch 2/3, pseudo-Dice 0.500, 2 min of training left"
    # What was read before is read no more: here it is no longer there.
    log.write_text(" " * len(LOG))
    second = LOG.partition("Epoch 1")[0].replace("Epoch 0", "Epoch 1").replace("0.75", "0.95").replace("60.0", "180.0")
    half = second.index("Pseudo dice") + 20
    with log.open("a") as file:
        for part, line in (
            (second[:half], "epoch 2/3, pseudo-Dice 0.500, 2 min of training left"),
            (second[half:], "epoch 3/3, pseudo-Dice 0.600, 2 min of training left"),
        ):
            file.write(part)
            file.flush()
            assert logs.progress().line == line


@pytest.mark.parametrize(
    ("printed", "mean"),
    [
        ("[0.5, 0.7]", "0.600"),
        ("[np.float32(0.5), nan]", "0.500"),
        ("[np.float64(3e-04), 1.0]", "0.500"),
        ("[nan]", "-"),
    ],
)
def test_pseudo_dice_as_numpy_prints_it(printed, mean, tmp_path):
    line = "2026-11-23 16:01:00.1: Pseudo dice "
    (folder_of_cell(tmp_path) / "training_log_1.txt").write_text(f"{line}{printed} \n")
    assert progress(tmp_path, CELL).line == f"epoch 1/3, pseudo-Dice {mean}"


def test_status_of_a_matrix(tmp_path, capsys):
    cells = [replace(CELL, fold=fold, seed=seed) for seed in (0, 1) for fold in (0, 1)]
    write_cells(tmp_path, cells)
    cells[0].write_record(tmp_path, FINISHED)
    cells[1].write_record(tmp_path, FAILED, reason="no luck")
    with locked(cells[2].lock(tmp_path), 0):
        assert main(["benchmark", "status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "running 0/3" in out
    assert "4 cells: 1 finished, 1 failed, 1 running, 0 interrupted, 1 waiting" in out
    assert "Dataset123_Tiny small wide fold 1 seed 0 failed: no luck" in out
    assert "Dataset123_Tiny small wide fold 0 seed 1: epoch 1/3" in out


def test_status_of_something_else(tmp_path, capsys):
    assert main(["benchmark", "status", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "spec.yaml").touch()
    assert main(["benchmark", "status", str(tmp_path / "spec.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "matrix.json").write_text("")
    assert main(["benchmark", "status", str(tmp_path)]) == 1
    assert "is damaged: `nnunet-xattnres benchmark run` writes it again" in capsys.readouterr().err


def test_status_while_data_is_prepared(tmp_path, capsys):
    with locked(tmp_path / PREPARATION_LOCK, 0):
        assert main(["benchmark", "status", str(tmp_path)]) == 0
        assert "being prepared" in capsys.readouterr().out
        write_cells(tmp_path, [CELL])
        assert main(["benchmark", "status", str(tmp_path)]) == 0
    assert "1 cell:" in capsys.readouterr().out
