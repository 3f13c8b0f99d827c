"""What comes before training: the steps of `benchmark run`, the plans of arms, the folds."""

import json
import multiprocessing.dummy
import shlex
import shutil

import pytest
from nnunetv2.utilities import utils

from helpers.benchmark import (
    OURS,
    PLANNED,
    ROOT,
    TINY,
    TINY_SPEC,
    write_spec_file,
    write_tiny_dataset,
)
from helpers.plans import ISOTROPIC, planned
from nnunet_xattnres.benchmark import preparation, run
from nnunet_xattnres.benchmark.preparation import DatasetPreparation
from nnunet_xattnres.benchmark.run import run_benchmark
from nnunet_xattnres.benchmark.spec import Arm, Configuration, Dataset, Spec
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import add_wide_configuration

SPEC = TINY_SPEC | {"trainers": [PLANNED]}


@pytest.fixture(autouse=True)
def threads_in_place_of_workers(monkeypatch):
    """nnU-Net lists cases in worker processes."""
    monkeypatch.setattr(utils, "Pool", multiprocessing.dummy.Pool)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny dataset, which tests only read."""
    folder = tmp_path_factory.mktemp("data") / TINY
    write_tiny_dataset(folder)
    return folder


@pytest.fixture
def data(tiny, tmp_path):
    """The folder with the tiny dataset, where the spec looks for it."""
    (tmp_path / "data").symlink_to(tiny.parent)
    return tmp_path / "data"


def benchmark_run(content, folder):
    """The command for a spec with that content."""
    return ["benchmark", "run", str(write_spec_file(content, folder)), "-o", str(folder / "out")]


class Steps(list):
    """The steps that were done, each with its dataset. A step that is in `failing` fails."""

    failing = ()


@pytest.fixture
def steps(monkeypatch):
    """The steps of preparation, noted in place of being done."""

    def note(name):
        def step(self):
            steps.append((name, self.dataset.name))
            if steps[-1] in steps.failing:
                raise XAttnResError("no luck")
            return []

        return step

    steps = Steps()
    for name in ("plan", "variants", "write_plans", "preprocess"):
        monkeypatch.setattr(DatasetPreparation, name, note(name))
    monkeypatch.setattr(preparation, "place_raw_dataset", lambda *given, **options: None)
    return steps


class TestRun:
    """The command `benchmark run` until trainings begin."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"trainer": [PLANNED]}, "unknown key trainer: did you mean trainers"),
            ({"datasets": ["x"]}, "does not exist"),
        ],
    )
    def test_a_mistake_in_the_spec_is_one_line_and_nothing_is_begun(self, change, message, tmp_path, capsys):
        assert main(benchmark_run(SPEC | change, tmp_path)) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_cannot_be_written_to(self, data, tmp_path, capsys):
        assert main([*benchmark_run(SPEC, tmp_path)[:-1], "/proc"]) == 1
        assert "choose another -o" in capsys.readouterr().err

    def test_a_folder_that_is_nnunets_own(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "out"))
        assert main(benchmark_run(SPEC, tmp_path)) == 1
        assert "(nnUNet_raw): choose another -o, such as -o benchmark" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_spec_that_cannot_be_planned_does_not_take_the_folder(self, tiny, steps, tmp_path):
        for name in (TINY, "Dataset124_Tiny"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / name).symlink_to(tiny)
        content = SPEC | {"datasets": [f"data/{TINY}", "data/Dataset124_Tiny"]}
        steps.failing = (("plan", "Dataset124_Tiny"),)
        assert main(benchmark_run(content, tmp_path)) == 1
        assert steps == [("plan", TINY), ("plan", "Dataset124_Tiny")]
        # Another spec may have the folder, and it belongs to this one as soon as everything is planned.
        steps.failing = (("preprocess", "Dataset124_Tiny"),)
        assert main(benchmark_run(content | {"configurations": ["2d"]}, tmp_path)) == 1
        assert (tmp_path / "out" / "spec.yaml").is_file()

    def test_a_folder_of_another_spec(self, data, steps, tmp_path, capsys):
        run_benchmark(write_spec_file(SPEC, tmp_path), tmp_path / "out")
        # Other words and another executor, the same matrix.
        same = SPEC | {"datasets": [str(data / TINY)], "executor": {"jobs": 2}}
        run_benchmark(write_spec_file(same, tmp_path), tmp_path / "out")
        assert steps.count(("preprocess", TINY)) == 2
        assert main(benchmark_run(SPEC | {"seeds": [0, 1]}, tmp_path)) == 1
        assert "another spec" in capsys.readouterr().err
        assert steps.count(("plan", TINY)) == 2

    def test_datasets_may_have_fewer_folds_and_seeds(self, tiny, steps, tmp_path, monkeypatch):
        (tmp_path / "data").mkdir()
        for name in (TINY, "Dataset124_Tiny"):
            (tmp_path / "data" / name).symlink_to(tiny)
        datasets = [f"data/{TINY}", {"path": "data/Dataset124_Tiny", "folds": [2, 1], "seeds": [5]}]
        cells = []
        fields = {"configuration": "small", "trainer": PLANNED, "trainer_class": PLANNED, "plans": "nnUNetPlans"}
        fields |= {"planned_configuration": "small", "num_epochs": 1, "parameters": 1}
        monkeypatch.setattr(DatasetPreparation, "variants", lambda self: [fields])
        monkeypatch.setattr(run, "run_cells", lambda root, of_run, machine: cells.extend(of_run))
        content = SPEC | {"datasets": datasets, "folds": [0, 1, 2], "seeds": [4, 5]}
        run_benchmark(write_spec_file(content, tmp_path), tmp_path / "out")
        found = [(cell.seed, cell.fold, cell.dataset) for cell in cells]
        assert found == [
            *((4, fold, TINY) for fold in range(3)),
            (5, 0, TINY),
            *((5, fold, name) for fold in (1, 2) for name in (TINY, "Dataset124_Tiny")),
        ]

    def test_the_command_for_the_report_can_be_pasted(self, data, steps, tmp_path, capsys):
        out = tmp_path / "a b"
        run_benchmark(write_spec_file(SPEC, tmp_path), out)
        printed = capsys.readouterr().out.partition("are finished: ")[2]
        assert shlex.split(printed) == ["nnunet-xattnres", "benchmark", "report", str(out), "-o", "REPORT"]

    def test_a_report_to_continue_from_is_looked_at_before_anything_is_prepared(self, data, steps, tmp_path, capsys):
        command = benchmark_run(SPEC, tmp_path)
        assert main([*command, "--continue-from", str(tmp_path / "nowhere")]) == 1
        assert "nowhere" in capsys.readouterr().err
        assert main([*command, "--continue-from", str(ROOT / "results" / "cpu-evidence")]) == 1
        assert "the report has no training of this spec's: give a report on the same spec" in capsys.readouterr().err
        assert not steps and not (tmp_path / "out").exists()

    def test_what_a_report_has_finished_is_not_trained_again(self, data, tmp_path, monkeypatch):
        """The report is taken over between preparation and training."""
        done = []
        monkeypatch.setattr(run, "read_tables", lambda report: report.name)
        monkeypatch.setattr(run, "check_names", lambda tables, spec: None)
        monkeypatch.setattr(run, "prepare", lambda root, *given: done.append("prepared") or [])
        monkeypatch.setattr(run, "take_over", lambda tables, root: done.append((tables, root)))
        monkeypatch.setattr(run, "run_cells", lambda *given: done.append("trained"))
        command = benchmark_run(SPEC, tmp_path)
        assert main(command) == 0
        assert main([*command, "--continue-from", str(tmp_path / "report")]) == 0
        assert done == ["prepared", "trained", "prepared", ("report", tmp_path / "out"), "trained"]


class TestPlans:
    def test_all_stages_are_widened(self):
        plans = planned(ISOTROPIC[:4], [40, 56, 40])
        base = next(iter(plans["configurations"]))
        features = plans["configurations"][base]["architecture"]["arch_kwargs"]["features_per_stage"]
        add_wide_configuration(plans, "wide", base, 1.5)
        wide = plans["configurations"]["wide"]
        assert wide["inherits_from"] == base
        wide_features = wide["architecture"]["arch_kwargs"]["features_per_stage"]
        assert wide_features == [round(1.5 * channels) for channels in features]
        assert plans["configurations"][base]["architecture"]["arch_kwargs"]["features_per_stage"] == features

    def test_arms_are_planned_as_what_they_are(self, tiny, tmp_path):
        arms = (
            Arm(trainer=PLANNED),
            Arm(trainer=OURS),
            Arm(name="wide", trainer=PLANNED, parameters_of=OURS),
            Arm(name="wider", trainer=PLANNED, width=1.5),
            Arm(name="resenc", trainer=PLANNED, planner="nnUNetPlannerResEncM"),
            Arm(name="carried", trainer=PLANNED, preset="XAttnRes"),
        )
        small = Configuration(name="small", base="full", features=16, patch_voxels=30_000, batch_size=2, epochs=3)
        nnunet = NnUNet(tmp_path, "cpu")
        nnunet.raw.symlink_to(tiny.parent)
        folder = nnunet.preprocessed / TINY
        folder.mkdir(parents=True)
        shutil.copy(tiny / "dataset.json", folder)
        # As nnU-Net would have planned: its commands are not run again.
        for name, residual in (("nnUNetPlans", False), ("nnUNetResEncUNetMPlans", True)):
            plans = planned(ISOTROPIC[:3], [40, 40, 40], residual)
            plans |= {"plans_name": name, "dataset_name": TINY}
            (folder / f"{name}.json").write_text(json.dumps(plans))
            (folder / f"{name}.complete").touch()
        (folder / "dataset_fingerprint.complete").touch()
        spec = Spec(datasets=[7], configurations=(small,), trainers=arms, folds=[0], seeds=[0])
        preparing = DatasetPreparation(nnunet, spec, Dataset(id=123, name=TINY))
        preparing.plan()
        preparing.write_plans()
        planned_network, xattnres, wide, wider, resenc, carried = preparing.variants()
        assert {variant["num_epochs"] for variant in (planned_network, xattnres, wide, wider, resenc, carried)} == {3}
        assert xattnres["parameters"] > planned_network["parameters"]
        assert wide["parameters"] == pytest.approx(xattnres["parameters"], rel=0.02)
        assert wider["parameters"] > wide["parameters"]
        assert wide["planned_configuration"] == "small_wide"
        assert (resenc["plans"], resenc["planned_configuration"]) == ("nnUNetResEncUNetMPlans", "small")
        assert resenc["parameters"] > planned_network["parameters"]
        residual = json.loads((folder / "nnUNetResEncUNetMPlans.json").read_text())["configurations"]["small"]
        assert residual["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
        assert carried["parameters"] == xattnres["parameters"]
        assert (carried["plans"], carried["planned_configuration"]) == ("nnUNetXAttnResPlans", "small")
        carrying = json.loads((folder / "nnUNetXAttnResPlans.json").read_text())["configurations"]["small"]
        assert carrying["architecture"]["network_class_name"].endswith(".PlainConvXAttnResUNet")
        before = (folder / "nnUNetPlans.json").read_bytes()
        preparing.plan()
        preparing.write_plans()
        assert (folder / "nnUNetPlans.json").read_bytes() == before
        (folder / "nnUNetPlans.json").write_bytes(before[:100])
        with pytest.raises(XAttnResError, match=r"is not valid JSON \(.*\): delete it and nnUNetPlans\.complete"):
            preparing.plan()


CASES = [f"case_{number}" for number in range(5)]


class TestFolds:
    @pytest.fixture
    def split(self, tiny, tmp_path, monkeypatch):
        """The folds that a benchmark takes where the user has some, in nnUNet_preprocessed; None for no such file."""

        def split(own, folds=(0, 1)):
            nnunet = NnUNet(tmp_path / "out", "cpu")
            nnunet.raw.parent.mkdir()
            nnunet.raw.symlink_to(tiny.parent)
            path = nnunet.preprocessed / TINY / "splits_final.json"
            path.parent.mkdir(parents=True)
            monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "own"))
            (tmp_path / "own" / TINY).mkdir(parents=True)
            if own is not None:
                (tmp_path / "own" / TINY / path.name).write_text(json.dumps(own))
            spec = Spec(datasets=[7], configurations=["2d"], trainers=[PLANNED], folds=folds, seeds=[0])
            DatasetPreparation(nnunet, spec, Dataset(id=123, name=TINY)).split()
            return json.loads(path.read_text())

        return split

    def test_folds_are_the_users_own_or_nnunets(self, split):
        own = [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[2:], "val": CASES[:2]}]
        assert split(own) == own

    def test_a_split_may_have_more_folds_than_nnunet_makes(self, split):
        own = 10 * [{"train": CASES[:3], "val": CASES[3:]}]
        assert split(own, folds=(0, 9)) == own

    def test_folds_without_a_split_of_the_user(self, split):
        folds = split(None)
        assert sorted(case for fold in folds for case in fold["val"]) == CASES

    def test_a_fold_that_nnunet_does_not_make(self, split):
        # nnU-Net itself would take a random split.
        with pytest.raises(XAttnResError, match=r"nnU-Net makes 5 folds of .* leave 5 out of the spec's, or put a spl"):
            split(None, folds=(0, 5))

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ([{"train": CASES[:3], "val": CASES[3:]}], "1 fold, counted from 0: leave 1"),
            (2 * [{"train": CASES[:3], "val": ["somebody"]}], "somebody"),
            ({"train": CASES, "val": CASES}, "no list of folds"),
        ],
    )
    def test_a_split_that_does_not_fit(self, own, message, split):
        with pytest.raises(XAttnResError, match=message):
            split(own)
