"""Where cells run: on this machine or on a Slurm cluster, both through submitit."""

import getpass
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import submitit
import torch

from nnunet_xattnres.benchmark.cell_task import CellTask
from nnunet_xattnres.benchmark.cells import Cell
from nnunet_xattnres.benchmark.signals import children_heed_interrupts
from nnunet_xattnres.benchmark.spec import Executor
from nnunet_xattnres.common.device import available_cores
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.nnunet.commands import NUM_AUGMENTATION_WORKERS, augmentation_workers

JOBS = "jobs"
QUEUE_SECONDS = 5.0
SECONDS_TO_STOP = 20.0
# submitit's own limits are a few minutes.
A_YEAR_IN_MINUTES = 365 * 24 * 60
A_DAY_IN_MINUTES = 24 * 60


class Machine(Protocol):
    """Where cells run. poll_seconds: the time between two looks at all cells."""

    poll_seconds: float

    def has_room(self) -> bool: ...

    def submit(self, cell: Cell) -> bool:
        """Start a cell. False if the machine refuses it for now: try again later."""

    def has(self, cell: Cell) -> bool:
        """Whether the cell has a job here, running or queued."""

    def stop(self) -> None:
        """End the jobs that must not outlive this process."""


def make_machine(root: Path, executor: Executor) -> Machine:
    """The machine that the spec's executor names. Raises `XAttnResError` if it cannot be used."""
    return SlurmCluster(root, executor) if executor.kind == "slurm" else LocalMachine(root, executor)


class LocalMachine:
    """This machine: several cells at a time, each with a share of the GPUs, or of the cores if there is no GPU."""

    poll_seconds = 1.0

    def __init__(self, root: Path, executor: Executor) -> None:
        self.root = root
        self.executor = executor
        self.shares = shares_of_machine(executor)
        self.jobs: dict[int, tuple[Cell, submitit.Job[None]]] = {}
        self.submitit = submitit.LocalExecutor(root / JOBS)
        self.submitit.update_parameters(timeout_min=A_YEAR_IN_MINUTES, stderr_to_stdout=True)

    def has_room(self) -> bool:
        return len(self._running()) < len(self.shares)

    def submit(self, cell: Cell) -> bool:
        free = next(number for number in range(len(self.shares)) if number not in self._running())
        with children_heed_interrupts():
            job = self.submitit.submit(CellTask(), self.root, cell, self.executor.num_gpus, self.shares[free])
        self.jobs[free] = (cell, job)
        return True

    def has(self, cell: Cell) -> bool:
        return any(cell == running for running, _ in self._running().values())

    def stop(self) -> None:
        for _, job in self._running().values():
            job.cancel()
        deadline = time.monotonic() + SECONDS_TO_STOP
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _running(self) -> dict[int, tuple[Cell, submitit.Job[None]]]:
        """The jobs that have not ended, by the number of their share."""
        self.jobs = {number: entry for number, entry in self.jobs.items() if not entry[1].done()}
        return self.jobs


class SlurmCluster:
    """A Slurm cluster: all cells are submitted at once. The names of jobs tell which cells an earlier run submitted."""

    # A look reads files of every cell, of which there may be hundreds, on a file system that many share.
    poll_seconds = 30.0

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
            raise XAttnResError("srun is missing, so there is no Slurm here: use kind: local") from None
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
            # Slurm has taken such jobs before. The refusal may end by itself, as a limit on queued jobs does.
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
                listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                # A line is a name. The name of a dataset may have spaces.
                self._queue = {line.strip() for line in listed.splitlines()}
            except subprocess.CalledProcessError as error:
                # The controller may be down for a while. Its queue does not change by that.
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


def shares_of_machine(executor: Executor) -> list[dict[str, str]]:
    """The shares of this machine, one for each of the cells that run at a time, as environment variables.

    Raises `XAttnResError` if the machine has fewer GPUs than one training needs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if not gpus:
        if executor.num_gpus > 1:
            raise XAttnResError(f"num_gpus of executor is {executor.num_gpus}, and PyTorch finds no GPU here")
        jobs = executor.jobs or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // jobs))
        workers = _workers("mps" if torch.backends.mps.is_available() else "cpu", jobs, 1)
        return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, **workers}] * jobs
    if executor.num_gpus > len(gpus):
        raise XAttnResError(f"num_gpus of executor is {executor.num_gpus}, and there are {len(gpus)}: say fewer")
    starts = range(0, len(gpus) - executor.num_gpus + 1, executor.num_gpus)
    groups = [",".join(gpus[start : start + executor.num_gpus]) for start in starts]
    jobs = executor.jobs or len(groups)
    workers = _workers("cuda", jobs, executor.num_gpus)
    # submitit could set the variable, but only to numbers. If there are more jobs than groups, jobs share a group.
    return [{"CUDA_VISIBLE_DEVICES": groups[job % len(groups)], **workers} for job in range(jobs)]


def _workers(device: str, jobs: int, num_gpus: int) -> dict[str, str]:
    """The number of augmentation workers of each of the jobs that share the cores; the user's own, if set, wins."""
    workers = augmentation_workers(device, available_cores() // jobs, num_gpus)
    return {NUM_AUGMENTATION_WORKERS: os.environ.get(NUM_AUGMENTATION_WORKERS, workers)}
