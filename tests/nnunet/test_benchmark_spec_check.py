"""The spec of a benchmark beside what it names: trainers, planners, datasets and their test sets."""

import multiprocessing.dummy
import shutil

import numpy as np
import pytest
from nnunetv2.utilities import utils

from helpers.benchmark import (
    OURS,
    PLANNED,
    TINY,
    TINY_SHAPE,
    TINY_SPEC,
    write_image,
    write_spec_file,
    write_tiny_dataset,
)
from helpers.training import run_in_threads
from nnunet_xattnres.benchmark.spec import read_spec, write_spec
from nnunet_xattnres.benchmark.spec_check import check_spec
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.datasets import check_test_set, place_raw_dataset, read_dataset

# Looking for a trainer takes a while.
SPEC = TINY_SPEC | {"trainers": [PLANNED]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny dataset, which tests only read."""
    folder = tmp_path_factory.mktemp("tiny") / TINY
    write_tiny_dataset(folder)
    return folder


@pytest.fixture
def raw(tiny, tmp_path):
    """A copy of the tiny dataset, where the spec looks for it."""
    return shutil.copytree(tiny, tmp_path / "data" / TINY)


def check(content, folder):
    return check_spec(read_spec(write_spec_file(content, folder)))


def arm(**keys):
    return {"trainers": [{"trainer": PLANNED, "name": "A"} | keys]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": ["data/Nowhere"]}, "data/Nowhere does not exist"),
        ({"datasets": [777]}, "dataset 777: nnUNet_raw is not set"),
        ({"datasets": [{"path": f"data/{TINY}", "name": "Dataset007_Bond"}]}, f"makes {TINY}, not Dataset007_Bond"),
        ({"datasets": 2 * [f"data/{TINY}"]}, "both have the id 123"),
        ({"datasets": [{"path": f"data/{TINY}", "test": True}]}, "no test images in imagesTs"),
        ({"trainers": ["nnUNetTrainerXAtnRes"]}, f"did you mean {OURS}"),
        ({"trainers": ["nnUNetTrainerDA5"]}, "nnUNetTrainerDA5 ignores the budget of the configuration small"),
        (arm(planner="ResEncM"), "no planner ResEncM: did you mean nnUNetPlannerResEncM"),
        (arm(planner="DatasetFingerprintExtractor"), "no planner DatasetFingerprintExtractor"),
        (arm(parameters_of="nnUNetTrainerX"), "finds no trainer nnUNetTrainerX"),
        (arm(preset="NoSkips"), "there is no preset NoSkips of XAttnRes: did you mean NoSkip"),
        (arm(trainer=OURS, preset="NoSkip"), f"{OURS} and the preset NoSkip both add XAttnRes"),
        ({"trainers": [PLANNED, {"trainer": PLANNED, "name": "A"}]}, f"{PLANNED} and A are the same: remove one"),
        (
            {"trainers": [{"trainer": PLANNED, "name": p, "preset": p} for p in ("NoSkip", "XAttnResNoSkip")]},
            "trainers NoSkip and XAttnResNoSkip are the same: remove one",
        ),
    ],
)
def test_a_mistake_is_refused_in_one_line(change, message, raw, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(XAttnResError) as error:
        check(SPEC | change, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_by_its_number_in_nnunet_raw(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    spec, (data,) = check(SPEC | {"datasets": [123]}, tmp_path)
    assert data.name == spec.datasets[0].name == spec.datasets[0].family == TINY
    # Once found, the dataset is known by its path.
    assert (spec.datasets[0].id, spec.datasets[0].path) == (None, str(raw))
    with pytest.raises(XAttnResError, match=f"knows no dataset 777 in .*: there are {TINY}"):
        check(SPEC | {"datasets": [777]}, tmp_path)


def test_what_is_filled_in_is_read_as_it_was_written(raw, tmp_path):
    spec, _ = check(SPEC, tmp_path)
    (tmp_path / "other").mkdir()
    write_spec(spec, tmp_path / "other" / "spec.yaml")
    assert read_spec(tmp_path / "other" / "spec.yaml") == spec


def test_a_test_set_is_predicted_if_it_has_labels(raw, tmp_path):
    assert check(SPEC, tmp_path)[0].datasets[0].test is False
    image, label = raw / "imagesTs" / "test_0_0000.nii.gz", raw / "labelsTs" / "test_0.nii.gz"
    write_image(np.zeros(TINY_SHAPE, np.float32), image)
    with pytest.raises(XAttnResError, match="no label for test_0: add it to labelsTs"):
        check(SPEC, tmp_path)
    without = SPEC | {"datasets": [{"path": str(raw), "test": False}]}
    assert check(without, tmp_path)[0].datasets[0].test is False
    write_image(np.ones(TINY_SHAPE, np.uint8), label)
    assert check(SPEC, tmp_path)[0].datasets[0].test is True
    # This label would be measured, and its image never be predicted.
    shutil.copy(label, label.with_name("test_1.nii.gz"))
    with pytest.raises(XAttnResError, match="no image for test_1: remove it from labelsTs"):
        check(SPEC, tmp_path)


def test_a_test_set_that_nnunet_could_not_predict_or_measure(raw, tmp_path, monkeypatch):
    image, label = raw / "imagesTs" / "test_0_0000.nii.gz", raw / "labelsTs" / "test_0.nii.gz"
    write_image(np.zeros(TINY_SHAPE, np.float32), image)
    write_image(np.ones(TINY_SHAPE, np.uint8), label)
    check_test_set(raw)
    write_image(np.full(TINY_SHAPE, 7, np.uint8), label)
    (tmp_path / "out").mkdir()
    nnunet = NnUNet(tmp_path / "out", "cpu")
    run_in_threads(nnunet, monkeypatch)
    monkeypatch.setattr(utils, "Pool", multiprocessing.dummy.Pool)
    with pytest.raises(XAttnResError, match=r"or say test: false: .*7"):
        place_raw_dataset(read_dataset(raw), nnunet, "-o", with_test_set=True)
    assert not (nnunet.raw / raw.name).exists()
    write_image(np.ones(TINY_SHAPE, np.uint8), label)
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(XAttnResError, match=r"test_0_0000\.nii\.gz is truncated or damaged"):
        check_test_set(raw)


@pytest.mark.parametrize("in_nnunet_raw", [True, False])
def test_a_dataset_may_be_a_link(in_nnunet_raw, raw, tmp_path, monkeypatch):
    link = tmp_path / "linked" / "Dataset027_Other"
    link.parent.mkdir()
    link.symlink_to(raw.rename(tmp_path / "tiny"))
    monkeypatch.setenv("nnUNet_raw", str(link.parent))
    spec, (data,) = check(SPEC | {"datasets": [27 if in_nnunet_raw else str(link)]}, tmp_path)
    assert spec.datasets[0].name == data.name == "Dataset027_Other"
    (tmp_path / "out").mkdir()
    nnunet = NnUNet(tmp_path / "out", "cpu")
    run_in_threads(nnunet, monkeypatch)
    monkeypatch.setattr(utils, "Pool", multiprocessing.dummy.Pool)
    for is_new in (True, False):
        assert place_raw_dataset(data, nnunet, "-o") is is_new
    assert (tmp_path / "out" / "nnUNet_raw" / "Dataset027_Other" / "dataset.json").is_file()
    # The spec that is recorded in the folder is read as the same.
    write_spec(spec, tmp_path / "out" / "spec.yaml")
    assert check_spec(read_spec(tmp_path / "out" / "spec.yaml"))[0] == spec
    # A link of any name to a dataset is that dataset.
    (tmp_path / "any").symlink_to((tmp_path / "tiny").rename(tmp_path / TINY))
    assert read_dataset(tmp_path / "any").name == TINY


def test_an_archive_may_be_a_link(tmp_path):
    (tmp_path / "Task04_Hippocampus.tar").touch()
    (tmp_path / "Task05_Mine.tar").symlink_to("Task04_Hippocampus.tar")
    assert read_dataset(tmp_path / "Task05_Mine.tar").name == "Dataset004_Hippocampus"
    (tmp_path / "blob").touch()
    (tmp_path / "Task06_Lung.tar").symlink_to("blob")
    assert read_dataset(tmp_path / "Task06_Lung.tar").name == "Dataset006_Lung"
