"""The command `nnunet-xattnres compare` on result folders as nnU-Net leaves them, and on folders of predictions."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch

from helpers.benchmark import edit, write_image
from helpers.networks import planned_network
from helpers.result_folders import (
    DATASET,
    DATASET_JSON,
    FOLDS,
    SPACING,
    label_map,
    write_predictions,
    write_references,
    write_result,
)
from nnunet_xattnres import BlockXAttnResConfig
from nnunet_xattnres.benchmark import measuring, report
from nnunet_xattnres.benchmark.cells import Cell, write_cells
from nnunet_xattnres.benchmark.result_folders import _number_of_parameters
from nnunet_xattnres.benchmark.spec import Arm, Configuration, Dataset, Spec, write_spec
from nnunet_xattnres.benchmark.tables import read_tables
from nnunet_xattnres.cli import main
from nnunet_xattnres.common import samples
from nnunet_xattnres.model.build import add_xattnres

FIRST, SECOND, THIRD = "nnUNetTrainer", "nnUNetTrainerDA5", "MyTrainer"


@pytest.fixture(autouse=True)
def quick_reports(monkeypatch):
    monkeypatch.setattr(report, "write_figures", lambda *given: [])
    monkeypatch.setattr(samples, "RESAMPLES", 99)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_references(root / "nnUNet_preprocessed")
    for seed, trainer in enumerate((FIRST, SECOND)):
        write_result(root / "nnUNet_results", trainer, seed)
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch) -> Path:
    """nnU-Net's folders, with the results of two trainers on one dataset. It is the current folder."""
    root = shutil.copytree(made, tmp_path / "root")
    monkeypatch.setenv("nnUNet_preprocessed", str(root / "nnUNet_preprocessed"))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def results(root) -> Path:
    return root / "nnUNet_results" / DATASET


@pytest.fixture
def first(results) -> Path:
    return results / f"{FIRST}__nnUNetPlans__small"


@pytest.fixture
def second(results) -> Path:
    return results / f"{SECOND}__nnUNetPlans__small"


@pytest.fixture
def references(root) -> Path:
    return root / "nnUNet_preprocessed" / DATASET / "gt_segmentations"


@pytest.fixture
def predictions(root) -> tuple[Path, Path]:
    """Two folders of predictions of all cases."""
    for seed, name in enumerate(("one", "other")):
        write_predictions(root / name, sum(FOLDS.values(), ()), seed)
    return root / "one", root / "other"


def compare(*arguments: object) -> Path:
    """The folder of the report."""
    assert main(["compare", *map(str, arguments), "-o", "out"]) == 0
    return Path("out")


def refused(capsys, *arguments: object) -> str:
    """The message, which is one line. Nothing is written."""
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "-o", "out"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-xattnres: ")]
    assert not Path("out").exists()
    return line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_dice(out: Path) -> pandas.DataFrame:
    comparisons = pandas.read_csv(out / "comparisons.csv", keep_default_na=False)
    return comparisons[comparisons.metric == "dice"]


class TestResultFolders:
    def test_the_numbers_are_those_of_a_benchmarks_report(self, root, first, second, tmp_path):
        raw = root / "nnUNet_raw" / DATASET
        shutil.copytree(root / "nnUNet_preprocessed" / DATASET / "gt_segmentations", raw / "labelsTr")
        (raw / "dataset.json").write_text(json.dumps(DATASET_JSON))
        preprocessed = root / "nnUNet_preprocessed" / DATASET
        (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": v} for v in FOLDS.values()]))
        shutil.copy(first / "plans.json", preprocessed / "nnUNetPlans.json")
        shutil.copytree(root / "nnUNet_results", root / "seed_0" / "nnUNet_results")
        spec = Spec(
            datasets=[Dataset(path="/data/A", name=DATASET, family=DATASET, test=False)],
            configurations=(Configuration(name="small", base="3d_fullres", features=8),),
            trainers=[Arm(trainer=FIRST), Arm(trainer=SECOND)],
            folds=[0, 1],
            seeds=[0],
        )
        write_spec(spec, root / "spec.yaml")
        costs = {"epochs": 2, "seconds_per_epoch": 3.5, "device": "NVIDIA H100", "versions": "torch 2.8"}
        cells = [
            Cell(DATASET, "small", name, name, "nnUNetPlans", "small", fold, 0, 2, 0, test=False)
            for fold in FOLDS
            for name in (FIRST, SECOND)
        ]
        write_cells(root, cells)
        for cell in cells:
            cell.write_record(root, "finished", peak_memory_gb=None, **costs)
        assert main(["benchmark", "report", str(root), "-o", "benchmark"]) == 0
        out = compare(first, second)
        for written in Path("benchmark").iterdir():
            assert (out / written.name).read_bytes() == written.read_bytes(), written.name
        assert (out / "label_curves.csv").is_file()
        assert main(["benchmark", "report", "out", "-o", "again"]) == 0
        assert (out / "report.md").read_bytes() == Path("again", "report.md").read_bytes()

    def test_nothing_of_nnunet_is_changed(self, root, first, second):
        before = contents(root)
        compare(first, second)
        assert contents(root) == before

    def test_results_are_named_by_what_tells_them_apart(self, root, first, second):
        names = {
            (first, second): [FIRST, SECOND],
            (first, write_result(root / "nnUNet_results", FIRST, 2, "nnUNetResEncUNetMPlans")): [
                "nnUNetPlans",
                "nnUNetResEncUNetMPlans",
            ],
            (first, write_result(root / "nnUNet_results", THIRD, 2, configuration="2d")): [
                f"{FIRST}__small",
                f"{THIRD}__2d",
            ],
        }
        for given, expected in names.items():
            shutil.rmtree("out", ignore_errors=True)
            assert list(read_tables(compare(*given)).trainers.trainer) == expected
        assert set(of_dice(Path("out")).configuration) == {"small+2d"}

    def test_folds_and_cases_that_only_one_has_are_counted(self, first, second, capsys):
        shutil.rmtree(second / "fold_1")
        (second / "fold_0" / "validation" / "case_2.nii.gz").unlink()
        out = compare(first, second)
        assert f"Left out: {DATASET} {SECOND} fold 1 (missing)" in capsys.readouterr().out.splitlines()
        text = (out / "report.md").read_text()
        assert text.startswith("# Comparison of trainings\n\n3 of 4 trainings are finished.")
        # The user has named no seeds.
        assert f"- {DATASET}, small, DA5: fold 1 (missing)" in text
        assert f"- {DATASET}, small, validation: DA5 lacks 1: case_2" in text
        assert list(of_dice(out).cases) == [2]

    def test_cases_that_only_one_has_are_marked(self, first, second):
        (second / "fold_0" / "validation" / "case_2.nii.gz").unlink()
        text = (compare(first, second) / "report.md").read_text()
        assert "| a | DA5 | 2 | 5* |" in text and "| a | nnUNetTrainer | 2 | 6 |" in text
        assert "Fewer cases than others: not to be compared with the other rows" in text

    def test_a_fold_that_is_not_validated_to_the_end_is_left_out(self, first, second, capsys):
        (second / "fold_1" / "validation" / "summary.json").unlink()
        (first / "fold_all" / "validation").mkdir(parents=True)
        out = compare(first, second)
        printed = capsys.readouterr().out
        assert "DA5 fold 1 (validation not finished)" in printed
        assert "fold_all is left out" in printed
        assert list(of_dice(out).cases) == [3]

    def test_the_folder_of_a_training_that_was_refused_is_no_fold(self, first, second, capsys):
        for name in ("fold_2", "fold_all"):
            (first / name).mkdir()
        (first / "fold_2" / "training_log.txt").touch()
        text = (compare(first, second) / "report.md").read_text()
        assert "\n\n4 of 4 trainings are finished" in text
        assert "Left out" not in capsys.readouterr().out
        # A training that was begun is.
        (first / "fold_2" / "checkpoint_latest.pth").touch()
        assert main(["compare", str(first), str(second), "-o", "begun"]) == 0
        assert f"Left out: {DATASET} {FIRST} fold 2 (missing)" in capsys.readouterr().out.splitlines()

    def test_folds_can_be_chosen(self, first, second):
        assert set(read_tables(compare(first, second, "--folds", 1)).cases.fold) == {1}

    def test_repeats_show_the_spread_of_one_setup(self, root, first, second, capsys):
        again = write_result(root / "again", FIRST, 7)
        out = compare(first, again, second, "--group", "plain", "plain", "more")
        assert f"Left out: {DATASET} more fold 0 seed 1 (missing)" in capsys.readouterr().out.splitlines()
        tables = read_tables(out)
        assert set(tables.cases[tables.cases.trainer == "plain"].seed) == {0, 1}
        assert "more: fold 0 seed 1 (missing), fold 1 seed 1 (missing)" in (out / "report.md").read_text()
        (spread,) = pandas.read_csv(out / "spreads.csv").to_dict("records")
        assert (spread["trainers"], spread["cells"], spread["left_out"]) == (1, 4, "more")
        assert spread["within"] > 0
        # Each with a name of its own, the runs are compared with each other.
        shutil.rmtree(out)
        first_pair = of_dice(compare(first, again, second, "--group", "run1", "run2", "more")).iloc[0]
        assert (first_pair["first"], first_pair["second"], first_pair["cases"]) == ("run2", "run1", 6)

    def test_datasets_of_the_same_patients_are_one_family(self, root, first, second):
        write_references(root / "nnUNet_preprocessed", "Dataset002_B")
        others = [write_result(root / "nnUNet_results", name, 5, dataset="Dataset002_B") for name in (FIRST, SECOND)]
        rows = of_dice(compare(first, second, *others, "--family", "--nsd-tolerance-mm", 2))
        assert list(rows.dataset) == [DATASET, "Dataset002_B", ""]
        assert set(read_tables(Path("out")).datasets.nsd_tolerance_mm) == {2.0}

    def test_without_checkpoints_there_are_no_costs(self, first, second, capsys):
        for checkpoint in (second / "fold_0" / "checkpoint_final.pth", second / "fold_1" / "checkpoint_final.pth"):
            checkpoint.unlink()
        (first / "fold_0" / "checkpoint_final.pth").write_bytes(b"?")
        cells = read_tables(compare(first, second)).cells
        printed = capsys.readouterr().out
        assert printed.count("no costs (") == 3
        assert list(cells[cells.seconds_per_epoch.notna()].fold) == [1]

    def test_iterations_are_those_of_the_training_where_the_trainer_ignores_the_plans(self, first, second):
        for model in (first, second):
            edit(
                model / "plans.json", '"batch_size": 2', '"batch_size": 2, "training": {"num_iterations_per_epoch": 10}'
            )
        edit(first / "fold_0" / "debug.json", '"device"', '"num_iterations_per_epoch": "250", "device"')
        cells = read_tables(compare(first, second)).cells
        # Without a note they are unknown.
        assert list(cells.iterations.isna()) == [False, True, True, True]
        assert cells.iterations[0] == 250

    def test_an_old_architecture_that_nnunet_does_not_know(self, first, second):
        old = '"UNet_class_name": "MyUNet", "UNet_base_num_features": 8'
        edit(second / "plans.json", '"architecture": {"arch_kwargs": {"features_per_stage": [8, 16]}}', old)
        cells = read_tables(compare(first, second)).cells
        assert list(cells.features) == ["8 16", "", "8 16", ""]
        assert set(cells.patch_size) == {"8x16x16"}

    def test_regions(self, root, first, second):
        regions = {"background": 0, "whole": [1, 2], "b": 2}
        for model in (first, second):
            content = DATASET_JSON | {"labels": regions, "regions_class_order": [1, 2]}
            (model / "dataset.json").write_text(json.dumps(content))
        cases = read_tables(compare(first, second)).cases
        assert list(dict.fromkeys(cases.label)) == ["whole", "b"]
        voxels = {"whole": {int((label_map() > 0).sum())}, "b": {int((label_map() == 2).sum())}}
        assert cases.groupby("label").reference_voxels.agg(set).to_dict() == voxels

    def test_an_equivalence_of_empty_predictions_is_not_silent(self, first, second):
        paths = sorted(first.parent.glob("*/fold_*/validation/*.nii.gz"))
        for path in paths:
            write_image(0 * label_map(), path, SPACING)
        text = (compare(first, second) / "report.md").read_text()
        assert "equivalent (0)" in text
        assert f"- DA5 - nnUNetTrainer, {DATASET}, small, validation: 6 of 6 cases" in text
        for path in paths:
            write_image(label_map(), path, SPACING)
        text = (compare(first, second) / "report.md").read_text()
        assert "equivalent (0)" in text
        assert "Left empty by both" not in text

    def test_parameters_that_are_registered_twice_count_once(self, tmp_path):
        convolution = torch.nn.Conv2d(2, 3, 1)
        network = torch.nn.ModuleList([convolution, convolution, torch.nn.BatchNorm2d(3)])
        self.assert_counted(network, tmp_path)

    def test_buffers_are_no_parameters(self, tmp_path):
        network = add_xattnres(planned_network(), BlockXAttnResConfig(bank_includes_input=True))
        network.register_buffer("positions", torch.arange(3))
        assert any(name.endswith("temperature") for name in network.state_dict())
        self.assert_counted(network, tmp_path)

    def assert_counted(self, network, tmp_path):
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        weights = torch.load(tmp_path / "weights.pth", mmap=True)
        assert _number_of_parameters(weights) == sum(parameter.numel() for parameter in network.parameters())


class TestFoldersOfPredictions:
    def test_two_folders_are_compared(self, predictions, references):
        before = contents(predictions[0]) | contents(references)
        (row,) = of_dice(compare(*predictions, "--references", references)).to_dict("records")
        assert (row["dataset"], row["configuration"], row["set"]) == (DATASET, "predictions", "gt_segmentations")
        assert (row["first"], row["second"], row["cases"]) == ("other", "one", 6)
        assert contents(predictions[0]) | contents(references) == before
        text = Path("out", "report.md").read_text()
        assert "trained: unknown versions; unknown device" in text
        assert "nan" not in text.lower()
        assert text.startswith("# Comparison of predictions\n\n2 folders of predictions. Tolerance")
        header = "| label | trainer | trainings | cases | Dice | NSD | HD95 | infinite |"
        assert text.splitlines().count(header) == 1
        assert not re.search("time|memory|widened|planner|matrix|benchmark", text.lower())

    def test_a_dataset_whose_name_holds_a_space(self, predictions, references, monkeypatch):
        monkeypatch.setattr(report, "write_figures", lambda *given: ["dice_My Study_predictions_gt_segmentations"])
        folder = references.parent.rename(references.parent.with_name("My Study"))
        text = (compare(*predictions, "--references", folder / references.name) / "report.md").read_text()
        assert "](dice_My%20Study_predictions_gt_segmentations.png)" in text

    def test_references_of_other_cases(self, predictions, references, capsys):
        for path in predictions[1].glob("case_*"):
            path.rename(path.with_name(f"other_{path.name}"))
        message = refused(capsys, *predictions, "--references", references)
        assert "6 of 6 predictions in" in message and "such as other_case_0.nii.gz: give the references" in message
        assert message.endswith("gt_segmentations holds case_0.nii.gz")

    def test_a_folder_without_predictions(self, predictions, references, capsys):
        for path in predictions[1].glob("case_*"):
            path.rename(path.with_name(f"{path.name}.old"))
        message = refused(capsys, *predictions, "--references", references)
        assert "other has no predictions *.nii.gz: give the folder that they are in" in message

    @pytest.mark.parametrize(
        "options, message",
        [
            ((), "one has no fold_*: give an nnU-Net result folder"),
            (("--references", "nowhere"), "--references: nowhere is no folder"),
            (("--references", "{references}", "--folds", 0), "folders of predictions have no folds"),
        ],
    )
    def test_options_that_do_not_fit(self, options, message, predictions, references, capsys):
        given = (str(option).format(references=references) for option in options)
        assert message in refused(capsys, *predictions, *given)

    def test_without_dataset_json(self, predictions, references, capsys):
        (references.parent / "dataset.json").unlink()
        assert "no dataset.json, which names the labels, is in" in refused(
            capsys, *predictions, "--references", references
        )

    def test_result_folders_and_predictions_are_not_mixed(self, predictions, references, first, capsys):
        assert "give folders of one kind" in refused(capsys, first, predictions[0], "--references", references)


def a_prediction(folder: Path) -> Path:
    return folder / "fold_0" / "validation" / "case_1.nii.gz"


class TestBadInput:
    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda first, second: (second / "dataset.json").unlink(), r"cannot read .*DA5.*dataset\.json \(No such"),
            (lambda first, second: (second / "dataset.json").write_text("{"), "dataset.json is not valid JSON"),
            (lambda first, second: (second / "dataset.json").write_text("{}"), "dataset.json has no file_ending"),
            (
                lambda first, second: edit(second / "dataset.json", '"b": 2', '"b": 3'),
                r"has other labels than .* \(1:a;3:b and 1:a;2:b\)",
            ),
            (lambda first, second: (second / "plans.json").unlink(), r"cannot read .*plans\.json"),
            (lambda first, second: edit(second / "plans.json", "small", "large"), r"plans\.json cannot be used"),
            (lambda first, second: a_prediction(second).write_bytes(b"?"), r"case_1\.nii\.gz is truncated or damaged"),
            (
                lambda first, second: a_prediction(second).write_bytes(a_prediction(second).read_bytes()[:90]),
                r"case_1\.nii\.gz is truncated or damaged",
            ),
            (
                lambda first, second: write_image(label_map(), a_prediction(second), (1.0, 1.0, 2.0)),
                r"has the spacing \(2\.0, 1\.0, 1\.0\), its reference \(3\.0, 1\.0, 1\.0\): get the prediction again",
            ),
            (
                lambda first, second: write_image(label_map()[1:], a_prediction(second), SPACING),
                r"has the shape \(5, 12, 12\)",
            ),
            (
                lambda first, second: write_image(label_map() * 100, a_prediction(second), SPACING),
                "holds the values 100, 200, which dataset.json does not name",
            ),
            (
                lambda first, second: write_image(label_map(), a_prediction(second).with_name("x.nii.gz")),
                r"1 of 4 predictions in .* have no reference in .*gt_segmentations, such as x\.nii\.gz: add it",
            ),
            (
                lambda first, second: (
                    [shutil.move(second / f"fold_{f}", second / f"fold_{f}_") for f in (0, 1)]
                    + [shutil.copytree(first / "fold_0", second / "fold_all")]
                ),
                r"has no predictions but those of fold_all, which has trained on these cases: train a fold",
            ),
            (
                lambda first, second: [
                    (shutil.rmtree(second / f"fold_{fold}"), (second / f"fold_{fold}").mkdir()) for fold in (0, 1)
                ],
                "has no predictions of a finished validation",
            ),
            (
                lambda first, second: [shutil.rmtree(second / f"fold_{fold}" / "validation") for fold in (0, 1)],
                "has no predictions of a finished validation",
            ),
            (
                lambda first, second: (shutil.rmtree(first / "fold_0"), shutil.rmtree(second / "fold_1")),
                "have no predicted case in common in any fold",
            ),
        ],
    )
    def test_it_is_said_in_one_line(self, damage: Callable, message, first, second, capsys):
        damage(first, second)
        assert re.search(message, refused(capsys, first, second))

    def test_without_references(self, root, first, second, monkeypatch, capsys):
        monkeypatch.delenv("nnUNet_preprocessed")
        message = f"there are no references of {DATASET}: nnUNet_preprocessed is not set: export nnUNet_preprocessed"
        assert message in refused(capsys, first, second)
        assert "is no folder" in refused(capsys, first, second, "--references", "nowhere")
        monkeypatch.setenv("nnUNet_preprocessed", str(root))
        assert f"there are no references of {DATASET} as {root}" in refused(capsys, first, second)
        compare(first, second, "--references", root / "nnUNet_preprocessed" / DATASET / "gt_segmentations")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["{first}"], "there is only one result"),
            (["{first}", "{first}/"], "is given twice"),
            (["{first}", "nowhere"], "nowhere is no folder: give an nnU-Net result folder"),
            (["{first}", "{second}", "--group", "one"], "--group has 1 name for 2 results"),
            (["{first}", "{second}", "--group", "one", " "], "--group has the name ' ': give a name that can be read"),
            (["{first}", "{second}", "--group", "one", "t\nwo"], r"--group has the name 't\nwo'"),
            (["{first}", "{second}", "--nsd-tolerance-mm", "0"], "--nsd-tolerance-mm must be a number above 0"),
            (["{first}", "{second}", "--nsd-tolerance-mm", "nan"], "--nsd-tolerance-mm must be a number above 0"),
            (["{first}", "{second}", "--folds", "7"], "has no predictions of a finished validation in these folds"),
            (["{first}", "{second}/fold_0"], "fold_0 has no fold_*"),
        ],
    )
    def test_arguments_that_do_not_fit(self, arguments, message, first, second, capsys):
        assert message in refused(capsys, *(text.format(first=first, second=second) for text in arguments))

    def test_paths_that_were_written_with_unset_variables(self, first, second, monkeypatch, capsys):
        for variable in ("nnUNet_results", "nnUNet_raw"):
            monkeypatch.delenv(variable, raising=False)
        assert "(nnUNet_results is not set in this shell)" in refused(capsys, first, "nowhere")
        message = refused(capsys, first, second, "--references", "nowhere")
        assert "(nnUNet_raw is not set in this shell)" in message

    def test_equal_names_need_group(self, root, first, capsys):
        again = write_result(root / "again", FIRST, 7)
        assert f"are both called {FIRST}: give each result a name with --group" in refused(capsys, first, again)

    def test_a_dataset_with_one_result(self, root, first, second, capsys):
        write_references(root / "nnUNet_preprocessed", "Dataset002_B")
        other = write_result(root / "nnUNet_results", FIRST, 5, dataset="Dataset002_B")
        assert "is the only result on Dataset002_B" in refused(capsys, first, second, other)

    def test_a_benchmarks_folder_has_a_command_of_its_own(self, root, first, capsys):
        (root / "matrix.json").write_text("[]")
        assert "`nnunet-xattnres benchmark report` compares it" in refused(capsys, first, root)

    @pytest.mark.parametrize("output", ["{first}", "{first}/report"])
    def test_the_report_does_not_go_into_a_result(self, output, first, second, capsys):
        before = contents(first)
        assert main(["compare", str(first), str(second), "-o", output.format(first=first)]) == 1
        assert "which is only read: choose another -o" in capsys.readouterr().err
        assert contents(first) == before

    def test_the_report_does_not_go_to_the_references(self, first, second, references, predictions, capsys):
        before = contents(references)
        for given in ((first, second), (*predictions, "--references", references)):
            assert main(["compare", *map(str, given), "-o", str(references)]) == 1
            assert "gt_segmentations, which is only read: choose another -o" in capsys.readouterr().err
        assert contents(references) == before

    def test_the_report_does_not_go_into_a_folder_of_nnunet(self, root, first, second, capsys, monkeypatch):
        monkeypatch.setenv("nnUNet_results", str(root / "nnUNet_results"))
        before = contents(root)
        for output in (root / "nnUNet_preprocessed", root / "nnUNet_preprocessed" / DATASET, first.parents[1]):
            assert main(["compare", str(first), str(second), "-o", str(output)]) == 1
            assert f"{output} is nnU-Net's own folder (nnUNet_" in capsys.readouterr().err
        assert contents(root) == before

    @pytest.mark.parametrize("name", ["report.md", "summary.csv", "cases.csv"])
    def test_a_file_that_is_not_from_a_report_is_not_replaced(self, name, first, second, capsys):
        Path("out").mkdir()
        Path("out", name).write_text("mine,dice\n")
        assert main(["compare", str(first), str(second), "-o", "out"]) == 1
        assert f"out/{name} is not from a report, which would replace it: choose another -o" in capsys.readouterr().err
        assert contents(Path("out")) == {Path("out", name): b"mine,dice\n"}

    def test_an_interrupted_report_is_replaced(self, first, second):
        out = compare(first, second)
        for path in (out / "versions.csv", out / "report.md"):
            path.unlink()
        compare(first, second)

    def test_nothing_is_measured_for_a_report_that_cannot_be_written(self, first, second, monkeypatch, capsys):
        Path("file").touch()
        monkeypatch.delattr(measuring, "measure")
        assert main(["compare", str(first), str(second), "-o", "file/report"]) == 1
        assert "cannot write to file/report" in capsys.readouterr().err

    def test_a_report_is_not_replaced_by_one_that_lacks_trainings(self, first, second, capsys):
        compare(first, second)
        assert main(["compare", str(first), str(second), "--folds", "0", "-o", "out"]) == 1
        message = capsys.readouterr().err
        assert "would lack (2 of 4, such as " in message
        assert message.endswith("or give the results, --folds and --group that it was made from\n")
        compare(first, second)
