"""A wheel holds the whole plugin, and nnU-Net finds its trainers from there."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from nnunet_xattnres.ops.native_library import ABI

CHECKOUT = Path(__file__).parents[2]
FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    trainer = find(name)
    print("FOUND", name, sys.modules["nnunet_xattnres"].__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("source"))


def build_wheel(folder: Path, **environment: str) -> Path:
    """A source distribution, and a wheel that is built from it."""
    checkout = folder / "checkout"  # a copy, because building leaves files behind
    left_out = shutil.ignore_patterns(".*", "build", "xattnres_demo", "*.egg-info", "*.so")
    shutil.copytree(CHECKOUT, checkout, ignore=left_out)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)]
    subprocess.run(build, check=True, capture_output=True, env=os.environ | environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the content of the wheel"""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    return site


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="there is no gcc here")
def test_one_wheel_per_platform_holds_the_compiled_library(wheel, site):
    assert "-py3-none-linux_" in wheel.name
    library = ctypes.CDLL(str(site / "nnunet_xattnres" / "ops" / "native_attention.so"))
    assert library.nnunet_xattnres_abi() == ABI


def test_without_a_compiler_the_installation_goes_on(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path, CC="false")) as content:
        names = content.namelist()
    assert "nnunet_xattnres/ops/native_operator.py" in names
    assert not any(name.endswith(".so") for name in names)


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
