"""What a report is made of, whatever has trained and predicted: measured predictions, plans and logs as rows of tables.

Voxels that the reference marks as to be ignored count as background in reference and prediction. Images of a single
slice are measured in two dimensions. Where images have no spacing (PNG), a pixel is 1 mm.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_xattnres.benchmark.metrics import measure
from nnunet_xattnres.benchmark.tables import make_table
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.nnunet.commands import NUM_WORKERS
from nnunet_xattnres.nnunet.datasets import labels_or_regions, reader_for, unknown_values

# The packages that measure, and those that decide about the bytes of a report.
RECORDED_PACKAGES = ("nnunet-xattnres", "monai", "SimpleITK", "numpy", "torch", "scipy", "pandas", "matplotlib")
# Relative. File formats keep different numbers of digits.
SPACING_TOLERANCE = 1e-3


class References:
    """How the segmentations of a dataset are read, and the labels that are compared in them.

    tolerance: of NSD, in mm. dataset_json: nnU-Net's content of that file.
    """

    def __init__(self, name: str, family: str, tolerance: float, dataset_json: dict[str, Any]) -> None:
        self.name = name
        self.family = family
        self.tolerance = tolerance
        self.file_ending: str = dataset_json["file_ending"]
        self.reader = reader_for(dataset_json)()
        self.labels = labels_or_regions(dataset_json["labels"])
        self.ignored = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order")).ignore_label

    def row(self) -> dict[str, Any]:
        """The dataset's row of datasets.csv."""
        labels = ";".join(f"{'+'.join(map(str, values))}:{name}" for name, values in self.labels.items())
        return {"dataset": self.name, "family": self.family, "nsd_tolerance_mm": self.tolerance, "labels": labels}

    def case(self, path: Path) -> str:
        return path.name.removesuffix(self.file_ending)

    def read(self, path: Path, remedy: str) -> tuple[NDArray[Any], tuple[float, ...]]:
        """A label map of two or three dimensions, and its spacing in mm.

        Raises `XAttnResError` if it cannot be read, and if it holds values that dataset.json does not name.
        """
        try:
            label_map, properties = self.reader.read_seg(str(path))
        except Exception as error:
            raise XAttnResError(f"cannot read {path} ({one_line(str(error))}): {remedy}") from None
        if unknown := unknown_values(label_map, self.labels, self.ignored):
            raise XAttnResError(f"{path} holds the values {unknown}, which dataset.json does not name: {remedy}")
        spacing = tuple(map(float, properties["spacing"]))
        return (label_map[0, 0], spacing[1:]) if label_map.shape[1] == 1 else (label_map[0], spacing)


@dataclass(frozen=True)
class Prediction:
    """A predicted case.

    cell: the columns of `CELL`. kind: the set that the case belongs to. remedy: what to do if the file is damaged.
    """

    cell: dict[str, Any]
    references: References
    kind: str
    reference: Path
    path: Path
    remedy: str

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of cases.csv, one per label."""
        reference, spacing = self.references.read(self.reference, "get it again")
        prediction, own_spacing = self.references.read(self.path, self.remedy)
        if prediction.shape != reference.shape:
            raise XAttnResError(
                f"{self.path} has the shape {prediction.shape}, its reference {reference.shape}: {self.remedy}"
            )
        if not np.allclose(own_spacing, spacing, rtol=SPACING_TOLERANCE, atol=0):
            raise XAttnResError(f"{self.path} has the spacing {own_spacing}, its reference {spacing}: {self.remedy}")
        counted = reference != self.references.ignored
        case = {"family": self.references.family, "set": self.kind, "case": self.references.case(self.path)}
        rows = []
        for name, values in self.references.labels.items():
            masks = [np.isin(label_map, values) & counted for label_map in (reference, prediction)]
            metrics = measure(masks[0], masks[1], spacing, self.references.tolerance)
            rows.append(self.cell | case | {"label": name} | asdict(metrics))
        return rows


def measured_cases(predictions: list[Prediction]) -> pandas.DataFrame:
    """The table "cases". Raises `XAttnResError` if a file is missing or damaged."""
    # One of MONAI's functions calls another one so. The user can do nothing about it.
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    with ThreadPoolExecutor(int(NUM_WORKERS)) as pool:
        rows = pool.map(lambda prediction: prediction.rows(), predictions)
        return make_table("cases", [row for of_case in tqdm(rows, "cases", len(predictions)) for row in of_case])


def measuring_versions() -> pandas.DataFrame:
    """The table "versions"."""
    return make_table("versions", ({"package": name, "version": version(name)} for name in RECORDED_PACKAGES))


def planned_columns(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The columns of the table "cells" that follow from nnU-Net's plans."""
    planned = _configuration(plans, configuration)
    features = planned.configuration["architecture"].get("arch_kwargs", {}).get("features_per_stage", ())
    return {
        "patch_size": "x".join(map(str, planned.patch_size)),
        "batch_size": planned.batch_size,
        "features": " ".join(map(str, np.atleast_1d(features))),
        "iterations": planned.configuration.get("training", {}).get("num_iterations_per_epoch"),
    }


def _configuration(plans: dict[str, Any], name: str) -> ConfigurationManager:
    """The configuration, without an architecture where nnU-Net's reader does not know that of its older format."""
    try:
        return PlansManager(plans).get_configuration(name)
    except (RuntimeError, KeyError):
        if name not in plans["configurations"]:
            raise
    known = {"architecture": {}} | plans["configurations"][name]
    return PlansManager(plans | {"configurations": plans["configurations"] | {name: known}}).get_configuration(name)


def label_curve_rows(
    cell: dict[str, Any], logged: dict[str, Any], labels: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """The rows of the table "label_curves", of a trainer that logs a pseudo-Dice per label. labels: those compared."""
    # nnU-Net sorts labels by their values, and keeps the order of regions.
    has_regions = any(len(values) > 1 for values in labels.values())
    names = list(labels) if has_regions else sorted(labels, key=lambda name: labels[name])
    for epoch, of_epoch in enumerate(logged.get("dice_per_class_or_region", ())):
        if len(of_epoch) == len(names):
            for name, dice in zip(names, of_epoch, strict=True):
                yield cell | {"epoch": epoch, "label": name, "pseudo_dice": float(dice)}


def curve_rows(cell: dict[str, Any], logged: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the table "curves". cell: the columns of `CELL`. logged: what a checkpoint holds of nnU-Net's log."""
    series = zip(logged["train_losses"], logged["val_losses"], logged["mean_fg_dice"], strict=True)
    for epoch, (train, val, dice) in enumerate(series):
        yield cell | {"epoch": epoch, "train_loss": float(train), "val_loss": float(val), "pseudo_dice": float(dice)}
