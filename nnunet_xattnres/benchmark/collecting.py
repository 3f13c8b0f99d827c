"""The tables of a benchmark's folder: of the trainings made there, and of those that an earlier report tells of.

A report is all that is needed of trainings that were finished elsewhere. Its tables are kept in the folder, and the
cells are finished there without files of a training.
"""

from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pandas

from nnunet_xattnres.benchmark.matrix import (
    EARLIER,
    FINISHED,
    LOCK,
    SECONDS_FOR_A_LOOK,
    Busy,
    Cell,
    locked,
    read_cells,
)
from nnunet_xattnres.benchmark.metrics import cases_to_predict, measured_tables, planned_tables
from nnunet_xattnres.benchmark.tables import CELL, COLUMNS, Tables, as_written, read_tables, write_tables
from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.files import folder_written_atomically

BY_CELL = ("cells", "cases", "curves")
# What two trainings must share to count as the same, beside their cases.
SETTINGS = ["plans", "patch_size", "batch_size", "features", "iterations", "epochs", "parameters"]


def collect(root: Path) -> Tables:
    """Measure all predictions of the finished cells of a benchmark's folder, and add those of earlier reports.

    Raises `XAttnResError` if it is no such folder, if no cell is finished, or if a finished one's files are not whole.
    """
    cells = read_cells(root)
    # A matrix may be running: whatever finishes from here on is of the next report.
    states = {cell: cell.state(root) for cell in cells}
    if FINISHED not in states.values():
        raise XAttnResError(f"{root}: none of {len(cells)} cells is finished, see `nnunet-xattnres benchmark status`")
    by_source: dict[Path | None, list[Cell]] = {}
    for cell in cells:
        if states[cell] == FINISHED:
            by_source.setdefault(cell.earlier_tables(root), []).append(cell)
    here = measured_tables(root, by_source.pop(None, []))
    earlier = [_only(read_tables(folder), of_folder) for folder, of_folder in by_source.items() if folder]
    unfinished = planned_tables(root, {cell: state for cell, state in states.items() if state != FINISHED})
    return _joined(cells, [here, *earlier, unfinished])


def take_over(theirs: Tables, root: Path) -> None:
    """Let the cells that a report has finished be finished in the benchmark's folder `root`, which is prepared.

    Those are taken that have the same settings, cases and metrics here, and that nobody has finished or trains here.
    Raises `XAttnResError` if the report has none with the same settings.
    """
    finished = theirs.cells[theirs.cells.state == FINISHED]
    same = _same_cells(theirs, root)
    if not same:
        raise XAttnResError(
            "--continue-from: none of the report's finished trainings has settings, cases and metrics of this spec's: "
            "give a report on the same spec"
        )
    tables = _only(theirs, same)
    # The same tables have the same place: taking them over again, or twice at a time, changes nothing.
    name = sha256("".join(getattr(tables, name).to_csv() for name in COLUMNS).encode()).hexdigest()[:12]
    with locked(root / f"{EARLIER}.lock", patience=float("inf")):
        if not (root / EARLIER / name).is_dir():
            with folder_written_atomically(root / EARLIER / name) as folder:
                write_tables(tables, folder)
    taken = 0
    for cell in same:
        with suppress(Busy), locked(cell.folder(root) / LOCK, SECONDS_FOR_A_LOOK):
            if cell.record(root).get("state") != FINISHED:
                cell.write_record(root, FINISHED, earlier=name)
                taken += 1
    print(
        f"The report has {len(finished)} finished trainings: {taken} taken over, {len(same) - taken} finished or "
        f"running here, {len(finished) - len(same)} with other settings, cases or metrics",
        flush=True,
    )


def _joined(cells: list[Cell], parts: list[Tables]) -> Tables:
    """All rows, in the order of the matrix. The first part has the datasets and trainers of all."""
    order = pandas.DataFrame([_key(cell) for cell in cells], columns=CELL)
    together = {name: pandas.concat([getattr(part, name) for part in parts]) for name in BY_CELL}
    by_cell = {name: order.merge(table, on=CELL)[list(COLUMNS[name])] for name, table in together.items()}
    versions = pandas.concat([part.versions for part in parts]).drop_duplicates()
    return replace(parts[0], versions=versions, **by_cell)


def _same_cells(theirs: Tables, root: Path) -> list[Cell]:
    """The cells of a folder that other tables have finished with the same settings, cases and metrics."""
    expected = cases_to_predict(root)
    ours = planned_tables(root, dict.fromkeys(expected, FINISHED))
    ours.cells["epochs"] = pandas.array([cell.num_epochs for cell in expected], dtype=COLUMNS["cells"]["epochs"])
    finished = theirs.cells[theirs.cells.state == FINISHED].merge(ours.cells[[*CELL, *SETTINGS]])
    for name, key in (("datasets", "dataset"), ("trainers", "trainer")):
        finished = finished.merge(as_written(getattr(ours, name)).merge(getattr(theirs, name))[[key]])
    keys = set(finished[CELL].itertuples(index=False, name=None))
    cases = {key: set(zip(rows.set, rows.case, strict=True)) for key, rows in theirs.cases.groupby(CELL)}
    return [cell for cell, of_cell in expected.items() if _key(cell) in keys and cases[_key(cell)] == of_cell]


def _only(tables: Tables, cells: list[Cell]) -> Tables:
    wanted = pandas.DataFrame([_key(cell) for cell in cells], columns=CELL)
    return replace(tables, **{name: wanted.merge(getattr(tables, name), on=CELL) for name in BY_CELL})


def _key(cell: Cell) -> tuple[str | int, ...]:
    return tuple(getattr(cell, name) for name in CELL)
