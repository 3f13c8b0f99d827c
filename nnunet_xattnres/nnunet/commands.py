"""nnU-Net's own console commands, each in a process of its own, inside one working directory."""

import codecs
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from nnunet_xattnres.common.device import available_cores
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import child_process, how_it_ended, last_meaningful_line, was_killed
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.nnunet.installation import external_trainers

# nnU-Net starts 8 processes by default for steps that work case by case.
NUM_WORKERS = str(min(8, available_cores()))
# nnU-Net's variable for the number of augmentation workers of every GPU.
NUM_AUGMENTATION_WORKERS = "nnUNet_n_proc_DA"
SETTINGS = {
    "nnUNet_def_n_proc": NUM_WORKERS,
    # Python 3.13 and newer: nnU-Net takes a thread for every core that it counts.
    "PYTHON_CPU_COUNT": str(available_cores()),
    "PYTHONUNBUFFERED": "1",
    # On Windows, Python writes to a pipe in an encoding that lacks many characters.
    "PYTHONIOENCODING": "utf-8",
    # PyTorch computes on the CPU what it cannot compute with MPS.
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
}
CPU_SETTINGS = {
    # OpenMP's threads wait for each other in a loop, by default for some 300,000 rounds. If augmentation needs the core
    # meanwhile, a training step takes several times as long. On idle cores 3,000 rounds are as fast.
    "GOMP_SPINCOUNT": "3000",
    # Every worker process imports torch: more than one of each kind costs more time than it saves.
    "nnUNet_npp": "1",
    "nnUNet_nps": "1",
    # glibc returns large blocks to the system when they are freed. The next feature map then needs new pages, which
    # costs a tenth to a quarter of the time of a training step. These settings let the process keep its memory.
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
}
POLL_SECONDS = 1


@dataclass(frozen=True)
class Model:
    """A model of nnUNet_results, and the commands that train it and predict with it.

    dataset: its name, DatasetNNN_Name.
    """

    dataset: str
    configuration: str
    trainer: str
    plans: str = "nnUNetPlans"

    def folder(self, results: Path) -> Path:
        """The model folder in nnUNet_results."""
        return results / self.dataset / f"{self.trainer}__{self.plans}__{self.configuration}"

    def train_command(self, fold: str, device: str, *options: str) -> list[str]:
        """`nnUNetv2_train` of one fold."""
        return ["nnUNetv2_train", self.dataset, self.configuration, fold, *self._options(device), *options]

    def predict_command(
        self, folds: Sequence[str], images: Path, output: Path, device: str, *options: str
    ) -> list[str]:
        """`nnUNetv2_predict` with the mean of some folds."""
        which = ["-i", str(images), "-o", str(output), "-d", self.dataset, "-c", self.configuration, "-f", *folds]
        return ["nnUNetv2_predict", *which, *self._options(device), *options]

    def _options(self, device: str) -> list[str]:
        return ["-tr", self.trainer, "-p", self.plans, "-device", device]


@dataclass(frozen=True)
class NnUNet:
    """nnU-Net with its three folders in `workdir`. The shell's own `nnUNet_*` folders are not used.

    device: "cpu", "cuda" or "mps".
    keep_open: file descriptors that the commands inherit.
    """

    workdir: Path
    device: str
    keep_open: tuple[int, ...] = ()

    @property
    def raw(self) -> Path:
        return self.workdir / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.workdir / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.workdir / "nnUNet_results"

    def folders(self) -> dict[str, str]:
        """The environment variables that a shell needs for the same commands."""
        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": external_trainers(),
        }

    def environment(self) -> dict[str, str]:
        """All environment variables of a command. The user's own win over our defaults, except for the folders."""
        workers = {NUM_AUGMENTATION_WORKERS: augmentation_workers(self.device, available_cores())}
        defaults = SETTINGS | workers | (CPU_SETTINGS if self.device == "cpu" else {})
        return defaults | dict(os.environ) | self.folders()

    def run(self, *command: str, log: str, environment: Mapping[str, str] | None = None) -> None:
        """Run one console command. Its output goes to the terminal at once and to `workdir/logs/<log>.log`.

        environment: variables in addition to `self.environment()`.

        Raises `XAttnResError` if the command is missing or fails.
        """
        log_file = self.workdir / "logs" / f"{log}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        program = [find_command(command[0]), *command[1:]]
        variables = self.environment() | dict(environment or {})
        with child_process(program, variables, subprocess.PIPE, self.keep_open) as process:
            _copy_output(process, log_file)
            return_code = process.wait()
        if return_code:
            raise XAttnResError(
                f"{shell_command(*command)} failed: {_reason(return_code, log_file)} (whole output: {log_file})"
            )


def augmentation_workers(device: str, cores: int, num_gpus: int = 1) -> str:
    """The value of `NUM_AUGMENTATION_WORKERS` for a training with so many cores. nnU-Net counts the machine's."""
    # 12 is nnU-Net's own number. On a CPU, the network needs the cores.
    most = 2 if device == "cpu" else 12
    return str(max(1, min(most, cores // num_gpus)))


def find_command(name: str) -> str:
    """The path of a console command: beside this Python, even if its environment is not active, or on PATH.

    Raises `XAttnResError` if there is none.
    """
    search_path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search_path)
    if found is None:
        raise XAttnResError(f"the command {name} is neither beside {sys.executable} nor on PATH: pip install nnunetv2")
    return found


def _copy_output(process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Copy the process's output to the terminal and to the log until the process ends."""
    # On Windows only a thread can wait for output and for the end of the process at once.
    chunks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_output, args=(process.stdout, chunks), daemon=True).start()
    # A multi-byte character may arrive in two pieces.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with log_file.open("wb") as log:
        while True:
            ended = process.poll() is not None
            try:
                chunk = chunks.get(timeout=POLL_SECONDS)
            except Empty:
                if ended:
                    # Workers that outlive a killed nnU-Net keep its output open.
                    return
                continue
            if not chunk:
                return
            log.write(chunk)
            log.flush()
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()


def _read_output(output: IO[bytes], chunks: "SimpleQueue[bytes]") -> None:
    """Put what is written to a pipe into the queue piece by piece, and nothing, b"", when the pipe is closed."""
    with output:
        while chunk := os.read(output.fileno(), 65536):
            chunks.put(chunk)
    chunks.put(b"")


def _reason(return_code: int, log_file: Path) -> str:
    if return_code < 0:
        return how_it_ended(return_code) + ", out of memory?" * was_killed(return_code)
    return last_meaningful_line(log_file.read_text("utf-8", "replace")) or how_it_ended(return_code)
