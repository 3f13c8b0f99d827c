"""Processes that a command starts: their environment, their last words, and how they end."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_END = 10
PROGRESS_BAR = re.compile(r"^\s*\d+%\|| \[\d+:\d+<|it/s\]|s/it\]")


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


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
            process.wait(SECONDS_TO_END)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_meaningful_line(output: str) -> str:
    """The last line of a command's output that is neither empty nor a progress bar."""
    lines = (line.strip() for line in reversed(re.split(r"[\r\n]+", output)))
    return next((line for line in lines if line and not PROGRESS_BAR.search(line)), "")
