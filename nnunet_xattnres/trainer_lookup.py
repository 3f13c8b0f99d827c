"""The trainer class behind a name, found where nnU-Net would find it."""

import ast
import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_xattnres.commands import environment_with, external_trainers
from nnunet_xattnres.errors import XAttnResError, one_line, suggestion


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class that nnU-Net would train with. Raises `XAttnResError` if there is none or it cannot be imported."""
    try:
        with environment_with(nnUNet_extTrainer=external_trainers()), redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        near = suggestion(name, _trainer_names()) or "see `nnunet-xattnres trainers --list`"
        raise XAttnResError(f"nnU-Net finds no trainer {name}: {near}") from None
    except (Exception, SystemExit) as error:
        raise XAttnResError(f"nnU-Net cannot load trainer {name}: {one_line(str(error))}") from None


def _trainer_names() -> list[str]:
    """All class names in the folders that nnU-Net searches, without importing anything."""
    own = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    folders = [own, *map(Path, external_trainers().split(os.pathsep))]
    return [name for folder in folders for file in folder.rglob("*.py") for name in _class_names(file)]


def _class_names(file: Path) -> list[str]:
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []  # Whatever it is, it suggests no name.
    return [node.name for node in body if isinstance(node, ast.ClassDef)]
