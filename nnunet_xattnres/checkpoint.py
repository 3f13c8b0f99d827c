"""Reading nnU-Net's checkpoints without letting them run code."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from nnunet_xattnres.errors import XAttnResError

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
KEYS = ("trainer_name", "init_args", "network_weights")


def finished_folds(model_folder: Path) -> dict[str, Path]:
    """The final checkpoints of a model folder of nnU-Net, by fold: a number, or "all"."""
    files = sorted(model_folder.glob(f"fold_*/{FINAL_CHECKPOINT}"))
    return {file.parent.name.removeprefix("fold_"): file for file in files}


def read_checkpoint(path: Path, remedy: str, trusted: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of nnU-Net; its tensors stay on disk until they are used.

    remedy: what to do about a file that is missing or damaged.
    trusted: read a file that holds other things than nnU-Net stores too, which may run any code.

    Raises `XAttnResError` if there is no such file, if it is no checkpoint, and for what only `trusted` reads.
    """
    try:
        checkpoint = _load_trusted(path) if trusted else _load_restricted(path)
        for key in KEYS:
            checkpoint[key]
    except FileNotFoundError:
        raise XAttnResError(f"{path} does not exist: {remedy}") from None
    except XAttnResError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise XAttnResError(f"{path} is damaged or no nnU-Net checkpoint ({reason}): {remedy}") from error
    return checkpoint


def _load_restricted(path: Path) -> Any:
    if Version(torch.__version__) < NAMES_IN_ALLOW_LIST:
        raise XAttnResError(
            f"PyTorch {torch.__version__} cannot read {path} without letting it run code: "
            f"pip install 'torch>={NAMES_IN_ALLOW_LIST}', or add --trust-checkpoint if you trust its origin"
        )
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise XAttnResError(
            f"{path} holds {named[1] if named else 'something'} that nnU-Net does not store and that may run any code "
            "when it is read: add --trust-checkpoint if you trust its origin"
        ) from error


def _load_trusted(path: Path) -> Any:
    try:
        return _load_restricted(path)
    except XAttnResError:
        print(f"{path} is trusted and read without restrictions")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
