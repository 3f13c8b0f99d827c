"""How good predicted segmentations are, and the tables of trainings in a benchmark's folder.

Normalised surface Dice (NSD) and the 95th percentile of the Hausdorff distance (HD95) are MONAI's, in the image's
spacing.

What is defined how, for a label (or region) of a case:

- Reference and prediction both empty: Dice, NSD and HD95 are undefined.
- One of them empty: Dice and NSD are 0, HD95 is infinite.
- NSD counts surface elements by their area, as DeepMind's surface-distance does, and takes one for right that is at
  most the dataset's tolerance away from the other surface. HD95 is the greater one of both directions' 95th
  percentiles over boundary voxels.
- Voxels that the reference marks as to be ignored are background in both.
- Images of a single slice are measured in two dimensions. Where images have no spacing (PNG), a pixel is 1 mm.
"""

import json
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_xattnres.benchmark.matrix import FINISHED, RECORD, SPEC, Cell, read_cells
from nnunet_xattnres.benchmark.spec import Arm, Dataset, read_spec
from nnunet_xattnres.benchmark.tables import CELL, COLUMNS, Tables
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.nnunet.commands import NUM_WORKERS
from nnunet_xattnres.nnunet.datasets import read_dataset_json, reader_for
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, read_checkpoint

# What measures, and what else decides about the bytes of a report.
MEASURING = ("nnunet-xattnres", "monai", "SimpleITK", "numpy", "torch", "scipy", "pandas", "matplotlib")
VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class Metrics:
    """Of one label of one case. dice, nsd: 0 to 1. hd95: mm. NaN where undefined."""

    dice: float
    nsd: float
    hd95: float
    reference_voxels: int
    predicted_voxels: int


def measure(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...], tolerance: float
) -> Metrics:
    """Compare two masks of the same two- or three-dimensional shape.

    spacing: of every axis in mm. tolerance: of the surfaces in mm.
    """
    voxels = int(reference.sum()), int(prediction.sum())
    if not any(voxels):
        return Metrics(nan, nan, nan, *voxels)
    if not all(voxels):
        return Metrics(0.0, 0.0, inf, *voxels)
    dice = 2 * int((reference & prediction).sum()) / sum(voxels)
    return Metrics(dice, *_surface_metrics(reference, prediction, spacing, tolerance), *voxels)


def _surface_metrics(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...], tolerance: float
) -> tuple[float, float]:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    masks = {
        "y_pred": torch.from_numpy(prediction)[None, None],
        "y": torch.from_numpy(reference)[None, None],
    }
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    nsd = compute_surface_dice(**masks, class_thresholds=[tolerance], use_subvoxels=True, **options)
    hd95 = compute_hausdorff_distance(**masks, percentile=95, **options)
    return nsd.item(), hd95.item()


def measured_tables(root: Path, finished: list[Cell]) -> Tables:
    """Measure all predictions of cells of a benchmark's folder.

    Raises `XAttnResError` if files of theirs are not whole.
    """
    # What MONAI's own functions hand to each other; no user can mend it.
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    datasets = {dataset.name: _References(root, dataset) for dataset in read_spec(root / SPEC).datasets}
    predictions = [prediction for cell in finished for prediction in _predictions(root, cell, datasets[cell.dataset])]
    with ThreadPoolExecutor(int(NUM_WORKERS)) as pool:
        rows = pool.map(lambda prediction: prediction.rows(), predictions)
        cases = [row for of_case in tqdm(rows, "cases", len(predictions)) for row in of_case]
    return replace(
        planned_tables(root, dict.fromkeys(finished, FINISHED)),
        cases=_table("cases", cases),
        curves=_table("curves", (row for cell in finished for row in _curve_rows(root, cell))),
        versions=_table("versions", ({"package": name, "version": version(name)} for name in MEASURING if finished)),
    )


def cell_key(cell: Cell) -> dict[str, Any]:
    """What tells the rows of a cell from those of others."""
    return {name: getattr(cell, name) for name in CELL}


def planned_tables(root: Path, states: dict[Cell, str]) -> Tables:
    """What is known of cells of a benchmark's folder, seen in these states, without measuring."""
    spec = read_spec(root / SPEC)
    return Tables(
        cases=_table("cases", ()),
        cells=_table("cells", (_cell_row(root, cell, state) for cell, state in states.items())),
        curves=_table("curves", ()),
        datasets=_table("datasets", (_References(root, dataset).row() for dataset in spec.datasets)),
        trainers=_table("trainers", (_arm_row(arm) for arm in spec.trainers)),
        versions=_table("versions", ()),
    )


def cases_to_predict(root: Path) -> dict[Cell, set[tuple[str, str]]]:
    """Which cases every cell of a benchmark's folder predicts, each with its set."""
    datasets = {dataset.name: _References(root, dataset) for dataset in read_spec(root / SPEC).datasets}
    return {
        cell: {(kind, datasets[cell.dataset].case(path)) for kind, path in datasets[cell.dataset].references(cell)}
        for cell in read_cells(root)
    }


def _table(name: str, rows: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    return pandas.DataFrame(list(rows), columns=list(COLUMNS[name])).astype(COLUMNS[name])


class _References:
    """The references of a dataset, and what is compared in them."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        self.name = dataset.name
        self.family = dataset.family
        self.tolerance = dataset.nsd_tolerance_mm
        self.raw = root / "nnUNet_raw" / dataset.name
        self.splits = root / "nnUNet_preprocessed" / dataset.name / "splits_final.json"
        content = read_dataset_json(self.raw)
        self.file_ending: str = content["file_ending"]
        self.reader = reader_for(content)()
        self.labels = labels_or_regions(content["labels"])
        self.ignored = LabelManager(content["labels"], content.get("regions_class_order")).ignore_label

    def row(self) -> dict[str, Any]:
        labels = ";".join(f"{'+'.join(map(str, values))}:{name}" for name, values in self.labels.items())
        return {
            "dataset": self.name,
            "family": self.family,
            "nsd_tolerance_mm": self.tolerance,
            "labels": labels,
        }

    def references(self, cell: Cell) -> list[tuple[str, Path]]:
        """Of the cases that a cell must have predicted, each with its set."""
        cases = json.loads(self.splits.read_text())[cell.fold]["val"]
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


def labels_or_regions(labels: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The values of every label or region that nnU-Net predicts, by name."""
    values = {name: tuple(map(int, np.atleast_1d(value))) for name, value in labels.items() if name != "ignore"}
    return {name: of_name for name, of_name in values.items() if set(of_name) != {0}}


@dataclass(frozen=True)
class _Prediction:
    cell: Cell
    dataset: _References
    kind: str
    reference: Path
    path: Path
    remedy: str

    def rows(self) -> list[dict[str, Any]]:
        """Of cases.csv: one per label."""
        reference, spacing = self.dataset.read(self.reference, "get it again")
        prediction, _ = self.dataset.read(self.path, self.remedy)
        if prediction.shape != reference.shape:
            raise XAttnResError(
                f"{self.path} has the shape {prediction.shape}, its reference {reference.shape}: {self.remedy}"
            )
        counted = reference != self.dataset.ignored
        case = {
            "family": self.dataset.family,
            "set": self.kind,
            "case": self.dataset.case(self.path),
        }
        return [
            cell_key(self.cell)
            | case
            | {"label": name}
            | asdict(
                measure(
                    np.isin(reference, values) & counted,
                    np.isin(prediction, values) & counted,
                    spacing,
                    self.dataset.tolerance,
                )
            )
            for name, values in self.dataset.labels.items()
        ]


def _predictions(root: Path, cell: Cell, dataset: _References) -> list[_Prediction]:
    found = []
    for kind, reference in dataset.references(cell):
        path = cell.folder(root) / kind / reference.name
        # A finished cell is not begun again as long as its record says so.
        remedy = f"delete {path.parent} and {cell.folder(root) / RECORD}, run again"
        if not path.is_file():
            raise XAttnResError(f"{cell.title} is finished, but {path} is missing: {remedy}")
        found.append(_Prediction(cell, dataset, kind, reference, path, remedy))
    return found


def _cell_row(root: Path, cell: Cell, state: str) -> dict[str, Any]:
    plans = PlansManager(str(root / "nnUNet_preprocessed" / cell.dataset / f"{cell.plans}.json"))
    planned = plans.get_configuration(cell.planned_configuration)
    record = cell.record(root)
    versions = "; ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    more = {
        "state": state,
        "plans": cell.plans,
        "patch_size": "x".join(map(str, planned.patch_size)),
        "batch_size": planned.batch_size,
        "features": " ".join(map(str, planned.network_arch_init_kwargs.get("features_per_stage", ()))),
        "iterations": planned.configuration.get("training", {}).get("num_iterations_per_epoch"),
        "parameters": cell.parameters,
        "versions": versions,
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
