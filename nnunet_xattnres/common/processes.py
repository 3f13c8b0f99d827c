"""Child processes: their environment, how they are started and ended, and what their output says."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import psutil

# Windows has no SIGHUP.
SIGNALS_TO_END = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
SECONDS_TO_END = 10
PROGRESS_BAR = re.compile(r"^\s*\d+%\|| \[\d+:\d+<|it/s\]|s/it\]")


@contextmanager
def environment_with(**variables: str) -> Iterator[None]:
    """Set environment variables of this process until the block is left."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def termination_as_exception() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`: the running command cleans up as it does after Ctrl-C.

    A signal that is ignored stays ignored: nohup ignores SIGHUP, and so must whatever it starts.
    """
    # Python handles signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in SIGNALS_TO_END if signal.getsignal(number) != signal.SIG_IGN]

    def leave(number: int, frame: object) -> None:
        # `timeout` sends two signals. The second one must not interrupt the cleaning up.
        for handled_number in handled:
            signal.signal(handled_number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def child_process(
    command: Sequence[str], environment: Mapping[str, str], output: int | IO[bytes], keep_open: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs while the block does. It is ended with its workers when the block is left.

    output: where stdout and stderr go, as `subprocess` takes it. keep_open: file descriptors that the command inherits.
    """
    with termination_as_exception():
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=keep_open,
            # A process group of its own: its workers can be ended with it.
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end_process_group(process)


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    """End the process, which leads a group, and all others of the group: first with SIGTERM, then with SIGKILL.

    Windows has neither groups nor these signals: there the process is ended with those that it has started.
    """
    if not hasattr(os, "killpg"):
        _end_tree(process)
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        for member in [*leader.children(recursive=True), leader]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def was_killed(return_code: int) -> bool:
    """Whether SIGKILL ended the process, as it does when there is too little memory. Windows has no such signal."""
    return return_code == -9


def how_it_ended(return_code: int) -> str:
    """A process's return code in words: a signal or an exit status."""
    return f"ended by {signal.Signals(-return_code).name}" if return_code < 0 else f"exit status {return_code}"


def last_meaningful_line(output: str) -> str:
    """The last line of a command's output that is neither empty nor a progress bar."""
    lines = (line.strip() for line in reversed(re.split(r"[\r\n]+", output)))
    return next((line for line in lines if line and not PROGRESS_BAR.search(line)), "")
