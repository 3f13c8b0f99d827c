"""A wheel holds the whole plugin, and nnU-Net finds its trainers from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    trainer = find(name)
    print("FOUND", name, sys.modules["nnunet_xattnres"].__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the content of the wheel"""
    folder, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    checkout = folder / "checkout"  # a copy, because building leaves files behind
    shutil.copytree(CHECKOUT, checkout, ignore=shutil.ignore_patterns(".*", "build", "xattnres_demo", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    return site


def test_a_wheel_holds_every_module(site):
    """A package that setup.cfg does not name is missing from the wheel."""
    modules = {path.relative_to(CHECKOUT) for path in (CHECKOUT / "nnunet_xattnres").rglob("*.py")}
    modules |= {Path("nnunet_xattnres", "trainers", path.name) for path in (CHECKOUT / "trainers").glob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == modules
    setup = ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    for package in setup["options"]["packages"].split():
        assert Path(site, *package.split("."), "__init__.py").is_file()
    assert (site / "nnunet_xattnres" / "py.typed").is_file()


def test_trainers_are_found_from_a_wheel(site, tmp_path):
    """nnU-Net, in a Python of its own, finds one trainer of every file; they use the package of the wheel."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "nnunet_xattnres", "trainers"]
    printed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    trainers = site / "nnunet_xattnres" / "trainers"
    assert printed == f"{trainers}\n"

    names = [file.stem for file in trainers.glob("nnUNetTrainer*.py")]
    assert len(names) > 5
    environment["nnUNet_extTrainer"] = f"{tmp_path}{os.pathsep}{trainers}"
    done = subprocess.run(
        [sys.executable, "-c", FIND, *names], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    package = str(site / "nnunet_xattnres" / "__init__.py")
    assert [(name, file) for _, name, file in found] == [(name, package) for name in names]
