"""The trainer class of a name, found as nnU-Net finds it."""

import ast
import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from traceback import extract_tb

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_xattnres.common.errors import XAttnResError, suggestion, type_and_message
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.folders import hint_if_unset
from nnunet_xattnres.nnunet.installation import external_trainers


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class that nnU-Net trains with. Raises `XAttnResError` if there is none, or if it cannot be imported."""
    try:
        with environment_with(nnUNet_extTrainer=external_trainers()), redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except (Exception, SystemExit) as error:
        file, reason = failing_file(error), type_and_message(error)
        if file is not None:
            text = f"cannot load trainer {name}, because {file} fails ({reason}): mend that, or remove it"
        elif isinstance(error, RuntimeError):
            near = suggestion(name, _trainer_names()) or "see `nnunet-xattnres trainers --list`"
            text = f"finds no trainer {name}: {near}{hint_if_unset('nnUNet_extTrainer')}"
        else:
            text = f"cannot load trainer {name} ({reason}): mend that, or remove what is in the way"
        raise XAttnResError(f"nnU-Net {text}") from None


def failing_file(error: BaseException) -> str | None:
    """The file in a folder that nnU-Net searches whose import raised the error. None if there is no such file."""
    # Only importing runs a module's own code. A searched folder may hold Python, nnU-Net and this plugin, too.
    files = [frame.filename for frame in extract_tb(error.__traceback__) if frame.name == "<module>"]
    if isinstance(error, SyntaxError) and error.filename:
        files.append(error.filename)
    folders = [folder.absolute() for folder in _trainer_folders()]
    return next((file for file in files if any(Path(file).is_relative_to(folder) for folder in folders)), None)


def _trainer_names() -> list[str]:
    """All class names in the folders that nnU-Net searches, without importing anything."""
    return [name for folder in _trainer_folders() for file in folder.rglob("*.py") for name in _class_names(file)]


def _trainer_folders() -> list[Path]:
    own = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    return [own, *map(Path, external_trainers().split(os.pathsep))]


def _class_names(file: Path) -> list[str]:
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []  # A file that cannot be parsed suggests no name.
    return [node.name for node in body if isinstance(node, ast.ClassDef)]
