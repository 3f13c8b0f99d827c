import json
import math
import re
import shutil
import threading
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy
import SimpleITK as sitk
import torch
from scipy import stats

from helpers.routing import assert_no_texts_overlap
from nnunet_xattnres.benchmark import collecting, metrics, reporting
from nnunet_xattnres.benchmark.collecting import collect, take_over
from nnunet_xattnres.benchmark.drawing import draw_cases, draw_curves, draw_differences
from nnunet_xattnres.benchmark.matrix import LOCK, Cell, locked, read_cells, write_cells
from nnunet_xattnres.benchmark.metrics import labels_or_regions, measure
from nnunet_xattnres.benchmark.reporting import Results, markdown, run_report
from nnunet_xattnres.benchmark.spec import Arm, Configuration, Dataset, Spec, read_spec, write_spec
from nnunet_xattnres.benchmark.statistics import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    case_values,
    compare,
    direction,
    holm,
    sample,
    spreads,
    summarise,
    wilcoxon,
)
from nnunet_xattnres.benchmark.tables import COLUMNS, Tables, read_tables, write_tables
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError

ROOT = Path(__file__).parents[2]
PLANNED, OURS = "nnUNetTrainerPlanned", "nnUNetTrainerXAttnRes"
DATASETS = {"Dataset001_A": "Dataset001_A", "Dataset002_CT": "Sarcoma", "Dataset003_MR": "Sarcoma"}


def table(name: str, rows: list[dict]) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=list(COLUMNS[name])).astype(COLUMNS[name])


def case_row(
    dataset: str, trainer: str, fold: int, seed: int, case: str, dice: float, label: str = "a", **more
) -> dict:
    row = {
        "dataset": dataset,
        "family": DATASETS.get(dataset, dataset),
        "configuration": "small",
        "trainer": trainer,
        "fold": fold,
        "seed": seed,
        "set": "validation",
        "case": case,
        "label": label,
        "dice": dice,
        "nsd": dice,
        "hd95": 1.0,
        "reference_voxels": 10,
        "predicted_voxels": 10,
    }
    return row | more


def tables_of(case_rows: list[dict], unfinished: tuple = (), trainers: tuple = ()) -> Tables:
    """trainers: as the spec orders them; by default as they appear."""
    cases = table("cases", case_rows)
    keys = cases[["dataset", "configuration", "trainer", "fold", "seed"]].drop_duplicates()
    cells = [
        {
            **key,
            "state": "finished",
            "epochs": 2,
            "seconds_per_epoch": 10.0 if key["trainer"] == PLANNED else 15.0,
            "parameters": 1_234_567 if key["trainer"] == PLANNED else 2_469_134,
            "peak_memory_gb": math.nan,
            "plans": "nnUNetPlans",
            "patch_size": "40x40",
            "batch_size": 2,
            "features": "8 16",
            "iterations": 50,
            "device": "cpu",
            "versions": "torch 2.8",
        }
        for key in keys.to_dict("records")
    ]
    curves = [
        {**key, "epoch": epoch, "train_loss": -epoch, "val_loss": -epoch, "pseudo_dice": epoch / 2}
        for key in keys.to_dict("records")
        for epoch in range(2)
    ]
    datasets = [
        {"dataset": name, "family": family, "nsd_tolerance_mm": 1.5, "labels": "1:a"}
        for name, family in dict(zip(cases.dataset, cases.family, strict=True)).items()
    ]
    blank = dict.fromkeys(("plans", "patch_size", "features", "device", "versions"), "")
    all_cells = table("cells", [*cells, *(cell | blank for cell in unfinished)])
    arms = [
        {"trainer": name, "trainer_class": name, "planner": "ExperimentPlanner", "parameters_of": ""}
        for name in trainers or all_cells.trainer.unique()
    ]
    return Tables(
        cases,
        all_cells,
        table("curves", curves),
        table("datasets", datasets),
        table("trainers", arms),
        table("versions", [{"package": "monai", "version": "1.5"}]),
    )


@pytest.fixture
def tables() -> Tables:
    """Two trainers, three datasets of two families, two folds of six cases, two seeds; ours is better in the first."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset, fold, case in product(DATASETS, range(2), range(6)):
        difficulty = rng.uniform(0.4, 0.8)
        for trainer, seed in product((PLANNED, OURS), range(2)):
            gain = 0.05 if trainer == OURS and dataset == "Dataset001_A" else 0
            dice = difficulty + gain + rng.normal(0, 0.01)
            rows.append(case_row(dataset, trainer, fold, seed, f"00{fold}{case}", dice))
    return tables_of(rows)


def results_of(tables: Tables) -> Results:
    return Results(summarise(tables), compare(tables), spreads(tables))


@pytest.fixture
def evidence(monkeypatch) -> Tables:
    """Of the size of the evidence's matrix, with two cases per fold."""
    monkeypatch.setenv("XATTNRES_DATA", "/")
    spec = read_spec(ROOT / "specs" / "cpu-evidence.yaml")
    rng = np.random.default_rng(0)
    rows = []
    for dataset in spec.datasets:
        name = Path(dataset.path).name
        more = {"configuration": dataset.configurations[0], "family": dataset.family or name}
        rows += [
            case_row(name, arm.name, fold, 0, f"{fold}{case}", rng.uniform(0.5, 0.9), **more)
            for fold, arm, case in product(spec.folds, spec.arms_of(dataset), range(2))
        ]
    return tables_of(rows, trainers=tuple(arm.name for arm in spec.trainers))


def differences_of(tables: Tables, dataset: str) -> np.ndarray:
    """By loops: per case the mean over seeds of ours - planned."""
    dice = {(row.case, row.seed, row.trainer): row.dice for row in tables.cases.itertuples() if row.dataset == dataset}
    cases = dict.fromkeys(case for case, _, _ in dice)
    return np.array([np.mean([dice[case, s, OURS] - dice[case, s, PLANNED] for s in range(2)]) for case in cases])


class TestStatistics:
    def test_holm_by_hand(self):
        # 4 * 0.01, 3 * 0.02, then never less than before: 2 * 0.03, 1 * 0.5
        assert holm([0.03, 0.01, 0.5, 0.02]) == [0.06, 0.04, 0.5, 0.06]
        assert holm([0.4, 0.9]) == [0.8, 0.9]
        assert holm([0.01, 0.012]) == [0.02, 0.02]

    def test_signed_ranks_of_six_wins(self):
        # All of 2^6 sign patterns are equally likely, two are as extreme.
        assert wilcoxon(np.arange(1.0, 7)) == pytest.approx(2 / 64)
        assert wilcoxon(np.zeros(5)) == 1.0

    def test_the_interval_is_that_of_resampled_means(self):
        values = np.random.default_rng(3).normal(0.02, 0.05, 30)
        rng = np.random.default_rng(7)
        means = values[rng.integers(0, 30, (40000, 30))].mean(axis=1)
        found = sample(values)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), abs=7e-4)
        assert found.mean == pytest.approx(values.mean(), abs=1e-6)
        assert sample(values) == found
        assert math.isnan(sample(values[:1]).low)

    def test_a_pair_is_compared_over_cases_with_seeds_averaged_first(self, tables):
        row = next(row for row in compare(tables) if row["dataset"] == "Dataset001_A" and row["metric"] == "dice")
        expected = differences_of(tables, "Dataset001_A")
        assert (row["first"], row["second"]) == (OURS, PLANNED)
        assert (row["cases"], row["cells"], row["cells_ahead"]) == (12, 4, 4)
        assert row["difference"] == pytest.approx(expected.mean(), abs=1e-6)
        assert row["low"] < row["difference"] < row["high"]
        assert (row["wins"], row["ties"], row["losses"]) == (12, 0, 0)
        assert row["p"] == pytest.approx(stats.wilcoxon(expected).pvalue, rel=1e-5)
        # Two families.
        assert row["p_holm"] == pytest.approx(2 * row["p"], rel=1e-5)
        assert row["verdict"] == BETTER
        assert (row["seconds_per_epoch_ratio"], row["parameters_ratio"]) == (1.5, 2.0)
        assert row["peak_memory_gb_ratio"] is None

    def test_a_family_is_one_hypothesis_over_patients(self, tables):
        rows = [row for row in compare(tables) if row["family"] == "Sarcoma" and row["metric"] == "dice"]
        assert [row["dataset"] for row in rows] == ["Dataset002_CT", "Dataset003_MR", ""]
        assert [row["verdict"] for row in rows] == [None, None, NO_DIFFERENCE]
        per_patient = (differences_of(tables, "Dataset002_CT") + differences_of(tables, "Dataset003_MR")) / 2
        assert rows[2]["cases"] == 12
        assert rows[2]["p"] == pytest.approx(stats.wilcoxon(per_patient).pvalue, rel=1e-4)
        assert rows[2]["difference"] == pytest.approx(per_patient.mean(), abs=1e-6)

    def test_only_common_folds_and_seeds_are_compared(self, tables):
        lacks = (tables.cases.trainer == OURS) & (tables.cases.fold == 1) & (tables.cases.seed == 1)
        cases = tables.cases[~lacks].copy()
        # Were they compared, these would make a difference.
        alone = (cases.trainer == PLANNED) & (cases.fold == 1) & (cases.seed == 1)
        cases.loc[alone, "dice"] = 0.0
        row = compare(replace(tables, cases=cases))[0]
        assert (row["cells"], row["cases"]) == (3, 12)
        assert row["difference"] == pytest.approx(0.05, abs=0.01)

    def test_costs_are_compared_over_common_folds_and_seeds(self, tables):
        cases = tables.cases[(tables.cases.trainer == PLANNED) | (tables.cases.seed == 0)]
        cells = tables_of(cases.to_dict("records")).cells
        # Of seed 1, which ours lacks.
        cells.loc[(cells.trainer == PLANNED) & (cells.seed == 1), "seconds_per_epoch"] = 1000.0
        row = compare(replace(tables, cases=cases, cells=cells))[0]
        assert (row["cells"], row["seconds_per_epoch_ratio"]) == (2, 1.5)

    def test_times_of_two_machines_are_not_compared(self, tables):
        cells = tables.cells
        cells["peak_memory_gb"] = 1.0
        of_second = (cells.trainer == PLANNED) & (cells.fold == 1)
        cells.loc[of_second, ["device", "seconds_per_epoch", "parameters"]] = ["another", 1000.0, 500_000]
        row = compare(replace(tables, cells=cells))[0]
        # The four trainings: two on one machine, two that are not.
        assert (row["cells"], row["seconds_per_epoch_ratio"], row["peak_memory_gb_ratio"]) == (4, 1.5, 1.0)
        assert row["parameters_ratio"] > 2
        cells.loc[cells.trainer == PLANNED, "device"] = "another"
        assert compare(replace(tables, cells=cells))[0]["seconds_per_epoch_ratio"] is None

    def test_costs_are_those_on_the_device_of_most_trainings(self, tables):
        cells = tables.cells
        cells.loc[cells.fold == 1, ["device", "seconds_per_epoch", "parameters"]] = ["another", 1000.0, 9]
        # Of the first dataset, one training more is on the first device, of the others all on the second.
        cells.loc[cells[(cells.trainer == OURS) & (cells.fold == 1)].index[0], "device"] = "cpu"
        for dataset in list(DATASETS)[1:]:
            cells.loc[cells[(cells.dataset == dataset) & (cells.fold == 0)].index, "device"] = "another"
        rows = [row for row in summarise(replace(tables, cells=cells)) if row["label"] == "mean"]
        shown = [(row["trainer"], row["cost_device"], row["seconds_per_epoch"]) for row in rows]
        assert shown[:2] == [(PLANNED, "cpu", 10.0), (OURS, "cpu", 15.0)]
        assert [device for _, device, _ in shown[2:]] == 4 * ["another"]
        # Parameters do not depend on it.
        assert rows[0]["parameters"] == (1_234_567 + 9) / 2
        text = markdown(replace(tables, cells=cells), results_of(replace(tables, cells=cells)), [])
        assert text.count("Time and memory: cpu.") == 1 and text.count("Time and memory: another.") == 2

    @pytest.mark.parametrize("known, device, seconds", [(1, "cpu", [10.0, None]), (0, "", [1000.0, 1000.0])])
    def test_an_unknown_device_does_not_count_beside_a_known_one(self, tables, known, device, seconds):
        cells = tables.cells
        cells.loc[cells.index[known:], ["device", "seconds_per_epoch"]] = ["", 1000.0]
        rows = summarise(replace(tables, cells=cells))[:2]
        assert [row["trainer"] for row in rows] == [PLANNED, OURS]
        assert [row["cost_device"] for row in rows] == 2 * [device]
        assert [row["seconds_per_epoch"] for row in rows] == seconds

    def test_nothing_is_warned_of(self, tables):
        # Validation comes before test: names that are not sorted.
        cases = pandas.concat([tables.cases, tables.cases.assign(set="test")])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compare(replace(tables, cases=cases))

    @pytest.mark.parametrize("sign, verdict", [(1, BETTER), (-1, WORSE)])
    def test_the_test_decides_and_not_the_interval(self, sign, verdict):
        def rows(number: int) -> list[dict]:
            return [
                case_row("Dataset001_A", trainer, 0, 0, str(i), 0.5 + (trainer == OURS) * sign * (0.01 + 0.001 * i))
                for i in range(number)
                for trainer in (PLANNED, OURS)
            ]

        assert compare(tables_of(rows(6)))[0]["verdict"] == verdict
        # Five cases can never be significant, however narrow their interval.
        few = compare(tables_of(rows(5)))[0]
        assert few["low"] * few["high"] > 0
        assert few["verdict"] == NO_DIFFERENCE

    def test_ranks_and_mean_that_point_apart_show_nothing(self):
        gains = [0.01] * 20 + [-0.9]
        rows = [
            case_row("Dataset001_A", trainer, 0, 0, str(i), 0.05 if trainer == PLANNED else 0.05 + gain)
            for i, gain in enumerate(gains)
            for trainer in (PLANNED, OURS)
        ]
        row = compare(tables_of(rows))[0]
        assert row["p_holm"] < 0.05
        assert row["difference"] < 0
        assert row["verdict"] == NO_DIFFERENCE

    def test_equal_cases_do_not_turn_the_ranks(self):
        # With ranks for 200 ties, the 21 small losses would outweigh the 19 large gains.
        differences = np.concatenate([np.zeros(200), -0.001 * np.arange(1, 22), 0.03 + 0.001 * np.arange(19)])
        assert wilcoxon(differences) < 0.05
        assert direction(differences) == BETTER
        assert direction(np.zeros(3)) == NO_DIFFERENCE

    def test_empty_references_are_in_no_mean_and_counted(self):
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

    def test_spreads_by_hand(self):
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


def ball(radius: float, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    centred = (np.arange(size) - size // 2 for size in shape)
    axes = np.meshgrid(*(places * step for places, step in zip(centred, spacing, strict=True)), indexing="ij")
    return sum(axis**2 for axis in axes) <= radius**2


class TestMetrics:
    def test_concentric_balls_in_an_anisotropic_image(self):
        spacing, shape = (2.5, 1.0, 0.8), (28, 70, 86)
        small, large = ball(20, spacing, shape), ball(26, spacing, shape)
        metrics = measure(small, large, spacing, 3.0)
        # 2 * 20^3 / (20^3 + 26^3); surfaces 6 mm apart.
        assert metrics.dice == pytest.approx(0.6255, abs=0.005)
        assert metrics.hd95 == pytest.approx(6, abs=1)
        assert metrics.nsd == 0
        assert measure(small, large, spacing, 8.0).nsd == 1
        assert measure(large, small, spacing, 3.0).hd95 == metrics.hd95

    def test_a_box_moved_along_the_coarse_axis(self):
        reference, prediction = np.zeros((2, 30, 60, 60), bool)
        reference[5:15, 10:50, 10:50] = True
        prediction[7:17, 10:50, 10:50] = True
        spacing = (3.0, 1.0, 1.0)
        assert measure(reference, prediction, spacing, 6.0).nsd == 1
        metrics = measure(reference, prediction, spacing, 5.0)
        assert metrics.dice == pytest.approx(0.8)
        assert metrics.hd95 == pytest.approx(6)
        # Wrong of 2 * 8000 mm2: the end faces outside the other box, 40 mm x 40 mm, and of those inside it what is
        # more than 5 mm from its sides, 30 mm x 30 mm.
        assert metrics.nsd == pytest.approx(1 - 2 * (1600 + 900) / 16000, abs=0.03)

    def test_squares_in_two_dimensions(self):
        reference, prediction = np.zeros((2, 50, 50), bool)
        reference[10:30, 10:30] = True
        prediction[10:30, 13:33] = True
        metrics = measure(reference, prediction, (1.0, 2.0), 1.0)
        assert metrics.dice == pytest.approx(0.85)
        assert metrics.hd95 == pytest.approx(6)
        assert 0 < metrics.nsd < 1
        assert measure(reference, prediction, (1.0, 2.0), 6.0).nsd == 1

    def test_what_is_defined_of_empty_masks(self):
        nothing, something = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
        both = measure(nothing, nothing, (1, 1, 1), 1.0)
        assert np.isnan([both.dice, both.nsd, both.hd95]).all()
        for reference, prediction in ((nothing, something), (something, nothing)):
            one = measure(reference, prediction, (1, 1, 1), 1.0)
            assert (one.dice, one.nsd, one.hd95) == (0.0, 0.0, math.inf)
        # A surface at the border of the image is one.
        whole = measure(something, something, (1, 1, 1), 0.0)
        assert (whole.dice, whole.nsd, whole.hd95) == (1.0, 1.0, 0.0)

    def test_labels_and_regions(self):
        labels = {"background": 0, "whole": [1, 2], "core": [2], "rim": 1, "ignore": 3}
        assert labels_or_regions(labels) == {"whole": (1, 2), "core": (2,), "rim": (1,)}


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A benchmark's folder with a finished cell and one that failed: two cases, regions and voxels to be ignored."""
    root = tmp_path / "benchmark"
    dataset = root / "nnUNet_raw" / "Dataset001_A"
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset.mkdir(parents=True)
    content = {"labels": labels, "regions_class_order": [1, 2], "file_ending": ".nii.gz", "channel_names": {"0": "MR"}}
    (dataset / "dataset.json").write_text(json.dumps(content))
    preprocessed = root / "nnUNet_preprocessed" / "Dataset001_A"
    preprocessed.mkdir(parents=True)
    small, wide = (
        {"patch_size": [8, 16, 16], "batch_size": 2, "architecture": {"arch_kwargs": {"features_per_stage": features}}}
        for features in ([8, 16], [16, 32])
    )
    plans = {"configurations": {"small": small | {"training": {"num_iterations_per_epoch": 30}}, "small_wide": wide}}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": ["1", "2"]}]))
    write_spec(
        Spec(
            datasets=(Dataset(path=str(dataset), name="Dataset001_A", family="A", nsd_tolerance_mm=2.0),),
            configurations=(Configuration("small", "3d_fullres", features=8),),
            trainers=(Arm(PLANNED, PLANNED), Arm("wide", PLANNED, width=2.0)),
            folds=(0,),
            seeds=(5,),
        ),
        root / "spec.yaml",
    )
    cells = [
        Cell("Dataset001_A", "small", name, PLANNED, "nnUNetPlans", configuration, 0, 5, 2, 123, test=True)
        for name, configuration in ((PLANNED, "small"), ("wide", "small_wide"))
    ]
    write_cells(root, cells)
    results = {"epochs": 2, "seconds_per_epoch": 3.5, "peak_memory_gb": None, "versions": {"torch": "2.8"}}
    cells[0].write_record(root, "finished", **results, device="cpu")
    cells[1].write_record(root, "failed", reason="because")
    folder = cells[0].folder(root)
    reference, prediction = np.zeros((2, 10, 20, 20), np.uint8)
    reference[2:8, 5:15, 5:15] = 1
    reference[4:6, 5:15, 5:15] = 2
    prediction[2:8, 5:15, 5:13] = 1
    # Nobody knows what is right here.
    reference[9], prediction[9] = 3, 2
    for case, kind, references in (
        ("1", "validation", "labelsTr"),
        ("2", "validation", "labelsTr"),
        ("9", "test", "labelsTs"),
    ):
        write_image(reference, dataset / references / f"{case}.nii.gz")
        write_image(prediction, folder / kind / f"{case}.nii.gz")
    logging = {
        "train_losses": [1.0, np.float32(0.5)],
        "val_losses": [1.0, 0.25],
        "mean_fg_dice": [0.1, np.float64(0.75)],
    }
    checkpoint = {"trainer_name": PLANNED, "init_args": {}, "network_weights": {}, "logging": logging}
    torch.save(checkpoint, folder / "checkpoint_final.pth")
    return root


def write_image(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(image, str(path))


def measured(benchmark: Path) -> Tables:
    return collect(benchmark, lambda tables: None)


PREDICT_AGAIN = "delete {folder}/validation and {folder}/cell.json, run again"


class TestFolder:
    def test_tables_of_a_benchmark(self, benchmark, tmp_path):
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "out")]) == 0
        tables = read_tables(tmp_path / "out")
        cases = tables.cases.set_index(["set", "case", "label"])
        assert list(cases.index) == [
            (kind, case, label)
            for kind, case in (("validation", "1"), ("validation", "2"), ("test", "9"))
            for label in ("whole", "core")
        ]
        whole, core = cases.loc[("validation", "2", "whole")], cases.loc[("test", "9", "core")]
        assert (whole.trainer, whole.fold, whole.seed, whole.family) == (PLANNED, 0, 5, "A")
        assert (whole.reference_voxels, whole.predicted_voxels) == (600, 480)
        assert whole.dice == pytest.approx(960 / 1080, rel=1e-5)
        # Its side is 2 mm off, as far as the tolerance.
        assert (whole.nsd, whole.hd95) == (1.0, 2.0)
        assert (core.reference_voxels, core.predicted_voxels) == (200, 0)
        assert (core.dice, core.nsd, core.hd95) == (0.0, 0.0, math.inf)
        assert list(tables.cells.state) == ["finished", "failed"]
        assert tables.cells.seconds_per_epoch[0] == 3.5
        assert tables.cells.patch_size[0] == "8x16x16"
        assert list(tables.cells.features) == ["8 16", "16 32"]
        assert tables.cells.iterations[0] == 30 and tables.cells.iterations.isna()[1]
        assert list(tables.curves.pseudo_dice) == [0.1, 0.75]
        assert list(tables.trainers.trainer) == [PLANNED, "wide"]
        assert list(tables.trainers.width.fillna(0)) == [0, 2]
        assert set(tables.versions.package) >= {"monai", "scipy", "pandas", "matplotlib"}
        text = (tmp_path / "out" / "report.md").read_text()
        assert "| wide | nnUNetTrainerPlanned | ExperimentPlanner | 2x | - |" in text
        assert "| Dataset001_A | small | Planned | nnUNetPlans | 8x16x16 | 2 | 8 16 | 30 | 2 |" in text
        assert f"scipy {scipy.__version__}" in text
        assert tables.datasets.to_dict("records") == [
            {"dataset": "Dataset001_A", "family": "A", "nsd_tolerance_mm": 2.0, "labels": "1+2:whole;2:core"}
        ]
        assert main(["benchmark", "report", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
        for name in ("report.md", "report.json", "cases.csv", "cells.csv"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    def test_a_training_that_finishes_while_a_report_is_made_is_of_the_next(self, benchmark, tmp_path, monkeypatch):
        second = read_cells(benchmark)[1]

        def measured_tables(*given):
            second.write_record(benchmark, "finished", epochs=2)
            return metrics.measured_tables(*given)

        monkeypatch.setattr(collecting, "measured_tables", measured_tables)
        run_report(benchmark, tmp_path / "out")
        assert list(read_tables(tmp_path / "out").cells.state) == ["finished", "failed"]

    def test_nothing_is_measured_for_a_report_that_cannot_be_kept(self, benchmark, tmp_path, monkeypatch):
        write_tables(tables_of([case_row("Dataset001_A", OURS, 0, 0, "1", 0.5)]), tmp_path / "other")
        monkeypatch.delattr(metrics, "measure")
        with pytest.raises(XAttnResError, match="would lack"):
            run_report(benchmark, tmp_path / "other")

    def test_damaged_tables_of_an_earlier_report(self, benchmark, tmp_path):
        write_tables(measured(benchmark), tmp_path / "report")
        new = without_trainings(benchmark, tmp_path / "new")
        take_over(read_tables(tmp_path / "report"), new)
        (folder,) = (new / "earlier").iterdir()
        (folder / "cases.csv").write_text("")
        with pytest.raises(
            XAttnResError, match=rf"damaged \(.*\): delete {folder}, and run again with --continue-from"
        ):
            run_report(new, tmp_path / "again")

    def test_what_another_machine_has_finished_is_taken_over_from_its_report(
        self, benchmark, tmp_path, monkeypatch, capsys
    ):
        run_report(benchmark, tmp_path / "report")
        new = without_trainings(benchmark, tmp_path / "new")
        cells = read_cells(new)
        for _ in range(2):  # the second time it is there already
            take_over(read_tables(tmp_path / "report"), new)
            assert [cell.state(new) for cell in cells] == ["finished", "waiting"]
        assert re.findall(r"(\d) finished trainings: (\d) taken over, (\d)", capsys.readouterr().out) == [
            ("1", "1", "0"),
            ("1", "0", "1"),
        ]
        # What measures here has measured nothing.
        monkeypatch.setattr(metrics, "version", lambda package: "another")
        run_report(new, tmp_path / "again")
        for name in ("cases.csv", "curves.csv", "versions.csv", "summary.csv"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "report" / name).read_bytes()
        again, before = (read_tables(tmp_path / name).cells for name in ("again", "report"))
        pandas.testing.assert_frame_equal(again[:1], before[:1])
        assert list(again.state) == ["finished", "waiting"]
        # Without what the report has told it is to be trained.
        shutil.rmtree(new / "earlier")
        assert [cell.state(new) for cell in cells] == ["waiting", "waiting"]
        take_over(read_tables(tmp_path / "report"), new)
        assert cells[0].state(new) == "finished"

    def test_trainings_of_three_machines_make_one_report(self, benchmark, tmp_path):
        """The report has the matrix's order, whatever was finished where and first."""
        write_cells(benchmark, [*read_cells(benchmark), replace(read_cells(benchmark)[1], seed=6)])
        write_tables(measured(benchmark), tmp_path / "report")
        for name, seed, dice in (("second", "5", "0.25"), ("third", "6", "0.75")):
            # What the first cell has, as another one's.
            shutil.copytree(tmp_path / "report", tmp_path / name)
            for kind in ("cases", "curves", "cells"):
                path = tmp_path / name / f"{kind}.csv"
                table = pandas.read_csv(path, dtype=str, keep_default_na=False)
                table = table[table.trainer == PLANNED].assign(trainer="wide", seed=seed)
                if kind == "cases":
                    table["dice"] = dice
                if kind == "cells":
                    planned = pandas.read_csv(tmp_path / "report" / path.name, dtype=str, keep_default_na=False)
                    table["features"] = planned[planned.trainer == "wide"].features.iloc[0]
                    table["iterations"] = ""
                table.to_csv(path, index=False)
        versions = pandas.read_csv(tmp_path / "second" / "versions.csv", dtype=str)
        versions.loc[versions.package == "monai", "version"] = "0.0.1"
        versions.to_csv(tmp_path / "second" / "versions.csv", index=False)
        for name in ("third", "second"):
            take_over(read_tables(tmp_path / name), benchmark)
        # A report may tell of what has been taken over from another one.
        write_tables(measured(benchmark), tmp_path / "two_of_them")
        shutil.rmtree(third := read_cells(benchmark)[2].folder(benchmark))
        take_over(read_tables(tmp_path / "two_of_them"), benchmark)
        assert third.is_dir()
        write_tables(measured(benchmark), tmp_path / "all")
        cases = read_tables(tmp_path / "all").cases
        assert list(cases.trainer) == 6 * [PLANNED] + 12 * ["wide"]
        assert list(cases.seed) == 12 * [5] + 6 * [6]
        assert list(cases.dice[6:]) == 6 * [0.25] + 6 * [0.75]
        assert list(cases.dice[:6]) == list(read_tables(tmp_path / "report").cases.dice)
        # Whatever has measured is named.
        versions = read_tables(tmp_path / "all").versions
        assert set(versions[versions.package == "monai"].version) == {"0.0.1", metrics.version("monai")}

    def test_a_cell_that_is_trained_here_is_not_taken_over(self, benchmark, tmp_path):
        write_tables(measured(benchmark), tmp_path / "report")
        new = without_trainings(benchmark, tmp_path / "new")
        first, _ = read_cells(new)
        with locked(first.folder(new) / LOCK, 0):
            first.write_record(new, "running")
            take_over(read_tables(tmp_path / "report"), new)
        assert first.record(new)["state"] == "running"

    @pytest.mark.parametrize(
        "file, old, new, told",
        [
            ("cells.csv", "finished,nnUNetPlans,", "finished,OtherPlans,", "plans='OtherPlans' (here 'nnUNetPlans')"),
            ("cells.csv", ",8x16x16,", ",8x16x32,", "patch_size='8x16x32' (here '8x16x16')"),
            ("cells.csv", ",2,8 16,", ",4,8 16,", "batch_size=4 (here 2)"),
            ("cells.csv", ",8 16,", ",8 32,", "features='8 32' (here '8 16')"),
            ("cells.csv", ",30,2,", ",40,2,", "iterations=40 (here 30)"),
            ("cells.csv", ",30,2,", ",30,3,", "epochs=3 (here 2)"),
            ("cells.csv", ",30,2,", ",30,,", "epochs=None (here 2)"),
            ("cells.csv", ",123,", ",124,", "parameters=124 (here 123)"),
            ("datasets.csv", ",0.333333,", ",0.5,", "nsd_tolerance_mm=0.5 (here 0.333333)"),
            ("datasets.csv", "1+2:whole", "1:whole", "labels='1:whole;2:core' (here '1+2:whole;2:core')"),
            ("trainers.csv", "ExperimentPlanner,,\n", "ExperimentPlanner,,1.5\n", "width=1.5 (here None)"),
            ("cases.csv", "test,9,", "test,8,", "other cases"),
        ],
    )
    def test_other_trainings_are_not_taken_over(self, file, old, new, told, benchmark, tmp_path):
        # A tolerance that a CSV file does not hold to the last digit.
        edit(benchmark / "spec.yaml", "nsd_tolerance_mm: 2.0", f"nsd_tolerance_mm: {1 / 3}")
        write_tables(measured(benchmark), tmp_path / "report")
        other = shutil.copytree(tmp_path / "report", tmp_path / "other")
        edit(other / file, old, new)
        here = without_trainings(benchmark, tmp_path / "new")
        title = read_cells(here)[0].title
        with pytest.raises(XAttnResError, match=re.escape(f"such as {title}: {told}: give a report on the same spec")):
            take_over(read_tables(other), here)
        assert not (here / "earlier").exists()
        take_over(read_tables(tmp_path / "report"), here)
        assert read_cells(here)[0].state(here) == "finished"

    def test_a_report_of_trainings_that_are_gone_is_not_overwritten(self, benchmark, tmp_path, capsys):
        write_tables(measured(benchmark), tmp_path / "one")
        new = without_trainings(benchmark, tmp_path / "new")
        _, second = read_cells(new)
        shutil.copytree(read_cells(benchmark)[0].folder(benchmark), second.folder(new))
        second.write_record(new, "finished", epochs=2)
        before = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
        assert main(["benchmark", "report", str(new), "-o", str(tmp_path / "one")]) == 1
        lacking = "is a report with trainings that this one would lack (1 of 1): choose another -o"
        assert lacking in capsys.readouterr().err
        # The same names are not the same trainings.
        edit(tmp_path / "one" / "cells.csv", ",30,2,", ",30,20,")
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "one")]) == 1
        assert lacking in capsys.readouterr().err
        edit(tmp_path / "one" / "cells.csv", ",30,20,", ",30,2,")
        assert {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()} == before
        take_over(read_tables(tmp_path / "one"), new)
        assert main(["benchmark", "report", str(new), "-o", str(tmp_path / "one")]) == 0
        assert len(read_tables(tmp_path / "one").finished) == 2
        # One that is damaged may be mended.
        edit(tmp_path / "one" / "cells.csv", ",state,", ",is,")
        assert main(["benchmark", "report", str(new), "-o", str(tmp_path / "one")]) == 1
        assert "holds a damaged report, which may be mended: choose another -o" in capsys.readouterr().err
        # One that was interrupted is made again.
        (tmp_path / "one" / "curves.csv").unlink()
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "one")]) == 0

    def test_a_benchmark_is_measured_and_not_reported_from_old_tables(self, benchmark, tmp_path, capsys):
        (benchmark / "cases.csv").write_text("of an earlier report")
        run_report(benchmark, tmp_path / "out")
        assert len(read_tables(tmp_path / "out").cases) == 6
        assert main(["benchmark", "report", str(benchmark), "-o", str(benchmark)]) == 1
        assert "is the folder of a benchmark: choose another -o" in capsys.readouterr().err

    def test_no_more_cases_are_in_memory_than_there_are_workers(self, benchmark, monkeypatch):
        monkeypatch.setattr(metrics, "NUM_WORKERS", "1")
        threads = set()

        def note(*masks) -> metrics.Metrics:
            threads.add(threading.get_ident())
            return metrics.Metrics(1.0, 1.0, 0.0, 1, 1)

        monkeypatch.setattr(metrics, "measure", note)
        measured(benchmark)
        assert len(threads) == 1

    @pytest.mark.parametrize(
        "damage, message, mended",
        [
            (lambda folder: (folder / "validation" / "2.nii.gz").unlink(), "is finished, but", PREDICT_AGAIN),
            (
                lambda folder: (folder / "validation" / "2.nii.gz").write_bytes(b"no image"),
                "cannot read",
                PREDICT_AGAIN,
            ),
            (
                lambda folder: write_image(np.zeros((3, 3, 3), np.uint8), folder / "test" / "9.nii.gz"),
                "the shape (3, 3, 3)",
                PREDICT_AGAIN.replace("validation", "test"),
            ),
            (
                lambda folder: (folder / "checkpoint_final.pth").unlink(),
                "checkpoint_final.pth does not exist",
                "delete {folder}, run again",
            ),
            (
                lambda folder: torch.save({"extra": Path("here")}, folder / "checkpoint_final.pth"),
                "when it is read: let its trainer store numbers and tensors only",
                "numbers and tensors only",
            ),
            (lambda folder: edit(folder / "cell.json", "finished", "failed"), "none of 2 cells is finished", "status`"),
        ],
    )
    def test_a_damaged_cell_is_said_in_one_line(self, benchmark, tmp_path, capsys, damage, message, mended):
        (folder,) = benchmark.glob("seed_5/*/*/*__small/fold_0")
        damage(folder)
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "out")]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-xattnres: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert lines[0].endswith(mended.format(folder=folder))


class TestReport:
    def test_the_committed_report_follows_from_its_tables(self, tmp_path, monkeypatch):
        """But for figures, whose bytes depend on what draws them."""
        folder = ROOT / "results" / "cpu-evidence"
        figures = re.findall(r"!\[.*\]\((.*)\.png\)", (folder / "report.md").read_text())
        monkeypatch.setattr(reporting, "_draw", lambda *given: figures)
        run_report(folder, tmp_path)
        committed = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix not in (".png", ".pdf")}
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == committed

    def test_a_report_is_rebuilt_from_its_csv_files_byte_for_byte(self, tables, tmp_path):
        write_tables(tables, tmp_path)
        for source, output in ((tmp_path, "one"), (tmp_path / "one", "two")):
            assert main(["benchmark", "report", str(source), "-o", str(tmp_path / output)]) == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
        assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
        figures = ["paired_differences", *(f"dice_{name}_small_validation" for name in DATASETS)]
        figures += [f"curves_{name}_small" for name in DATASETS]
        written = {"cases", "cells", "curves", "datasets", "trainers", "versions", "summary", "comparisons", "spreads"}
        expected = {f"{name}.csv" for name in written} | {"report.md", "report.json"}
        assert files.keys() == expected | {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
        # A case called 0003 is no number.
        assert b",0003,a," in files["cases.csv"]
        json.loads(files["report.json"], parse_constant=pytest.fail)
        text = files["report.md"].decode()
        assert "| XAttnRes - Planned | family Sarcoma, by patient | - | - | 12 |" in text
        assert "| a | Planned | 4 | 12 |" in text
        assert text.count("1.50x | 2.00x | - |") == 2 * len(DATASETS)
        assert "24 of 24 trainings of the matrix are finished" in text

    def test_a_family_without_common_names_is_not_to_be_trusted(self, tables):
        told = "**Dataset002_CT and Dataset003_MR are of the family Sarcoma and have no name of a case in common"
        renamed = tables.cases.dataset == "Dataset003_MR"
        names = tables.cases.case.where(~renamed, "MR_" + tables.cases.case)
        assert told not in markdown(tables, results_of(tables), [])
        of_others = replace(tables, cases=tables.cases.assign(case=names))
        assert told in markdown(of_others, results_of(of_others), [])
        # Other folds are other patients.
        fold_of = {"Dataset002_CT": 0, "Dataset003_MR": 1}
        kept = tables.cases.fold == tables.cases.dataset.map(fold_of).fillna(tables.cases.fold)
        partial_matrix = tables_of(tables.cases[kept].to_dict("records"))
        assert told not in markdown(partial_matrix, results_of(partial_matrix), [])

    def test_trainers_have_the_order_of_the_spec(self, tmp_path):
        # The first dataset lacks the first trainer.
        trained = {"Dataset001_A": ("wide", OURS), "Dataset002_CT": (OURS, "wide", PLANNED)}
        rows = [
            case_row(dataset, trainer, 0, 0, str(case), 0.5)
            for dataset, trainers in trained.items()
            for trainer in trainers
            for case in range(2)
        ]
        write_tables(tables_of(rows, trainers=(PLANNED, OURS, "wide")), tmp_path)
        run_report(tmp_path, tmp_path / "out")
        comparisons = pandas.read_csv(tmp_path / "out" / "comparisons.csv")
        pairs = comparisons[["first", "second"]].drop_duplicates().to_numpy().tolist()
        assert pairs == [[OURS, PLANNED], ["wide", PLANNED], ["wide", OURS]]
        summary = pandas.read_csv(tmp_path / "out" / "summary.csv")
        assert list(summary.trainer[summary.label == "mean"]) == [OURS, "wide", PLANNED, OURS, "wide"]

    def test_cells_that_are_missing_are_named(self, tables, tmp_path, capsys):
        cell = {"dataset": "Dataset001_A", "configuration": "small", "trainer": "nnUNetTrainerNoSkip", "fold": 1}
        unfinished = [cell | {"seed": 0, "state": "failed"}, cell | {"seed": 1, "state": "waiting"}]
        lacks = (tables.cases.trainer == OURS) & (tables.cases.fold == 1) & (tables.cases.dataset == "Dataset001_A")
        write_tables(tables_of(tables.cases[~lacks].to_dict("records"), tuple(unfinished)), tmp_path)
        run_report(tmp_path, tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert "22 of 24 trainings of the matrix are finished" in text
        assert "- Dataset001_A, small, NoSkip: fold 1 seed 0 (failed), fold 1 seed 1 (waiting)" in text
        assert "| a | XAttnRes | 2* | 6 |" in text
        assert text.count("not to be compared with the other rows") == 1
        assert "| Dataset001_A, small, validation | 1 | 4 | - | - | - | XAttnRes, NoSkip |" in text

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda folder: (folder / "cells.csv").unlink(), "cannot read"),
            (lambda folder: edit(folder / "cases.csv", ",nsd,", ",surface,"), "cases.csv has no column nsd"),
            (lambda folder: edit(folder / "cases.csv", ",10,10\n", ",ten,10\n"), "cases.csv is damaged"),
            (lambda folder: edit(folder / "cells.csv", "Dataset003", "Dataset009"), "take files of one report"),
            (lambda folder: edit(folder / "datasets.csv", "Sarcoma", "other"), "of family Sarcoma"),
            (lambda folder: edit(folder / "trainers.csv", f"{OURS},{OURS}", "b,b"), f"lacks {OURS}"),
            (lambda folder: edit(folder / "cells.csv", "finished", "failed"), "no cell is finished"),
            (lambda folder: edit(folder / "cases.csv", "0003", "0002"), "twice"),
            (lambda folder: (folder / "cases.csv").unlink(), "no matrix.json"),
            (lambda folder: (folder / "cases.csv").write_text(""), "cases.csv is damaged"),
        ],
    )
    def test_damage_is_said_in_one_line(self, tables, tmp_path, capsys, damage, message):
        write_tables(tables, tmp_path)
        damage(tmp_path)
        assert main(["benchmark", "report", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()

    def test_an_output_that_cannot_be_written(self, tables, tmp_path, capsys):
        write_tables(tables, tmp_path)
        assert main(["benchmark", "report", str(tmp_path), "-o", str(tmp_path / "cells.csv" / "out")]) == 1
        assert "choose another -o" in capsys.readouterr().err

    def test_texts_of_figures_do_not_overlap(self, tables):
        rows = [row for row in compare(tables) if row["metric"] == "dice"]
        assert_no_texts_overlap(draw_differences(rows))
        values = case_values(tables.cases)
        assert_no_texts_overlap(draw_cases(values[values.dataset == "Dataset001_A"], [PLANNED, OURS]))

    def test_eight_trainers_are_readable(self, evidence):
        results = results_of(evidence)
        # 7 on one dataset, 4 on three of them and on a family.
        rows = [row for row in results.with_first if row["metric"] == "dice"]
        assert len(rows) == 7 + 4 * 4
        assert_no_texts_overlap(draw_differences(rows))
        assert_no_texts_overlap(draw_differences([row for row in rows if row["dataset"] == "Task04_Hippocampus"]))
        trainers = list(evidence.trainers.trainer)
        values = case_values(evidence.cases)
        assert_no_texts_overlap(draw_cases(values[values.dataset == "Task04_Hippocampus"], trainers))
        assert_no_texts_overlap(draw_curves(evidence.curves[evidence.curves.configuration == "2d_cpu"], trainers))
        text, _, other_pairs = markdown(evidence, results, []).partition("other pairs\n")
        assert text.count("XAttnResBlock - Planned |") == 1 + 2 * 5
        assert "PlannedSameParameters - XAttnRes |" not in text
        assert other_pairs.count("| PlannedSameParameters - XAttnRes | Task04_Hippocampus") == 1

    def test_a_single_trainer_is_reported_alone(self, tables, tmp_path):
        alone = tables_of(tables.cases[tables.cases.trainer == OURS].to_dict("records"))
        write_tables(alone, tmp_path)
        run_report(tmp_path, tmp_path / "out")
        assert "There is no pair of trainers to compare." in (tmp_path / "out" / "report.md").read_text()
        assert read_tables(tmp_path / "out").cases.equals(read_tables(tmp_path).cases)


def without_trainings(benchmark: Path, folder: Path) -> Path:
    """The same matrix in another folder, of which nothing is trained."""
    return shutil.copytree(benchmark, folder, ignore=shutil.ignore_patterns("seed_*"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
