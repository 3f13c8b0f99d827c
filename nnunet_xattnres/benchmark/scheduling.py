"""Which cells are started when, until all are finished or have failed."""

import time
from contextlib import suppress
from pathlib import Path

from nnunet_xattnres.benchmark.cells import FAILED, FINISHED, RUNNING, WAITING, Cell
from nnunet_xattnres.benchmark.locks import SECONDS_FOR_A_LOOK, Busy, is_locked, locked
from nnunet_xattnres.benchmark.machines import JOBS, Machine
from nnunet_xattnres.benchmark.status import TrainingLogs, failure_lines
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import termination_as_exception

# A process may be killed by hand or by the system. If it ends early every time, something is wrong with the cell.
ATTEMPTS = 3


def run_cells(root: Path, cells: list[Cell], machine: Machine) -> None:
    """Run all cells that are not finished, and wait for those that other processes run.

    Raises `XAttnResError` at the end if cells have failed.
    """
    with termination_as_exception():
        try:
            Schedule(root, cells, machine).run()
        finally:
            machine.stop()
    failed = failure_lines(root, cells)
    if failed:
        raise XAttnResError(
            f"{len(failed)} of {len(cells)} cells failed: mend the cause and run again; the first: {failed[0]}"
        )


class Schedule:
    """The cells of one run. Other runs may work on the same folder at the same time."""

    def __init__(self, root: Path, cells: list[Cell], machine: Machine) -> None:
        self.root = root
        self.cells = cells
        self.machine = machine
        # A record that has changed since then is of this time. Times of records tell nothing: clocks of nodes differ.
        self.records_before = {cell: cell.record(root) for cell in cells}
        self.attempts = dict.fromkeys(cells, 0)
        self.announced = dict.fromkeys(cells, "")
        self.logs = {cell: TrainingLogs(root, cell) for cell in cells}

    def run(self) -> None:
        """Start cells as the machine has room, until every cell is settled."""
        open_cells = self.cells
        while open_cells:
            settled = {cell for cell in open_cells if self._is_settled(cell)}
            for cell in open_cells:
                if cell not in settled and self._is_idle(cell) and self.machine.has_room():
                    self.start(cell)
            self._announce(open_cells, settled)
            # Settled cells are not looked at again: the matrix may be large and its file system slow.
            open_cells = [cell for cell in open_cells if cell not in settled]
            if open_cells:
                time.sleep(self.machine.poll_seconds)

    def start(self, cell: Cell) -> None:
        """Submit an idle cell, or record that it has failed if its process has always ended early."""
        if self.attempts[cell] < ATTEMPTS:
            self.attempts[cell] += self.machine.submit(cell)
            return
        reason = f"its process has ended {ATTEMPTS} times without saying why, see {self.root / JOBS}"
        # Another run may have begun or settled the cell since the last look.
        with suppress(Busy), locked(cell.lock(self.root), SECONDS_FOR_A_LOOK):
            if not self._is_settled(cell):
                cell.write_record(self.root, FAILED, reason=reason)

    def _is_settled(self, cell: Cell) -> bool:
        """Whether the cell is finished, or has failed since this run began, here or in another run."""
        if self.machine.has(cell):
            return False
        record = cell.record(self.root)
        has_failed = record.get("state") == FAILED and record != self.records_before[cell]
        return record.get("state") == FINISHED or has_failed

    def _is_idle(self, cell: Cell) -> bool:
        """Whether the cell is neither settled nor in the hands of any process."""
        is_free = not self.machine.has(cell) and not is_locked(cell.lock(self.root))
        # The record is read last, when no process changes it any more.
        return is_free and not self._is_settled(cell)

    def _announce(self, cells: list[Cell], settled: set[Cell]) -> None:
        """Print what is new: the progress of a running cell, the state of any other."""
        for cell in cells:
            # The process that has settled a cell holds its lock an instant longer.
            state = cell.record(self.root)["state"] if cell in settled else cell.state(self.root)
            line = self.logs[cell].progress().line if state == RUNNING else state
            if state != WAITING and line != self.announced[cell]:
                self.announced[cell] = line
                print(f"{cell.title}: {line}", flush=True)
