"""Reading nnU-Net's checkpoints without letting them run code."""

import errno
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from nnunet_xattnres.common.device import is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError, reason

# nnU-Net logs NumPy numbers. A pickle names their constructor by its module, which NumPy 2 has renamed.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
]
FINAL_CHECKPOINT = "checkpoint_final.pth"
LATEST_CHECKPOINT = "checkpoint_latest.pth"
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
REQUIRED_KEYS = {"trainer_name": str, "init_args": dict, "network_weights": dict}


def checkpoints_of_folds(model_folder: Path, name: str = FINAL_CHECKPOINT) -> dict[str, Path]:
    """The checkpoints of this name in an nnU-Net model folder, by fold: a number, or "all"."""
    files = [folder / name for folder in sorted(model_folder.glob("fold_*"))]
    return {file.parent.name.removeprefix("fold_"): file for file in files if file.is_file()}


def choose_fold(model_folder: Path, fold: str | None, name: str = FINAL_CHECKPOINT) -> str | None:
    """The fold that the user has chosen. Otherwise the only one that has a checkpoint of this name; None without one.

    Raises `XAttnResError` if several folds have one.
    """
    if fold is not None:
        return fold
    folds = list(checkpoints_of_folds(model_folder, name))
    if len(folds) > 1:
        raise XAttnResError(f"{model_folder} has {name} in several folds: choose one with -f: {', '.join(folds)}")
    return folds[0] if folds else None


def read_checkpoint(path: Path, remedy: str, trusted: bool | None = None) -> dict[str, Any]:
    """The content of an nnU-Net checkpoint. Its tensors stay on disk until they are used.

    The prefixes `module.` and `_orig_mod.` of keys in network_weights are removed. Distributed training and
    torch.compile add them, and other tools keep them.

    remedy: what to do about a missing or damaged file, for the message.
    trusted: whether the user has given --trust-checkpoint. A trusted file is read without restrictions if it holds
        objects that nnU-Net does not store, and these may run any code. None for a command without that option.

    Raises `XAttnResError` if the file is missing, unreadable at present or no checkpoint, and if reading it needs trust
    that it does not have.
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

    return _checked(load, str(path), remedy)


def read_checkpoint_as_nnunet(path: Path, remedy: str, if_missing: str) -> dict[str, Any]:
    """`read_checkpoint` for a file that nnU-Net is about to read without restrictions in any case.

    if_missing: what to do if there is no such file.
    """

    def load() -> Any:
        try:
            return _load_restricted(path)
        except _NeedsTrust:
            return _load(path, weights_only=False)

    return _checked(load, str(path), remedy, if_missing)


def check_content(checkpoint: dict[str, Any], name: str, remedy: str) -> None:
    """Raise `XAttnResError` if a dict is no nnU-Net checkpoint. name: what it is called in the message."""
    _checked(lambda: checkpoint, name, remedy)


class _NeedsTrust(Exception):
    """One line: why a file cannot be read with restrictions, and what to do."""


def _checked(load: Callable[[], Any], name: str, remedy: str, if_missing: str | None = None) -> dict[str, Any]:
    try:
        checkpoint = load()
        if problem := _foreign(checkpoint):
            raise XAttnResError(f"{name} is no nnU-Net checkpoint, but {problem}: {remedy}")
        _check_types(checkpoint)
    except FileNotFoundError:
        raise XAttnResError(f"{name} does not exist: {if_missing or remedy}") from None
    except XAttnResError:
        raise
    except Exception as error:
        if _may_be_undamaged(error):
            raise XAttnResError(f"cannot read {name} ({reason(error)}): mend that and run again") from error
        raise XAttnResError(f"{name} is damaged or no nnU-Net checkpoint ({reason(error)}): {remedy}") from error
    weights = checkpoint["network_weights"]
    return checkpoint | {"network_weights": {WRAPPERS.sub("", key): weight for key, weight in weights.items()}}


def _foreign(checkpoint: Any) -> str:
    """What a file holds that other software has written, and what it lacks. Empty for a checkpoint of nnU-Net."""
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__}; nnU-Net's trainers store a dict"
    missing = [key for key in REQUIRED_KEYS if key not in checkpoint]
    if not missing:
        return ""
    if "nnssl_adaptation_plan" in checkpoint:
        found = "a pretrained encoder of nnssl"
    elif "pytorch-lightning_version" in checkpoint:
        found = "a checkpoint of PyTorch Lightning"
    elif checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        found = f"a bare state dict of {len(checkpoint)} tensors"
    else:
        found = f"a dict with {shorten(', '.join(map(str, checkpoint)) or 'no keys', width=100, placeholder=' ...')}"
    return f"{found}; nnU-Net's trainers also store {', '.join(missing)}"


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


def _may_be_undamaged(error: Exception) -> bool:
    """Whether the error comes from the system, not from the content of the file."""
    if isinstance(error, OSError):
        # EINVAL is different: PyTorch seeks to negative positions in a truncated file.
        return error.errno != errno.EINVAL
    return is_out_of_memory(error) or str(error).startswith("unable to mmap")


def _load_restricted(path: Path) -> Any:
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
    # PyTorch cannot memory-map its older format, which is no zip file.
    return torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=weights_only)
