"""Locks that many processes take on files in a benchmark's folder.

The library filelock is not used, because its release unlocks the file for all processes that share the descriptor. Here
a lock ends when the last of them has closed it, so that a training that outlives a killed run keeps its cell locked.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_xattnres.common.errors import XAttnResError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# `is_locked` holds a lock for an instant: whoever wants it tries at least as long as this.
SECONDS_FOR_A_LOOK = 2.0


class Busy(Exception):
    """Another process has the lock."""


def check_locks() -> None:
    """Raise `XAttnResError` where there are no such locks."""
    if fcntl is None:
        raise XAttnResError(
            "the folder of a benchmark needs file locks that Windows does not have: use Linux, macOS or WSL"
        )


@contextmanager
def locked(path: Path, patience: float) -> Iterator[int]:
    """Hold a lock that ends with this process and with those that inherit the file descriptor, which is returned.

    patience: for how many seconds to try. Raises `Busy` after that.
    """
    check_locks()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + patience
        while not _try(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    check_locks()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def close_in_forks(descriptor: int) -> None:
    """Keep a lock's file descriptor from forked workers: one that outlives this process would keep the lock."""
    inherited = [descriptor]

    def close() -> None:
        while inherited:
            os.close(inherited.pop())

    os.register_at_fork(after_in_child=close)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise XAttnResError(f"this file system has no locks ({error.strerror}): choose another -o") from None
    return True
