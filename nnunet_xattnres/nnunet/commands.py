"""nnU-Net's own console commands, run in subprocesses inside one working directory."""

import codecs
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import end_process_group, last_meaningful_line, termination_as_exception
from nnunet_xattnres.nnunet.installation import external_trainers

# nnU-Net starts 8 processes wherever it works case by case.
NUM_WORKERS = str(min(8, os.cpu_count() or 1))
CPU_SETTINGS = {
    # OpenMP's threads wait for each other spinning, some 300,000 rounds by default. Where augmentation or anything else
    # wants the core, a training step then takes several times as long. On idle cores 3,000 rounds are as fast.
    "GOMP_SPINCOUNT": "3000",
    "nnUNet_n_proc_DA": str(min(2, os.cpu_count() or 1)),
    # Every worker process imports torch: more than one of each kind costs more than it brings.
    "nnUNet_npp": "1",
    "nnUNet_nps": "1",
    # glibc returns large blocks to the system when they are freed, and every page of the next feature map has to be
    # faulted in again, a tenth to a quarter of the time of a training step. This lets the process keep its memory.
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
}
POLL_SECONDS = 1


@dataclass(frozen=True)
class NnUNet:
    """nnU-Net with its three folders in `workdir`, whatever the shell's own `nnUNet_*` variables say.

    device: "cpu" or "cuda".
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
        """The whole environment of a command: what the user has set wins, except for the folders."""
        defaults = {"nnUNet_def_n_proc": NUM_WORKERS, "PYTHONUNBUFFERED": "1"}
        if self.device == "cpu":
            defaults |= CPU_SETTINGS
        return defaults | dict(os.environ) | self.folders()

    def run(self, *command: str, log: str, environment: Mapping[str, str] | None = None) -> None:
        """Run one console command; its output goes to the terminal, as it comes, and to `workdir/logs/<log>.log`.

        environment: variables on top of `self.environment()`.

        Raises `XAttnResError` if the command is missing or fails.
        """
        log_file = self.workdir / "logs" / f"{log}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with termination_as_exception():
            variables = self.environment() | dict(environment or {})
            return_code = _run_and_log(command, variables, log_file, self.keep_open)
        if return_code:
            raise XAttnResError(
                f"{shlex.join(command)} failed: {_reason(return_code, log_file)} (whole output: {log_file})"
            )


def find_command(name: str) -> str:
    """The path of a console command: beside this Python (a virtual environment need not be active), or on PATH."""
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search_path)
    if found is None:
        raise XAttnResError(f"the command {name} is neither beside {sys.executable} nor on PATH: pip install nnunetv2")
    return found


def _run_and_log(
    command: tuple[str, ...], environment: dict[str, str], log_file: Path, keep_open: Sequence[int]
) -> int:
    process = subprocess.Popen(
        [find_command(command[0]), *command[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=keep_open,
        # Its own process group, so that its worker processes can be ended with it.
        start_new_session=True,
    )
    try:
        _copy_output(process, log_file)
        return process.wait()
    finally:
        end_process_group(process)


def _copy_output(process: subprocess.Popen[bytes], log_file: Path) -> None:
    assert process.stdout is not None
    # A multi-byte character may arrive in two pieces.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with process.stdout as output, log_file.open("wb") as log:
        while True:
            ended = process.poll() is not None
            if select.select([output], [], [], 0 if ended else POLL_SECONDS)[0]:
                chunk = os.read(output.fileno(), 65536)
                if not chunk:
                    return
                log.write(chunk)
                log.flush()
                sys.stdout.write(decoder.decode(chunk))
                sys.stdout.flush()
            elif ended:
                # Workers that outlive a killed nnU-Net would hold its output open for ever.
                return


def _reason(return_code: int, log_file: Path) -> str:
    if return_code < 0:
        hint = ", out of memory?" if -return_code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-return_code).name}{hint}"
    return last_meaningful_line(log_file.read_text(errors="replace")) or f"exit status {return_code}"
