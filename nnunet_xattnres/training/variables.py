"""The environment variables of a training, read in nnU-Net's manner."""

import os

from nnunet_xattnres.common.errors import XAttnResError

RECORD = "nnUNet_xattnres_record"
CHECKPOINT_MINUTES = "nnUNet_xattnres_checkpoint_minutes"

# nnU-Net takes the first three for true, and everything else for false.
TRUE = ("true", "1", "t")
FALSE = ("false", "0", "f")


def records_weights() -> bool:
    """Whether attention weights are recorded. Raises `XAttnResError` for a value that is neither true nor false."""
    value = os.environ.get(RECORD, "true")
    if value.lower() not in TRUE + FALSE:
        raise XAttnResError(f"{RECORD}={value} is neither true, 1, t nor false, 0, f: export one of them, or unset it")
    return value.lower() in TRUE


def checkpoint_minutes(default: float) -> float:
    """The variable's value, or `default` if it is not set. Raises `XAttnResError` if it is no positive number."""
    value = os.environ.get(CHECKPOINT_MINUTES)
    if value is None:
        return default
    try:
        minutes = float(value)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:  # NaN too
        raise XAttnResError(f"{CHECKPOINT_MINUTES}={value} is no positive number: export minutes or inf, or unset it")
    return minutes
