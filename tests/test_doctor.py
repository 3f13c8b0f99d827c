import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnunet_xattnres import doctor
from nnunet_xattnres.cli import main
from nnunet_xattnres.doctor import NOTE, OK, PROBLEM
from nnunet_xattnres.installation import list_trainers, trainers_folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An environment in which training works, and one trainer to look for: all of them take a second."""
    monkeypatch.setattr(doctor, "list_trainers", lambda: [("nnUNetTrainerXAttnRes", "")])
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.delenv("nnUNet_compile", raising=False)


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[str, str, int]]:
    """Run the command. Returns the status and text of the line that mentions `about`, and the exit status."""

    def run(about: str) -> tuple[str, str, int]:
        exit_status = main(["doctor"])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert [line.split()[0] in (OK, NOTE, PROBLEM) for line in lines] == [True] * 11
        assert (exit_status == 1) == any(line.startswith(PROBLEM) for line in lines)
        assert captured.err.count("\n") == exit_status
        (line,) = (line for line in lines if about in line)
        status, text = line.split(maxsplit=1)
        return status, text, exit_status

    return run


def test_where_training_works_all_is_well(examine, monkeypatch):
    monkeypatch.setattr(doctor, "list_trainers", list_trainers)
    status, text, exit_status = examine("nnU-Net finds")
    assert (status, text, exit_status) == (OK, f"nnU-Net finds all {len(list(list_trainers()))} trainers", 0)


@pytest.mark.parametrize("package", ["nnunetv2", "torch", "dynamic-network-architectures"])
def test_versions_are_named(examine, package):
    status, text, _ = examine(f"{package} ")
    assert status == OK
    assert doctor.version(package) in text


@pytest.mark.parametrize("package, other", [("torch", "2.9.1"), ("dynamic-network-architectures", "0.3")])
def test_a_version_that_nnunet_excludes(examine, monkeypatch, package, other):
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: other if name == package else version(name))
    status, text, exit_status = examine(f"{package} ")
    assert (status, exit_status) == (PROBLEM, 1)
    assert text.startswith(f"{package} {other} does not fit nnU-Net, which needs ")
    assert f"pip install '{package}" in text


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
class TestFolders:
    def test_that_is_there(self, examine, variable):
        assert examine(f" {variable} ")[:2] == (OK, f"{variable} is {os.environ[variable]}")

    def test_that_is_not_set(self, examine, variable, monkeypatch):
        monkeypatch.delenv(variable)
        assert examine(f" {variable} ") == (PROBLEM, f"{variable} is not set: export {variable}=FOLDER", 1)

    def test_that_does_not_exist(self, examine, variable, monkeypatch, tmp_path):
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
        status, text, exit_status = examine(f" {variable} ")
        assert (status, exit_status) == (PROBLEM, 1)
        assert "is no folder: mkdir -p it" in text


@pytest.mark.parametrize("variable, status", [("nnUNet_raw", OK), ("nnUNet_results", PROBLEM)])
def test_a_folder_that_cannot_be_written_to(examine, monkeypatch, variable, status):
    temporary_file = doctor.TemporaryFile

    def refused(dir: str) -> Any:
        if dir == os.environ[variable]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return temporary_file(dir=dir)

    monkeypatch.setattr(doctor, "TemporaryFile", refused)
    found, text, exit_status = examine(f" {variable} ")
    assert (found, exit_status) == (status, status == PROBLEM)
    assert ("cannot be written to (Permission denied)" in text) == (status == PROBLEM)


class TestTrainers:
    def test_that_nnunet_is_not_told_of(self, examine, monkeypatch):
        monkeypatch.delenv("nnUNet_extTrainer")
        status, text, exit_status = examine("nnUNet_extTrainer")
        assert (status, exit_status) == (PROBLEM, 1)
        assert 'is not set: export nnUNet_extTrainer="$(nnunet-xattnres trainers)"' in text

    def test_that_are_elsewhere(self, examine, monkeypatch, tmp_path):
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
        status, text, _ = examine("nnU-Net does not find nnUNetTrainer")
        assert status == PROBLEM
        assert f"nnUNet_extTrainer is {tmp_path}: export" in text

    def test_beside_one_that_cannot_be_imported(self, examine, monkeypatch, tmp_path):
        (tmp_path / "a_broken.py").write_text("import nothing_of_that_name")
        monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{trainers_folder()}")
        status, text, _ = examine("nnUNetTrainerXAttnRes")
        assert status == PROBLEM
        assert "nothing_of_that_name" in text


class TestGpu:
    def test_none_is_a_note(self, examine, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        status, text, exit_status = examine("no GPU")
        assert (status, exit_status) == (NOTE, 0)
        assert "-device cpu" in text

    def test_no_triton_is_a_note(self, examine, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)
        assert examine("Triton")[0::2] == (NOTE, 0)

    def test_one_without_triton_cannot_compile(self, examine, monkeypatch):
        properties = SimpleNamespace(name="Some GPU", total_memory=24e9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)
        assert examine("GPU") == (OK, "GPU: Some GPU, 24 GB", 1)
        assert examine("Triton")[0] == PROBLEM
        assert examine("nnU-Net compiles on cuda by default")[0] == OK
        monkeypatch.setenv("nnUNet_compile", "f")
        assert examine("Triton")[0::2] == (NOTE, 0)
        assert examine("nnU-Net does not compile on cuda with nnUNet_compile=f")[0] == OK
