"""Datasets that a user has: their layout is recognised, they are checked and brought into nnU-Net's raw format."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.experiment_planning.verify_dataset_integrity import (
    check_cases,
    verify_dataset_integrity,
    verify_labels,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)
from numpy.typing import NDArray

from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.files import link_or_copy, read_json, temporary_folder
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.nnunet.commands import NUM_WORKERS, NnUNet
from nnunet_xattnres.nnunet.phantom import write_phantom_dataset

PHANTOM_DATASET = "Dataset900_Phantom"
PHANTOM_CASES = 24
PHANTOM_SEED = 0
NUM_FOLDS = 5
SPLITS = "splits_final.json"

MSD_KEYS = ("labels", "modality", "numTraining", "training", "test")
RAW_KEYS = ("labels", "channel_names", "numTraining", "file_ending")
MSD_NAME = r"Task(\d\d)_([^_]+)"
LAYOUTS = "an MSD task (TaskNN_Name) or an nnU-Net raw dataset (DatasetNNN_Name)"

# nnU-Net's cases: identifier -> {"images": one path per channel, "label": path}
Cases = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class InputDataset:
    """A dataset that is not in nnUNet_raw yet.

    origin: its path, or how it is generated. It is recorded with the raw dataset.
    name: nnU-Net's name for it, DatasetNNN_Name.
    make: writes the raw dataset, a folder of this name, into a folder.
    """

    origin: str
    name: str
    make: Callable[[NnUNet, Path], None]


def phantom_dataset() -> InputDataset:
    """Generated cases."""

    def generate(nnunet: NnUNet, folder: Path) -> None:
        print(f"Generating {PHANTOM_CASES} phantom cases", flush=True)
        write_phantom_dataset(folder / PHANTOM_DATASET, PHANTOM_CASES, PHANTOM_SEED)

    return InputDataset(f"phantoms with seed {PHANTOM_SEED}", PHANTOM_DATASET, generate)


def read_dataset(data: Path) -> InputDataset:
    """An MSD task, the archive of one, or an nnU-Net raw dataset. The layout is recognised by dataset.json.

    Raises `XAttnResError` if `data` is none of these.
    """
    if data.is_file() and data.suffix == ".tar":
        return _msd_archive(data)
    if not data.is_dir():
        problem = "is not a folder (any archive but an MSD task's .tar must be unpacked)"
        problem = problem if data.exists() else "does not exist"
        raise XAttnResError(f"{data} {problem}: give the folder of {LAYOUTS}")
    dataset_json = read_dataset_json(data)
    is_msd = "modality" in dataset_json and "channel_names" not in dataset_json
    missing = [key for key in (MSD_KEYS if is_msd else RAW_KEYS) if key not in dataset_json]
    if missing:
        raise XAttnResError(f"{data / 'dataset.json'} has no {', '.join(missing)}: give the folder of {LAYOUTS}")
    for key in ("labels", "modality" if is_msd else "channel_names"):
        if not isinstance(dataset_json[key], dict):
            raise XAttnResError(f"{data / 'dataset.json'}: {key} must be an object, name by name: mend it")
    for folder in ("imagesTr", "labelsTr"):
        if "dataset" not in dataset_json and not (data / folder).is_dir():
            raise XAttnResError(f"{data} has no folder {folder}: give the folder of {LAYOUTS}")
    return _msd_task(data) if is_msd else _raw_dataset(data)


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """The dataset.json of a folder. Raises `XAttnResError` if there is none or if it cannot be used."""
    path = folder / "dataset.json"
    if not path.exists():
        raise XAttnResError(f"{folder} has no dataset.json: give the folder of {LAYOUTS}")
    return read_json(path, "mend it or get the dataset again")


def read_splits(path: Path, remedy: str) -> list[dict[str, list[str]]]:
    """The training and validation cases of every fold, "train" and "val", from a file as nnU-Net writes it.

    Raises `XAttnResError`, with the remedy, if the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
        splits = [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in content]
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): {remedy}") from None
    except (ValueError, KeyError, TypeError):
        splits = []
    if not splits:
        raise XAttnResError(f"{path} is no list of folds with train and val: {remedy}")
    return splits


def _path_with_name(data: Path, pattern: str) -> tuple[Path, re.Match[str]] | None:
    """The path of `data` or of the target of that link, whichever has a name that matches. Its parents are resolved."""
    for path in (Path(os.path.abspath(data)), data.resolve()):
        if name := re.fullmatch(pattern, path.name):
            return path.parent.resolve() / path.name, name
    return None


def _msd_task(data: Path) -> InputDataset:
    named = _path_with_name(data, MSD_NAME)
    if named is None:
        raise XAttnResError(f"nnU-Net converts MSD tasks in folders named TaskNN_Name: rename {data} accordingly")
    data, name = named
    if not (data / "imagesTs").is_dir():
        raise XAttnResError(f"nnU-Net's MSD converter needs a folder imagesTs in {data}: create it, empty if need be")

    dataset = f"Dataset0{name[1]}_{name[2]}"

    def convert(nnunet: NnUNet, folder: Path) -> None:
        # The converter would split a truncated image into channels that look complete.
        check_nifti_files([*(data / "imagesTr").glob("[!._]*.nii.gz"), *(data / "labelsTr").glob("[!._]*.nii.gz")])
        # The command refuses a number that is in use in any of nnU-Net's folders.
        elsewhere = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(folder))
        command = ("nnUNetv2_convert_MSD_dataset", "-i", str(data))
        print(f"$ {shell_command(*command)}", flush=True)
        nnunet.run(*command, log=f"{dataset}_convert", environment=elsewhere)

    return InputDataset(str(data), dataset, convert)


def _msd_archive(archive: Path) -> InputDataset:
    # The folder in the archive has the name that the archive was made with: a link's target comes first.
    pattern = rf"{MSD_NAME}\.tar"
    named = _path_with_name(archive.resolve(), pattern) or _path_with_name(archive, pattern)
    if named is None:
        raise XAttnResError(f"{archive} is not named TaskNN_Name.tar, as archives of MSD tasks are: rename it")
    archive, name = named

    def unpack_and_convert(nnunet: NnUNet, folder: Path) -> None:
        if not hasattr(tarfile, "data_filter"):
            raise XAttnResError(f"this Python cannot unpack archives safely: unpack {archive} and give its folder")
        unpacked = folder / "unpacked"
        try:
            with tarfile.open(archive) as content:
                content.extractall(unpacked, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise XAttnResError(f"{archive} cannot be unpacked ({one_line(str(error))}): get it again") from None
        read_dataset(unpacked / archive.stem).make(nnunet, folder)
        shutil.rmtree(unpacked)

    return InputDataset(str(archive), f"Dataset0{name[1]}_{name[2]}", unpack_and_convert)


def _raw_dataset(data: Path) -> InputDataset:
    named = _path_with_name(data, r"Dataset\d{3}_.+")
    if named is None:
        raise XAttnResError(f"nnU-Net takes raw datasets in folders named DatasetNNN_Name: rename {data} accordingly")
    data, _ = named

    def link(nnunet: NnUNet, folder: Path) -> None:
        link_or_copy(data.resolve(), folder / data.name)

    return InputDataset(str(data), data.name, link)


def place_raw_dataset(dataset: InputDataset, nnunet: NnUNet, option: str, with_test_set: bool = False) -> bool:
    """Check the dataset and put it into nnUNet_raw, as a whole or not at all. False if it is there already.

    option: the one that names the working directory, for messages. with_test_set: check imagesTs and labelsTs, too.

    Raises `XAttnResError` for data that cannot be used, and if something else has the dataset's name or number.
    """
    place = nnunet.raw / dataset.name
    if place.exists():
        _check_same_origin(dataset, place, option)
        return False
    _check_number_is_free(dataset, nnunet, option)
    with temporary_folder(nnunet.workdir, ".staging") as staging:
        staged = staging / dataset.name
        dataset.make(nnunet, staging)
        try:
            check_raw_dataset(staged)
            if with_test_set:
                check_test_set(staged)
        except XAttnResError as error:
            # The staging folder is removed: name files relative to the dataset.
            message = str(error).replace(f"{staged}{os.sep}", "")
            raise XAttnResError(f"{dataset.origin}: {message}") from None
        if not staged.is_symlink():
            (staged / "origin.txt").write_text(dataset.origin, "utf-8")
        nnunet.raw.mkdir(exist_ok=True)
        staged.rename(place)
    return True


def _check_same_origin(dataset: InputDataset, place: Path, option: str) -> None:
    record = place / "origin.txt"
    expected = dataset.origin
    if place.is_symlink():
        origin, expected = str(place.resolve()), str(Path(dataset.origin).resolve())
    else:
        origin = record.read_text("utf-8") if record.is_file() else "something else"
    if origin != expected:
        raise XAttnResError(f"{place} was made from {origin}, not from {dataset.origin}: choose another {option}")


def _check_number_is_free(dataset: InputDataset, nnunet: NnUNet, option: str) -> None:
    """nnU-Net refuses to work where two datasets have the same number."""
    for folder in (nnunet.raw, nnunet.preprocessed, nnunet.results):
        for other in folder.glob(f"{dataset.name[:10]}_*"):
            if other.name != dataset.name:
                raise XAttnResError(f"{other} has the same number as {dataset.name}: choose another {option}")


def check_raw_dataset(folder: Path) -> Cases:
    """The training cases of a dataset in nnU-Net's raw format.

    Raises `XAttnResError`, which names the file, if something is missing, damaged or does not fit.
    """
    dataset_json = read_dataset_json(folder)
    try:
        cases: Cases = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
    except Exception as error:
        raise XAttnResError(f"nnU-Net cannot list the training cases ({error!r}): mend dataset.json") from None
    if len(cases) < NUM_FOLDS:
        raise XAttnResError(
            f"the dataset has {len(cases)} training cases with images ending in _0000{dataset_json['file_ending']}: "
            f"nnU-Net's {NUM_FOLDS}-fold cross-validation needs at least {NUM_FOLDS}"
        )
    for name, case in cases.items():
        if not Path(case["label"]).is_file():
            raise XAttnResError(f"training case {name} has no label: add {case['label']} or remove the case")
    check_nifti_files(_files(cases))
    try:
        # nnU-Net prints a traceback for a file that cannot be opened.
        with redirect_stderr(io.StringIO()):
            verify_dataset_integrity(str(folder), int(NUM_WORKERS))
    except AssertionError as error:
        raise XAttnResError(f"mend the dataset: {one_line(str(error))}") from None
    except Exception as error:
        complaint = _first_complaint(cases, dataset_json) or str(error)
        raise XAttnResError(f"mend the dataset: {one_line(complaint)}") from None
    return cases


def check_test_set(folder: Path) -> None:
    """Raise `XAttnResError` for the first case of imagesTs and labelsTs that does not fit dataset.json."""
    dataset_json = read_dataset_json(folder)
    ending, images = dataset_json["file_ending"], str(folder / "imagesTs")
    names = get_identifiers_from_splitted_dataset_folder(images, ending)
    files = create_lists_from_splitted_dataset_folder(images, ending, names, int(NUM_WORKERS))
    cases: Cases = {
        name: {"images": of_case, "label": str(folder / "labelsTs" / f"{name}{ending}")}
        for name, of_case in zip(names, files, strict=True)
    }
    check_nifti_files(_files(cases))
    complaint = _first_complaint(cases, dataset_json)
    if complaint:
        raise XAttnResError(f"mend the test set, or say test: false: {one_line(complaint)}")


def _files(cases: Cases) -> Iterator[Path]:
    return (Path(file) for case in cases.values() for file in [*case["images"], case["label"]])


def check_nifti_files(files: Iterable[Path]) -> None:
    """Raise `XAttnResError` for a truncated or damaged file. Files of other formats are not looked at.

    nibabel reads them: SimpleITK, which nnU-Net reads with, fills the rest of a truncated file with zeros.
    """

    def damage(file: Path) -> str | None:
        try:
            nibabel.load(file).dataobj.get_unscaled()
        except MemoryError:
            raise
        except Exception as error:
            return f"{file} is truncated or damaged ({one_line(str(error))}): get the file again"
        return None

    with ThreadPoolExecutor(int(NUM_WORKERS)) as pool:
        for found in pool.map(damage, (file for file in files if file.name.endswith((".nii", ".nii.gz")))):
            if found:
                pool.shutdown(cancel_futures=True)
                raise XAttnResError(found)


def _first_complaint(cases: Cases, dataset_json: dict[str, Any]) -> str | None:
    """The message of nnU-Net's integrity check on the first bad case. nnU-Net's own loses it in worker processes."""
    reader = reader_for(dataset_json)
    try:
        labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except Exception as error:
        return f"labels in dataset.json: {error}"
    expected = [int(label) for label in labels.all_labels]
    if labels.ignore_label is not None:
        expected.append(labels.ignore_label)
    for name, case in cases.items():
        with redirect_stdout(io.StringIO()) as complaint:
            try:
                fine = verify_labels(case["label"], reader, expected)
                fine &= check_cases(case["images"], case["label"], len(dataset_json["channel_names"]), reader)
            except Exception as error:
                return f"case {name}: {error}"
        if not fine:
            return f"case {name}: {complaint.getvalue()}"
    return None


def reader_for(dataset_json: dict[str, Any]) -> type[BaseReaderWriter]:
    """nnU-Net's reader for the images of a dataset."""
    return determine_reader_writer_from_dataset_json(dataset_json, verbose=False)


def names_of_values(labels: dict[str, Any]) -> dict[int, str]:
    """The names of the foreground values in a label map. A value that only regions contain is named by its number."""
    values = {int(value) for label in labels.values() for value in (label if isinstance(label, list) else [label])}
    names = {int(label): name for name, label in labels.items() if not isinstance(label, list)}
    return {value: names.get(value, f"label {value}") for value in sorted(values) if value != 0}


def unknown_values(label_map: NDArray[Any], labels: Mapping[str, Sequence[int]], ignored: int | None) -> str:
    """The values of a label map that are neither background, nor ignored, nor of a label. Empty if there are none.

    labels: from `labels_or_regions`.
    """
    known = {0, ignored or 0, *(value for values in labels.values() for value in values)}
    if np.isin(label_map, list(known)).all():
        return ""
    return ", ".join(f"{value:g}" for value in np.unique(label_map) if value not in known)


def labels_or_regions(labels: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The values of every label or region that nnU-Net predicts, by name. labels: as in dataset.json."""
    values = {name: tuple(map(int, np.atleast_1d(value))) for name, value in labels.items() if name != "ignore"}
    return {name: of_name for name, of_name in values.items() if set(of_name) != {0}}
