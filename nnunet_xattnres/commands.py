"""nnU-Net's own console commands, run in subprocesses inside one working directory."""

import codecs
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.installation import trainers_folder

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
SECONDS_TO_END = 10
POLL_SECONDS = 1
PROGRESS_BAR = re.compile(r"^\s*\d+%\|| \[\d+:\d+<|it/s\]|s/it\]")


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


def external_trainers() -> str:
    """The value of `nnUNet_extTrainer`: what is already set, and this plugin's trainers."""
    already_set = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*filter(None, already_set), str(trainers_folder())]))


@contextmanager
def environment_with(**variables: str) -> Iterator[None]:
    """Environment variables of this process, set for a while."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def find_command(name: str) -> str:
    """The path of a console command: beside this Python (a virtual environment need not be active), or on PATH."""
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search_path)
    if found is None:
        raise XAttnResError(f"the command {name} is neither beside {sys.executable} nor on PATH: pip install nnunetv2")
    return found


@contextmanager
def termination_as_exception() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the running command too, as Ctrl-C does."""

    def leave(number: int, frame: object) -> None:
        # A second one, `timeout` sends two, would interrupt what ends the command.
        for heeded_number in heeded:
            signal.signal(heeded_number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    # Python handles signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # nohup ignores the latter, and so must whatever it starts.
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
            process.wait(SECONDS_TO_END)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _reason(return_code: int, log_file: Path) -> str:
    if return_code < 0:
        hint = ", out of memory?" if -return_code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-return_code).name}{hint}"
    return last_meaningful_line(log_file.read_text(errors="replace")) or f"exit status {return_code}"


def last_meaningful_line(output: str) -> str:
    """The last line of a command's output that is neither empty nor a progress bar."""
    lines = (line.strip() for line in reversed(re.split(r"[\r\n]+", output)))
    return next((line for line in lines if line and not PROGRESS_BAR.search(line)), "")
