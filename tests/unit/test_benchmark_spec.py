"""The spec of a benchmark: what is refused before anything is trained, and what the plans get from it."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from helpers.phantom_dataset import PHANTOM
from helpers.plans import ISOTROPIC, planned
from nnunet_xattnres.benchmark import command, preparation
from nnunet_xattnres.benchmark.command import run_benchmark
from nnunet_xattnres.benchmark.matrix import is_locked
from nnunet_xattnres.benchmark.preparation import _Preparation, check_spec
from nnunet_xattnres.benchmark.spec import Arm, Configuration, Dataset, Spec, read_spec, without_executor, write_spec
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet import commands
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.datasets import check_test_set, place_raw_dataset, read_dataset
from nnunet_xattnres.nnunet.derived_configurations import add_wide_configuration

SPECS = Path(__file__).parents[2] / "specs"
SHAPE = (8, 9, 10)


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def raw(tmp_path):
    """A tiny dataset in nnU-Net's raw format."""
    folder = tmp_path / "data" / "Dataset123_Tiny"
    for case in range(5):
        write_image(folder / "imagesTr" / f"case_{case}_0000.nii.gz", np.zeros(SHAPE, np.float32))
        write_image(folder / "labelsTr" / f"case_{case}.nii.gz", np.ones(SHAPE, np.uint8))
    dataset_json = {
        "channel_names": {"0": "nothing"},
        "labels": {"background": 0, "all": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


@pytest.fixture
def content(raw):
    """A spec that is fine, as YAML holds it."""
    return {
        "datasets": [{"path": "data/Dataset123_Tiny"}],
        "configurations": {"small": {"base": "3d_fullres", "features": 4, "epochs": 1}},
        "trainers": ["nnUNetTrainerPlanned", "nnUNetTrainerXAttnRes"],
        "folds": [0, 1],
        "seeds": [0],
    }


def write(content, folder):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def refusal(content, tmp_path, capsys):
    """What `benchmark run` answers, after checking that it is one line and nothing was begun."""
    assert main(["benchmark", "run", str(write(content, tmp_path)), "-o", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return captured.err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"trainer": ["nnUNetTrainerPlanned"]}, "unknown key trainer: did you mean trainers"),
        ({"folds": None}, "folds is missing"),
        ({"folds": [5]}, "from 0 to 4"),
        ({"folds": [0, 0]}, "twice"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": [True]}, "whole number"),
        ({"datasets": [{"path": "x", "tolerance": 1}]}, "unknown key tolerance: did you mean nsd_tolerance_mm"),
        ({"datasets": [{"path": "x", "nsd_tolerance_mm": 0}]}, "positive number"),
        ({"datasets": [{"path": "x", "id": 3}]}, "one of them"),
        ({"datasets": [{"path": "x", "trainers": ["nnUNetTrainerPlaned"]}]}, "did you mean nnUNetTrainerPlanned"),
        ({"datasets": [{"path": "$NO_SUCH_VARIABLE/x"}]}, "NO_SUCH_VARIABLE in $NO_SUCH_VARIABLE/x is not set"),
        ({"datasets": ["data/Nowhere"]}, "does not exist"),
        ({"datasets": [777]}, "dataset 777"),
        ({"datasets": [{"path": "data/Dataset123_Tiny", "name": "Dataset007_Bond"}]}, "not Dataset007_Bond"),
        ({"datasets": [{"path": "x", "trainers": 2 * ["nnUNetTrainerPlanned"]}]}, "nnUNetTrainerPlanned twice"),
        ({"datasets": 2 * ["data/Dataset123_Tiny"]}, "both have the id 123"),
        ({"datasets": [{"path": "data/Dataset123_Tiny", "test": True}]}, "no test images"),
        ({"configurations": {"small": {"base": "3d_fullres", "feature": 4}}}, "did you mean features"),
        ({"configurations": {"3d_fullres": {"features": 4}}}, "a name of its own"),
        ({"configurations": {"2d": {"base": "3d_fullres", "features": 4}}}, "a name of its own"),
        ({"configurations": {"a": {"base": "2d", "batch_size": 10**9}}}, "batch_size of configuration a"),
        (
            {
                "configurations": {name: {"base": "2d", "epochs": len(name)} for name in ("small", "small_wide")},
                "trainers": [{"trainer": "nnUNetTrainerPlanned", "name": "wide", "width": 1.5}],
            },
            "small_wide twice",
        ),
        ({"configurations": ["2d", "2d"]}, "configurations has 2d twice"),
        ({"configurations": {"a": {"base": "3d_fullress", "features": 4}}}, "did you mean 3d_fullres"),
        ({"configurations": {"a__b": {"base": "2d", "features": 4}}}, "single underscores"),
        ({"configurations": {"a": {"base": "2d"}}}, "the same as its base"),
        ({"configurations": {"a": {"base": "2d", "iterations": 4}}}, "no epochs"),
        ({"trainers": ["nnUNetTrainerXAtnRes"]}, "did you mean nnUNetTrainerXAttnRes"),
        ({"trainers": ["nnUNetTrainerDA5"]}, "nnUNetTrainerDA5 ignores the budget of the configuration small"),
        ({"trainers": [{"trainer": "nnUNetTrainerPlanned", "width": 1.2}]}, "needs a name"),
        ({"trainers": [{"trainer": "nnUNetTrainerPlanned", "name": "A", "planner": "ResEncM"}]}, "no planner ResEncM"),
        (
            {"trainers": [{"trainer": "nnUNetTrainerPlanned", "name": "A", "planner": "DatasetFingerprintExtractor"}]},
            "no planner DatasetFingerprintExtractor",
        ),
        ({"trainers": [{"trainer": None}]}, "needs a trainer"),
        ({"trainers": [{"trainer": "nnUNetTrainerPlanned", "name": "A", "width": 1000}]}, "from 0.25 to 8.0"),
        (
            {"trainers": [{"trainer": "nnUNetTrainerPlanned", "name": "A", "parameters_of": "nnUNetTrainerX"}]},
            "finds no trainer nnUNetTrainerX",
        ),
        (
            {"trainers": ["nnUNetTrainerPlanned", {"trainer": "nnUNetTrainerPlanned", "name": "A"}]},
            "nnUNetTrainerPlanned and A are the same",
        ),
        ({"executor": "slrm"}, "there is no executor slrm: did you mean slurm"),
        ({"executor": {"kind": "local", "job": 2}}, "unknown key job: did you mean jobs"),
        ({"executor": []}, "executor must hold kind"),
        (
            {"executor": {"kind": "slurm", "num_gpus": 4, "parameters": {"gpus_per_node": 1}}},
            "num_gpus 4 and gpus_per_node 1",
        ),
        ({"seeds": 0}, "seeds must be a list"),
        ({"executor": {"kind": "local", "parameters": {"partition": "gpu"}}}, "Slurm"),
    ],
)
def test_a_mistake_in_the_spec_is_one_line(change, complaint, content, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert complaint in refusal(content | change, tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("datasets: [", "not valid YAML"),
        ("- a\n- b\n", "must hold datasets"),
        ("", "must hold datasets"),
        ("folds: [0]\nseeds: [0]\nfolds: [1]\n", "folds is there twice"),
    ],
)
def test_a_file_that_is_no_spec(text, complaint, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(text)
    assert main(["benchmark", "run", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_missing_spec(tmp_path, capsys):
    assert main(["benchmark", "run", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_a_test_set_without_labels(content, raw, tmp_path, capsys):
    write_image(raw / "imagesTs" / "test_0_0000.nii.gz", np.zeros(SHAPE, np.float32))
    assert "no label for test_0: add it to labelsTs" in refusal(content, tmp_path, capsys)
    content["datasets"][0]["test"] = False
    spec, _ = check_spec(read_spec(write(content, tmp_path)))
    assert spec.datasets[0].test is False
    del content["datasets"][0]["test"]
    write_image(raw / "labelsTs" / "test_0.nii.gz", np.ones(SHAPE, np.uint8))
    spec, _ = check_spec(read_spec(write(content, tmp_path)))
    assert spec.datasets[0].test is True
    # It would be measured, and never be predicted.
    write_image(raw / "labelsTs" / "test_1.nii.gz", np.ones(SHAPE, np.uint8))
    assert "no image for test_1: remove it from labelsTs" in refusal(content, tmp_path, capsys)


def test_a_test_set_that_nnunet_could_not_predict_or_measure(raw, tmp_path):
    image, label = raw / "imagesTs" / "test_0_0000.nii.gz", raw / "labelsTs" / "test_0.nii.gz"
    write_image(image, np.zeros(SHAPE, np.float32))
    write_image(label, np.ones(SHAPE, np.uint8))
    check_test_set(raw)
    write_image(label, np.full(SHAPE, 7, np.uint8))
    (tmp_path / "out").mkdir()
    nnunet = NnUNet(tmp_path / "out", "cpu")
    with pytest.raises(XAttnResError, match=r"or say test: false: .*7"):
        place_raw_dataset(read_dataset(raw), nnunet, "-o", with_test_set=True)
    assert not (nnunet.raw / raw.name).exists()
    write_image(label, np.ones(SHAPE, np.uint8))
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(XAttnResError, match=r"test_0_0000\.nii\.gz is truncated or damaged"):
        check_test_set(raw)


@pytest.mark.parametrize("in_nnunet_raw", [True, False])
def test_a_dataset_may_be_a_link(in_nnunet_raw, content, raw, tmp_path, monkeypatch):
    link = tmp_path / "linked" / "Dataset027_Other"
    link.parent.mkdir()
    link.symlink_to(raw.rename(tmp_path / "tiny"))
    monkeypatch.setenv("nnUNet_raw", str(link.parent))
    content["datasets"] = [27 if in_nnunet_raw else str(link)]
    spec, (data,) = check_spec(read_spec(write(content, tmp_path)))
    assert spec.datasets[0].name == data.name == "Dataset027_Other"
    (tmp_path / "out").mkdir()
    nnunet = NnUNet(tmp_path / "out", "cpu")
    for first in (True, False):
        assert place_raw_dataset(data, nnunet, "-o") is first
    assert (tmp_path / "out" / "nnUNet_raw" / "Dataset027_Other" / "dataset.json").is_file()
    # What is recorded is read as the same.
    write_spec(spec, tmp_path / "out" / "spec.yaml")
    assert check_spec(read_spec(tmp_path / "out" / "spec.yaml"))[0] == spec
    # A link of any name to a dataset is that dataset.
    (tmp_path / "any").symlink_to((tmp_path / "tiny").rename(tmp_path / "Dataset123_Tiny"))
    assert read_dataset(tmp_path / "any").name == "Dataset123_Tiny"


def test_an_archive_may_be_a_link(tmp_path):
    (tmp_path / "Task04_Hippocampus.tar").touch()
    (tmp_path / "Task05_Mine.tar").symlink_to("Task04_Hippocampus.tar")
    assert read_dataset(tmp_path / "Task05_Mine.tar").name == "Dataset004_Hippocampus"
    (tmp_path / "blob").touch()
    (tmp_path / "Task06_Lung.tar").symlink_to("blob")
    assert read_dataset(tmp_path / "Task06_Lung.tar").name == "Dataset006_Lung"


def test_a_key_without_a_value_is_not_given(content, tmp_path):
    content["trainers"] = [{"trainer": "nnUNetTrainerPlanned", "name": None, "planner": None, "width": None}]
    spec = read_spec(write(content | {"executor": {"num_gpus": None}}, tmp_path))
    assert spec.trainers == (Arm("nnUNetTrainerPlanned", "nnUNetTrainerPlanned"),)
    assert spec.executor.num_gpus == 1


def test_a_folder_that_cannot_be_written_to(content, tmp_path, capsys):
    assert main(["benchmark", "run", str(write(content, tmp_path)), "-o", "/proc"]) == 1
    assert "choose another -o" in capsys.readouterr().err


@pytest.fixture
def steps(monkeypatch):
    """Preparation without nnU-Net: what is done with which dataset. A step that is in `failing` fails."""

    class Steps(list):
        failing = ()

    def note(name):
        def step(self):
            steps.append((name, self.dataset.name))
            if steps[-1] in steps.failing:
                raise XAttnResError("no luck")
            return []

        return step

    steps = Steps()
    for name in ("plan", "variants", "write_plans", "preprocess"):
        monkeypatch.setattr(_Preparation, name, note(name))
    monkeypatch.setattr(preparation, "place_raw_dataset", lambda *given, **options: None)
    return steps


def test_a_spec_that_cannot_be_planned_does_not_take_the_folder(content, raw, steps, tmp_path):
    shutil.copytree(raw, raw.with_name("Dataset124_Tiny"))
    content["datasets"].append("data/Dataset124_Tiny")
    steps.failing = (("plan", "Dataset124_Tiny"),)
    command = ["benchmark", "run", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out")]
    write(content, tmp_path)
    assert main(command) == 1
    assert steps == [("plan", "Dataset123_Tiny"), ("plan", "Dataset124_Tiny")]
    write(content | {"configurations": ["2d"]}, tmp_path)
    steps.failing = (("preprocess", "Dataset124_Tiny"),)
    assert main(command) == 1
    assert (tmp_path / "out" / "spec.yaml").is_file()


def test_a_command_that_outlives_the_preparation_keeps_others_from_it(content, tmp_path, monkeypatch):
    """A process of nnU-Net's is still at work when the one that has started it has gone."""
    # Until it leads a session of its own it ends with its parent's process group.
    command = tmp_path / "command"
    outlives = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 600' >/dev/null 2>&1 &"
    command.write_text(f"#!/bin/sh\n{outlives}\nuntil [ -s {tmp_path}/pid ]; do sleep 0.1; done\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setattr(commands, "find_command", lambda name: str(command))
    monkeypatch.setattr(preparation, "place_raw_dataset", lambda *given, **options: None)
    out = tmp_path / "out"
    with pytest.raises(XAttnResError, match="extract_fingerprint"):
        run_benchmark(write(content, tmp_path), out)
    try:
        assert is_locked(out / preparation.PREPARATION_LOCK)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_folder_of_another_spec(content, steps, tmp_path, capsys):
    out = tmp_path / "out"
    run_benchmark(write(content, tmp_path), out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Other words and another executor, the same matrix.
    same = content | {"datasets": [str(tmp_path / "data/Dataset123_Tiny")], "executor": {"jobs": 2}}
    run_benchmark(write(same, elsewhere), out)
    assert steps.count(("preprocess", "Dataset123_Tiny")) == 2
    assert main(["benchmark", "run", str(write(content | {"seeds": [0, 1]}, tmp_path)), "-o", str(out)]) == 1
    assert "another spec" in capsys.readouterr().err
    assert steps.count(("plan", "Dataset123_Tiny")) == 2


def test_a_report_to_continue_from_is_looked_at_before_anything_is_prepared(content, steps, tmp_path, capsys):
    run = ["benchmark", "run", str(write(content, tmp_path)), "-o", str(tmp_path / "out")]
    assert main([*run, "--continue-from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main([*run, "--continue-from", str(SPECS.parent / "results" / "cpu-evidence")]) == 1
    assert "the report has no training of this spec's: give a report on the same spec" in capsys.readouterr().err
    assert not steps and not (tmp_path / "out").exists()


def test_what_a_report_has_finished_is_not_trained_again(content, tmp_path, monkeypatch):
    """The report is taken over between preparation and training."""
    done = []
    monkeypatch.setattr(command, "read_tables", lambda report: report.name)
    monkeypatch.setattr(command, "check_names", lambda tables, spec: None)
    monkeypatch.setattr(command, "prepare", lambda root, *given: done.append("prepared") or [])
    monkeypatch.setattr(command, "take_over", lambda tables, root: done.append((tables, root)))
    monkeypatch.setattr(command, "run_cells", lambda *given: done.append("trained"))
    run = ["benchmark", "run", str(write(content, tmp_path)), "-o", str(tmp_path / "out")]
    assert main(run) == 0
    assert main([*run, "--continue-from", str(tmp_path / "report")]) == 0
    assert done == ["prepared", "trained", "prepared", ("report", tmp_path / "out"), "trained"]


def test_a_dataset_by_its_number_in_nnunet_raw(content, raw, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    spec, (data,) = check_spec(read_spec(write(content | {"datasets": [123]}, tmp_path)))
    assert data.name == spec.datasets[0].name == "Dataset123_Tiny"
    assert spec.datasets[0].family == "Dataset123_Tiny"
    # Once found, it is known by its path.
    assert (spec.datasets[0].id, spec.datasets[0].path) == (None, str(raw))


def test_a_configuration_that_only_another_planner_plans(content, tmp_path):
    spec = read_spec(write(content | {"configurations": ["3d_fullres_bs40"]}, tmp_path))
    assert spec.configurations == (Configuration("3d_fullres_bs40", "3d_fullres_bs40"),)


def test_a_spec_is_written_as_it_was_read(content, tmp_path):
    spec, _ = check_spec(read_spec(write(content, tmp_path)))
    (tmp_path / "other").mkdir()
    write_spec(spec, tmp_path / "other" / "spec.yaml")
    assert read_spec(tmp_path / "other" / "spec.yaml") == spec


def test_datasets_may_have_fewer_configurations_and_trainers(content, tmp_path):
    content["datasets"][0]["trainers"] = ["nnUNetTrainerXAttnRes"]
    spec = read_spec(write(content, tmp_path))
    assert [arm.name for arm in spec.arms_of(spec.datasets[0])] == ["nnUNetTrainerXAttnRes"]
    assert [configuration.name for configuration in spec.configurations_of(spec.datasets[0])] == ["small"]


@pytest.mark.parametrize("name", ["msd.yaml", "cpu-evidence.yaml"])
def test_committed_specs_are_read(name, monkeypatch):
    for variable in ("MSD", "XATTNRES_DATA"):
        monkeypatch.setenv(variable, "/data")
    spec = read_spec(SPECS / name)
    assert {arm.trainer for arm in spec.trainers} >= {"nnUNetTrainerPlanned", "nnUNetTrainerXAttnRes"}


def test_the_decathlons_spec_has_all_tasks_and_folds(monkeypatch):
    monkeypatch.setenv("MSD", "/data")
    spec = read_spec(SPECS / "msd.yaml")
    assert [Path(dataset.path or "").name[:6] for dataset in spec.datasets] == [f"Task{n:02d}" for n in range(1, 11)]
    assert spec.folds == (0, 1, 2, 3, 4)
    assert spec.configurations == (Configuration("3d_fullres", base="3d_fullres"),)
    assert len(spec.trainers) == 4


# What the plans get


def test_all_stages_are_widened():
    plans = planned(ISOTROPIC[:4], [40, 56, 40])
    base = next(iter(plans["configurations"]))
    features = plans["configurations"][base]["architecture"]["arch_kwargs"]["features_per_stage"]
    add_wide_configuration(plans, "wide", base, 1.5)
    wide = plans["configurations"]["wide"]
    assert wide["inherits_from"] == base
    assert wide["architecture"]["arch_kwargs"]["features_per_stage"] == [round(1.5 * channels) for channels in features]
    assert plans["configurations"][base]["architecture"]["arch_kwargs"]["features_per_stage"] == features


def test_arms_are_planned_as_what_they_are(nnunet: NnUNet, tmp_path):
    small = Configuration("small", base="3d_fullres", features=16, patch_voxels=30_000, batch_size=2, epochs=3)
    arms = (
        Arm("nnUNetTrainerPlanned", "nnUNetTrainerPlanned"),
        Arm("nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnRes"),
        Arm("wide", "nnUNetTrainerPlanned", parameters_of="nnUNetTrainerXAttnRes"),
        Arm("wider", "nnUNetTrainerPlanned", width=1.25),
        Arm("resenc", "nnUNetTrainerPlanned", planner="nnUNetPlannerResEncM"),
    )
    copy = NnUNet(tmp_path, "cpu")
    folder = copy.preprocessed / PHANTOM
    folder.mkdir(parents=True)
    copy.raw.symlink_to(nnunet.raw)
    for name in ("dataset_fingerprint", "nnUNetPlans", "nnUNetResEncUNetMPlans"):
        shutil.copy(nnunet.preprocessed / PHANTOM / f"{name}.json", folder)
        (folder / f"{name}.complete").touch()
    shutil.copy(nnunet.preprocessed / PHANTOM / "dataset.json", folder)
    matched = _Preparation(copy, spec_of(small, arms), Dataset(path="", name=PHANTOM))
    matched.plan()
    matched.write_plans()
    planned_network, xattnres, wide, wider, resenc = matched.variants()
    assert {variant["num_epochs"] for variant in (planned_network, xattnres, wide, wider, resenc)} == {3}
    assert xattnres["parameters"] > planned_network["parameters"]
    assert wide["parameters"] == pytest.approx(xattnres["parameters"], rel=0.01)
    assert wider["parameters"] > wide["parameters"]
    assert wide["planned_configuration"] == "small_wide"
    assert (resenc["plans"], resenc["planned_configuration"]) == ("nnUNetResEncUNetMPlans", "small")
    assert resenc["parameters"] > planned_network["parameters"]
    residual = json.loads((folder / "nnUNetResEncUNetMPlans.json").read_text())["configurations"]["small"]
    assert residual["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
    before = (folder / "nnUNetPlans.json").read_bytes()
    matched.plan()
    matched.write_plans()
    assert (folder / "nnUNetPlans.json").read_bytes() == before


CASES = [f"case_{number}" for number in range(5)]


@pytest.fixture
def split(raw, tmp_path, monkeypatch):
    """The folds that a benchmark takes where the user has some, in nnUNet_preprocessed; None for no such file."""

    def split(own, folds=(0, 1)):
        nnunet = NnUNet(tmp_path / "out", "cpu")
        nnunet.raw.mkdir(parents=True)
        (nnunet.raw / raw.name).symlink_to(raw)
        path = nnunet.preprocessed / raw.name / "splits_final.json"
        path.parent.mkdir(parents=True)
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "own"))
        (tmp_path / "own" / raw.name).mkdir(parents=True)
        if own is not None:
            (tmp_path / "own" / raw.name / path.name).write_text(json.dumps(own))
        _Preparation(nnunet, Spec((), (), (), folds, (0,)), Dataset(path="", name=raw.name))._split()
        return json.loads(path.read_text())

    return split


def test_folds_are_the_users_own_or_nnunets(split):
    own = [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[2:], "val": CASES[:2]}]
    assert split(own) == own


def test_folds_without_a_split_of_the_user(split):
    folds = split(None)
    assert sorted(case for fold in folds for case in fold["val"]) == CASES


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ([{"train": CASES[:3], "val": CASES[3:]}], "1 folds, counted from 0: leave 1"),
        (2 * [{"train": CASES[:3], "val": ["somebody"]}], "somebody"),
        ({"train": CASES, "val": CASES}, "no list of folds"),
    ],
)
def test_a_split_that_does_not_fit(own, complaint, split):
    with pytest.raises(XAttnResError, match=complaint):
        split(own)


def spec_of(configuration, arms):
    return Spec((), (configuration,), arms, (0,), (0,))


def test_another_executor_is_the_same_matrix(content, tmp_path):
    spec = read_spec(write(content, tmp_path))
    other = read_spec(write(content | {"executor": {"kind": "slurm", "parameters": {"partition": "gpu"}}}, tmp_path))
    assert spec != other
    assert without_executor(spec) == without_executor(other)
