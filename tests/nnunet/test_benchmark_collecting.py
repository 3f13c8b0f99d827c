"""The tables of a benchmark's folder: predictions that are measured, trainings that are taken over from reports.

One small benchmark is measured once. Tests work on copies of its folder and of its tables.
"""

import json
import math
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy
import torch

from helpers.benchmark import OURS, PLANNED, case_row, edit, tables_of, write_final_checkpoint, write_image
from nnunet_xattnres.benchmark import cell_tables, collecting, measuring, report
from nnunet_xattnres.benchmark.cells import Cell, read_cells, write_cells
from nnunet_xattnres.benchmark.collecting import collect, take_over
from nnunet_xattnres.benchmark.locks import locked
from nnunet_xattnres.benchmark.measuring import label_curve_rows
from nnunet_xattnres.benchmark.metrics import Metrics
from nnunet_xattnres.benchmark.report import run_report
from nnunet_xattnres.benchmark.spec import Arm, Configuration, Dataset, Spec, write_spec
from nnunet_xattnres.benchmark.tables import Tables, read_tables, write_tables
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError

DATASET = "Dataset001_A"
PREDICT_AGAIN = "delete {folder}/validation and {folder}/cell.json, run again"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(report, "write_figures", lambda *given: [])


@pytest.fixture(scope="module")
def made_benchmark(tmp_path_factory) -> Path:
    """A benchmark's folder with a finished cell and one that failed: two cases, regions and voxels to be ignored."""
    root = tmp_path_factory.mktemp("made") / "benchmark"
    dataset = root / "nnUNet_raw" / DATASET
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset.mkdir(parents=True)
    content = {"labels": labels, "regions_class_order": [1, 2], "file_ending": ".nii.gz", "channel_names": {"0": "MR"}}
    (dataset / "dataset.json").write_text(json.dumps(content))
    preprocessed = root / "nnUNet_preprocessed" / DATASET
    preprocessed.mkdir(parents=True)
    small, wide = (
        {"patch_size": [8, 16, 16], "batch_size": 2, "architecture": {"arch_kwargs": {"features_per_stage": features}}}
        for features in ([8, 16], [16, 32])
    )
    plans = {"configurations": {"small": small | {"training": {"num_iterations_per_epoch": 30}}, "small_wide": wide}}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": ["1", "2"]}]))
    spec = Spec(
        datasets=[Dataset(path="/data/A", name=DATASET, family="A", nsd_tolerance_mm=2.0, test=True)],
        configurations=(Configuration(name="small", base="3d_fullres", features=8),),
        trainers=[Arm(trainer=PLANNED), Arm(name="wide", trainer=PLANNED, width=2.0)],
        folds=[0],
        seeds=[5],
    )
    write_spec(spec, root / "spec.yaml")
    cells = [
        Cell(DATASET, "small", name, PLANNED, "nnUNetPlans", configuration, 0, 5, 2, 123, test=True)
        for name, configuration in ((PLANNED, "small"), ("wide", "small_wide"))
    ]
    write_cells(root, cells)
    results = {"epochs": 2, "seconds_per_epoch": 3.5, "peak_memory_gb": None, "versions": "torch 2.8"}
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
        write_image(reference, dataset / references / f"{case}.nii.gz", (1.0, 1.0, 3.0))
        write_image(prediction, folder / kind / f"{case}.nii.gz", (1.0, 1.0, 3.0))
    logging = {
        "train_losses": [1.0, np.float32(0.5)],
        "val_losses": [1.0, 0.25],
        "mean_fg_dice": [0.1, np.float64(0.75)],
        "dice_per_class_or_region": [[0.2, np.nan], [np.float32(0.5), 1.0]],
    }
    write_final_checkpoint(folder, logging=logging)
    return root


@pytest.fixture(scope="module")
def measured(made_benchmark) -> Tables:
    """The tables of the benchmark's folder; tests do not change them."""
    return collect(made_benchmark, lambda tables: None)


@pytest.fixture
def benchmark(made_benchmark, tmp_path) -> Path:
    """A copy of the benchmark's folder."""
    return shutil.copytree(made_benchmark, tmp_path / "benchmark")


@pytest.fixture
def new(made_benchmark, tmp_path) -> Path:
    """The same matrix in another folder, of which nothing is trained."""
    return shutil.copytree(made_benchmark, tmp_path / "new", ignore=shutil.ignore_patterns("seed_*"))


@pytest.fixture
def report_of_benchmark(measured, tmp_path) -> Path:
    """The folder of a report on the benchmark."""
    write_tables(measured, tmp_path / "report")
    return tmp_path / "report"


class TestMeasuring:
    def test_tables_of_a_benchmark(self, measured):
        cases = measured.cases.set_index(["set", "case", "label"])
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
        assert list(measured.cells.state) == ["finished", "failed"]
        assert measured.cells.seconds_per_epoch[0] == 3.5
        assert measured.cells.patch_size[0] == "8x16x16"
        assert list(measured.cells.features) == ["8 16", "16 32"]
        assert measured.cells.iterations[0] == 30 and measured.cells.iterations.isna()[1]
        assert list(measured.curves.pseudo_dice) == [0.1, 0.75]
        of_labels = measured.label_curves[["epoch", "label", "pseudo_dice"]].fillna(-1).to_numpy().tolist()
        assert of_labels == [[0, "whole", 0.2], [0, "core", -1], [1, "whole", 0.5], [1, "core", 1]]
        assert list(measured.trainers.trainer) == [PLANNED, "wide"]
        assert list(measured.trainers.width.fillna(0)) == [0, 2]
        assert set(measured.versions.package) >= {"monai", "scipy", "pandas", "matplotlib"}
        assert measured.datasets.to_dict("records") == [
            {"dataset": DATASET, "family": "A", "nsd_tolerance_mm": 2.0, "labels": "1+2:whole;2:core"}
        ]

    def test_no_more_cases_are_in_memory_than_there_are_workers(self, made_benchmark, monkeypatch):
        monkeypatch.setattr(measuring, "NUM_WORKERS", "1")
        threads = set()

        def note(*masks) -> Metrics:
            threads.add(threading.get_ident())
            return Metrics(1.0, 1.0, 0.0, 1, 1)

        monkeypatch.setattr(measuring, "measure", note)
        collect(made_benchmark, lambda tables: None)
        assert len(threads) == 1

    def test_a_training_that_finishes_while_a_report_is_made_is_of_the_next(self, benchmark, monkeypatch):
        second = read_cells(benchmark)[1]

        def measured_tables(*given):
            second.write_record(benchmark, "finished", epochs=2)
            return cell_tables.measured_tables(*given)

        monkeypatch.setattr(collecting, "measured_tables", measured_tables)
        assert list(collect(benchmark, lambda tables: None).cells.state) == ["finished", "failed"]

    @pytest.mark.parametrize(
        "damage, message, remedy",
        [
            (lambda folder: (folder / "validation" / "2.nii.gz").unlink(), "is finished, but", PREDICT_AGAIN),
            (lambda folder: (folder / "validation" / "2.nii.gz").write_bytes(b"?"), "cannot read", PREDICT_AGAIN),
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
    def test_a_damaged_cell_is_said_in_one_line(self, benchmark, damage, message, remedy):
        (folder,) = benchmark.glob("seed_5/*/*/*__small/fold_0")
        damage(folder)
        with pytest.raises(XAttnResError) as error:
            collect(benchmark, lambda tables: None)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(remedy.format(folder=folder))

    @pytest.mark.parametrize("content", [None, '[{"train": [], "val', "{}", "[]"])
    @pytest.mark.parametrize(
        "name, remedy",
        [
            ("splits_final.json", "mend or remove it, and run again"),
            ("nnUNetPlans.json", "delete it and nnUNetPlans.complete beside it, run again, and nnU-Net plans again"),
        ],
    )
    def test_damaged_splits_and_plans_are_said_in_one_line(self, benchmark, name, remedy, content):
        path = benchmark / "nnUNet_preprocessed" / DATASET / name
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(XAttnResError) as error:
            collect(benchmark, lambda tables: None)
        assert str(path) in str(error.value)
        assert str(error.value).endswith(remedy)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels, names",
    [
        # nnU-Net sorts labels, and keeps the order of regions.
        ({"core": (2,), "edge": (1,)}, ["edge", "core"]),
        ({"whole": (1, 2), "edge": (1,)}, ["whole", "edge"]),
        # A trainer with other outputs than labels.
        ({"core": (1,)}, []),
    ],
)
def test_the_order_of_labels_in_nnunets_log(labels, names):
    rows = label_curve_rows({}, {"dice_per_class_or_region": [[0.1, 0.2]]}, labels)
    assert [(row["label"], row["pseudo_dice"]) for row in rows] == list(zip(names, (0.1, 0.2), strict=False))


class TestReport:
    def test_a_benchmark_is_reported_and_the_report_again(self, benchmark, measured, tmp_path, monkeypatch):
        # A benchmark's folder is measured, even if it holds tables of an earlier report.
        (benchmark / "cases.csv").write_text("of an earlier report")
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "out")]) == 0
        assert len(read_tables(tmp_path / "out").cases) == 6
        text = (tmp_path / "out" / "report.md").read_text()
        assert "| wide | nnUNetTrainerPlanned | ExperimentPlanner | 2x |\n" in text
        assert "| Dataset001_A | small | Planned | nnUNetPlans | 8x16x16 | 2 | 8 16 | 30 | 2 |" in text
        assert f"scipy {scipy.__version__}" in text
        # What measures is not needed for a report on tables.
        monkeypatch.delattr(measuring, "measure")
        assert main(["benchmark", "report", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
        for name in ("report.md", "report.json", "cases.csv", "cells.csv"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    def test_a_report_does_not_go_into_a_benchmarks_folder(self, benchmark, capsys):
        assert main(["benchmark", "report", str(benchmark), "-o", str(benchmark)]) == 1
        assert "is the folder of a benchmark: choose another -o" in capsys.readouterr().err

    def test_damage_is_said_in_one_line(self, benchmark, tmp_path, capsys):
        (folder,) = benchmark.glob("seed_5/*/*/*__small/fold_0")
        (folder / "validation" / "2.nii.gz").write_bytes(b"no image")
        assert main(["benchmark", "report", str(benchmark), "-o", str(tmp_path / "out")]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-xattnres: ")]
        assert len(lines) == 1
        assert not (tmp_path / "out").exists()

    def test_nothing_is_measured_for_a_report_that_cannot_be_kept(self, benchmark, tmp_path, monkeypatch):
        write_tables(tables_of([case_row(DATASET, OURS, 0, 0, "1", 0.5)]), tmp_path / "other")
        monkeypatch.delattr(measuring, "measure")
        with pytest.raises(XAttnResError, match="would lack"):
            run_report(benchmark, tmp_path / "other")

    def test_a_report_of_trainings_that_are_gone_is_not_overwritten(self, benchmark, new, measured, tmp_path):
        one = tmp_path / "one"
        write_tables(measured, one)
        _, second = read_cells(new)
        shutil.copytree(read_cells(benchmark)[0].folder(benchmark), second.folder(new))
        second.write_record(new, "finished", epochs=2)
        before = {file.name: file.read_bytes() for file in one.iterdir()}
        lacking = r"is a report with trainings that this one would lack \(1 of 1, such as {}\): choose another -o"
        name = f"{DATASET} small {PLANNED} fold 0 seed 5"
        with pytest.raises(XAttnResError, match=lacking.format(name)):
            run_report(new, one)
        # The same names are not the same trainings.
        edit(one / "cells.csv", ",30,2,", ",30,20,")
        with pytest.raises(XAttnResError, match=lacking.format(rf"{name} with epochs=20 \(here 2\)")):
            run_report(benchmark, one)
        edit(one / "cells.csv", ",30,20,", ",30,2,")
        assert {file.name: file.read_bytes() for file in one.iterdir()} == before
        take_over(read_tables(one), new)
        run_report(new, one)
        assert len(read_tables(one).finished) == 2
        # One that is damaged may be mended.
        edit(one / "cells.csv", ",state,", ",is,")
        with pytest.raises(XAttnResError, match="holds a damaged report, which may be mended: choose another -o"):
            run_report(new, one)
        # One that was interrupted is made again.
        (one / "curves.csv").unlink()
        run_report(benchmark, one)


class TestTakingOver:
    def test_what_another_machine_has_finished_is_taken_over_from_its_report(
        self, new, measured, tmp_path, monkeypatch, capsys
    ):
        first = tmp_path / "first"
        write_tables(measured, first)
        run_report(first, tmp_path / "report")
        cells = read_cells(new)
        for _ in range(2):  # the second time it is there already
            take_over(read_tables(tmp_path / "report"), new)
            assert [cell.state(new) for cell in cells] == ["finished", "waiting"]
        assert re.findall(r"(\d) finished training: (\d) taken over, (\d)", capsys.readouterr().out) == [
            ("1", "1", "0"),
            ("1", "0", "1"),
        ]
        # What measures here has measured nothing.
        monkeypatch.setattr(measuring, "version", lambda package: "another")
        run_report(new, tmp_path / "again")
        for name in ("cases.csv", "curves.csv", "label_curves.csv", "versions.csv", "trainers.csv"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "report" / name).read_bytes()
        again, before = (read_tables(tmp_path / name).cells for name in ("again", "report"))
        pandas.testing.assert_frame_equal(again[:1].drop(columns="device"), before[:1].drop(columns="device"))
        # Another machine may have the same name. A report on the report has that of the first one.
        assert re.fullmatch("cpu, report [0-9a-f]{6}", again.device[0])
        shutil.rmtree(new / "earlier")
        take_over(read_tables(tmp_path / "again"), new)
        assert collect(new, lambda tables: None).cells.device[0] == again.device[0]
        assert list(again.state) == ["finished", "waiting"]
        # Without the report's tables, the cell has to be trained.
        shutil.rmtree(new / "earlier")
        assert [cell.state(new) for cell in cells] == ["waiting", "waiting"]
        take_over(read_tables(tmp_path / "report"), new)
        assert cells[0].state(new) == "finished"

    def test_damaged_tables_of_an_earlier_report(self, new, measured, tmp_path):
        take_over(measured, new)
        (folder,) = (new / "earlier").iterdir()
        (folder / "cases.csv").write_text("")
        remedy = rf"damaged \(.*\): delete {folder}, and run again with --continue-from"
        with pytest.raises(XAttnResError, match=remedy):
            run_report(new, tmp_path / "again")

    def test_trainings_of_three_machines_make_one_report(self, benchmark, report_of_benchmark, tmp_path):
        """The report has the matrix's order, whatever was finished where and first."""
        write_cells(benchmark, [*read_cells(benchmark), replace(read_cells(benchmark)[1], seed=6)])
        for name, seed, dice in (("second", "5", "0.25"), ("third", "6", "0.75")):
            # What the first cell has, as another one's.
            shutil.copytree(report_of_benchmark, tmp_path / name)
            for kind in ("cases", "curves", "cells"):
                path = tmp_path / name / f"{kind}.csv"
                whole = pandas.read_csv(path, dtype=str, keep_default_na=False)
                table = whole[whole.trainer == PLANNED].assign(trainer="wide", seed=seed)
                if kind == "cases":
                    table["dice"] = dice
                if kind == "cells":
                    table["features"] = whole[whole.trainer == "wide"].features.iloc[0]
                    table["iterations"] = ""
                table.to_csv(path, index=False)
        versions = pandas.read_csv(tmp_path / "second" / "versions.csv", dtype=str)
        versions.loc[versions.package == "monai", "version"] = "0.0.1"
        versions.to_csv(tmp_path / "second" / "versions.csv", index=False)
        for name in ("third", "second"):
            take_over(read_tables(tmp_path / name), benchmark)
        # A report may tell of what has been taken over from another one.
        write_tables(collect(benchmark, lambda tables: None), tmp_path / "two_of_them")
        shutil.rmtree(third := read_cells(benchmark)[2].folder(benchmark))
        take_over(read_tables(tmp_path / "two_of_them"), benchmark)
        assert third.is_dir()
        write_tables(collect(benchmark, lambda tables: None), tmp_path / "all")
        together = read_tables(tmp_path / "all")
        assert list(together.cases.trainer) == 6 * [PLANNED] + 12 * ["wide"]
        assert list(together.cases.seed) == 12 * [5] + 6 * [6]
        assert list(together.cases.dice[6:]) == 6 * [0.25] + 6 * [0.75]
        assert list(together.cases.dice[:6]) == list(read_tables(report_of_benchmark).cases.dice)
        # Whatever has measured is named.
        of_monai = together.versions[together.versions.package == "monai"]
        assert set(of_monai.version) == {"0.0.1", measuring.version("monai")}

    def test_a_cell_that_is_trained_here_is_not_taken_over(self, new, measured, monkeypatch):
        monkeypatch.setattr(collecting, "SECONDS_FOR_A_LOOK", 0.1)
        first, _ = read_cells(new)
        with locked(first.lock(new), 0):
            first.write_record(new, "running")
            take_over(measured, new)
        assert first.record(new)["state"] == "running"

    @pytest.mark.parametrize(
        "file, old, other, told",
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
    def test_other_trainings_are_not_taken_over(self, file, old, other, told, new, measured, tmp_path):
        # A tolerance that a CSV file does not hold to the last digit.
        edit(new / "spec.yaml", "nsd_tolerance_mm: 2.0", f"nsd_tolerance_mm: {1 / 3}")
        here = replace(measured, datasets=measured.datasets.assign(nsd_tolerance_mm=1 / 3))
        write_tables(here, tmp_path / "report")
        shutil.copytree(tmp_path / "report", tmp_path / "other")
        edit(tmp_path / "other" / file, old, other)
        title = read_cells(new)[0].title
        with pytest.raises(XAttnResError, match=re.escape(f"such as {title}: {told}: give a report on the same spec")):
            take_over(read_tables(tmp_path / "other"), new)
        assert not (new / "earlier").exists()
        take_over(read_tables(tmp_path / "report"), new)
        assert read_cells(new)[0].state(new) == "finished"
