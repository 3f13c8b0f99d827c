"""The trainer class behind a name, found where nnU-Net would find it."""

import ast
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_xattnres.commands import external_trainers
from nnunet_xattnres.errors import XAttnResError, one_line, suggestion


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class that nnU-Net would train with. Raises `XAttnResError` if there is none or it cannot be imported."""
    try:
        with _external_trainers_in_environment(), redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        near = suggestion(name, _trainer_names()) or "see `nnunet-xattnres trainers --list`"
        raise XAttnResError(f"nnU-Net finds no trainer {name}: {near}") from None
    except Exception as error:
        raise XAttnResError(f"nnU-Net cannot load trainer {name}: {one_line(str(error))}") from None


@contextmanager
def _external_trainers_in_environment() -> Iterator[None]:
    previous = os.environ.get("nnUNet_extTrainer")
    os.environ["nnUNet_extTrainer"] = external_trainers()
    try:
        yield
    finally:
        del os.environ["nnUNet_extTrainer"]
        if previous is not None:
            os.environ["nnUNet_extTrainer"] = previous


def _trainer_names() -> list[str]:
    """All class names in the folders that nnU-Net searches, without importing anything."""
    own = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    folders = [own, *map(Path, external_trainers().split(os.pathsep))]
    return [
        node.name
        for folder in folders
        for file in folder.rglob("*.py")
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef)
    ]
