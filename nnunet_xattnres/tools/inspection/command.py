"""The command `nnunet-xattnres inspect`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

import torch
from tqdm import tqdm

from nnunet_xattnres.common.device import choose_device, free_memory, is_out_of_memory, limit_memory
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import check_writable, temporary_folder
from nnunet_xattnres.common.processes import termination_as_exception
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.nnunet.datasets import check_nifti_files
from nnunet_xattnres.nnunet.folders import check_not_of_nnunet
from nnunet_xattnres.routing.drawing import draw_history, save_figure
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory
from nnunet_xattnres.tools.inspection.case import inspect_case
from nnunet_xattnres.tools.inspection.image_files import find_cases
from nnunet_xattnres.tools.inspection.knock_out import KnockOut
from nnunet_xattnres.tools.inspection.knock_out_report import FILES as REPORT_FILES
from nnunet_xattnres.tools.inspection.references import References
from nnunet_xattnres.tools.inspection.trained_model import Model

OWN_FILES = re.compile(r"routing\.(json|png|pdf)|prediction\..+|[^.]+_from_[^.]+\.nii\.gz")
TRAINING_PICTURE = "training.pdf"
DISK_FULL = (ENOSPC, EDQUOT, None)  # SimpleITK gives no number


@dataclass(frozen=True)
class Options:
    """The options of the command.

    model: a model folder in nnUNet_results, TRAINER__PLANS__CONFIGURATION. fold: a number, or "all".
        None for the only one that has the checkpoint.
    checkpoint: the name of a file in the folder of the fold.
    images: folders, or files named as nnU-Net expects them.
    output: the parent of the folders that are written, one for every case.
    targets: their names. None: all.
    knock_out: predict every case again without each source of each target.
    sources: the names of the sources that are left out. None: all.
    labels: a folder of references for `knock_out`. None: predictions are compared with those of the whole network.
    device: see `choose_device`.
    pdf: draw pictures as PDF too.
    trust_checkpoint: see `read_checkpoint`.
    """

    model: Path
    fold: str | None
    checkpoint: str
    images: list[Path]
    output: Path
    targets: list[str] | None
    knock_out: bool
    sources: list[str] | None
    labels: Path | None
    device: str | None
    pdf: bool
    trust_checkpoint: bool


def run_inspect(options: Options) -> None:
    """Write the attention weights of the model in every case and, if asked for, how far Dice falls without a source.

    Raises `XAttnResError` for a folder without an XAttnRes model, a target or source that the model does not have,
    images and references that cannot be read or do not fit the model, an output that cannot be written, that is the
    folder of the images or that would replace files of others, and too little memory.
    """
    for option, value in (("--sources", options.sources), ("--labels", options.labels)):
        if value is not None and not options.knock_out:
            raise XAttnResError(f"{option} is for --knock-out: add that, or leave {option} out")
    device = torch.device(choose_device(options.device))
    if device.type == "cpu":
        limit_memory(free_memory())
    model = Model(options.model, options.fold, options.checkpoint, options.targets, device, options.trust_checkpoint)
    if options.output.resolve() in [(path.parent if path.is_file() else path).resolve() for path in options.images]:
        raise XAttnResError(f"-o {options.output} is the folder of the images: choose another -o")
    cases = find_cases(options.images, model.dataset_json["file_ending"])
    history = _history_of(model) if options.pdf else None
    beside_the_cases = [*(REPORT_FILES if options.knock_out else ()), *([TRAINING_PICTURE] if history else ())]
    _check_replaceable(options.output, list(cases), beside_the_cases)
    check_not_of_nnunet(options.output, "-o", "attention_maps")
    check_writable(options.output, "-o")
    with _errors_explained("the images", device):
        check_nifti_files(Path(file) for files in cases.values() for file in files)
    knock_out = _prepared_knock_out(model, cases, options, device) if options.knock_out else None
    formats = ["png", "pdf"] if options.pdf else ["png"]
    # Two progress bars would overwrite each other. With several cases there is one bar over the cases. With a single
    # case there is one over its tiles, and then one over its maps.
    single = len(cases) == 1
    model.predictor.allow_tqdm = single
    with (
        termination_as_exception(),
        temporary_folder(options.output) as temporary,
        tqdm(cases.items(), unit="case", disable=single) as progress,
    ):
        for case, files in progress:
            progress.set_postfix_str(case)
            folder = temporary / case
            folder.mkdir()
            with _errors_explained(case, device):
                inspect_case(model, case, files, folder, formats, knock_out)
                _move(folder, options.output / case)
        if knock_out is not None:
            with _errors_explained("the table", device):
                report = knock_out.report()
                report.write(temporary, formats)
                for name in REPORT_FILES:
                    _replace(temporary / name, options.output / name)
            print(f"\n{report.markdown()}", end="")
        if history is not None:
            with _errors_explained("the training", device):
                save_figure(lambda: draw_history(history), options.output / TRAINING_PICTURE)
    print(f"{options.output}: {counted(len(cases), 'case')}. Look at routing.png in the folder of a case first")


def _prepared_knock_out(
    model: Model, cases: Mapping[str, Sequence[str]], options: Options, device: torch.device
) -> KnockOut:
    """Check the sources and every reference, and print what the predictions cost, before the first of them."""
    references = References(model, options.labels, list(cases)) if options.labels else None
    knock_out = KnockOut(model, options.sources, references, len(cases))
    if references is not None:
        with _errors_explained("the references", device):
            check_nifti_files(references.files.values())
            references.check(cases)
    print(knock_out.cost, flush=True)
    return knock_out


def _history_of(model: Model) -> RoutingHistory | None:
    """The record of the training, or None if there is none."""
    try:
        return RoutingHistory.read(model.folder / RECORD)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XAttnResError(f"cannot read {error.filename} ({error.strerror}): leave --pdf out") from None


@contextmanager
def _errors_explained(what: str, device: torch.device) -> Iterator[None]:
    """Turn a full disk, an unreadable or unwritable file and too little memory into a one-line `XAttnResError`.

    what: what could not be processed, for the message.
    """
    try:
        yield
    except OSError as error:
        remedy = "make room or choose --targets" if error.errno in DISK_FULL else "see to that file and run again"
        raise XAttnResError(f"cannot go on with {what} ({error}): {remedy}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Python, NumPy and the check before the first tile mean the memory of the CPU, and their messages are short.
        of_cpu = isinstance(error, MemoryError)
        remedy = "choose fewer --targets" + ", or --device cpu" * (device.type != "cpu" and not of_cpu)
        detail = f" ({error})" if of_cpu and str(error) else ""
        raise XAttnResError(f"too little memory for {what}{detail}: {remedy}") from None


def _check_replaceable(output: Path, cases: Sequence[str], beside_the_cases: Sequence[str]) -> None:
    """Raise `XAttnResError` if what will be replaced is not from inspect.

    A case's folder may hold files with the names that inspect gives. A file beside the cases may be replaced if the
    folder of a case shows that inspect has written there.

    beside_the_cases: names of files.
    """
    foreign: list[Path] = []
    for place in (output / case for case in cases):
        foreign += (
            [place] if place.is_file() else [file for file in place.glob("*") if not OWN_FILES.fullmatch(file.name)]
        )
    is_of_inspect = any(output.glob("*/routing.json"))
    for file in (output / name for name in beside_the_cases):
        if file.is_dir() or (file.exists() and not is_of_inspect):
            foreign.append(file)
    if foreign:
        raise XAttnResError(f"{foreign[0]} is not from inspect, which would replace it: choose another -o")


def _move(finished: Path, place: Path) -> None:
    """Move a finished folder to its place. An earlier result there is moved away, to be removed."""
    if place.exists():
        place.rename(finished.with_name(f"{finished.name}.old"))
    finished.rename(place)


def _replace(finished: Path, place: Path) -> None:
    """Move a finished file to its place. If there is none, an earlier one there is removed: it is of other numbers."""
    if finished.exists():
        finished.replace(place)
    else:
        place.unlink(missing_ok=True)
