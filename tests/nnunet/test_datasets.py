"""Input datasets: which ones are refused and why, and how the others get into nnUNet_raw."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from helpers.in_process import InProcess
from helpers.tiny_dataset import NUM_CASES, SHAPE, edit_dataset_json, write_image, write_msd_task, write_raw_dataset
from helpers.training import run_in_threads
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.datasets import phantom_dataset, place_raw_dataset, read_dataset

CONVERTED_IMAGES = {f"case_{number}_0000.nii.gz" for number in range(NUM_CASES)}

unpacks = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot unpack archives safely")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw_dataset(tmp_path / "data" / "Dataset123_Tiny")


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    return write_msd_task(tmp_path / "data" / "Task12_Tiny")


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnUNet:
    """A working directory. nnU-Net's commands and its integrity check run in this process."""
    nnunet = InProcess(tmp_path / "work", "cpu")
    nnunet.workdir.mkdir()
    run_in_threads(nnunet, monkeypatch)
    return nnunet


def place(data: Path, nnunet: NnUNet) -> bool:
    return place_raw_dataset(read_dataset(data), nnunet, "--workdir")


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(data: Path, nnunet: NnUNet) -> str:
    """The error for `data`, after checking that it is one line and leaves neither traces nor changes."""
    before = files_in(data)
    with pytest.raises(XAttnResError) as error:
        place(data, nnunet)
    assert "\n" not in str(error.value)
    assert not list(nnunet.workdir.glob("nnUNet_raw/*"))
    assert not list(nnunet.workdir.glob(".*"))
    assert files_in(data) == before
    return str(error.value)


class TestLayout:
    """Data that is neither an MSD task nor a raw dataset is refused before anything is read."""

    def test_missing_folder(self, tmp_path, nnunet):
        assert "does not exist" in refusal(tmp_path / "nowhere", nnunet)

    @unpacks
    def test_empty_archive(self, tmp_path, nnunet):
        (tmp_path / "Task12_Tiny.tar").write_bytes(b"")
        assert "unpacked" in refusal(tmp_path / "Task12_Tiny.tar", nnunet)

    def test_folder_of_neither_layout(self, tmp_path, nnunet):
        (tmp_path / "holiday").mkdir()
        message = refusal(tmp_path / "holiday", nnunet)
        assert "dataset.json" in message
        assert "TaskNN_Name" in message
        assert "DatasetNNN_Name" in message

    def test_invalid_json(self, raw, nnunet):
        (raw / "dataset.json").write_text('{"labels": ')
        assert "not valid JSON" in refusal(raw, nnunet)

    def test_json_that_is_no_object(self, raw, nnunet):
        (raw / "dataset.json").write_text("[]")
        assert "holds no JSON object" in refusal(raw, nnunet)

    @pytest.mark.parametrize("key", ["labels", "file_ending", "channel_names", "numTraining"])
    def test_raw_dataset_without_a_key(self, raw, nnunet, key):
        edit_dataset_json(raw, **{key: None})
        assert f"has no {key}" in refusal(raw, nnunet)

    def test_msd_task_without_a_key(self, msd, nnunet):
        edit_dataset_json(msd, training=None)
        assert "has no training" in refusal(msd, nnunet)

    @pytest.mark.parametrize("layout", ["raw", "msd"])
    def test_folder_that_nnunet_cannot_name(self, layout, nnunet, request):
        folder = request.getfixturevalue(layout)
        renamed = folder.rename(folder.with_name("Hippocampus"))
        assert "rename" in refusal(renamed, nnunet)

    def test_msd_task_without_test_images_folder(self, msd, nnunet):
        (msd / "imagesTs").rmdir()
        assert "imagesTs" in refusal(msd, nnunet)


class TestContent:
    """Data that nnU-Net could not train on is refused, and the message names the file."""

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"labels": ["background", "large"]}, "labels"),
            ({"labels": {"background": 0, "whole": [1, 2], "small": 2}}, "regions_class_order"),
            ({"labels": {"background": 0, "large": 1, "small": 3}}, "consecutive"),
            ({"labels": {"large": 1, "small": 2}}, "Background"),
            ({"dataset": {"case_0": "imagesTr/case_0_0000.nii.gz"}}, "training cases"),
        ],
    )
    def test_wrong_entry_in_dataset_json(self, raw, nnunet, changes, complaint):
        edit_dataset_json(raw, **changes)
        assert complaint in refusal(raw, nnunet)

    @pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
    @pytest.mark.parametrize("layout", ["raw", "msd"])
    def test_truncated_nifti(self, layout, folder, nnunet, request):
        data = request.getfixturevalue(layout)
        damaged = sorted((data / folder).iterdir())[2]
        damaged.write_bytes(damaged.read_bytes()[:-40])
        message = refusal(data, nnunet)
        assert "truncated" in message
        assert damaged.name in message

    def test_case_without_label(self, raw, nnunet):
        (raw / "labelsTr" / "case_3.nii.gz").unlink()
        assert "case_3 has no label" in refusal(raw, nnunet)

    def test_too_few_cases(self, raw, nnunet):
        for file in (raw / "imagesTr/case_4_0000.nii.gz", raw / "labelsTr/case_4.nii.gz"):
            file.unlink()
        edit_dataset_json(raw, numTraining=4)
        assert "4 training cases" in refusal(raw, nnunet)

    def test_label_of_another_shape(self, raw, nnunet):
        write_image(raw / "labelsTr" / "case_2.nii.gz", np.zeros((8, 9, 11), np.uint8))
        message = refusal(raw, nnunet)
        assert "labelsTr/case_2.nii.gz" in message
        assert "Shape mismatch" in message
        assert "(8, 9, 11)" in message

    def test_unexpected_label_value_in_an_msd_task(self, msd, nnunet):
        write_image(msd / "labelsTr" / "case_1.nii.gz", np.full(SHAPE, 7, np.uint8))
        message = refusal(msd, nnunet)
        assert str(msd) in message
        assert "labelsTr/case_1.nii.gz" in message
        assert "Unexpected labels" in message

    def test_cases_that_dataset_json_does_not_announce(self, raw, nnunet):
        edit_dataset_json(raw, numTraining=6)
        message = refusal(raw, nnunet)
        assert "(6)" in message
        assert "Found 5" in message


class TestPlacement:
    def test_raw_dataset_is_linked_and_recognised(self, raw, nnunet):
        assert place(raw, nnunet)
        assert (nnunet.raw / "Dataset123_Tiny").resolve() == raw
        assert not place(raw, nnunet)

    def test_msd_task_is_converted_and_recognised(self, msd, nnunet):
        assert place(msd, nnunet)
        dataset = nnunet.raw / "Dataset012_Tiny"
        assert {path.name for path in (dataset / "imagesTr").iterdir()} == CONVERTED_IMAGES
        assert not place(msd, nnunet)
        elsewhere = msd.parent / "copy" / msd.name
        elsewhere.parent.mkdir()
        msd.rename(elsewhere)
        with pytest.raises(XAttnResError, match="--workdir"):
            place(elsewhere, nnunet)

    @unpacks
    def test_archive_of_an_msd_task_is_unpacked_and_converted(self, msd, tmp_path, nnunet):
        archive = tmp_path / "Task12_Tiny.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(msd, arcname="Task12_Tiny")
        assert place(archive, nnunet)
        dataset = nnunet.raw / "Dataset012_Tiny"
        assert {path.name for path in (dataset / "imagesTr").iterdir()} == CONVERTED_IMAGES
        assert not list(nnunet.workdir.glob(".*"))

    def test_number_that_is_taken(self, raw, nnunet):
        (nnunet.preprocessed / "Dataset123_Other").mkdir(parents=True)
        with pytest.raises(XAttnResError, match="same number"):
            place(raw, nnunet)

    def test_phantoms_are_the_dataset_without_data(self):
        assert phantom_dataset().name == "Dataset900_Phantom"


def test_a_python_that_cannot_unpack_safely_asks_for_the_folder(tmp_path, monkeypatch):
    archive = tmp_path / "Task04_Hippocampus.tar"
    with tarfile.open(archive, "w"):
        pass
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(XAttnResError, match=r"unpack .* and give its folder"):
        read_dataset(archive).make(NnUNet(tmp_path, "cpu"), tmp_path)
