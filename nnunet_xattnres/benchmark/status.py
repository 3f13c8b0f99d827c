"""The command `nnunet-xattnres benchmark status`: the state of every cell, and the progress of running ones."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
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
from nnunet_xattnres.common.text import align_columns, counted

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


class TrainingLogs:
    """nnU-Net's training logs of a cell, one per attempt at the training. A look reads only what is new."""

    def __init__(self, root: Path, cell: Cell) -> None:
        self.folder = cell.folder(root)
        self.num_epochs = cell.num_epochs
        self._logs: dict[Path, _TrainingLog] = {}

    def progress(self) -> Progress:
        epochs, pseudo_dice = 0, None
        seconds: list[float] = []
        for path in sorted(self.folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime):
            log = self._logs.setdefault(path, _TrainingLog(path))
            log.read_on()
            seconds += log.seconds
            epochs = epochs if log.epochs is None else log.epochs
            pseudo_dice = pseudo_dice if log.pseudo_dice is None else log.pseudo_dice
        left = statistics.median(seconds) * (self.num_epochs - epochs) if seconds else None
        return Progress(epochs, self.num_epochs, pseudo_dice, left)


@dataclass
class _TrainingLog:
    """A log that grows, and what it has said so far.

    begun: the numbers of epochs. seconds: of those that have ended.
    """

    path: Path
    position: int = 0
    begun: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pseudo_dice: float | None = None

    @property
    def epochs(self) -> int | None:
        """The number of finished epochs of the training, earlier attempts included. None if none has begun here."""
        if self.seconds:
            return self.begun[len(self.seconds) - 1] + 1
        return self.begun[0] if self.begun else None

    def read_on(self) -> None:
        """Read the complete lines that were appended since the last time."""
        with self.path.open("rb") as file:
            file.seek(self.position)
            appended = file.read()
        complete = appended[: appended.rfind(b"\n") + 1]
        self.position += len(complete)
        text = complete.decode(errors="replace")
        self.begun += map(int, EPOCH.findall(text))
        self.seconds += map(float, EPOCH_TIME.findall(text))
        for printed in PSEUDO_DICE.findall(text):
            values = [float(number) for number in NUMBER.findall(printed)]
            self.pseudo_dice = statistics.mean(values) if values else self.pseudo_dice


def progress(root: Path, cell: Cell) -> Progress:
    """Read all training logs of a cell once."""
    return TrainingLogs(root, cell).progress()


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
    return f"{align_columns(table)}\n{counted(len(cells), 'cell')}: {counts}"


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
