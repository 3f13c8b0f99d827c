"""Where cells run: on this machine or on a Slurm cluster, both through submitit."""

import getpass
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import submitit
import torch

from nnunet_xattnres.benchmark.cell import CellTask
from nnunet_xattnres.benchmark.matrix import Cell
from nnunet_xattnres.benchmark.spec import SLURM, Executor
from nnunet_xattnres.common.device import available_cores
from nnunet_xattnres.common.errors import XAttnResError, one_line

JOBS = "jobs"
QUEUE_SECONDS = 5.0
SECONDS_TO_STOP = 20.0
# submitit ends jobs after a few minutes unless told otherwise.
A_YEAR_IN_MINUTES = 365 * 24 * 60
A_DAY_IN_MINUTES = 24 * 60


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
