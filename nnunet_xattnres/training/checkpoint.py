"""Reading nnU-Net's checkpoints without letting them run code."""

import errno
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from packaging.version import Version

from nnunet_xattnres.common.device import is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError, reason

# nnU-Net logs numbers of numpy's, and pickle names their constructor by the module where numpy 1 or numpy 2 has it.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
]
NAMES_IN_ALLOW_LIST = Version("2.6")
FINAL_CHECKPOINT = "checkpoint_final.pth"
REQUIRED_KEYS = {"trainer_name": str, "init_args": dict, "network_weights": dict}


def finished_folds(model_folder: Path) -> dict[str, Path]:
    """The final checkpoints of a model folder of nnU-Net, by fold: a number, or "all"."""
    files = sorted(model_folder.glob(f"fold_*/{FINAL_CHECKPOINT}"))
    return {file.parent.name.removeprefix("fold_"): file for file in files}


def read_checkpoint(path: Path, remedy: str, trusted: bool | None = None) -> dict[str, Any]:
    """The content of a checkpoint of nnU-Net; its tensors stay on disk until they are used.

    remedy: what to do about a file that is missing or damaged.
    trusted: whether the user has given --trust-checkpoint, which reads other things than nnU-Net stores too, and they
        may run any code; None for a command that does not have it.

    Raises `XAttnResError` if there is no such file, if it cannot be read now, if it is no checkpoint, and for what only
    `trusted` reads.
    """

    def load() -> Any:
        try:
            return _load_restricted(path)
        except _NeedsTrust as error:
            if trusted:
                print(f"{path} is trusted and read without restrictions")
                return _load(path, weights_only=False)
            alternative = "" if trusted is None else ", or add --trust-checkpoint if you trust its origin"
            raise XAttnResError(f"{error}{alternative}") from error

    return _checked(load, path, remedy)


def read_checkpoint_as_nnunet(path: Path, remedy: str) -> dict[str, Any]:
    """`read_checkpoint` of a file that nnU-Net reads without restrictions anyway, so that nothing is to be decided."""

    def load() -> Any:
        try:
            return _load_restricted(path)
        except _NeedsTrust:
            return _load(path, weights_only=False)

    return _checked(load, path, remedy)


def why_unrestricted_only() -> str | None:
    """What keeps this PyTorch from reading any checkpoint with restrictions; None where nothing does."""
    if Version(torch.__version__) >= NAMES_IN_ALLOW_LIST:
        return None
    return (
        f"PyTorch {torch.__version__} cannot read checkpoints without letting them run code: "
        f"pip install 'torch>={NAMES_IN_ALLOW_LIST}'"
    )


class _NeedsTrust(Exception):
    """One line: why a file cannot be read with restrictions, and what to do."""


def _checked(load: Callable[[], Any], path: Path, remedy: str) -> dict[str, Any]:
    try:
        checkpoint = load()
        _check_types(checkpoint)
    except FileNotFoundError:
        raise XAttnResError(f"{path} does not exist: {remedy}") from None
    except XAttnResError:
        raise
    except Exception as error:
        if _is_unreadable_now(error):
            raise XAttnResError(f"cannot read {path} ({reason(error)}): mend that and run again") from error
        raise XAttnResError(f"{path} is damaged or no nnU-Net checkpoint ({reason(error)}): {remedy}") from error
    return checkpoint


def _check_types(checkpoint: Any) -> None:
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(checkpoint[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")
    for key, weight in checkpoint["network_weights"].items():
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"{key} in network_weights is no tensor")
    match checkpoint["init_args"].get("xattnres"):
        case None | {"version": str(), "config": dict()}:
            pass
        case _:
            raise TypeError("xattnres in init_args is not what our trainers store")


def _is_unreadable_now(error: Exception) -> bool:
    """Whether the file itself may be whole."""
    if isinstance(error, OSError):
        # In a truncated file PyTorch looks for places before its beginning.
        return error.errno != errno.EINVAL
    return is_out_of_memory(error) or str(error).startswith("unable to mmap")


def _load_restricted(path: Path) -> Any:
    if problem := why_unrestricted_only():
        raise _NeedsTrust(f"{path}: {problem}")
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return _load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None and not is_zipfile(path):
            raise ValueError("not written by torch.save") from error
        raise _NeedsTrust(
            f"{path} holds {named[1] if named else 'something'} that nnU-Net does not store and that may run any code "
            "when it is read: let its trainer store numbers and tensors only"
        ) from error


def _load(path: Path, weights_only: bool) -> Any:
    # PyTorch's older format cannot stay on disk.
    return torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=weights_only)
