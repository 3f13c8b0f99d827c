"""The tables of the trainings in a benchmark's folder: what is planned, and all predictions measured.

Voxels that the reference marks as to be ignored count as background in reference and prediction. Images of a single
slice are measured in two dimensions. Where images have no spacing (PNG), a pixel is 1 mm.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_xattnres.benchmark.cells import FINISHED, RECORD, SPEC, Cell, read_cells, read_planned
from nnunet_xattnres.benchmark.metrics import measure
from nnunet_xattnres.benchmark.spec import Arm, Dataset, read_spec
from nnunet_xattnres.benchmark.tables import CELL, Tables, make_table
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.nnunet.commands import NUM_WORKERS
from nnunet_xattnres.nnunet.datasets import SPLITS, labels_or_regions, read_dataset_json, read_splits, reader_for
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, read_checkpoint

# The packages that measure, and those that decide about the bytes of a report.
RECORDED_PACKAGES = ("nnunet-xattnres", "monai", "SimpleITK", "numpy", "torch", "scipy", "pandas", "matplotlib")
VALIDATION, TEST = "validation", "test"


def measured_tables(root: Path, finished: list[Cell]) -> Tables:
    """Measure all predictions of finished cells of a benchmark's folder.

    Raises `XAttnResError` if a file of a cell is missing or damaged.
    """
    # One of MONAI's functions calls another one so. The user can do nothing about it.
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    references = _references_by_dataset(root)
    predictions = [prediction for cell in finished for prediction in _predictions(root, cell, references[cell.dataset])]
    with ThreadPoolExecutor(int(NUM_WORKERS)) as pool:
        rows = pool.map(lambda prediction: prediction.rows(), predictions)
        cases = [row for of_case in tqdm(rows, "cases", len(predictions)) for row in of_case]
    packages = RECORDED_PACKAGES if finished else ()
    return replace(
        planned_tables(root, dict.fromkeys(finished, FINISHED)),
        cases=make_table("cases", cases),
        curves=make_table("curves", (row for cell in finished for row in _curve_rows(root, cell))),
        versions=make_table("versions", ({"package": name, "version": version(name)} for name in packages)),
    )


def planned_tables(root: Path, states: dict[Cell, str]) -> Tables:
    """What is known without measuring of cells of a benchmark's folder that were seen in these states."""
    references = _references_by_dataset(root)
    return Tables(
        cases=make_table("cases", ()),
        cells=make_table("cells", (_cell_row(root, cell, state) for cell, state in states.items())),
        curves=make_table("curves", ()),
        datasets=make_table("datasets", (of_dataset.row() for of_dataset in references.values())),
        trainers=make_table("trainers", (_arm_row(arm) for arm in read_spec(root / SPEC).trainers)),
        versions=make_table("versions", ()),
    )


def cases_to_predict(root: Path) -> dict[Cell, set[tuple[str, str]]]:
    """The cases that every cell of a benchmark's folder predicts, each as its set and its name."""
    references = _references_by_dataset(root)
    return {
        cell: {(kind, references[cell.dataset].case(path)) for kind, path in references[cell.dataset].files(cell)}
        for cell in read_cells(root)
    }


def cell_key(cell: Cell) -> dict[str, Any]:
    """The columns by which rows of one cell are told from those of others."""
    return {name: getattr(cell, name) for name in CELL}


def _references_by_dataset(root: Path) -> dict[str, "_References"]:
    return {dataset.name: _References(root, dataset) for dataset in read_spec(root / SPEC).datasets}


class _References:
    """The reference segmentations of a dataset, and the labels that are compared in them."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        self.name = dataset.name
        self.family = dataset.family
        self.tolerance = dataset.nsd_tolerance_mm
        self.raw = root / "nnUNet_raw" / dataset.name
        self.splits_file = root / "nnUNet_preprocessed" / dataset.name / SPLITS
        content = read_dataset_json(self.raw)
        self.file_ending: str = content["file_ending"]
        self.reader = reader_for(content)()
        self.labels = labels_or_regions(content["labels"])
        self.ignored = LabelManager(content["labels"], content.get("regions_class_order")).ignore_label

    @cached_property
    def splits(self) -> list[dict[str, list[str]]]:
        return read_splits(self.splits_file, "mend or remove it, and run again")

    def row(self) -> dict[str, Any]:
        """The dataset's row of datasets.csv."""
        labels = ";".join(f"{'+'.join(map(str, values))}:{name}" for name, values in self.labels.items())
        return {"dataset": self.name, "family": self.family, "nsd_tolerance_mm": self.tolerance, "labels": labels}

    def files(self, cell: Cell) -> list[tuple[str, Path]]:
        """The references of the cases that a cell must have predicted, each with its set."""
        cases = self.splits[cell.fold]["val"]
        found = [(VALIDATION, self.raw / "labelsTr" / f"{case}{self.file_ending}") for case in sorted(cases)]
        if cell.test:
            found += [(TEST, path) for path in sorted((self.raw / "labelsTs").glob(f"*{self.file_ending}"))]
        return found

    def case(self, path: Path) -> str:
        return path.name.removesuffix(self.file_ending)

    def read(self, path: Path, remedy: str) -> tuple[NDArray[Any], tuple[float, ...]]:
        """A label map of two or three dimensions, and its spacing in mm."""
        try:
            label_map, properties = self.reader.read_seg(str(path))
        except Exception as error:
            raise XAttnResError(f"cannot read {path} ({one_line(str(error))}): {remedy}") from None
        spacing = tuple(map(float, properties["spacing"]))
        return (label_map[0, 0], spacing[1:]) if label_map.shape[1] == 1 else (label_map[0], spacing)


@dataclass(frozen=True)
class _Prediction:
    """A predicted case. kind: the set that the case belongs to. remedy: what to do if the file is damaged."""

    cell: Cell
    references: _References
    kind: str
    reference: Path
    path: Path
    remedy: str

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of cases.csv, one per label."""
        reference, spacing = self.references.read(self.reference, "get it again")
        prediction, _ = self.references.read(self.path, self.remedy)
        if prediction.shape != reference.shape:
            raise XAttnResError(
                f"{self.path} has the shape {prediction.shape}, its reference {reference.shape}: {self.remedy}"
            )
        counted = reference != self.references.ignored
        case = {"family": self.references.family, "set": self.kind, "case": self.references.case(self.path)}
        rows = []
        for name, values in self.references.labels.items():
            masks = [np.isin(label_map, values) & counted for label_map in (reference, prediction)]
            metrics = measure(masks[0], masks[1], spacing, self.references.tolerance)
            rows.append(cell_key(self.cell) | case | {"label": name} | asdict(metrics))
        return rows


def _predictions(root: Path, cell: Cell, references: _References) -> list[_Prediction]:
    found = []
    for kind, reference in references.files(cell):
        path = cell.folder(root) / kind / reference.name
        # As long as the record says that the cell is finished, it is not begun again.
        remedy = f"delete {path.parent} and {cell.folder(root) / RECORD}, run again"
        if not path.is_file():
            raise XAttnResError(f"{cell.title} is finished, but {path} is missing: {remedy}")
        found.append(_Prediction(cell, references, kind, reference, path, remedy))
    return found


def _cell_row(root: Path, cell: Cell, state: str) -> dict[str, Any]:
    plans = PlansManager(read_planned(root / "nnUNet_preprocessed" / cell.dataset / f"{cell.plans}.json"))
    planned = plans.get_configuration(cell.planned_configuration)
    record = cell.record(root)
    more = {
        "state": state,
        "plans": cell.plans,
        "patch_size": "x".join(map(str, planned.patch_size)),
        "batch_size": planned.batch_size,
        "features": " ".join(map(str, planned.network_arch_init_kwargs.get("features_per_stage", ()))),
        "iterations": planned.configuration.get("training", {}).get("num_iterations_per_epoch"),
        "parameters": cell.parameters,
        "versions": "; ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
    }
    return {"device": ""} | record | cell_key(cell) | more


def _arm_row(arm: Arm) -> dict[str, Any]:
    return {
        "trainer": arm.name,
        "trainer_class": arm.trainer,
        "planner": arm.planner,
        "parameters_of": arm.parameters_of or "",
        "width": arm.width,
    }


def _curve_rows(root: Path, cell: Cell) -> list[dict[str, Any]]:
    checkpoint = read_checkpoint(cell.folder(root) / FINAL_CHECKPOINT, f"delete {cell.folder(root)}, run again")
    logged = checkpoint["logging"]
    series = zip(logged["train_losses"], logged["val_losses"], logged["mean_fg_dice"], strict=True)
    return [
        cell_key(cell)
        | {"epoch": epoch, "train_loss": float(train), "val_loss": float(val), "pseudo_dice": float(dice)}
        for epoch, (train, val, dice) in enumerate(series)
    ]
