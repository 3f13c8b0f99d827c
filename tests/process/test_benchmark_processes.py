"""Locks and signals of processes that start others: who keeps a lock, and who is ended by what."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.benchmark import PLANNED, TINY, TINY_SPEC, eventually, write_spec_file, write_tiny_dataset
from nnunet_xattnres.benchmark import preparation
from nnunet_xattnres.benchmark.cells import PREPARATION_LOCK
from nnunet_xattnres.benchmark.locks import is_locked, locked
from nnunet_xattnres.benchmark.run import run_benchmark
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import termination_as_exception
from nnunet_xattnres.nnunet import commands


def test_a_lock_lives_as_long_as_the_training_and_ends_with_it(tmp_path):
    """Kill the process that has taken the lock: the training that it has started still has it."""
    taker = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from nnunet_xattnres.benchmark.locks import locked\n"
        f"with locked(Path({str(tmp_path / 'lock')!r}), 0) as lock:\n"
        "    training = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[lock])\n"
        "    print(training.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", taker], stdout=subprocess.PIPE, text=True)
    training = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert is_locked(tmp_path / "lock")
    os.kill(training, signal.SIGKILL)
    assert eventually(lambda: not is_locked(tmp_path / "lock"))


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    script = (
        "import os, sys, time\n"
        "from nnunet_xattnres.benchmark.locks import close_in_forks\n"
        "close_in_forks(int(sys.argv[1]))\n"
        "if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "time.sleep(600)\n"
    )
    with locked(tmp_path / "lock", 0) as lock:
        command = [sys.executable, "-c", script, str(lock)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[lock])
        worker = int(process.stdout.readline())
    try:
        assert is_locked(tmp_path / "lock")
        process.kill()
        process.wait()
        assert eventually(lambda: not is_locked(tmp_path / "lock"))
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_command_that_outlives_the_preparation_keeps_others_from_it(tmp_path, monkeypatch):
    """A process of nnU-Net's is still at work when the one that has started it has gone."""
    write_tiny_dataset(tmp_path / "data" / TINY)
    # Until it leads a session of its own it ends with its parent's process group.
    command = tmp_path / "command"
    outlives = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 600' >/dev/null 2>&1 &"
    command.write_text(f"#!/bin/sh\n{outlives}\nuntil [ -s {tmp_path}/pid ]; do sleep 0.1; done\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setattr(commands, "find_command", lambda name: str(command))
    monkeypatch.setattr(preparation, "place_raw_dataset", lambda *given, **options: None)
    out = tmp_path / "out"
    with pytest.raises(XAttnResError, match="extract_fingerprint"):
        run_benchmark(write_spec_file(TINY_SPEC | {"trainers": [PLANNED]}, tmp_path), out)
    try:
        assert is_locked(out / PREPARATION_LOCK)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


RUN_WITH_A_JOB = """
import os, signal, subprocess, sys
from nnunet_xattnres.benchmark.signals import children_heed_interrupts
before = signal.getsignal(signal.SIGINT), os.getpgrp()
assert before[0] == signal.SIG_IGN
jobs = []
for _ in range(2):
    with children_heed_interrupts():
        jobs.append(subprocess.Popen(["sleep", "600"]))
    assert (signal.getsignal(signal.SIGINT), os.getpgrp()) == before
print(*(number for job in jobs for number in (job.pid, os.getpgid(job.pid))), flush=True)
sys.exit(any(job.wait() != -signal.SIGINT for job in jobs))
"""


def test_a_job_of_a_run_in_the_background_ends_when_it_is_told_to_and_not_by_ctrl_c():
    """What a script puts into the background ignores Ctrl-C, and submitit ends a job by the same signal."""
    script = subprocess.Popen(
        ["sh", "-c", '"$PYTHON" -c "$RUN" & wait $!'],
        env=os.environ | {"PYTHON": sys.executable, "RUN": RUN_WITH_A_JOB},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first, group, second, group_of_second = map(int, script.stdout.readline().split())
    # A terminal's Ctrl-C is for the script's group, in which the run stays.
    assert script.pid not in (group, group_of_second)
    for job in (first, second):
        os.kill(job, signal.SIGINT)
    assert script.wait(60) == 0


def test_a_run_under_nohup_outlives_its_terminal():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit), termination_as_exception():
            os.kill(os.getpid(), signal.SIGHUP)
            still_here = True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert still_here


def test_a_second_signal_does_not_interrupt_the_end_of_a_run():
    """`timeout` sends one to the process and one to its group."""
    cleared = False
    with pytest.raises(SystemExit) as exit_status, termination_as_exception():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            cleared = True
    assert cleared
    assert exit_status.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
