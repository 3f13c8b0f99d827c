"""The folders that nnU-Net's environment variables name, and the datasets in them."""

import os
import re
from pathlib import Path

from nnunet_xattnres.common.errors import XAttnResError, suggestion

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def nnunet_folder(variable: str) -> Path:
    """The folder that an environment variable names. Raises `XAttnResError` if it is not set or names no folder."""
    value = os.environ.get(variable)
    if not value:
        raise XAttnResError(f"{variable} is not set: export {variable}=FOLDER")
    if not Path(value).is_dir():
        raise XAttnResError(f"{variable} names {value}, which is no folder: mkdir -p it, or export another")
    return Path(value)


def hint_if_unset(variable: str, path: Path | None = None) -> str:
    """The end of a message on something that is not found. Empty if the variable that leads to it is set.

    path: what is not found, if it is a path. If it exists, the message is on something else, and the hint is empty.
    """
    if os.environ.get(variable) or (path is not None and path.exists()):
        return ""
    return f" ({variable} is not set in this shell)"


def check_not_of_nnunet(folder: Path, option: str, better: str) -> None:
    """Raise `XAttnResError` if the folder is one of nnU-Net's own: that of a variable, or of a dataset in it.

    option: for the folder. better: what to give instead.
    """
    for variable in filter(os.environ.get, VARIABLES):
        root = Path(os.environ[variable])
        if folder.resolve() in (place.resolve() for place in (root, *(root / name for name in _datasets(root)))):
            raise XAttnResError(
                f"{folder} is nnU-Net's own folder ({variable}): choose another {option}, such as {option} {better}"
            )


def dataset_folder(dataset: str, variable: str = "nnUNet_preprocessed") -> Path:
    """The folder of a dataset. dataset: its name or number. Raises `XAttnResError` if there is none, or more than one.

    variable: of the folder that it is in, nnUNet_preprocessed or nnUNet_raw.
    """
    root = nnunet_folder(variable)
    found = _called(dataset, root)
    if len(found) > 1:
        raise XAttnResError(f"{', '.join(found)} in {root} have the same number: rename all but one of them")
    if found:
        return root / found[0]
    raw = _called(dataset, Path(os.environ.get("nnUNet_raw") or root))
    if raw:
        raise XAttnResError(
            f"{raw[0]} is in nnUNet_raw and not in {root}: nnUNetv2_plan_and_preprocess -d {int(raw[0][7:10])} plans it"
        )
    datasets = _datasets(root)
    near = suggestion(dataset, datasets) or f"there are {', '.join(datasets) or 'none'}"
    raise XAttnResError(f"nnU-Net knows no dataset {dataset} in {root}: {near}")


def _called(dataset: str, root: Path) -> list[str]:
    beginning = f"Dataset{int(dataset):03d}_" if dataset.isdecimal() else None
    return [name for name in _datasets(root) if name == dataset or (beginning and name.startswith(beginning))]


def _datasets(root: Path) -> list[str]:
    folders = root.glob("Dataset*")
    return sorted(folder.name for folder in folders if folder.is_dir() and re.match(r"Dataset\d{3}_", folder.name))
