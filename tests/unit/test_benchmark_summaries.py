"""What is reported of every trainer: its metrics, its costs, and the spread between trainings."""

import math
from dataclasses import replace

import pytest

from helpers.benchmark import DATASETS, OURS, PLANNED, case_row, cells_of, tables_of, two_trainers
from nnunet_xattnres.benchmark.summaries import spreads, summarise


def test_empty_references_are_in_no_mean_and_counted():
    nothing = {"nsd": math.nan, "hd95": math.nan, "reference_voxels": 0, "predicted_voxels": 0}
    wrong = {"nsd": 0.0, "hd95": math.inf, "reference_voxels": 0}
    rows = [
        case_row("Dataset001_A", OURS, 0, 0, "1", 0.8),
        case_row("Dataset001_A", OURS, 0, 0, "1", math.nan, "b", **nothing),
        case_row("Dataset001_A", OURS, 0, 0, "2", 0.6),
        case_row("Dataset001_A", OURS, 0, 0, "2", 0.0, "b", **wrong, predicted_voxels=30),
        case_row("Dataset001_A", OURS, 0, 0, "3", 0.4),
        case_row("Dataset001_A", OURS, 0, 0, "3", 0.0, "b", nsd=0.0, hd95=math.inf, predicted_voxels=0),
        case_row("Dataset001_A", OURS, 0, 0, "4", 0.4),
        case_row("Dataset001_A", OURS, 0, 0, "4", 0.0, "b", **wrong, predicted_voxels=50),
    ]
    mean, _, b = summarise(tables_of(rows))
    assert (b["label"], b["cases"], b["dice"], b["hd95"], b["hd95_infinite"]) == ("b", 1, 0.0, math.inf, 1)
    assert (b["empty_references"], b["both_empty"], b["false_positives"]) == (3, 1, 2)
    assert b["false_positive_voxels"] == 40
    # 0.8, 0.6, (0.4 + 0) / 2, 0.4
    assert (mean["label"], mean["cases"], mean["dice"]) == ("mean", 4, 0.5)
    assert (mean["hd95"], mean["hd95_infinite"]) == (1.0, 1)


def test_costs_are_those_on_the_device_of_most_trainings():
    tables = two_trainers()
    cells = tables.cells
    cells.loc[cells.fold == 1, ["device", "seconds_per_epoch", "parameters"]] = ["another", 1000.0, 9]
    # Of the first dataset, one training more is on the first device, of the others all on the second.
    cells.loc[cells[cells_of(cells, trainer=OURS, fold=1)].index[0], "device"] = "cpu"
    for dataset in list(DATASETS)[1:]:
        cells.loc[cells_of(cells, dataset=dataset, fold=0), "device"] = "another"
    rows = [row for row in summarise(replace(tables, cells=cells)) if row["label"] == "mean"]
    shown = [(row["trainer"], row["cost_device"], row["seconds_per_epoch"]) for row in rows]
    assert shown[:2] == [(PLANNED, "cpu", 10.0), (OURS, "cpu", 15.0)]
    assert [device for _, device, _ in shown[2:]] == 4 * ["another"]
    # Parameters do not depend on it.
    assert rows[0]["parameters"] == (1_234_567 + 9) / 2


@pytest.mark.parametrize("known, device, seconds", [(1, "cpu", [10.0, None]), (0, "", [1000.0, 1000.0])])
def test_an_unknown_device_does_not_count_beside_a_known_one(known, device, seconds):
    tables = two_trainers()
    cells = tables.cells
    cells.loc[cells.index[known:], ["device", "seconds_per_epoch"]] = ["", 1000.0]
    rows = summarise(replace(tables, cells=cells))[:2]
    assert [row["trainer"] for row in rows] == [PLANNED, OURS]
    assert [row["cost_device"] for row in rows] == 2 * [device]
    assert [row["seconds_per_epoch"] for row in rows] == seconds


def test_spreads_by_hand():
    means = {PLANNED: (0.70, 0.74), OURS: (0.80, 0.82), "nnUNetTrainerNoSkip": (0.1, None)}
    rows = [
        case_row("Dataset001_A", trainer, 0, seed, "1", dice)
        for trainer, of_seeds in means.items()
        for seed, dice in enumerate(of_seeds)
        if dice is not None
    ]
    waiting = {"dataset": "Dataset001_A", "configuration": "small", "trainer": "wide", "fold": 0, "seed": 0}
    (row,) = spreads(tables_of(rows, ({**waiting, "state": "waiting"},)))
    # The third lacks a seed. Means 0.72 and 0.81; variances 0.0008 and 0.0002.
    assert (row["trainers"], row["cells"]) == (2, 2)
    assert row["left_out"] == "nnUNetTrainerNoSkip, wide"
    assert row["between"] == pytest.approx(0.09 / math.sqrt(2), abs=1e-6)
    assert row["within"] == pytest.approx(math.sqrt(0.0005), abs=1e-6)
    assert row["ratio"] == pytest.approx(row["between"] / row["within"], rel=1e-4)
