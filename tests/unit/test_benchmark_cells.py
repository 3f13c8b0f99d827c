"""A cell of a matrix: its folders, its record and its states."""

from dataclasses import replace

import pytest

from helpers.benchmark import CELL, folder_of_cell
from nnunet_xattnres.benchmark.cells import FAILED, FINISHED, INTERRUPTED, RUNNING, WAITING, read_cells, write_cells
from nnunet_xattnres.benchmark.locks import locked
from nnunet_xattnres.common.errors import XAttnResError


def test_every_seed_has_results_of_its_own(tmp_path):
    other = replace(CELL, seed=8)
    assert CELL.results(tmp_path) != other.results(tmp_path)
    tail = "Dataset123_Tiny/nnUNetTrainerPlanned__nnUNetPlans__small_wide/fold_1"
    assert CELL.folder(tmp_path) == tmp_path / "seed_7" / "nnUNet_results" / tail


def test_states_of_a_cell(tmp_path):
    assert CELL.state(tmp_path) == WAITING
    with locked(CELL.lock(tmp_path), 0):
        CELL.write_record(tmp_path, RUNNING)
        assert CELL.state(tmp_path) == RUNNING
    assert CELL.state(tmp_path) == INTERRUPTED
    CELL.write_record(tmp_path, FAILED, reason="no luck")
    assert CELL.state(tmp_path) == FAILED
    CELL.write_record(tmp_path, FINISHED, epochs=3)
    assert CELL.state(tmp_path) == FINISHED
    assert CELL.record(tmp_path)["trainer"] == "wide"


def test_a_record_that_a_crash_has_emptied_is_that_of_an_interrupted_cell(tmp_path):
    (folder_of_cell(tmp_path) / "cell.json").touch()
    assert CELL.state(tmp_path) == INTERRUPTED


def test_cells_are_read_as_they_were_written(tmp_path):
    write_cells(tmp_path, [CELL, replace(CELL, seed=8)])
    assert read_cells(tmp_path) == [CELL, replace(CELL, seed=8)]


def test_a_folder_without_cells(tmp_path):
    with pytest.raises(XAttnResError, match="nowhere does not exist: give the folder of `nnunet-xattnres"):
        read_cells(tmp_path / "nowhere")
    with pytest.raises(XAttnResError, match=r"has no matrix\.json: give the folder of `nnunet-xattnres benchmark run`"):
        read_cells(tmp_path)
    (tmp_path / "matrix.json").write_text("[{}]")
    with pytest.raises(XAttnResError, match="is damaged: `nnunet-xattnres benchmark run` writes it again"):
        read_cells(tmp_path)
