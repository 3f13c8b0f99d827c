"""Where the plugin's trainers are installed, and which nnU-Net and other packages are."""

import ast
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.text import shell_command

# 2.8 is the first release that looks for trainers in the folders of `nnUNet_extTrainer`.
SUPPORTED_NNUNET = ">=2.8,<3"
# Older releases export a fixed batch size.
SUPPORTED_TORCH = ">=2.7"
TRAINER_PREFIX = "nnUNetTrainer"


def trainers_folder() -> Path:
    """The folder of this plugin's trainers, for the environment variable `nnUNet_extTrainer`."""
    spec = importlib.util.find_spec("nnunet_xattnres.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise XAttnResError("nnunet-xattnres finds no trainers: install it with pip, or leave its source folder")
    return Path(spec.submodule_search_locations[0])


def list_trainers() -> Iterator[tuple[str, str]]:
    """Name and first line of the docstring of every trainer. The files are parsed: importing nnU-Net takes seconds."""
    for path in sorted(trainers_folder().glob("nnUNetTrainer*.py")):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef):
                yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


def installed_version(package: str) -> str | None:
    """None if the package is not installed, or if only files without a version are left of it."""
    try:
        return version(package) or None
    except PackageNotFoundError:
        return None


def check_nnunet_version() -> None:
    """Raise `XAttnResError` unless the installed nnU-Net finds external trainers."""
    remedy = shell_command("pip", "install", f"nnunetv2{SUPPORTED_NNUNET}")
    installed = installed_version("nnunetv2")
    if installed is None:
        raise XAttnResError(f"nnunetv2 is not installed: {remedy}")
    if not SpecifierSet(SUPPORTED_NNUNET).contains(installed, prereleases=True):
        raise XAttnResError(
            f"nnunetv2 {installed} does not fit: trainers are found through nnUNet_extTrainer from 2.8 on: {remedy}"
        )


def check_installed(*modules: str) -> None:
    """Raise `XAttnResError` unless the modules, which the benchmark needs beside nnU-Net, can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        remedy = shell_command("pip", "install", "nnunet-xattnres[benchmark]")
        raise XAttnResError(f"the benchmark needs {', '.join(missing)}: {remedy}")


def external_trainers() -> str:
    """The value for `nnUNet_extTrainer`: the folders that it names already, and this plugin's."""
    already_set = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*filter(None, already_set), str(trainers_folder())]))


def short_name(trainer: str) -> str:
    """The name of a trainer without `nnUNetTrainer`, for tables and figures."""
    return trainer.removeprefix(TRAINER_PREFIX) or trainer
