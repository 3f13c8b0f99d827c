"""A report on tables: its files, its Markdown and its figures, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest

from helpers.benchmark import (
    DATASETS,
    OURS,
    PLANNED,
    ROOT,
    case_row,
    cells_of,
    edit,
    tables_of,
    two_trainers,
)
from helpers.routing import assert_no_texts_overlap
from nnunet_xattnres.benchmark import report
from nnunet_xattnres.benchmark.comparisons import case_values
from nnunet_xattnres.benchmark.drawing import draw_cases, draw_curves, draw_differences, draw_learning
from nnunet_xattnres.benchmark.learning_curves import learning_curves
from nnunet_xattnres.benchmark.markdown import markdown
from nnunet_xattnres.benchmark.report import run_report
from nnunet_xattnres.benchmark.results import results_of
from nnunet_xattnres.benchmark.spec import read_spec
from nnunet_xattnres.benchmark.statistics import holm
from nnunet_xattnres.benchmark.tables import Tables, read_tables, write_tables
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError

of_every_committed_report = pytest.mark.parametrize(
    "evidence", [ROOT / "results" / "evidence", ROOT / "results" / "cpu-evidence"], ids=lambda folder: folder.name
)
WRITTEN = {"cases", "cells", "curves", "datasets", "trainers", "versions", "summary", "comparisons", "spreads"}
OF_LEARNING_CURVES = {"label_curves", "flatness", "steps_to_target"}


@pytest.fixture
def tables() -> Tables:
    return two_trainers()


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(report, "write_figures", lambda *given: [])


def of_dataset(tables: Tables, *names: str) -> Tables:
    """The tables of a benchmark with these datasets only."""
    return tables_of(tables.cases[tables.cases.dataset.isin(names)].to_dict("records"))


def figures_of(evidence: Path) -> list[str]:
    return re.findall(r"!\[.*\]\((.*)\.png\)", (evidence / "report.md").read_text())


class TestFiles:
    def test_a_report_is_rebuilt_from_its_csv_files_byte_for_byte(self, tables, tmp_path):
        write_tables(of_dataset(tables, "Dataset001_A"), tmp_path)
        for origin, output in ((tmp_path, "one"), (tmp_path / "one", "two")):
            assert main(["benchmark", "report", str(origin), "-o", str(tmp_path / output)]) == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
        assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
        figures = ["paired_differences", "dice_Dataset001_A_small_validation", "curves_Dataset001_A_small"]
        figures.append("learning_Dataset001_A_small")
        expected = {f"{name}.csv" for name in WRITTEN | OF_LEARNING_CURVES} | {"report.md", "report.json"}
        assert files.keys() == expected | {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
        assert all(f"![{name}]({name}.png)" in files["report.md"].decode() for name in figures)
        json.loads(files["report.json"], parse_constant=pytest.fail)

    @of_every_committed_report
    def test_the_committed_numbers_follow_from_the_committed_tables(self, evidence):
        """Of one dataset with two of its trainers; `test_the_committed_report_follows_from_its_tables` checks all."""
        committed = pandas.read_csv(evidence / "comparisons.csv", keep_default_na=False)
        tables = read_tables(evidence)
        dataset = "Dataset004_Hippocampus"
        arms = tables.trainers[tables.trainers.trainer.isin([PLANNED, OURS])]
        chosen = replace(
            tables,
            cases=tables.cases[(tables.cases.dataset == dataset) & tables.cases.trainer.isin(arms.trainer)],
            trainers=arms,
        )
        rows = pandas.DataFrame(results_of(chosen).comparisons).set_index("metric")
        pair = cells_of(committed, dataset=dataset, first=OURS, second=PLANNED)
        expected = committed[pair].set_index("metric").loc[["dice", "nsd"]]
        # Other families of the pair, which the correction counts, are left out here.
        intervals = ("low", "high", "low_of_trainings", "high_of_trainings")
        costs = ("seconds_per_epoch_ratio", "parameters_ratio")
        for column in ("cases", "difference", *intervals, "wins", "ties", "losses", "p", *costs):
            assert list(rows[column]) == pytest.approx(list(expected[column].astype(float)), rel=1e-5), column
        # Of Dice only: the margin is one of Dice.
        assert rows.p_equivalence["dice"] == pytest.approx(float(expected.p_equivalence["dice"]), rel=1e-5)

    @of_every_committed_report
    def test_the_committed_corrections_are_holms(self, evidence):
        """Of all pairs, from the committed p of families."""
        committed = pandas.read_csv(evidence / "comparisons.csv", keep_default_na=False)
        tested = committed[committed.p_holm != ""]
        for _, of_pair in tested.groupby(["first", "second", "metric"], sort=False):
            assert holm(list(of_pair.p)) == pytest.approx(list(of_pair.p_holm.astype(float)), rel=1e-5)

    @pytest.mark.slow
    @of_every_committed_report
    def test_the_committed_report_follows_from_its_tables(self, evidence, tmp_path, monkeypatch):
        """But for figures, whose bytes depend on what draws them."""
        monkeypatch.setattr(report, "write_figures", lambda *given: figures_of(evidence))
        run_report(evidence, tmp_path)
        committed = {file.name: file.read_bytes() for file in evidence.iterdir() if file.suffix not in (".png", ".pdf")}
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == committed

    def test_tables_of_an_earlier_version_have_no_curves_of_labels(self, tables, tmp_path, without_figures):
        of_one = of_dataset(tables, "Dataset001_A")
        write_tables(of_one, tmp_path / "old")
        (tmp_path / "old" / "label_curves.csv").unlink()
        run_report(tmp_path / "old", tmp_path / "one")
        assert {path.name for path in (tmp_path / "one").glob("*.csv")} == {f"{name}.csv" for name in WRITTEN}
        assert "How fast every trainer learns" not in (tmp_path / "one" / "report.md").read_text()
        # It is a report as any other, and not overwritten by one that lacks its trainings.
        write_tables(of_dataset(tables, "Dataset002_CT"), tmp_path / "other")
        with pytest.raises(XAttnResError, match="would lack"):
            run_report(tmp_path / "other", tmp_path / "one")

    def test_a_single_trainer_is_reported_alone(self, tables, tmp_path, without_figures):
        alone = tables_of(tables.cases[tables.cases.trainer == OURS].to_dict("records"))
        write_tables(alone, tmp_path)
        run_report(tmp_path, tmp_path / "out")
        assert "There is no pair of trainers to compare." in (tmp_path / "out" / "report.md").read_text()
        assert read_tables(tmp_path / "out").cases.equals(read_tables(tmp_path).cases)

    def test_trainers_have_the_order_of_the_spec(self, tmp_path, without_figures):
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


class TestRefusals:
    def test_damaged_files_are_said_in_one_line(self, tables, tmp_path, capsys):
        write_tables(tables, tmp_path)
        edit(tmp_path / "cases.csv", ",nsd,", ",surface,")
        assert main(["benchmark", "report", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "cases.csv has no column nsd" in error
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_holds_neither_a_report_nor_a_benchmark(self, tmp_path, capsys):
        assert main(["benchmark", "report", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert "no matrix.json" in error
        assert error.count("\n") == 1

    def test_an_output_that_cannot_be_written(self, tables, tmp_path, capsys):
        write_tables(tables, tmp_path)
        assert main(["benchmark", "report", str(tmp_path), "-o", str(tmp_path / "cells.csv" / "out")]) == 1
        assert "choose another -o" in capsys.readouterr().err


class TestMarkdown:
    def test_what_is_compared_and_measured(self, tables):
        text = markdown(tables, results_of(tables), [])
        assert "24 of 24 trainings are finished" in text
        assert "| XAttnRes - Planned | family Sarcoma, by patient | - | - | 12 |" in text
        assert "| a | Planned | 4 | 12 |" in text
        # No memory is known, and no trainer is widened.
        assert text.count("1.50x (4) | 2.00x |\n") == 2 * len(DATASETS)
        assert "memory |" not in text and "memory GB" not in text and "widened" not in text
        assert "case in common" not in text

    def test_every_interval_is_explained(self, tables):
        text = markdown(tables, results_of(tables), [])
        row = next(row for row in results_of(tables).comparisons if row["metric"] == "dice")
        over_trainings = f"[{100 * row['low_of_trainings']:+.2f}, {100 * row['high_of_trainings']:+.2f}]"
        dice, nsd = (line for line in text.splitlines() if line.startswith("| XAttnRes - Planned | Dataset001_A"))
        assert over_trainings in dice and over_trainings in nsd
        assert "| better | different |" in dice and "different" not in nsd
        assert text.count("margin of 0.5 points |") == 1
        assert "- **over trainings**: 95 % interval of a hierarchical bootstrap" in text

    def test_a_single_training_shows_no_interval_over_trainings(self, tables):
        alone = tables_of(tables.cases[(tables.cases.fold == 0) & (tables.cases.seed == 0)].to_dict("records"))
        text = markdown(alone, results_of(alone), [])
        assert "There is no interval over trainings, because no pair has two trainings in common." in text
        assert "over trainings |" not in text

    def test_a_family_without_common_names_is_not_to_be_trusted(self, tables):
        renamed = tables.cases.dataset == "Dataset003_MR"
        names = tables.cases.case.where(~renamed, "MR_" + tables.cases.case)
        of_others = replace(tables, cases=tables.cases.assign(case=names))
        text = markdown(of_others, results_of(of_others), [])
        assert "**Dataset002_CT and Dataset003_MR are of the family Sarcoma and have no name of a validation" in text

    def test_cells_that_are_missing_are_named(self, tables):
        cell = {"dataset": "Dataset001_A", "configuration": "small", "trainer": "nnUNetTrainerNoSkip", "fold": 1}
        unfinished = (cell | {"seed": 0, "state": "failed"}, cell | {"seed": 1, "state": "waiting"})
        lacks = cells_of(tables.cases, trainer=OURS, fold=1, dataset="Dataset001_A")
        incomplete = tables_of(tables.cases[~lacks].to_dict("records"), unfinished)
        text = markdown(incomplete, results_of(incomplete), [])
        assert "22 of 24 trainings are finished" in text
        assert "- Dataset001_A, small, NoSkip: fold 1 seed 0 (failed), fold 1 seed 1 (waiting)" in text
        assert "| a | XAttnRes | 2* | 6 |" in text
        assert text.count("not to be compared with the other rows") == 1
        # One trainer with all its trainings shows the spread within a trainer, and none between trainers.
        assert re.search(
            r"\| Dataset001_A, small, validation \| 1 \| 4 \| - \| [\d.]+ \| - \| XAttnRes, NoSkip \|", text
        )

    def test_the_device_of_costs_is_named_under_every_table(self, tables):
        tables.cells.loc[tables.cells.dataset != "Dataset001_A", "device"] = "another"
        text = markdown(tables, results_of(tables), [])
        assert text.count("Time and memory: cpu.") == 1 and text.count("Time and memory: another.") == 2

    def test_how_fast_trainers_learn(self, tables):
        one = of_dataset(tables, "Dataset001_A")
        is_slow = (one.label_curves.trainer == OURS) & (one.label_curves.seed == 1)
        slower = one.label_curves.pseudo_dice.where(~is_slow, 0.1)
        mixed = replace(one, label_curves=one.label_curves.assign(pseudo_dice=slower))
        text = markdown(mixed, results_of(mixed), [])
        # 0, 0.25, 0.5, 0.75: the mean of the last three is reached in epoch 4 of 50 steps and 10 or 15 s.
        assert "| Dataset001_A, small | a | Planned | 4 | 4 | 200 | 0.7 | - | - |" in text
        assert "| Dataset001_A, small | a | XAttnRes | 4 | 2 | not reached | not reached | > 1.00x | > 1.50x |" in text
        # A quarter of four epochs.
        assert "| Dataset001_A, small | a | 4 | 50.00 | - | too short to say |" in text
        text = markdown(one, results_of(one), [])
        assert "| Dataset001_A, small | a | XAttnRes | 4 | 4 | 200 | 1.0 | 1.00x [1.00, 1.00] | 1.50x |" in text
        assert "Fewer trainings" not in text
        fewer = replace(one, label_curves=one.label_curves[~is_slow])
        text = markdown(fewer, results_of(fewer), [])
        assert "| Dataset001_A, small | a | XAttnRes | 2* | 2 | 200 | 1.0 | 1.00x | 1.50x |" in text
        assert "\\* Fewer trainings than Planned: its steps" in text
        never = replace(one, label_curves=one.label_curves.assign(pseudo_dice=0.0))
        assert "Planned has learned no label." in markdown(never, results_of(never), [])


class TestFigures:
    def test_texts_do_not_overlap(self, tables):
        rows = [row for row in results_of(tables).comparisons if row["metric"] == "dice"]
        assert_no_texts_overlap(draw_differences(rows))
        values = case_values(tables.cases)
        assert_no_texts_overlap(draw_cases(values[values.dataset == "Dataset001_A"], [PLANNED, OURS]))

    @pytest.fixture
    def largest(self, monkeypatch) -> Tables:
        """Tables of the size of `specs/cpu-evidence.yaml`, which has the most trainers, with two cases per fold."""
        monkeypatch.setenv("XATTNRES_DATA", "/")
        spec = read_spec(ROOT / "specs" / "cpu-evidence.yaml")
        rng = np.random.default_rng(0)
        rows = []
        for dataset in spec.datasets:
            name = Path(dataset.path or "").name
            more = {"configuration": dataset.configurations[0], "family": dataset.family or name}
            rows += [
                case_row(name, arm.name, fold, 0, f"{fold}{case}", rng.uniform(0.5, 0.9), **more)
                for fold in spec.folds_of(dataset)
                for arm in spec.arms_of(dataset)
                for case in range(2)
            ]
        return tables_of(rows, trainers=tuple(arm.name for arm in spec.trainers))

    def test_eight_trainers_are_readable(self, largest):
        results = results_of(largest)
        # 7 on one dataset, 4 on three of them and on a family.
        rows = [row for row in results.with_first if row["metric"] == "dice"]
        assert len(rows) == 7 + 4 * 4
        assert_no_texts_overlap(draw_differences(rows))
        assert_no_texts_overlap(draw_differences([row for row in rows if row["dataset"] == "Task04_Hippocampus"]))
        trainers = list(largest.trainers.trainer)
        values = case_values(largest.cases)
        assert_no_texts_overlap(draw_cases(values[values.dataset == "Task04_Hippocampus"], trainers))
        assert_no_texts_overlap(draw_curves(largest.curves[largest.curves.configuration == "2d_cpu"], trainers))
        curves = learning_curves(largest)
        of_one = curves[curves.configuration == "2d_cpu"]
        assert_no_texts_overlap(draw_learning(of_one, results.learning["flatness"], trainers))
        text, _, other_pairs = markdown(largest, results, []).partition("other pairs\n")
        assert text.count("XAttnResBlock - Planned |") == 1 + 2 * 5
        assert "PlannedSameParameters - XAttnRes |" not in text
        assert other_pairs.count("| PlannedSameParameters - XAttnRes | Task04_Hippocampus") == 1
