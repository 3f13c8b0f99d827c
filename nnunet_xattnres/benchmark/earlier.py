"""Trainings that were finished elsewhere, of which nothing but a report is at hand.

Their tables are kept in the benchmark's folder, and their cells are finished there, without files of a training.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas

from nnunet_xattnres.benchmark.matrix import EARLIER, FINISHED, Cell, read_cells
from nnunet_xattnres.benchmark.metrics import cases_to_predict, planned_tables
from nnunet_xattnres.benchmark.tables import CELL, COLUMNS, Tables, read_tables, write_tables
from nnunet_xattnres.errors import XAttnResError

BY_CELL = ("cells", "cases", "curves")
# What two trainings must share to count as the same, beside their data.
SETTINGS = ["plans", "patch_size", "batch_size", "features", "iterations", "parameters"]


def take_over(theirs: Tables, root: Path) -> None:
    """Let the cells that a report has finished be finished in the benchmark's folder `root`, which is prepared.

    Those are taken that have the same settings, cases and metrics here, and are not finished here already. Raises
    `XAttnResError` if there is none.
    """
    same = _same_cells(theirs, root)
    if not same:
        raise XAttnResError(
            "--continue-from: none of the report's finished trainings has settings, cases and metrics of this spec's: "
            "give a report on the same spec"
        )
    new = [cell for cell in same if cell.state(root) != FINISHED]
    if new:
        number = len(list((root / EARLIER).glob("*")))
        incomplete = root / EARLIER / f"{number}.incomplete"
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
        write_tables(_only(theirs, new), incomplete)
        incomplete.rename(root / EARLIER / str(number))
    for cell in new:
        cell.write_record(root, FINISHED, earlier=str(number))
    finished = len(theirs.cells[theirs.cells.state == FINISHED])
    print(f"Taken over from the report: {len(new)} of its {finished} finished trainings", flush=True)


def with_earlier(tables: Tables, root: Path) -> Tables:
    """The tables of a benchmark's folder, with what reports tell of the cells that were finished elsewhere."""
    cells = read_cells(root)
    folders = dict.fromkeys(filter(None, (cell.earlier_tables(root) for cell in cells)))
    earlier = [
        _only(read_tables(folder), [cell for cell in cells if cell.earlier_tables(root) == folder])
        for folder in folders
    ]
    order = tables.cells[CELL]
    joined = {name: pandas.concat([getattr(part, name) for part in (*earlier, tables)]) for name in BY_CELL}
    # A cell that was finished elsewhere has a row here too, the last one, which says less.
    joined["cells"] = joined["cells"].drop_duplicates(CELL)
    versions = pandas.concat([tables.versions, *(part.versions for part in earlier)]).drop_duplicates()
    by_cell = {name: order.merge(table, on=CELL)[list(COLUMNS[name])] for name, table in joined.items()}
    return replace(tables, versions=versions, **by_cell)


def _same_cells(theirs: Tables, root: Path) -> list[Cell]:
    """The cells of a folder that other tables have finished with the same settings, cases and metrics."""
    ours = planned_tables(root)
    finished = theirs.cells[theirs.cells.state == FINISHED].merge(ours.cells[[*CELL, *SETTINGS]])
    finished = finished.merge(ours.datasets.merge(theirs.datasets)[["dataset"]])
    finished = finished.merge(ours.trainers.merge(theirs.trainers)[["trainer"]])
    epochs = dict(zip(finished[CELL].itertuples(index=False, name=None), finished.epochs, strict=True))
    cases = {key: set(zip(rows.set, rows.case, strict=True)) for key, rows in theirs.cases.groupby(CELL)}
    return [
        cell
        for cell, expected in cases_to_predict(root).items()
        if epochs.get(_key(cell)) == cell.num_epochs and cases[_key(cell)] == expected
    ]


def _only(tables: Tables, cells: list[Cell]) -> Tables:
    wanted = pandas.DataFrame([_key(cell) for cell in cells], columns=CELL)
    return replace(tables, **{name: wanted.merge(getattr(tables, name), on=CELL) for name in BY_CELL})


def _key(cell: Cell) -> tuple[str | int, ...]:
    return tuple(getattr(cell, name) for name in CELL)
