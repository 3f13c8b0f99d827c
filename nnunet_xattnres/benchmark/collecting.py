"""The tables of a benchmark's folder: of its own trainings, and of trainings taken over from earlier reports.

Trainings that were finished elsewhere need nothing but the report on them. Its tables are copied into the folder, and
the cells count as finished there without any file of a training.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import pandas

from nnunet_xattnres.benchmark.cell_tables import cases_to_predict, cell_key, measured_tables, planned_tables
from nnunet_xattnres.benchmark.cells import EARLIER, FINISHED, Cell, read_cells
from nnunet_xattnres.benchmark.cost_recording import OF_REPORT
from nnunet_xattnres.benchmark.locks import SECONDS_FOR_A_LOOK, Busy, locked
from nnunet_xattnres.benchmark.spec import Spec
from nnunet_xattnres.benchmark.tables import CELL, COLUMNS, REMEDY, Tables, read_tables, write_tables
from nnunet_xattnres.common.errors import XAttnResError, differences
from nnunet_xattnres.common.files import folder_written_atomically
from nnunet_xattnres.common.text import counted

BY_CELL = ("cells", "cases", "curves", "label_curves")
GIVE_ANOTHER = "give a report on the same spec"


def collect(root: Path, check: Callable[[Tables], None]) -> Tables:
    """Measure all predictions of the finished cells of a benchmark's folder, and add those of earlier reports.

    check: is called with the finished cells before anything is measured, and may refuse them.

    Raises `XAttnResError` if `root` is no such folder, if no cell is finished, or if a file of a finished cell is
    missing or damaged.
    """
    cells = read_cells(root)
    # The matrix may be running. A cell that finishes from here on belongs to the next report.
    states = {cell: cell.state(root) for cell in cells}
    if FINISHED not in states.values():
        raise XAttnResError(f"{root}: none of {len(cells)} cells is finished, see `nnunet-xattnres benchmark status`")
    check(_planned(root, [cell for cell in cells if states[cell] == FINISHED]))
    by_report: dict[Path | None, list[Cell]] = {}
    for cell in cells:
        if states[cell] == FINISHED:
            by_report.setdefault(cell.earlier_tables(root), []).append(cell)
    here = measured_tables(root, by_report.pop(None, []))
    earlier = [_only(_read_earlier(folder), of_folder) for folder, of_folder in by_report.items() if folder]
    unfinished = planned_tables(root, {cell: state for cell, state in states.items() if state != FINISHED})
    return _joined(cells, [here, *earlier, unfinished])


def _read_earlier(folder: Path) -> Tables:
    try:
        return read_tables(folder)
    except XAttnResError as error:
        problem = str(error).removesuffix(f": {REMEDY}")
        raise XAttnResError(f"{problem}: delete {folder}, and run again with --continue-from its report") from None


def check_names(theirs: Tables, spec: Spec) -> None:
    """Raises `XAttnResError` if a report has no training of a spec. Trainings are compared by name only."""
    names = (
        (dataset.name, configuration.name, arm.name, fold, seed)
        for dataset in spec.datasets
        for configuration in spec.configurations_of(dataset)
        for arm in spec.arms_of(dataset)
        for fold in spec.folds_of(dataset)
        for seed in spec.seeds_of(dataset)
    )
    if theirs.finished.keys().isdisjoint(names):
        raise XAttnResError(f"--continue-from: the report has no training of this spec's: {GIVE_ANOTHER}")


def take_over(theirs: Tables, root: Path) -> None:
    """Let the cells that a report has finished count as finished in the prepared benchmark's folder `root`.

    A cell is taken over if its settings, cases and metrics are the same here, and if it is neither finished nor being
    trained here. Raises `XAttnResError` if the report has no training with the same settings.
    """
    num_finished = len(theirs.finished)
    differing = _differing(theirs, root)
    same = [cell for cell, what in differing.items() if not what]
    example = next((f", such as {cell.title}: {what}" for cell, what in differing.items() if what), "")
    if not same:
        raise XAttnResError(
            f"--continue-from: none of the report's finished trainings is one of this matrix's{example}: {GIVE_ANOTHER}"
        )
    tables = _only(theirs, same)
    # The same tables have the same folder, so that taking them over again, or twice at a time, changes nothing.
    digest = sha256("".join(getattr(tables, name).to_csv() for name in COLUMNS).encode()).hexdigest()[:12]
    origin = partial(_with_report, digest=digest)
    tables = replace(tables, cells=tables.cells.assign(device=tables.cells.device.map(origin)))
    with locked(root / f"{EARLIER}.lock", patience=float("inf")):
        if not (root / EARLIER / digest).is_dir():
            with folder_written_atomically(root / EARLIER / digest) as folder:
                write_tables(tables, folder)
    taken = 0
    for cell in same:
        with suppress(Busy), locked(cell.lock(root), SECONDS_FOR_A_LOOK):
            if cell.record(root).get("state") != FINISHED:
                cell.write_record(root, FINISHED, earlier=digest)
                taken += 1
    print(
        f"The report has {counted(num_finished, 'finished training')}: {taken} taken over, "
        f"{len(same) - taken} finished or running here, {num_finished - len(same)} not of this matrix{example}",
        flush=True,
    )


def _with_report(device: str, digest: str) -> str:
    """The name of a known device with the report that a training comes from, unless it has one already.

    Another machine of the same name may be of another speed. Trainings of one report may be compared among themselves.
    """
    return device if device == "" or OF_REPORT in device else f"{device}{OF_REPORT}{digest[:6]}"


def _joined(cells: list[Cell], parts: list[Tables]) -> Tables:
    """The rows of all parts in the order of the matrix. Datasets and trainers are the same in all parts."""
    order = _keys(cells)
    together = {name: pandas.concat([getattr(part, name) for part in parts]) for name in BY_CELL}
    by_cell = {name: order.merge(table, on=CELL)[list(COLUMNS[name])] for name, table in together.items()}
    versions = pandas.concat([part.versions for part in parts]).drop_duplicates()
    return replace(parts[0], versions=versions, **by_cell)


def _differing(theirs: Tables, root: Path) -> dict[Cell, str]:
    """For every cell of a folder that other tables have finished: what differs, or "" if it is the same training."""
    expected = cases_to_predict(root)
    there, here = theirs.finished, _planned(root, list(expected)).finished
    cases = {key: set(zip(rows.set, rows.case, strict=True)) for key, rows in theirs.cases.groupby(CELL)}
    found = {}
    for cell, of_cell in expected.items():
        key = tuple(cell_key(cell).values())
        if key in there:
            found[cell] = differences(there[key], here[key]) or ("" if cases[key] == of_cell else "other cases")
    return found


def _planned(root: Path, cells: list[Cell]) -> Tables:
    """The tables of these cells as they will be when the cells are finished, but for what is measured."""
    tables = planned_tables(root, dict.fromkeys(cells, FINISHED))
    tables.cells["epochs"] = pandas.array([cell.num_epochs for cell in cells], dtype=COLUMNS["cells"]["epochs"])
    return tables


def _only(tables: Tables, cells: list[Cell]) -> Tables:
    wanted = _keys(cells)
    return replace(tables, **{name: wanted.merge(getattr(tables, name), on=CELL) for name in BY_CELL})


def _keys(cells: list[Cell]) -> pandas.DataFrame:
    return pandas.DataFrame([cell_key(cell) for cell in cells], columns=CELL)
