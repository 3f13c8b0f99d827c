"""What a job does: train, validate and predict one cell, and record the result."""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import Checkpointable

from nnunet_xattnres.benchmark.cells import FAILED, FINISHED, RUNNING, Cell
from nnunet_xattnres.benchmark.cost_recording import logged_times, recorded_costs
from nnunet_xattnres.benchmark.locks import SECONDS_FOR_A_LOOK, Busy, locked
from nnunet_xattnres.common.device import available_cores, choose_device
from nnunet_xattnres.common.errors import one_line
from nnunet_xattnres.nnunet.commands import NUM_AUGMENTATION_WORKERS, NnUNet, augmentation_workers
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, read_checkpoint

LAUNCH = ("-m", "nnunet_xattnres.benchmark.launch")


class CellTask(Checkpointable):
    """What submitit runs. It can continue: at a time limit, Slurm interrupts the job and queues it again."""

    def __call__(self, root: Path, cell: Cell, num_gpus: int, share: Mapping[str, str]) -> None:
        """share: environment variables that limit the job to its part of the machine; empty for all that it sees."""
        os.environ.update(share)
        device = choose_device()
        os.environ.setdefault(NUM_AUGMENTATION_WORKERS, augmentation_workers(device, available_cores(), num_gpus))
        run_cell(root, cell, device, num_gpus)


def run_cell(root: Path, cell: Cell, device: str, num_gpus: int) -> None:
    """Do what is left of a cell and record the result. Does nothing if another process has the cell's lock."""
    with suppress(Busy), locked(cell.lock(root), SECONDS_FOR_A_LOOK) as lock:
        if cell.record(root).get("state") == FINISHED:
            return
        cell.write_record(root, RUNNING)
        try:
            steps = _Steps(root, cell, NnUNet(root, device, keep_open=(lock,)), num_gpus, lock)
            steps.train()
            if cell.test:
                steps.predict()
            cell.write_record(root, FINISHED, **_results(root, cell))
        except Exception as error:
            cell.write_record(root, FAILED, reason=one_line(str(error) or repr(error)))


@dataclass(frozen=True)
class _Steps:
    root: Path
    cell: Cell
    nnunet: NnUNet
    num_gpus: int
    lock: int

    def train(self) -> None:
        """Train, or continue a training, or validate a finished one."""
        cell, folder = self.cell, self.cell.folder(self.root)
        if cell.is_trained(self.root) and cell.is_validated(self.root):
            return
        options = ["-num_gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        if cell.is_trained(self.root):
            options.append("--val")
        else:
            # A summary of an earlier training must not pass for this one's.
            cell.validation_summary(self.root).unlink(missing_ok=True)
            if any(folder.glob("checkpoint_*.pth")):
                options.append("--c")
        self._run("train", *cell.model.train_command(str(cell.fold), self.nnunet.device, *options))

    def predict(self) -> None:
        """Predict the test set."""
        cell, predictions = self.cell, self.cell.folder(self.root) / "test"
        if predictions.is_dir():
            return
        incomplete = predictions.with_name("test.incomplete")
        shutil.rmtree(incomplete, ignore_errors=True)
        images = self.nnunet.raw / cell.dataset / "imagesTs"
        command = cell.model.predict_command([str(cell.fold)], images, incomplete, self.nnunet.device)
        self._run("predict", *command)
        incomplete.rename(predictions)

    def _run(self, step: str, *command: str) -> None:
        logs = self.cell.logs(self.root)
        attempt = 1 + len(list(logs.glob(f"{step}_*.log")))
        self.nnunet.run(
            *(sys.executable, *LAUNCH, str(self.cell.seed), str(self.lock), str(self.cell.folder(self.root)), *command),
            log=str(logs.relative_to(self.root / "logs") / f"{step}_{attempt}"),
            environment={"nnUNet_results": str(self.cell.results(self.root))},
        )


def _results(root: Path, cell: Cell) -> dict[str, Any]:
    checkpoint = cell.folder(root) / FINAL_CHECKPOINT
    logged = read_checkpoint(checkpoint, "delete its folder to train again")["logging"]
    return {**logged_times(logged), **recorded_costs(cell.folder(root))}
