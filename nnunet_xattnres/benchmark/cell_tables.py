"""The tables of the trainings in a benchmark's folder: what is planned, and all predictions measured."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from nnunet_xattnres.benchmark.cells import FINISHED, RECORD, SPEC, Cell, read_cells, read_planned
from nnunet_xattnres.benchmark.measuring import (
    Prediction,
    References,
    curve_rows,
    label_curve_rows,
    measured_cases,
    measuring_versions,
    planned_columns,
)
from nnunet_xattnres.benchmark.spec import Arm, Dataset, read_spec
from nnunet_xattnres.benchmark.tables import CELL, Tables, make_table
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.datasets import SPLITS, read_dataset_json, read_splits
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, read_checkpoint

VALIDATION, TEST = "validation", "test"


def measured_tables(root: Path, finished: list[Cell]) -> Tables:
    """Measure all predictions of finished cells of a benchmark's folder.

    Raises `XAttnResError` if a file of a cell is missing or damaged.
    """
    planned = planned_tables(root, dict.fromkeys(finished, FINISHED))
    if not finished:
        return planned
    references = _references_by_dataset(root)
    predictions = [prediction for cell in finished for prediction in _predictions(root, cell, references[cell.dataset])]
    return replace(
        planned,
        cases=measured_cases(predictions),
        **_curves(root, finished, references),
        versions=measuring_versions(),
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


def _references_by_dataset(root: Path) -> dict[str, "_ReferencesOfBenchmark"]:
    return {dataset.name: _ReferencesOfBenchmark(root, dataset) for dataset in read_spec(root / SPEC).datasets}


class _ReferencesOfBenchmark(References):
    """The reference segmentations of a dataset in a benchmark's folder."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        self.raw = root / "nnUNet_raw" / dataset.name
        self.splits_file = root / "nnUNet_preprocessed" / dataset.name / SPLITS
        super().__init__(dataset.name, dataset.family, dataset.nsd_tolerance_mm, read_dataset_json(self.raw))

    @cached_property
    def splits(self) -> list[dict[str, list[str]]]:
        return read_splits(self.splits_file, "mend or remove it, and run again")

    def files(self, cell: Cell) -> list[tuple[str, Path]]:
        """The references of the cases that a cell must have predicted, each with its set."""
        cases = self.splits[cell.fold]["val"]
        found = [(VALIDATION, self.raw / "labelsTr" / f"{case}{self.file_ending}") for case in sorted(cases)]
        if cell.test:
            found += [(TEST, path) for path in sorted((self.raw / "labelsTs").glob(f"*{self.file_ending}"))]
        return found


def _predictions(root: Path, cell: Cell, references: _ReferencesOfBenchmark) -> list[Prediction]:
    found = []
    for kind, reference in references.files(cell):
        path = cell.folder(root) / kind / reference.name
        # As long as the record says that the cell is finished, it is not begun again.
        remedy = f"delete {path.parent} and {cell.folder(root) / RECORD}, run again"
        if not path.is_file():
            raise XAttnResError(f"{cell.title} is finished, but {path} is missing: {remedy}")
        found.append(Prediction(cell_key(cell), references, kind, reference, path, remedy))
    return found


def _cell_row(root: Path, cell: Cell, state: str) -> dict[str, Any]:
    plans = read_planned(root / "nnUNet_preprocessed" / cell.dataset / f"{cell.plans}.json")
    recorded = {"device": "", "versions": ""} | cell.record(root)
    more = {"state": state, "plans": cell.plans, "parameters": cell.parameters}
    return recorded | cell_key(cell) | planned_columns(plans, cell.planned_configuration) | more


def _arm_row(arm: Arm) -> dict[str, Any]:
    return {
        "trainer": arm.name,
        "trainer_class": arm.trainer,
        "planner": arm.planner + (f" with {arm.preset}" if arm.preset else ""),
        "parameters_of": arm.parameters_of or "",
        "width": arm.width,
    }


def _curves(
    root: Path, cells: list[Cell], references: dict[str, _ReferencesOfBenchmark]
) -> dict[str, pandas.DataFrame]:
    """The tables "curves" and "label_curves"."""
    of_means: list[dict[str, Any]] = []
    of_labels: list[dict[str, Any]] = []
    for cell in cells:
        checkpoint = read_checkpoint(cell.folder(root) / FINAL_CHECKPOINT, f"delete {cell.folder(root)}, run again")
        logged = checkpoint["logging"]
        of_means += curve_rows(cell_key(cell), logged)
        of_labels += label_curve_rows(cell_key(cell), logged, references[cell.dataset].labels)
    return {"curves": make_table("curves", of_means), "label_curves": make_table("label_curves", of_labels)}
