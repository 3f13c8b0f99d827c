"""The trainers are found wherever the plugin is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_xattnres

CHECKOUT = Path(__file__).parents[2]
FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    trainer = find(name)
    print("FOUND", name, sys.modules["nnunet_xattnres"].__file__)
"""


def find_trainers(python_path: str, trainers: Path, folder: Path) -> set[str]:
    """Let nnU-Net find all trainers in a Python of its own; returns the package files they use."""
    names = [
        line.split("(")[0].removeprefix("class ")
        for file in trainers.glob("nnUNetTrainer*.py")
        for line in file.read_text().splitlines()
        if line.startswith("class ")
    ]
    assert len(names) > 20
    environment = os.environ | {"nnUNet_extTrainer": f"{folder}{os.pathsep}{trainers}", "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, "-c", FIND, *names], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [name for _, name, _ in found] == names
    return {file for _, _, file in found}


def test_from_the_checkout(tmp_path):
    assert find_trainers("", CHECKOUT / "trainers", tmp_path) == {nnunet_xattnres.__file__}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the plugin installed from a wheel"""
    folder, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    source = folder / "checkout"  # a copy, because building leaves files behind
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "xattnres_demo", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return site


def test_from_a_wheel(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "nnunet_xattnres", "trainers"]
    printed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    trainers = site / "nnunet_xattnres" / "trainers"
    assert printed == f"{trainers}\n"
    assert find_trainers(str(site), trainers, tmp_path) == {str(site / "nnunet_xattnres" / "__init__.py")}
