"""The comparison of two trainers: what is paired, what is one hypothesis, and the ratios of costs."""

import warnings
from dataclasses import replace

import numpy as np
import pandas
import pytest
from scipy import stats

from helpers.benchmark import DATASETS, OURS, PLANNED, case_row, cells_of, tables_of, two_trainers
from nnunet_xattnres.benchmark.comparisons import compare, unrelated_datasets
from nnunet_xattnres.benchmark.statistics import (
    BETTER,
    DIFFERENT,
    EQUIVALENT,
    INCONCLUSIVE,
    NO_DIFFERENCE,
    WORSE,
)
from nnunet_xattnres.benchmark.summaries import summarise
from nnunet_xattnres.benchmark.tables import Tables


@pytest.fixture
def tables() -> Tables:
    return two_trainers()


def one_set(differences: list[float]) -> Tables:
    """One dataset, fold and seed. differences: ours - planned, one per case."""
    rows = [
        case_row("Dataset001_A", trainer, 0, 0, str(case), 0.5 + difference * (trainer == OURS))
        for case, difference in enumerate(differences)
        for trainer in (PLANNED, OURS)
    ]
    return tables_of(rows)


def differences_of(tables: Tables, dataset: str) -> np.ndarray:
    """By loops: per case the mean over seeds of ours - planned."""
    dice = {(row.case, row.seed, row.trainer): row.dice for row in tables.cases.itertuples() if row.dataset == dataset}
    cases = dict.fromkeys(case for case, _, _ in dice)
    return np.array([np.mean([dice[case, s, OURS] - dice[case, s, PLANNED] for s in range(2)]) for case in cases])


class TestDifferences:
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

    def test_a_name_in_validation_and_test_is_two_patients(self):
        gain = {"validation": 0.1, "test": 0.3}
        rows = [
            case_row(dataset, trainer, 0, 0, str(case), 0.5 + gain[kind] * (trainer == OURS), set=kind)
            for dataset in ("Dataset002_CT", "Dataset003_MR")
            for kind in gain
            for case in range(6)
            for trainer in (PLANNED, OURS)
        ]
        family = compare(tables_of(rows))[4]
        per_patient = np.repeat([0.1, 0.3], 6)
        # Two datasets of the same patients, and two sets of other ones.
        assert (family["dataset"], family["cases"], family["wins"]) == ("", 12, 12)
        assert family["p"] == pytest.approx(stats.wilcoxon(per_patient).pvalue, rel=1e-5)
        assert (family["difference"], family["verdict"]) == (pytest.approx(0.2), BETTER)

    def test_only_common_folds_and_seeds_are_compared(self, tables):
        lacks = cells_of(tables.cases, trainer=OURS, fold=1, seed=1)
        cases = tables.cases[~lacks].copy()
        # These would make a difference, if they were compared.
        cases.loc[cells_of(cases, trainer=PLANNED, fold=1, seed=1), "dice"] = 0.0
        row = compare(replace(tables, cases=cases))[0]
        assert (row["cells"], row["cases"]) == (3, 12)
        assert row["difference"] == pytest.approx(0.05, abs=0.01)

    @pytest.mark.parametrize("sign, verdict", [(1, BETTER), (-1, WORSE)])
    def test_the_test_decides_and_not_the_interval(self, sign, verdict):
        differences = [sign * (0.01 + 0.001 * case) for case in range(6)]
        assert compare(one_set(differences))[0]["verdict"] == verdict
        # Five cases can never be significant, however narrow their interval.
        few = compare(one_set(differences[:5]))[0]
        assert few["low"] * few["high"] > 0
        assert few["verdict"] == NO_DIFFERENCE

    def test_ranks_and_mean_that_point_apart_show_nothing(self):
        row = compare(one_set([0.01] * 20 + [-0.4]))[0]
        assert row["p_holm"] < 0.05
        assert row["difference"] < 0
        assert row["verdict"] == NO_DIFFERENCE

    def test_nothing_is_warned_of(self, tables):
        # Validation comes before test: names that are not sorted.
        cases = pandas.concat([tables.cases, tables.cases.assign(set="test")])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compare(replace(tables, cases=cases))


class TestTrainings:
    def test_the_interval_over_trainings_stands_beside_that_over_cases(self):
        gain = {0: 0.1, 1: -0.02}
        rows = [
            case_row("Dataset001_A", trainer, fold, 0, f"{fold}{case}", 0.5 + gain[fold] * (trainer == OURS))
            for fold in gain
            for case in range(30)
            for trainer in (PLANNED, OURS)
        ]
        row = compare(tables_of(rows))[0]
        assert (row["low_of_trainings"], row["high_of_trainings"]) == (-0.02, 0.1)
        assert (row["cells"], row["cells_ahead"]) == (2, 1)
        # Over cases the gain is shown. Another training of the second kind would turn it.
        assert (row["difference"], row["verdict"]) == (pytest.approx(0.04), BETTER)
        assert row["low"] > 0

    def test_one_training_and_a_family_have_none(self, tables):
        alone = one_set([0.01, 0.02])
        of_family = next(row for row in compare(tables) if not row["dataset"])
        for row in (compare(alone)[0], of_family):
            assert np.isnan(row["low_of_trainings"]) and np.isnan(row["high_of_trainings"])


class TestPairs:
    def test_the_second_correction_is_over_families_and_pairs(self):
        rng = np.random.default_rng(0)
        trainers = (PLANNED, OURS, "nnUNetTrainerNoSkip")
        rows = [
            case_row(dataset, trainer, 0, 0, str(case), rng.uniform(0.4, 0.8))
            for dataset in ("Dataset001_A", "Dataset004_B")
            for case in range(9)
            for trainer in trainers
        ]
        found = compare(tables_of(rows))
        for is_with_first in (True, False):
            chosen = [row for row in found if (row["second"] == PLANNED) == is_with_first and row["metric"] == "dice"]
            # Two pairs of two datasets, and one pair of two.
            assert len(chosen) == (4 if is_with_first else 2)
            by_p = sorted(chosen, key=lambda row: row["p"])
            expected, largest = [], 0.0
            for rank, row in enumerate(by_p):
                largest = max(largest, min(1.0, (len(by_p) - rank) * row["p"]))
                expected.append(largest)
            assert [row["p_of_pairs"] for row in by_p] == pytest.approx(expected, rel=1e-5)
            assert all(row["p_of_pairs"] >= row["p_holm"] for row in chosen)

    def test_one_pair_has_one_correction(self, tables):
        for row in compare(tables):
            assert row["p_of_pairs"] == row["p_holm"]


def test_equivalence_is_of_dice_and_of_every_set_and_family(tables):
    rows = compare(tables)
    verdicts = [row["equivalence"] for row in rows if row["metric"] == "dice"]
    # A gain of five points, and none in the others: 0.5 points are shown for them or not.
    assert verdicts[0] == DIFFERENT and len(verdicts) == 4
    assert all(verdict in (EQUIVALENT, INCONCLUSIVE) for verdict in verdicts[1:])
    assert {row["equivalence"] for row in rows if row["metric"] == "nsd"} == {None}


class TestFamilies:
    def test_datasets_without_common_names_are_told(self, tables):
        assert unrelated_datasets(tables.cases) == []
        renamed = tables.cases.dataset == "Dataset003_MR"
        names = tables.cases.case.where(~renamed, "MR_" + tables.cases.case)
        found = unrelated_datasets(tables.cases.assign(case=names))
        assert found == [("Sarcoma", "validation", "Dataset002_CT", "Dataset003_MR")]

    def test_test_sets_without_common_names_are_told(self, tables):
        names = tables.cases.case.where(tables.cases.dataset != "Dataset003_MR", "MR_" + tables.cases.case)
        test_sets = tables.cases.assign(set="test", case=names)
        found = unrelated_datasets(pandas.concat([tables.cases, test_sets]))
        assert found == [("Sarcoma", "test", "Dataset002_CT", "Dataset003_MR")]

    def test_different_folds_are_different_patients(self, tables):
        fold_of = {"Dataset002_CT": 0, "Dataset003_MR": 1}
        kept = tables.cases.fold == tables.cases.dataset.map(fold_of).fillna(tables.cases.fold)
        assert unrelated_datasets(tables.cases[kept]) == []


class TestCostRatios:
    def test_costs_are_compared_over_common_folds_and_seeds(self, tables):
        cases = tables.cases[(tables.cases.trainer == PLANNED) | (tables.cases.seed == 0)]
        cells = tables_of(cases.to_dict("records")).cells
        # Ours lacks seed 1.
        cells.loc[cells_of(cells, trainer=PLANNED, seed=1), "seconds_per_epoch"] = 1000.0
        row = compare(replace(tables, cases=cases, cells=cells))[0]
        assert (row["cells"], row["seconds_per_epoch_cells"], row["seconds_per_epoch_ratio"]) == (2, 2, 1.5)

    def test_times_of_two_machines_are_not_compared(self, tables):
        cells = tables.cells
        cells["peak_memory_gb"] = 1.0
        cells.loc[cells_of(cells, trainer=PLANNED, fold=0, seed=1), "peak_memory_gb"] = np.nan
        of_second = cells_of(cells, trainer=PLANNED, fold=1)
        cells.loc[of_second, ["device", "seconds_per_epoch", "parameters"]] = ["another", 1000.0, 500_000]
        row = compare(replace(tables, cells=cells))[0]
        # The four trainings: two on one machine, two that are not.
        assert (row["cells"], row["seconds_per_epoch_cells"], row["seconds_per_epoch_ratio"]) == (4, 2, 1.5)
        assert (row["peak_memory_gb_cells"], row["peak_memory_gb_ratio"]) == (1, 1.0)
        assert row["parameters_ratio"] > 2
        cells.loc[cells.trainer == PLANNED, "device"] = "another"
        assert compare(replace(tables, cells=cells))[0]["seconds_per_epoch_ratio"] is None

    def test_ratios_are_of_the_device_that_the_report_names(self):
        third = "nnUNetTrainerNoSkip"
        trainings = [(PLANNED, 0), (PLANNED, 1), (PLANNED, 2), (OURS, 0), (OURS, 1), (OURS, 2), (third, 2)]
        tables = tables_of([case_row("Dataset001_A", trainer, fold, 0, "1", 0.5) for trainer, fold in trainings])
        tables.cells.loc[tables.cells.fold == 2, ["device", "seconds_per_epoch"]] = ["gpu", 1.0]
        assert {row["cost_device"] for row in summarise(tables)} == {"cpu"}
        ratios = {(row["first"], row["second"]): row["seconds_per_epoch_ratio"] for row in compare(tables)}
        # The third trainer was never trained on the CPU.
        assert ratios == {(OURS, PLANNED): 1.5, (third, PLANNED): None, (third, OURS): None}

    def test_machines_of_one_name_are_told_apart_by_their_reports(self):
        trainings = [(PLANNED, 0), (PLANNED, 1), (PLANNED, 2), (PLANNED, 3), (OURS, 0), (OURS, 1), (OURS, 2), (OURS, 3)]
        tables = tables_of([case_row("Dataset001_A", trainer, fold, 0, "1", 0.5) for trainer, fold in trainings])
        # (device, s per epoch) of the planned network, then ours: 1.5x, 2x, and a pair of two machines.
        costs = [("cpu", 10), ("cpu, report a", 100), ("cpu, report a", 100), ("gpu", 1)]
        costs += [("cpu", 15), ("cpu, report a", 200), ("cpu, report b", 9000), ("gpu", 9)]
        tables.cells[["device", "seconds_per_epoch"]] = costs
        assert compare(tables)[0]["seconds_per_epoch_ratio"] == 1.75
        rows = {row["trainer"]: row for row in summarise(tables)}
        assert {row["cost_device"] for row in rows.values()} == {"cpu, report a"}
        assert [rows[trainer]["seconds_per_epoch"] for trainer in (PLANNED, OURS)] == [100, 200]

    @pytest.mark.parametrize("device", ["", "slow and fast"])
    def test_a_device_that_is_not_one_is_not_compared(self, tables, device):
        tables.cells.device = device
        assert compare(tables)[0]["seconds_per_epoch_ratio"] is None
        assert {row["cost_device"] for row in summarise(tables)} == {""}


def test_every_pair_and_metric_is_compared(tables):
    rows = compare(tables)
    assert {(row["first"], row["second"], row["metric"]) for row in rows} == {
        (OURS, PLANNED, metric) for metric in ("dice", "nsd")
    }
    assert {row["dataset"] for row in rows} == {*DATASETS, ""}
