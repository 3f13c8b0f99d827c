"""The command `nnunet-xattnres inspect`."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import mkdtemp

import psutil
import torch
from tqdm import tqdm

from nnunet_xattnres.common.device import choose_device, is_out_of_memory, limit_memory
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import termination_as_exception
from nnunet_xattnres.nnunet.datasets import check_nifti_files
from nnunet_xattnres.routing.drawing import draw_history, save_figure
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory
from nnunet_xattnres.tools.inspection.case import inspect_case
from nnunet_xattnres.tools.inspection.image_files import find_cases
from nnunet_xattnres.tools.inspection.trained_model import Model

OWN_FILES = re.compile(r"routing\.(json|png|pdf)|prediction\..+|[^.]+_from_[^.]+\.nii\.gz")
NO_ROOM = (ENOSPC, EDQUOT, None)  # SimpleITK says no number


@dataclass(frozen=True)
class Options:
    """What the command takes.

    model: a folder of nnUNet_results, TRAINER__PLANS__CONFIGURATION. fold: its number, or "all".
    checkpoint: the name of a file in the fold's folder.
    images: a folder, or files, named as nnU-Net wants them.
    output: gets a folder per case.
    targets: by name; None for all.
    device: "cpu" or "cuda"; None for a GPU where there is one.
    pdf: pictures as vectors too.
    trust_checkpoint: see `read_checkpoint`.
    """

    model: Path
    fold: str
    checkpoint: str
    images: list[Path]
    output: Path
    targets: list[str] | None
    device: str | None
    pdf: bool
    trust_checkpoint: bool


def run_inspect(options: Options) -> None:
    """Write what the model reads in every case.

    Raises `XAttnResError` for a folder that holds no XAttnRes model, a target that the model does not have, images that
    cannot be read or do not fit the model, and too little memory.
    """
    device = torch.device(choose_device(options.device))
    if device.type == "cpu":
        limit_memory(psutil.virtual_memory().available + psutil.swap_memory().free)
    model = Model(options.model, options.fold, options.checkpoint, options.targets, device, options.trust_checkpoint)
    cases = find_cases(options.images, model.dataset_json["file_ending"])
    for case in cases:
        _check_place(options.output / case)
    with _want_explained("the images", device):
        check_nifti_files(Path(file) for files in cases.values() for file in files)
    history = _history_of(model) if options.pdf else None
    formats = ["png", "pdf"] if options.pdf else ["png"]
    # A bar over the cases or, where there is only one, over its tiles and then its maps: they would break each other.
    single = len(cases) == 1
    model.predictor.allow_tqdm = single
    with (
        termination_as_exception(),
        _staging_folder(options.output) as staging,
        tqdm(cases.items(), unit="case", disable=single) as progress,
    ):
        for case, files in progress:
            progress.set_postfix_str(case)
            folder = staging / case
            folder.mkdir()
            with _want_explained(case, device):
                inspect_case(model, case, files, folder, formats)
                _put(folder, options.output / case)
        if history is not None:
            with _want_explained("the training", device):
                save_figure(lambda: draw_history(history), options.output / "training.pdf")


def _history_of(model: Model) -> RoutingHistory | None:
    """What the training has recorded, if it has."""
    try:
        return RoutingHistory.read(model.folder / RECORD)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XAttnResError(f"cannot read {error.filename} ({error.strerror}): leave --pdf out") from None


@contextmanager
def _want_explained(what: str, device: torch.device) -> Iterator[None]:
    """A full disk, a file that cannot be read or written, or too little memory, in one line."""
    try:
        yield
    except OSError as error:
        remedy = "make room or choose --targets" if error.errno in NO_ROOM else "see to that file and run again"
        raise XAttnResError(f"cannot go on with {what} ({error}): {remedy}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "choose fewer --targets" + ", or --device cpu" * (device.type == "cuda")
        raise XAttnResError(f"too little memory for {what}: {remedy}") from None


@contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """A folder inside `output` from which finished cases are moved to their places. Gone afterwards."""
    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(mkdtemp(prefix=".inspect_", dir=output))
    except OSError as error:
        raise XAttnResError(f"cannot write to {output} ({error.strerror}): choose another -o") from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in new:
            if not any(folder.iterdir()):
                folder.rmdir()


def _check_place(place: Path) -> None:
    """Raise `XAttnResError` if there is something that an earlier run has not written, for it would be replaced."""
    foreign = [place] if place.is_file() else [file for file in place.glob("*") if not OWN_FILES.fullmatch(file.name)]
    if foreign:
        raise XAttnResError(f"{foreign[0]} is not from inspect, which would replace {place}: choose another -o")


def _put(folder: Path, place: Path) -> None:
    """Move a finished folder to its place, which may hold an earlier result."""
    if place.exists():
        place.rename(folder.with_name(f"{folder.name}.old"))
    folder.rename(place)
