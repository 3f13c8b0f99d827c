"""Locks within one process; `tests/process/test_benchmark_processes.py` has several."""

import errno
import fcntl
import os
import time
from threading import Thread

import pytest

from nnunet_xattnres.benchmark.locks import Busy, is_locked, locked
from nnunet_xattnres.common.errors import XAttnResError


def test_a_lock_is_for_one(tmp_path):
    with locked(tmp_path / "lock", 0):
        with pytest.raises(Busy), locked(tmp_path / "lock", 0.1):
            pass
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "nowhere")


def test_a_lock_lasts_until_the_last_copy_of_its_descriptor_is_closed(tmp_path):
    with locked(tmp_path / "lock", 0) as descriptor:
        copy = os.dup(descriptor)
    assert is_locked(tmp_path / "lock")
    os.close(copy)
    assert not is_locked(tmp_path / "lock")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(XAttnResError, match="choose another -o"), locked(tmp_path / "lock", 0):
        pass


def test_a_look_at_a_lock_does_not_keep_it_from_anybody(tmp_path):
    looking = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    Thread(target=lambda: (time.sleep(0.15), os.close(looking))).start()
    with locked(tmp_path / "lock", 5):
        assert is_locked(tmp_path / "lock")
