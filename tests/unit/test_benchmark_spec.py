"""The spec of a benchmark: what is read, written and refused without looking at datasets, trainers and planners."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.benchmark import OURS, PLANNED, ROOT, TINY_SPEC, write_spec_file
from nnunet_xattnres.benchmark.spec import (
    Arm,
    Configuration,
    Dataset,
    Executor,
    Spec,
    planned_name,
    read_spec,
    without_executor,
    write_spec,
)
from nnunet_xattnres.common.errors import XAttnResError

SPECS = ROOT / "specs"
LONG_NAME = "letters, digits, points, dashes and single underscores"


def refusal(path: Path) -> str:
    """What `read_spec` says, after checking that it is one line that begins with the file."""
    with pytest.raises(XAttnResError) as error:
        read_spec(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def dataset(**keys):
    return {"datasets": [{"path": "x"} | keys]}


def configuration(**keys):
    return {"configurations": {"small": {"base": "2d"} | keys}}


def trainer(**keys):
    return {"trainers": [{"trainer": PLANNED} | keys]}


def slurm(**keys):
    return {"executor": {"kind": "slurm"} | keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The spec
        ({"trainer": [PLANNED]}, ": unknown key trainer: did you mean trainers?"),
        (
            {"xyz": 1},
            ": unknown key xyz: it takes datasets, configurations, trainers, folds, seeds, executor",
        ),
        ({"folds": None}, ": folds is missing"),
        ({"datasets": []}, ": datasets: say at least one"),
        ({"configurations": {}}, ": configurations: say at least one"),
        ({"trainers": []}, ": trainers: say at least one"),
        ({"folds": []}, ": folds: say at least one"),
        ({"seeds": []}, ": seeds: say at least one"),
        ({"folds": [0, -1]}, ": folds, entry 2: must be greater than or equal to 0, not -1"),
        ({"folds": [0, 0]}, ": folds: 0 is there twice: say it once"),
        ({"seeds": [-1]}, ": seeds, entry 1: must be greater than or equal to 0, not -1"),
        ({"seeds": [2**31]}, ": seeds, entry 1: must be less than 2147483648, not 2147483648"),
        ({"seeds": [True]}, ": seeds, entry 1: must be a valid integer, not True"),
        ({"seeds": [1.0]}, ": seeds, entry 1: must be a valid integer, not 1.0"),
        ({"seeds": ["1"]}, ": seeds, entry 1: must be a valid integer, not '1'"),
        ({"seeds": [4, 4]}, ": seeds: 4 is there twice: say it once"),
        ({"seeds": 0}, ": seeds: must be a list, not 0"),
        ({"seeds": {0, 1}}, ": seeds: must be a list, not {0, 1}"),
        # Datasets
        ({"datasets": {"path": "x"}}, ": datasets: must be a list, not {'path': 'x'}"),
        (
            {"datasets": [[1]]},
            ": datasets, entry 1: must hold path, id, name, nsd_tolerance_mm, family, test, configurations, trainers, "
            "folds, seeds, not [1]",
        ),
        (dataset(tolerance=1), ": datasets, entry 1: unknown key tolerance: did you mean nsd_tolerance_mm"),
        (dataset(nsd_tolerance_mm=0), ": datasets, entry 1, nsd_tolerance_mm: must be greater than 0, not 0"),
        (
            dataset(nsd_tolerance_mm=float("inf")),
            ": datasets, entry 1, nsd_tolerance_mm: must be a finite number, not inf",
        ),
        (dataset(nsd_tolerance_mm=True), ": datasets, entry 1, nsd_tolerance_mm: must be a valid number, not True"),
        (dataset(id=3), ": datasets, entry 1: give either a path or an id"),
        (dataset(path=None), ": datasets, entry 1: give either a path or an id"),
        (dataset(path=""), ": datasets, entry 1, path: must have at least 1 character, not ''"),
        ({"datasets": [1, 0]}, ": datasets, entry 2, id: must be greater than or equal to 1, not 0"),
        ({"datasets": [1000]}, ": datasets, entry 1, id: must be less than or equal to 999, not 1000"),
        ({"datasets": [True]}, ", not True"),
        (dataset(name=7), ": datasets, entry 1, name: must be a valid string, not 7"),
        (dataset(family=""), ": datasets, entry 1, family: must have at least 1 character, not ''"),
        (dataset(test="yes"), ": datasets, entry 1, test: must be a valid boolean, not 'yes'"),
        (dataset(trainers=PLANNED), f": datasets, entry 1, trainers: must be a list, not '{PLANNED}'"),
        (dataset(trainers=[PLANNED, PLANNED]), f": datasets, entry 1, trainers: {PLANNED} is there twice: say it once"),
        (dataset(path="/x", trainers=["nnUNetTrainerPlaned"]), f"has nnUNetTrainerPlaned: did you mean {PLANNED}"),
        (dataset(path="/x", folds=[0, 7]), ": folds of dataset /x has 7: there are 0, 1"),
        (dataset(path="/x", seeds=[1]), ": seeds of dataset /x has 1: there are 0"),
        (dataset(path="/x", seeds=[True]), ": datasets, entry 1, seeds, entry 1: must be a valid integer, not True"),
        (dataset(path="/x", configurations=["q"]), ": configurations of dataset /x has q: there are small"),
        (
            dataset(path="$NO_SUCH_VARIABLE/x"),
            "path: the environment variable NO_SUCH_VARIABLE in $NO_SUCH_VARIABLE/x is not set: export it",
        ),
        # Configurations
        ({"configurations": 3}, ": configurations: must be a list, not 3"),
        ({"configurations": ["2d", "2d"]}, ": configurations: 2d is there twice: say it once"),
        ({"configurations": ["2d", 3]}, ": configurations, entry 2, name: must be a valid string, not 3"),
        (
            {"configurations": {"2d": None, 3: {"base": "2d"}}},
            ": configurations, 3, name: must be a valid string, not 3",
        ),
        (
            {"configurations": {"small": 3}},
            ": configurations: small must hold what it changes, such as base",
        ),
        (configuration(name="other"), ": configurations: small must hold what it changes, such as base"),
        (configuration(feature=4), ": configurations, small: unknown key feature: did you mean features?"),
        (configuration(features=0), ": configurations, small, features: must be greater than or equal to 1, not 0"),
        (configuration(patch_voxels=1.5), ": configurations, small, patch_voxels: must be a valid integer, not 1.5"),
        (configuration(batch_size=10**9), "batch_size: must be less than or equal to 10000, not 1000000000"),
        (configuration(epochs=True), ": configurations, small, epochs: must be a valid integer, not True"),
        ({"configurations": {"a__b": {"base": "2d", "features": 4}}}, f"a__b is no name: use {LONG_NAME}"),
        (
            {"configurations": {"3d_fullres": {"features": 4}}},
            ": configurations, 3d_fullres: it changes what nnU-Net plans",
        ),
        ({"configurations": {"2d": {"base": "3d_fullres", "features": 4}}}, "give it a name of its own and a base"),
        (configuration(), ": configurations, small: it is the same as its base 2d: say what it changes"),
        (configuration(iterations=4), ": configurations, small: it has iterations and no epochs: say both"),
        (configuration(base="3d_fullress", features=4), "nnU-Net plans no 3d_fullress: did you mean 3d_fullres?"),
        (configuration(base="2dd", features=4), "nnU-Net plans no 2dd: did you mean 2d?"),
        # Trainers
        ({"trainers": PLANNED}, f": trainers: must be a list, not '{PLANNED}'"),
        (
            {"trainers": [3]},
            ": trainers, entry 1: must hold trainer, name, planner, parameters_of, width, preset, not 3",
        ),
        ({"trainers": [{"trainer": None}]}, ": trainers, entry 1: trainer is missing"),
        (trainer(trainer=""), ": trainers, entry 1, trainer: must have at least 1 character, not ''"),
        (trainer(withd=2), ": trainers, entry 1: unknown key withd: did you mean width?"),
        (trainer(name="a/b"), f": trainers, entry 1, name: a/b is no name: use {LONG_NAME}"),
        (trainer(trainer="a/b"), f": trainers, entry 1, name: a/b is no name: use {LONG_NAME}"),
        (trainer(width=1.2), f": trainers, entry 1: {PLANNED} with a width, planner or preset needs a name"),
        (trainer(planner="P"), f": trainers, entry 1: {PLANNED} with a width, planner or preset needs a name"),
        (trainer(name="A", width=1000), ": trainers, entry 1, width: must be less than or equal to 8, not 1000"),
        (trainer(name="A", width=0.1), ": trainers, entry 1, width: must be greater than or equal to 0.25, not 0.1"),
        (
            trainer(name="A", width=2, parameters_of=OURS),
            ": trainers, entry 1: parameters_of and width each set the width",
        ),
        (
            trainer(name="A", width=2, preset="NoSkip"),
            ": trainers, entry 1: a preset keeps the planned width: remove it, or parameters_of and width",
        ),
        (trainer(preset="NoSkip"), f": trainers, entry 1: {PLANNED} with a width, planner or preset needs a name"),
        ({"trainers": [PLANNED, PLANNED]}, f": trainers: {PLANNED} is there twice: say it once"),
        (
            {
                "configurations": {name: {"base": "2d", "epochs": len(name)} for name in ("small", "small_wide")},
                "trainers": [{"trainer": PLANNED, "name": "wide", "width": 1.5}],
            },
            ": the plans would have small_wide twice (a wide trainer adds CONFIGURATION_TRAINER): rename one",
        ),
        # The executor
        ({"executor": "slrm"}, ": executor, kind: must be 'local' or 'slurm', not 'slrm'"),
        ({"executor": []}, ": executor: must hold kind, jobs, num_gpus, parameters, not []"),
        ({"executor": {"job": 2}}, ": executor: unknown key job: did you mean jobs?"),
        ({"executor": {"jobs": 0}}, ": executor, jobs: must be greater than or equal to 1, not 0"),
        ({"executor": {"num_gpus": 0.5}}, ": executor, num_gpus: must be a valid integer, not 0.5"),
        ({"executor": {"parameters": {"partition": "gpu"}}}, ": executor: parameters are those of submitit's Slurm"),
        (slurm(parameters=["gpu"]), ": executor, parameters: must be a valid dictionary, not ['gpu']"),
        (slurm(jobs=2), ": executor: Slurm itself decides how many trainings run at a time"),
        (slurm(num_gpus=4, parameters={"gpus_per_node": 1}), ": executor: num_gpus is 4 and gpus_per_node 1"),
    ],
)
def test_a_mistake_is_refused_in_one_line(change, message, tmp_path):
    assert message in refusal(write_spec_file(TINY_SPEC | change, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", " is not valid YAML"),
        ("- a\n- b\n", ": must hold datasets, configurations, trainers, folds, seeds, executor, not ['a', 'b']"),
        ("", ": must hold datasets"),
        ("folds: [0]\nseeds: [0]\nfolds: [1]\n", "folds is there twice"),
        ("datasets: [{path: x, path: y}]", "path is there twice"),
        ("seeds: [2026-13-41]", " is not valid YAML"),
    ],
)
def test_a_file_that_is_no_spec(text, message, tmp_path):
    (tmp_path / "spec.yaml").write_text(text)
    assert message in refusal(tmp_path / "spec.yaml")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(XAttnResError, match=r"cannot read .*spec\.yaml \(No such file or directory\): give the YAML"):
        read_spec(tmp_path / "spec.yaml")
    (tmp_path / "spec.yaml").write_bytes(b"\xff\xff")
    assert " is not valid YAML" in refusal(tmp_path / "spec.yaml")


def test_a_key_without_a_value_is_not_given(tmp_path):
    content = TINY_SPEC | {
        "trainers": [{"trainer": PLANNED, "name": None, "planner": None, "width": None}],
        "executor": {"num_gpus": None},
    }
    spec = read_spec(write_spec_file(content, tmp_path))
    assert spec.trainers == (Arm(name=PLANNED, trainer=PLANNED),)
    assert spec.executor == Executor(num_gpus=1)
    assert read_spec(write_spec_file(TINY_SPEC | {"executor": None}, tmp_path)).executor == Executor()


def test_one_value_may_stand_for_an_entry(tmp_path):
    content = TINY_SPEC | {"datasets": [7, "/data/x"], "configurations": ["2d"], "executor": "slurm"}
    spec = read_spec(write_spec_file(content, tmp_path))
    assert spec.datasets == (Dataset(id=7), Dataset(path="/data/x"))
    assert spec.configurations == (Configuration(name="2d", base="2d"),)
    assert spec.trainers == (Arm(name=PLANNED, trainer=PLANNED), Arm(name=OURS, trainer=OURS))
    assert spec.executor == Executor(kind="slurm")


def test_paths_are_relative_to_the_spec_and_may_hold_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    content = TINY_SPEC | {"datasets": ["here/../x", "$DATA/x", "${DATA}/y", "~/x"]}
    spec = read_spec(write_spec_file(content, tmp_path))
    assert [entry.path for entry in spec.datasets] == [f"{tmp_path}/x", "/data/x", "/data/y", "/home/me/x"]


def test_a_spec_cannot_be_changed(tmp_path):
    spec = read_spec(write_spec_file(TINY_SPEC, tmp_path))
    for entry, key in ((spec, "folds"), (spec.datasets[0], "test"), (spec.trainers[0], "width")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(entry, key, None)


NAMES = st.from_regex(r"[A-Za-z0-9]([.-]?[A-Za-z0-9]){0,8}", fullmatch=True)
COUNTS = st.integers(1, 10_000)


def _some_of(values):
    return st.lists(st.sampled_from(values), unique=True)


@st.composite
def specs(draw) -> Spec:
    """Any spec as `check_spec` leaves it: datasets have a path, a name and a family."""
    names = [f"c{name}" for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))]
    arms = [f"a{name}" for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))]
    folds = draw(st.lists(st.integers(0, 9), min_size=1, unique=True))
    seeds = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True))
    changes = st.fixed_dictionaries(
        {"features": COUNTS, "epochs": COUNTS},
        optional=dict.fromkeys(("patch_voxels", "batch_size", "iterations", "validation_iterations"), COUNTS),
    )
    return Spec(
        datasets=draw(
            st.lists(
                st.builds(
                    Dataset,
                    path=st.text("abc/. é").map(lambda path: os.path.abspath(f"/{path}")),
                    name=NAMES,
                    family=NAMES,
                    nsd_tolerance_mm=st.floats(1e-6, 1e6),
                    test=st.booleans(),
                    configurations=_some_of(names),
                    trainers=_some_of(arms),
                    folds=_some_of(folds),
                    seeds=_some_of(seeds),
                ),
                min_size=1,
                max_size=3,
            )
        ),
        configurations=tuple(Configuration(name=name, base="2d", **draw(changes)) for name in names),
        trainers=[
            Arm(
                name=name,
                trainer=name,
                planner=draw(NAMES),
                **draw(
                    st.fixed_dictionaries({}, optional={"width": st.floats(0.25, 8)})
                    | st.fixed_dictionaries({}, optional={"parameters_of": NAMES})
                ),
            )
            for name in arms
        ],
        folds=folds,
        seeds=seeds,
        executor=draw(
            st.builds(Executor, jobs=COUNTS, num_gpus=COUNTS)
            | st.builds(Executor, kind=st.just("slurm"), parameters=st.dictionaries(NAMES, COUNTS | st.text("ab")))
        ),
    )


@settings(max_examples=30, deadline=None)
@given(specs())
def test_a_spec_is_read_as_it_was_written(tmp_path_factory, spec):
    path = tmp_path_factory.getbasetemp() / "spec.yaml"
    write_spec(spec, path)
    assert read_spec(path) == spec


# As version 0.1.0 has written it.
SPEC_OF_0_1_0 = """\
datasets:
- path: /data/Dataset803_SarcomaCT
  name: Dataset803_SarcomaCT
  nsd_tolerance_mm: 3.0
  family: sarcoma
  test: false
  configurations:
  - 3d_cpu
  trainers: []
configurations:
  3d_cpu:
    base: 3d_fullres
    features: 8
    patch_voxels: 50000
    batch_size: 2
    epochs: 8
    iterations: 100
    validation_iterations: 10
  3d_lowres:
    base: 3d_lowres
trainers:
- name: nnUNetTrainerPlanned
  trainer: nnUNetTrainerPlanned
  planner: ExperimentPlanner
- name: PlannedSameParameters
  trainer: nnUNetTrainerPlanned
  planner: ExperimentPlanner
  parameters_of: nnUNetTrainerXAttnRes
folds:
- 0
- 1
seeds:
- 0
executor:
  kind: local
  num_gpus: 1
  parameters: {}
"""


def test_a_spec_of_an_older_version_is_read(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC_OF_0_1_0)
    small = {"features": 8, "patch_voxels": 50000, "batch_size": 2}
    name = "Dataset803_SarcomaCT"
    assert read_spec(tmp_path / "spec.yaml") == Spec(
        datasets=[
            Dataset(
                path=f"/data/{name}",
                name=name,
                nsd_tolerance_mm=3,
                family="sarcoma",
                test=False,
                configurations=["3d_cpu"],
            )
        ],
        configurations=(
            Configuration(
                name="3d_cpu", base="3d_fullres", **small, epochs=8, iterations=100, validation_iterations=10
            ),
            Configuration(name="3d_lowres"),
        ),
        trainers=[
            Arm(trainer=PLANNED),
            Arm(name="PlannedSameParameters", trainer=PLANNED, parameters_of=OURS),
        ],
        folds=[0, 1],
        seeds=[0],
    )


def test_a_configuration_that_only_another_planner_plans(tmp_path):
    spec = read_spec(write_spec_file(TINY_SPEC | {"configurations": ["3d_fullres_bs40"]}, tmp_path))
    assert spec.configurations == (Configuration(name="3d_fullres_bs40", base="3d_fullres_bs40"),)


def test_datasets_may_have_less_than_the_spec(tmp_path):
    content = TINY_SPEC | {
        "datasets": ["a", {"path": "b", "trainers": [OURS], "configurations": ["2d"], "folds": [1], "seeds": [0]}],
        "configurations": ["2d", "3d_fullres"],
    }
    spec = read_spec(write_spec_file(content, tmp_path))
    arms = [[arm.name for arm in spec.arms_of(entry)] for entry in spec.datasets]
    assert arms == [[PLANNED, OURS], [OURS]]
    configurations = [[entry.name for entry in spec.configurations_of(dataset)] for dataset in spec.datasets]
    assert configurations == [["2d", "3d_fullres"], ["2d"]]
    assert [spec.folds_of(entry) for entry in spec.datasets] == [[0, 1], [1]]
    assert [spec.seeds_of(entry) for entry in spec.datasets] == [[0], [0]]


def test_names_in_plans():
    small = Configuration(name="small", base="2d", features=4)
    assert planned_name(small, Arm(trainer=PLANNED)) == "small"
    assert planned_name(small, Arm(trainer=PLANNED, name="wide", width=1.5)) == "small_wide"
    assert planned_name(small, Arm(trainer=PLANNED, name="wide", parameters_of=OURS)) == "small_wide"


def test_another_executor_is_the_same_matrix(tmp_path):
    executor = {"kind": "slurm", "parameters": {"partition": "gpu"}}
    spec = read_spec(write_spec_file(TINY_SPEC, tmp_path))
    other = read_spec(write_spec_file(TINY_SPEC | {"executor": executor}, tmp_path))
    assert spec != other
    assert without_executor(spec) == without_executor(other)
    assert without_executor(spec) != without_executor(spec.model_copy(update={"seeds": (0, 1)}))


@pytest.mark.parametrize("name", ["msd.yaml", "cpu-evidence.yaml", "evidence.yaml"])
def test_committed_specs_are_read(name, monkeypatch):
    for variable in ("MSD", "XATTNRES_DATA"):
        monkeypatch.setenv(variable, "/data")
    spec = read_spec(SPECS / name)
    assert {arm.trainer for arm in spec.trainers} >= {PLANNED, OURS}


def test_the_pilot_is_a_part_of_the_evidence(monkeypatch):
    """The evidence can continue from the pilot: it takes one of its candidates per dataset, with the same settings."""
    monkeypatch.setenv("XATTNRES_DATA", "/data")
    pilot, evidence = (read_spec(SPECS / f"{name}.yaml") for name in ("evidence-pilot", "evidence"))
    assert set(evidence.configurations) <= set(pilot.configurations)
    assert pilot.trainers == evidence.trainers[:1]
    of_pilot = {entry.path: entry for entry in pilot.datasets}
    for entry in evidence.datasets:
        candidates = of_pilot[entry.path]
        assert entry.nsd_tolerance_mm == candidates.nsd_tolerance_mm
        assert set(entry.configurations) <= set(candidates.configurations)
        assert set(pilot.folds) <= set(evidence.folds_of(entry))
        assert set(evidence.seeds_of(entry)) & set(pilot.seeds_of(candidates))


def test_the_decathlons_spec_has_all_tasks_and_folds(monkeypatch):
    monkeypatch.setenv("MSD", "/data")
    spec = read_spec(SPECS / "msd.yaml")
    assert [Path(entry.path or "").name[:6] for entry in spec.datasets] == [f"Task{n:02d}" for n in range(1, 11)]
    assert spec.folds == (0, 1, 2, 3, 4)
    assert spec.configurations == (Configuration(name="3d_fullres", base="3d_fullres"),)
    assert len(spec.trainers) == 4
