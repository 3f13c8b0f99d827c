"""Running the cells of a matrix to the end."""

import time
from contextlib import suppress
from pathlib import Path

from nnunet_xattnres.benchmark.machines import JOBS, Machine
from nnunet_xattnres.benchmark.matrix import (
    FAILED,
    FINISHED,
    LOCK,
    RUNNING,
    SECONDS_FOR_A_LOOK,
    WAITING,
    Busy,
    Cell,
    is_locked,
    locked,
)
from nnunet_xattnres.benchmark.status import failure_lines, progress
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import termination_as_exception

POLL_SECONDS = 1.0
# A process may be killed by hand, or by the system; one that always ends early has a cause.
ATTEMPTS = 3


def run_cells(root: Path, cells: list[Cell], machine: Machine) -> None:
    """Run all cells that are not finished, and wait for those that other processes run.

    Raises `XAttnResError` at the end if cells have failed.
    """
    with termination_as_exception():
        try:
            _Run(root, cells, machine).to_the_end()
        finally:
            machine.stop()
    failed = failure_lines(root, cells)
    if failed:
        raise XAttnResError(
            f"{len(failed)} of {len(cells)} cells failed: mend the cause and run again; the first: {failed[0]}"
        )


class _Run:
    """One run of the matrix, beside which others may work on the same folder."""

    def __init__(self, root: Path, cells: list[Cell], machine: Machine) -> None:
        self.root = root
        self.cells = cells
        self.machine = machine
        # A failure of this run is a record that has changed: the clocks of nodes need not agree.
        self.before = {cell: cell.record(root) for cell in cells}
        self.attempts = dict.fromkeys(cells, 0)
        self.announced = dict.fromkeys(cells, "")

    def to_the_end(self) -> None:
        open_cells = self.cells
        while open_cells:
            settled = {cell for cell in open_cells if self._is_settled(cell)}
            for cell in open_cells:
                if cell not in settled and self._is_idle(cell) and self.machine.has_room():
                    self._start(cell)
            self._show(open_cells, settled)
            # Not looked at again: a matrix is large, and may lie on a file system that many use.
            open_cells = [cell for cell in open_cells if cell not in settled]
            if open_cells:
                time.sleep(POLL_SECONDS)

    def _is_settled(self, cell: Cell) -> bool:
        """Finished, or failed in this run or in another one that goes on beside it."""
        if self.machine.has(cell):
            return False
        record = cell.record(self.root)
        failed = record.get("state") == FAILED and record != self.before[cell]
        return record.get("state") == FINISHED or failed

    def _is_idle(self, cell: Cell) -> bool:
        # Its record last: no process changes it any more.
        return (
            not self.machine.has(cell) and not is_locked(cell.folder(self.root) / LOCK) and not self._is_settled(cell)
        )

    def _start(self, cell: Cell) -> None:
        if self.attempts[cell] < ATTEMPTS:
            self.attempts[cell] += self.machine.submit(cell)
            return
        reason = f"its process has ended {ATTEMPTS} times without saying why, see {self.root / JOBS}"
        # Another run may have begun or settled it since the last look.
        with suppress(Busy), locked(cell.folder(self.root) / LOCK, SECONDS_FOR_A_LOOK):
            if not self._is_settled(cell):
                cell.write_record(self.root, FAILED, reason=reason)

    def _show(self, cells: list[Cell], settled: set[Cell]) -> None:
        """Print what is new: of a running cell its line, of others their state."""
        for cell in cells:
            # The process that has settled a cell holds its lock an instant longer.
            state = cell.record(self.root)["state"] if cell in settled else cell.state(self.root)
            line = progress(self.root, cell).line if state == RUNNING else state
            if state != WAITING and line != self.announced[cell]:
                self.announced[cell] = line
                print(f"{cell.title}: {line}", flush=True)
