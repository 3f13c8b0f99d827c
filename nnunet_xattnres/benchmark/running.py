"""Running the cells of a matrix, on this machine or on a Slurm cluster, both through submitit."""

import getpass
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import submitit
import torch
from submitit.helpers import Checkpointable

from nnunet_xattnres.benchmark.launch import recorded_costs
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
from nnunet_xattnres.benchmark.spec import SLURM, Executor
from nnunet_xattnres.benchmark.status import failure_lines, progress
from nnunet_xattnres.checkpoint import FINAL_CHECKPOINT, read_checkpoint
from nnunet_xattnres.commands import NnUNet, termination_as_exception
from nnunet_xattnres.device import available_cores, choose_device
from nnunet_xattnres.errors import XAttnResError, one_line

LAUNCH = ("-m", "nnunet_xattnres.benchmark.launch")
RECORDED_VERSIONS = ("nnunet-xattnres", "nnunetv2", "torch", "numpy")
JOBS = "jobs"
POLL_SECONDS = 1.0
QUEUE_SECONDS = 5.0
SECONDS_TO_STOP = 20.0
# A process may be killed by hand, or by the system; one that always ends early has a cause.
ATTEMPTS = 3
# submitit ends jobs after a few minutes unless told otherwise.
A_YEAR_IN_MINUTES = 365 * 24 * 60
A_DAY_IN_MINUTES = 24 * 60


class CellTask(Checkpointable):
    """What submitit runs. Slurm may interrupt it at a time limit and put it back into the queue: it continues."""

    def __call__(self, root: Path, cell: Cell, num_gpus: int, share: Mapping[str, str]) -> None:
        """share: environment variables that say which part of the machine it gets; empty for all that it sees."""
        os.environ.update(share)
        run_cell(root, cell, choose_device(), num_gpus)


def run_cell(root: Path, cell: Cell, device: str, num_gpus: int) -> None:
    """Do what is left to do of a cell and record it; nothing, if another process does it already."""
    with suppress(Busy), locked(cell.folder(root) / LOCK, SECONDS_FOR_A_LOOK) as lock:
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
        """Train, continue, or validate what is trained."""
        cell, folder = self.cell, self.cell.folder(self.root)
        if cell.is_trained(self.root) and cell.is_validated(self.root):
            return
        command = ["nnUNetv2_train", cell.dataset, cell.planned_configuration, str(cell.fold)]
        command += ["-tr", cell.trainer_class, "-p", cell.plans, "-device", self.nnunet.device]
        if self.num_gpus > 1:
            command += ["-num_gpus", str(self.num_gpus)]
        if cell.is_trained(self.root):
            command.append("--val")
        else:
            # Of another training, it would pass for this one's.
            cell.validation_summary(self.root).unlink(missing_ok=True)
            if any(folder.glob("checkpoint_*.pth")):
                command.append("--c")
        self._run("train", *command)

    def predict(self) -> None:
        """Predict the test set."""
        cell, predictions = self.cell, self.cell.folder(self.root) / "test"
        if predictions.is_dir():
            return
        incomplete = predictions.with_name("test.incomplete")
        shutil.rmtree(incomplete, ignore_errors=True)
        images = self.nnunet.raw / cell.dataset / "imagesTs"
        command = ["nnUNetv2_predict", "-i", str(images), "-o", str(incomplete), "-d", cell.dataset]
        command += ["-c", cell.planned_configuration, "-f", str(cell.fold), "-tr", cell.trainer_class]
        self._run("predict", *command, "-p", cell.plans, "-device", self.nnunet.device)
        incomplete.rename(predictions)

    def _run(self, step: str, *command: str) -> None:
        logs = self.cell.log(self.root)
        attempt = 1 + len(list(logs.glob(f"{step}_*.log")))
        self.nnunet.run(
            *(sys.executable, *LAUNCH, str(self.cell.seed), str(self.lock), str(self.cell.folder(self.root)), *command),
            log=str(logs.relative_to(self.root / "logs") / f"{step}_{attempt}"),
            environment={"nnUNet_results": str(self.cell.results(self.root))},
        )


def _results(root: Path, cell: Cell) -> dict[str, Any]:
    checkpoint = cell.folder(root) / FINAL_CHECKPOINT
    logged = read_checkpoint(checkpoint, "delete its folder to train again")["logging"]
    times = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)
    seconds = [end - start for start, end in times]
    costs = recorded_costs(cell.folder(root))
    return {
        "epochs": len(seconds),
        "seconds_per_epoch": statistics.median(seconds),
        "peak_memory_gb": costs["peak_memory_gb"],
        # A training may have been continued elsewhere.
        "device": " and ".join(costs["devices"]),
        "versions": {package: version(package) for package in RECORDED_VERSIONS} | {"python": sys.version.split()[0]},
    }


def run_cells(root: Path, cells: list[Cell], machine: "Machine") -> None:
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


class Machine(Protocol):
    """Where cells run."""

    def has_room(self) -> bool: ...

    def submit(self, cell: Cell) -> bool:
        """Whether the cell was taken; else it is to be tried again later."""

    def has(self, cell: Cell) -> bool:
        """Whether a cell has a process here, or waits for one."""

    def stop(self) -> None:
        """End what ends with this process."""


def make_machine(root: Path, executor: Executor) -> Machine:
    """Raises `XAttnResError` where that executor cannot be used."""
    return SlurmCluster(root, executor) if executor.kind == SLURM else LocalMachine(root, executor)


class LocalMachine:
    """N cells at a time, each with GPUs of its own where there are enough, or with a share of the cores."""

    def __init__(self, root: Path, executor: Executor) -> None:
        self.root = root
        self.executor = executor
        self.shares = _shares(executor)
        self.jobs: dict[int, tuple[Cell, submitit.Job[None]]] = {}
        self.submitit = submitit.LocalExecutor(root / JOBS)
        self.submitit.update_parameters(timeout_min=A_YEAR_IN_MINUTES, stderr_to_stdout=True)

    def has_room(self) -> bool:
        return len(self._live()) < len(self.shares)

    def submit(self, cell: Cell) -> bool:
        slot = next(slot for slot in range(len(self.shares)) if slot not in self._live())
        with _children_heed_interrupts():
            job = self.submitit.submit(CellTask(), self.root, cell, self.executor.num_gpus, self.shares[slot])
        self.jobs[slot] = (cell, job)
        return True

    def has(self, cell: Cell) -> bool:
        return any(cell == live for live, _ in self._live().values())

    def stop(self) -> None:
        for _, job in self._live().values():
            job.cancel()
        deadline = time.monotonic() + SECONDS_TO_STOP
        while self._live() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _live(self) -> dict[int, tuple[Cell, submitit.Job[None]]]:
        self.jobs = {slot: entry for slot, entry in self.jobs.items() if not entry[1].done()}
        return self.jobs


class SlurmCluster:
    """All cells at once: Slurm decides what runs when. Jobs are known by their names, of earlier runs too."""

    def __init__(self, root: Path, executor: Executor) -> None:
        self.root = root
        self.executor = executor
        self._looked, self._queue = -QUEUE_SECONDS, set[str]()
        self._has_taken, self._refused, self._refusal = False, -QUEUE_SECONDS, ""
        parameters = {"time": A_DAY_IN_MINUTES, **executor.parameters}
        if executor.num_gpus > 1:
            parameters.setdefault("gpus_per_node", executor.num_gpus)
        try:
            self.submitit = submitit.SlurmExecutor(root / JOBS)
            self.submitit.update_parameters(**parameters)
        except RuntimeError:
            raise XAttnResError("there is no Slurm here, for srun is missing: use the executor local") from None
        except (TypeError, ValueError) as error:
            raise XAttnResError(f"parameters of executor: {one_line(str(error))}") from None

    def has_room(self) -> bool:
        return time.monotonic() > self._refused + QUEUE_SECONDS

    def submit(self, cell: Cell) -> bool:
        self.submitit.update_parameters(job_name=self._job_name(cell))
        try:
            self.submitit.submit(CellTask(), self.root, cell, self.executor.num_gpus, {})
        except Exception as error:
            refusal = f"Slurm takes no job: {one_line(str(error))}"
            if not self._has_taken:
                raise XAttnResError(refusal) from None
            # It takes jobs like this one. A limit on how many are queued, say, ends with one of them.
            if refusal != self._refusal:
                print(f"{refusal}; trying again until it does", file=sys.stderr)
            self._refused, self._refusal = time.monotonic(), refusal
            return False
        self._has_taken, self._refusal = True, ""
        self._queue.add(self._job_name(cell))
        return True

    def has(self, cell: Cell) -> bool:
        if time.monotonic() > self._looked + QUEUE_SECONDS:
            command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%j"]
            try:
                self._queue = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
            except subprocess.CalledProcessError as error:
                # The controller may be away for a while; what it has queued does not change by that.
                print(f"squeue: {one_line(error.stderr)}", file=sys.stderr)
            self._looked = time.monotonic()
        is_queued = self._job_name(cell) in self._queue
        self._has_taken |= is_queued
        return is_queued

    def stop(self) -> None:
        """Jobs stay in the queue."""

    def _job_name(self, cell: Cell) -> str:
        digest = sha256(f"{self.root} {cell.title}".encode()).hexdigest()[:8]
        return f"{cell.trainer}-{cell.dataset}-fold{cell.fold}-seed{cell.seed}-{digest}"


def _shares(executor: Executor) -> list[dict[str, str]]:
    """For each of the cells that run at a time, the environment variables that say what of this machine it gets."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if not gpus:
        if executor.num_gpus > 1:
            raise XAttnResError(f"num_gpus of executor is {executor.num_gpus}, and PyTorch finds no GPU here")
        jobs = executor.jobs or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // jobs))
        return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}] * jobs
    if executor.num_gpus > len(gpus):
        raise XAttnResError(f"num_gpus of executor is {executor.num_gpus}, and there are {len(gpus)}: say fewer")
    starts = range(0, len(gpus) - executor.num_gpus + 1, executor.num_gpus)
    groups = [",".join(gpus[start : start + executor.num_gpus]) for start in starts]
    # submitit sets the variable too, but knows GPUs by number only. More cells than groups share them.
    return [{"CUDA_VISIBLE_DEVICES": groups[slot % len(groups)]} for slot in range(executor.jobs or len(groups))]


@contextmanager
def _children_heed_interrupts() -> Iterator[None]:
    """submitit ends a local job by SIGINT; a command in a script's background, and all that it starts, ignores that."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    # Ctrl-C in that script's terminal is still not meant for them, so that they have a process group of their own. This
    # process stays in the script's: whoever ends that group ends the run, and the run its children.
    group = os.getpgrp()
    if group != os.getpid():
        os.setpgrp()
    # Unlike SIG_IGN, a handler is not inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The script, and its group with it, may be gone.
        with suppress(PermissionError):
            os.setpgid(0, group)


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
