"""The tables that a report starts from, as CSV files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas

from nnunet_xattnres.benchmark.cells import FINISHED, title_of
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.files import written_atomically

# What names a training.
CELL_TYPES = {"dataset": "str", "configuration": "str", "trainer": "str", "fold": "int64", "seed": "int64"}
CELL = list(CELL_TYPES)
SET = ["dataset", "configuration", "set"]
# The type of every column. Numbers that may be missing have the types "float64" and "Int64".
COLUMNS = {
    "cases": {
        "dataset": "str",
        "family": "str",
        "configuration": "str",
        "trainer": "str",
        "fold": "int64",
        "seed": "int64",
        "set": "str",
        "case": "str",
        "label": "str",
        "dice": "float64",
        "nsd": "float64",
        "hd95": "float64",
        "reference_voxels": "int64",
        "predicted_voxels": "int64",
    },
    "cells": {
        **CELL_TYPES,
        "state": "str",
        "plans": "str",
        "patch_size": "str",
        "batch_size": "Int64",
        "features": "str",
        "iterations": "Int64",
        "epochs": "Int64",
        "seconds_per_epoch": "float64",
        "parameters": "Int64",
        "peak_memory_gb": "float64",
        "device": "str",
        "versions": "str",
    },
    "curves": {
        **CELL_TYPES,
        "epoch": "int64",
        "train_loss": "float64",
        "val_loss": "float64",
        "pseudo_dice": "float64",
    },
    "label_curves": {
        **CELL_TYPES,
        "epoch": "int64",
        "label": "str",
        "pseudo_dice": "float64",
    },
    "datasets": {"dataset": "str", "family": "str", "nsd_tolerance_mm": "float64", "labels": "str"},
    "trainers": {
        "trainer": "str",
        "trainer_class": "str",
        "planner": "str",
        "parameters_of": "str",
        "width": "float64",
    },
    "versions": {"package": "str", "version": "str"},
}
# Reports of earlier versions lack these. A table without rows has no file.
OPTIONAL = ("label_curves",)
# Two trainings with equal settings, dataset, trainer and cases count as the same.
SETTINGS = ["plans", "patch_size", "batch_size", "features", "iterations", "epochs", "parameters"]
FLOAT_FORMAT = "%.6g"
REMEDY = "make it with `nnunet-xattnres benchmark report` from the benchmark's folder"


@dataclass(frozen=True)
class Tables:
    """What was measured, in the columns of `COLUMNS`.

    cases: a row per prediction and label. An undefined metric is NaN. set: "validation" or "test".
    cells: a row per training of the matrix, in whatever state. patch_size: "56x40". features: the channels of every
        stage, "16 32 64". iterations: per epoch, missing for the trainer's default. versions: "package version; ...".
    curves: a row per epoch. label_curves: a row per epoch and label; an undefined pseudo-Dice is NaN.
    datasets: labels is "value:name;...", with the values of a region joined by "+".
    trainers: in the order of the spec. All others are compared with the first one.
    versions: of the packages that have measured.
    """

    cases: pandas.DataFrame
    cells: pandas.DataFrame
    curves: pandas.DataFrame
    datasets: pandas.DataFrame
    trainers: pandas.DataFrame
    versions: pandas.DataFrame
    label_curves: pandas.DataFrame = field(default_factory=lambda: make_table("label_curves", ()))

    @property
    def finished(self) -> dict[tuple[str | int, ...], dict[str, Any]]:
        """Finished trainings by their values of `CELL`, each with what must be equal to count as the same training."""
        table = self.cells[self.cells.state == FINISHED][[*CELL, *SETTINGS]]
        for name, key in (("datasets", "dataset"), ("trainers", "trainer")):
            table = table.merge(as_written(getattr(self, name)), on=key, how="left")
        # JSON makes None of missing numbers. NaN would not be equal to itself.
        rows = json.loads(table.to_json(orient="records"))
        return {tuple(row.pop(name) for name in CELL): row for row in rows}


def has_tables(folder: Path) -> bool:
    return (folder / "cases.csv").is_file()


def begins_a_report(folder: Path) -> bool:
    """Whether the table that is written first is there, so that the folder is that of a report, maybe interrupted."""
    try:
        with (folder / "cases.csv").open() as file:
            return file.readline().rstrip("\n").split(",") == list(COLUMNS["cases"])
    except (OSError, ValueError):
        return False


def make_table(name: str, rows: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    """The table `name` of `COLUMNS`; keys of rows that are no columns are left out."""
    return pandas.DataFrame(list(rows), columns=list(COLUMNS[name])).astype(COLUMNS[name])


def write_tables(tables: Tables, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (entry.name for entry in fields(Tables)):
        table, path = getattr(tables, name), folder / f"{name}.csv"
        if name in OPTIONAL and table.empty:
            path.unlink(missing_ok=True)
        else:
            write_csv(table, path)


def write_csv(table: pandas.DataFrame, path: Path) -> None:
    """Write numbers with six significant digits, and nothing for an undefined one."""
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index=False, float_format=FLOAT_FORMAT, lineterminator="\n")


def as_written(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table with its numbers rounded as in a file, and so as in every table that is read from a file."""
    floats = table.select_dtypes("float64")
    return table.assign(**{name: floats[name].map(lambda value: float(FLOAT_FORMAT % value)) for name in floats})


def read_tables(folder: Path) -> Tables:
    """Read the tables of a report. Raises `XAttnResError` if files are missing, damaged or of different reports."""
    paths = {name: folder / f"{name}.csv" for name in COLUMNS}
    there = [name for name, path in paths.items() if name not in OPTIONAL or path.exists()]
    tables = Tables(**{name: _read(paths[name], COLUMNS[name]) for name in there})
    _check_consistency(tables, folder)
    return tables


def _read(path: Path, columns: dict[str, str]) -> pandas.DataFrame:
    try:
        may_be_missing = {name: [""] for name, kind in columns.items() if kind in ("float64", "Int64")}
        # pandas must take no name for a number or a missing value: a case may be called 001 or NA.
        header = pandas.read_csv(path, nrows=0).columns
        missing = [name for name in columns if name not in header]
        if missing:
            raise XAttnResError(f"{path} has no column {', '.join(missing)}: {REMEDY}")
        table = pandas.read_csv(path, dtype=columns, keep_default_na=False, na_values=may_be_missing)
    except XAttnResError:
        raise
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): {REMEDY}") from None
    except ValueError as error:
        raise XAttnResError(f"{path} is damaged ({one_line(str(error))}): {REMEDY}") from None
    return table[list(columns)]


def _check_consistency(tables: Tables, folder: Path) -> None:
    finished = tables.cells[tables.cells.state == FINISHED]
    if finished.empty:
        raise XAttnResError(f"{folder}: no cell is finished, there is nothing to report yet")
    with_cases = set(tables.cases[CELL].itertuples(index=False, name=None))
    of_cells = set(finished[CELL].itertuples(index=False, name=None))
    for cell in sorted(with_cases ^ of_cells):
        has, lacks = ("cases.csv", "cells.csv") if cell in with_cases else ("cells.csv", "cases.csv")
        raise XAttnResError(
            f"{folder}: {has} has {title_of(cell)}, finished, and {lacks} has not: take files of one report"
        )
    unknown = tables.cells[~tables.cells.trainer.isin(tables.trainers.trainer)]
    if not unknown.empty:
        name = unknown.iloc[0].trainer
        raise XAttnResError(f"{folder}: trainers.csv lacks {name}, which cells.csv has: take files of one report")
    families = tables.datasets.set_index("dataset").family.to_dict()
    for dataset, family in sorted(set(zip(tables.cases.dataset, tables.cases.family, strict=True))):
        if families.get(dataset) != family:
            raise XAttnResError(
                f"{folder}: datasets.csv does not have {dataset} of family {family}, as cases.csv has: "
                "take files of one report"
            )
    keys = [*CELL, "set", "case", "label"]
    twice = tables.cases[tables.cases.duplicated(keys)]
    if not twice.empty:
        name = ", ".join(map(str, twice.iloc[0][keys]))
        raise XAttnResError(f"{folder / 'cases.csv'} has {name} twice: {REMEDY}")
