"""The cells of a matrix: the folder of each, its record and its state."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_xattnres.benchmark.locks import is_locked
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import read_json, write_json_atomically, write_text_atomically
from nnunet_xattnres.nnunet.commands import Model
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

SPEC = "spec.yaml"
MATRIX = "matrix.json"
RECORD = "cell.json"
# Beside a result of preparation, once the command that makes it has succeeded.
COMPLETE = ".complete"
PREPARATION_LOCK = "preparation.lock"
EARLIER = "earlier"
FINISHED, FAILED, RUNNING, INTERRUPTED, WAITING = STATES = ("finished", "failed", "running", "interrupted", "waiting")


def title_of(training: Iterable[str | int]) -> str:
    """How messages name a training, given its dataset, configuration, trainer, fold and seed."""
    return "{} {} {} fold {} seed {}".format(*training)


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
        return title_of((self.dataset, self.configuration, self.trainer, self.fold, self.seed))

    @property
    def model(self) -> Model:
        return Model(self.dataset, self.planned_configuration, self.trainer_class, self.plans)

    def results(self, root: Path) -> Path:
        """nnUNet_results. Every seed has its own, because nnU-Net's names do not contain the seed."""
        return root / f"seed_{self.seed}" / "nnUNet_results"

    def folder(self, root: Path) -> Path:
        """nnU-Net's folder of the training."""
        return self.model.folder(self.results(root)) / f"fold_{self.fold}"

    def lock(self, root: Path) -> Path:
        """The lock of the process that works on the cell."""
        return self.folder(root) / "cell.lock"

    def logs(self, root: Path) -> Path:
        """The folder of the logs of its commands, a log per attempt."""
        return root / "logs" / self.folder(root).relative_to(root)

    def is_trained(self, root: Path) -> bool:
        return (self.folder(root) / FINAL_CHECKPOINT).is_file()

    def validation_summary(self, root: Path) -> Path:
        """The file that nnU-Net writes last, when all cases are predicted."""
        return self.folder(root) / "validation" / "summary.json"

    def is_validated(self, root: Path) -> bool:
        return self.validation_summary(root).is_file()

    def record(self, root: Path) -> dict[str, Any]:
        """The content of cell.json. Empty if the cell was never begun; the state `RUNNING` if the file is damaged."""
        try:
            record = json.loads((self.folder(root) / RECORD).read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"state": RUNNING}
        # Without the tables of the earlier report the training has to be done here.
        is_lost = "earlier" in record and not (root / EARLIER / record["earlier"]).is_dir()
        return {} if is_lost else record

    def earlier_tables(self, root: Path) -> Path | None:
        """The folder with the tables of an earlier report, if the cell was finished elsewhere."""
        name = self.record(root).get("earlier")
        return root / EARLIER / name if name else None

    def write_record(self, root: Path, state: str, **more: Any) -> None:
        """Write cell.json: what tells the cell from others, its state, the time, and `more`."""
        own = {"dataset", "configuration", "trainer", "trainer_class", "plans", "fold", "seed", "parameters"}
        content = {key: value for key, value in asdict(self).items() if key in own}
        self.folder(root).mkdir(parents=True, exist_ok=True)
        content |= {"state": state, "time": time.time(), **more}
        write_json_atomically(content, self.folder(root) / RECORD)

    def state(self, root: Path) -> str:
        """One of `STATES`. `INTERRUPTED`: begun, and its process no longer runs."""
        if is_locked(self.lock(root)):
            return RUNNING
        state = self.record(root).get("state")
        return INTERRUPTED if state == RUNNING else state or WAITING


def write_cells(root: Path, cells: list[Cell]) -> None:
    """Write matrix.json."""
    write_text_atomically(json.dumps([asdict(cell) for cell in cells], indent=1), root / MATRIX)


def read_cells(root: Path) -> list[Cell]:
    """Read matrix.json. Raises `XAttnResError` if `root` is not the folder of a benchmark that has been prepared."""
    try:
        return [Cell(**entry) for entry in json.loads((root / MATRIX).read_text())]
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {MATRIX}" if root.exists() else "does not exist"
        raise XAttnResError(
            f"{root} {problem}: give the folder of `nnunet-xattnres benchmark run`, once it has prepared the data"
        ) from None
    except (ValueError, TypeError):
        raise XAttnResError(
            f"{root / MATRIX} is damaged: `nnunet-xattnres benchmark run` writes it again, and trains nothing twice"
        ) from None


def read_planned(path: Path) -> dict[str, Any]:
    """Read the plans of a benchmark's folder. Raises `XAttnResError` if they are missing or damaged."""
    remedy = f"delete it and {path.stem}{COMPLETE} beside it, run again, and nnU-Net plans again"
    plans = read_json(path, remedy)
    if "configurations" not in plans:
        raise XAttnResError(f"{path} has no configurations: {remedy}")
    return plans
