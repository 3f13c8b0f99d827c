"""The command `nnunet-xattnres benchmark status`: the state of every cell, and the progress of running ones."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nnunet_xattnres.benchmark.cells import (
    FAILED,
    INTERRUPTED,
    MATRIX,
    PREPARATION_LOCK,
    RUNNING,
    STATES,
    Cell,
    read_cells,
)
from nnunet_xattnres.benchmark.locks import is_locked
from nnunet_xattnres.common.text import align_columns

# Lines of nnU-Net's training log, each of which begins with a time stamp.
EPOCH = re.compile(r": Epoch (\d+) ?$", re.MULTILINE)
EPOCH_TIME = re.compile(r": Epoch time: ([\d.]+) s", re.MULTILINE)
PSEUDO_DICE = re.compile(r": Pseudo dice (\[.*\])")
NUMBER = re.compile(r"(?<=[\[( ])\d(?:\.\d+)?(?:e-\d+)?(?=[\]),])")


@dataclass(frozen=True)
class Progress:
    """The progress of a training, as nnU-Net's training log says.

    epochs: the number of finished epochs.
    pseudo_dice: the mean over labels after the last finished epoch; None before the first has finished.
    seconds_left: until training ends, from the median time of an epoch; None before the first has finished.
    """

    epochs: int
    num_epochs: int
    pseudo_dice: float | None
    seconds_left: float | None

    @property
    def line(self) -> str:
        if self.epochs >= self.num_epochs:
            return f"epoch {self.epochs}/{self.num_epochs}, pseudo-Dice {_dice(self.pseudo_dice)}, predicting"
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} of training left"
        # The number of the epoch in progress, counted from 1.
        return f"epoch {self.epochs + 1}/{self.num_epochs}, pseudo-Dice {_dice(self.pseudo_dice)}{left}"


def progress(root: Path, cell: Cell) -> Progress:
    """Read from nnU-Net's training logs, one per attempt at the training."""
    logs = sorted(cell.folder(root).glob("training_log_*.txt"), key=lambda log: log.stat().st_mtime)
    epochs, pseudo_dice = 0, None
    seconds: list[float] = []
    for log in logs:
        text = log.read_text(errors="replace")
        begun = EPOCH.findall(text)
        ended = EPOCH_TIME.findall(text)
        seconds += map(float, ended)
        if ended:
            epochs = int(begun[len(ended) - 1]) + 1
        elif begun:
            epochs = int(begun[0])
        values = [float(number) for number in NUMBER.findall((PSEUDO_DICE.findall(text) or [""])[-1])]
        pseudo_dice = statistics.mean(values) if values else pseudo_dice
    left = statistics.median(seconds) * (cell.num_epochs - epochs) if seconds else None
    return Progress(epochs, cell.num_epochs, pseudo_dice, left)


def run_status(root: Path) -> None:
    """Print the matrix. Raises `XAttnResError` if `root` is not the folder of a benchmark."""
    if is_locked(root / PREPARATION_LOCK) and not (root / MATRIX).exists():
        print("The data is being prepared: which cells there are is known after that")
        return
    cells = read_cells(root)
    print(matrix_table(root, cells))
    for line in running_lines(root, cells):
        print(line)
    for line in failure_lines(root, cells):
        print(line)


def matrix_table(root: Path, cells: list[Cell]) -> str:
    """A row per dataset, configuration and trainer, a column per seed and fold."""
    columns = sorted({(cell.seed, cell.fold) for cell in cells})
    rows: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    states = {cell: cell.state(root) for cell in cells}
    for cell, state in states.items():
        row = rows.setdefault((cell.dataset, cell.configuration, cell.trainer), {})
        begun = state in (RUNNING, INTERRUPTED)
        row[cell.seed, cell.fold] = f"{state} {progress(root, cell).epochs}/{cell.num_epochs}" if begun else state
    table = [["", *(f"seed {seed} fold {fold}" for seed, fold in columns)]]
    table += [[" ".join(row), *(entries.get(column, "-") for column in columns)] for row, entries in rows.items()]
    counts = ", ".join(f"{sum(s == state for s in states.values())} {state}" for state in STATES)
    return f"{align_columns(table)}\n{len(cells)} cells: {counts}"


def running_lines(root: Path, cells: Iterable[Cell]) -> list[str]:
    return [f"{cell.title}: {progress(root, cell).line}" for cell in cells if cell.state(root) == RUNNING]


def failure_lines(root: Path, cells: Iterable[Cell]) -> list[str]:
    records = ((cell, cell.record(root)) for cell in cells)
    return [f"{cell.title} failed: {record['reason']}" for cell, record in records if record.get("state") == FAILED]


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
