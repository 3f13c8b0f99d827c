"""The commands that work in a Python whose torch cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Run a command of ours in a Python that finds what is in `tmp_path` first."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}"}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        environment[name] = str(tmp_path / name)

    def run(*arguments):
        command = [sys.executable, "-m", "nnunet_xattnres", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_the_folder_of_the_trainers_is_printed_without_importing_torch(run):
    """The command is meant for the start-up files of shells."""
    done = run("trainers")
    assert (done.returncode, done.stderr) == (0, "")
    assert (Path(done.stdout.strip()) / "nnUNetTrainerXAttnRes.py").is_file()


def test_doctor_names_everything_that_is_broken(run, tmp_path):
    (tmp_path / "nnunetv2-2.7.0.dist-info").mkdir()
    (tmp_path / "nnunetv2-2.7.0.dist-info" / "METADATA").write_text("Name: nnunetv2\nVersion: 2.7.0\n")
    done = run("doctor")
    assert done.returncode == 1
    assert done.stderr == "nnunet-xattnres: training would not work: mend the 2 marked PROBLEM\n"
    assert "PROBLEM nnunetv2 2.7.0 does not fit" in done.stdout
    reason = "ImportError: libcudart.so.12: cannot open shared object file"
    assert f"PROBLEM torch cannot be imported ({reason}): pip install" in done.stdout
    assert "trainers were not looked at: they need torch" in done.stdout
    assert f"ok      nnUNet_raw is {tmp_path / 'nnUNet_raw'}" in done.stdout
