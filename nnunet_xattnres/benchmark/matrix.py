"""The cells of a matrix: where each has its folder, and in what state it is."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import write_json_atomically, write_text_atomically
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

SPEC = "spec.yaml"
MATRIX = "matrix.json"
RECORD = "cell.json"
LOCK = "cell.lock"
PREPARATION_LOCK = "preparation.lock"
EARLIER = "earlier"
FINISHED, FAILED, RUNNING, INTERRUPTED, WAITING = STATES = ("finished", "failed", "running", "interrupted", "waiting")
# A look at a lock holds it for an instant.
SECONDS_FOR_A_LOOK = 2.0


class Busy(Exception):
    """Another process has the lock."""


@dataclass(frozen=True)
class Cell:
    """One training, with the predictions of its validation cases and of the test set.

    configuration, trainer: as the spec calls them. trainer_class, plans, planned_configuration: as nnU-Net does.
    num_epochs: of the whole training. parameters: of the network. test: whether there is a test set to predict.
    """

    dataset: str
    configuration: str
    trainer: str
    trainer_class: str
    plans: str
    planned_configuration: str
    fold: int
    seed: int
    num_epochs: int
    parameters: int
    test: bool

    @property
    def title(self) -> str:
        return f"{self.dataset} {self.configuration} {self.trainer} fold {self.fold} seed {self.seed}"

    def results(self, root: Path) -> Path:
        """nnUNet_results: every seed has one of its own, for nnU-Net's names tell no seeds apart."""
        return root / f"seed_{self.seed}" / "nnUNet_results"

    def folder(self, root: Path) -> Path:
        """Where nnU-Net writes the training."""
        model = f"{self.trainer_class}__{self.plans}__{self.planned_configuration}"
        return self.results(root) / self.dataset / model / f"fold_{self.fold}"

    def log(self, root: Path) -> Path:
        """The folder of its logs, one per command and attempt."""
        return root / "logs" / self.folder(root).relative_to(root)

    def is_trained(self, root: Path) -> bool:
        return (self.folder(root) / FINAL_CHECKPOINT).is_file()

    def validation_summary(self, root: Path) -> Path:
        """What nnU-Net writes when all cases are predicted."""
        return self.folder(root) / "validation" / "summary.json"

    def is_validated(self, root: Path) -> bool:
        return self.validation_summary(root).is_file()

    def record(self, root: Path) -> dict[str, Any]:
        """cell.json; empty where the cell was never begun, running where the file is damaged."""
        try:
            record = json.loads((self.folder(root) / RECORD).read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"state": RUNNING}
        # Whoever deletes the tables of earlier reports wants it done here.
        is_lost = "earlier" in record and not (root / EARLIER / record["earlier"]).is_dir()
        return {} if is_lost else record

    def earlier_tables(self, root: Path) -> Path | None:
        """The folder of the tables from which it is known, if it was finished elsewhere."""
        name = self.record(root).get("earlier")
        return root / EARLIER / name if name else None

    def write_record(self, root: Path, state: str, **more: Any) -> None:
        own = {"dataset", "configuration", "trainer", "trainer_class", "plans", "fold", "seed", "parameters"}
        content = {key: value for key, value in asdict(self).items() if key in own}
        self.folder(root).mkdir(parents=True, exist_ok=True)
        content |= {"state": state, "time": time.time(), **more}
        write_json_atomically(content, self.folder(root) / RECORD)

    def state(self, root: Path) -> str:
        """One of `STATES`. Interrupted: begun, and its process is gone."""
        if is_locked(self.folder(root) / LOCK):
            return RUNNING
        state = self.record(root).get("state")
        return INTERRUPTED if state == RUNNING else state or WAITING


def write_cells(root: Path, cells: list[Cell]) -> None:
    write_text_atomically(json.dumps([asdict(cell) for cell in cells], indent=1), root / MATRIX)


def read_cells(root: Path) -> list[Cell]:
    """Raises `XAttnResError` if `root` is no folder of a benchmark that has been prepared."""
    try:
        return [Cell(**entry) for entry in json.loads((root / MATRIX).read_text())]
    except (FileNotFoundError, NotADirectoryError):
        raise XAttnResError(
            f"{root} has no {MATRIX}: give the folder of `nnunet-xattnres benchmark run`, once it has prepared the data"
        ) from None
    except (ValueError, TypeError):
        raise XAttnResError(
            f"{root / MATRIX} is damaged: `nnunet-xattnres benchmark run` writes it again, and trains nothing twice"
        ) from None


@contextmanager
def locked(path: Path, patience: float) -> Iterator[int]:
    """Hold a lock that ends with this process and with those that inherit the file descriptor.

    patience: for how many seconds to try. Raises `Busy` after that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + patience
        while not _try(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise XAttnResError(f"this file system has no locks ({error.strerror}): choose another -o") from None
    return True
