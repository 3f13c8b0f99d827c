"""Running a matrix: cells that are interrupted, fail, or are wanted by two; what is shown; seeds; downloads."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from nnunetv2.run import run_training

from nnunet_xattnres.benchmark import fetch, launch, running
from nnunet_xattnres.benchmark.cell import CellTask, run_cell
from nnunet_xattnres.benchmark.launch import recorded_costs, set_seeds
from nnunet_xattnres.benchmark.machines import make_machine
from nnunet_xattnres.benchmark.matrix import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOCK,
    PREPARATION_LOCK,
    RUNNING,
    WAITING,
    Busy,
    Cell,
    is_locked,
    locked,
    read_cells,
    write_cells,
)
from nnunet_xattnres.benchmark.running import ATTEMPTS, _Run
from nnunet_xattnres.benchmark.spec import Executor
from nnunet_xattnres.benchmark.status import progress
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import termination_as_exception
from nnunet_xattnres.nnunet.commands import NnUNet

ROOT = Path(__file__).parents[2]
CELL = Cell(
    dataset="Dataset123_Tiny",
    configuration="small",
    trainer="wide",
    trainer_class="nnUNetTrainerPlanned",
    plans="nnUNetPlans",
    planned_configuration="small_wide",
    fold=1,
    seed=7,
    num_epochs=3,
    parameters=1234,
    test=True,
)


def folder_of(root):
    folder = CELL.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_final_checkpoint(root):
    logging = {"epoch_start_timestamps": [0.0, 10.0, 20.0], "epoch_end_timestamps": [2.0, 13.0, 29.0]}
    content = {"trainer_name": "nnUNetTrainerPlanned", "init_args": {}, "network_weights": {}, "logging": logging}
    torch.save(content, folder_of(root) / "checkpoint_final.pth")


def write_validation(root):
    (folder_of(root) / "validation").mkdir()
    (folder_of(root) / "validation" / "summary.json").write_text("{}")


# Folders, states and locks


def test_every_seed_has_results_of_its_own(tmp_path):
    other = replace(CELL, seed=8)
    assert CELL.results(tmp_path) != other.results(tmp_path)
    tail = "Dataset123_Tiny/nnUNetTrainerPlanned__nnUNetPlans__small_wide/fold_1"
    assert CELL.folder(tmp_path) == tmp_path / "seed_7" / "nnUNet_results" / tail


def test_states_of_a_cell(tmp_path):
    assert CELL.state(tmp_path) == WAITING
    with locked(folder_of(tmp_path) / LOCK, 0):
        CELL.write_record(tmp_path, RUNNING)
        assert CELL.state(tmp_path) == RUNNING
    assert CELL.state(tmp_path) == INTERRUPTED
    CELL.write_record(tmp_path, FAILED, reason="no luck")
    assert CELL.state(tmp_path) == FAILED
    CELL.write_record(tmp_path, FINISHED, epochs=3)
    assert CELL.state(tmp_path) == FINISHED
    assert CELL.record(tmp_path)["trainer"] == "wide"


def test_a_record_that_a_crash_has_emptied_is_that_of_an_interrupted_cell(tmp_path):
    (folder_of(tmp_path) / "cell.json").touch()
    assert CELL.state(tmp_path) == INTERRUPTED
    (folder_of(tmp_path) / "costs.json").touch()
    assert recorded_costs(folder_of(tmp_path)) == recorded_costs(tmp_path) == {"peak_memory_gb": None, "devices": []}


def test_cells_are_read_as_they_were_written(tmp_path):
    write_cells(tmp_path, [CELL, replace(CELL, seed=8)])
    assert read_cells(tmp_path) == [CELL, replace(CELL, seed=8)]


def test_a_lock_is_for_one(tmp_path):
    with locked(tmp_path / "lock", 0):
        with pytest.raises(Busy), locked(tmp_path / "lock", 0.2):
            pass
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "nowhere")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(XAttnResError, match="choose another -o"), locked(tmp_path / "lock", 0):
        pass


def test_a_look_at_a_lock_does_not_keep_it_from_anybody(tmp_path):
    looking = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    Thread(target=lambda: (time.sleep(0.3), os.close(looking))).start()
    with locked(tmp_path / "lock", 5):
        assert is_locked(tmp_path / "lock")


def test_a_lock_lives_as_long_as_the_training_and_ends_with_it(tmp_path):
    """Kill the process that has taken the lock: the training that it has started still has it."""
    taker = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from nnunet_xattnres.benchmark.matrix import locked\n"
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
        "from nnunet_xattnres.benchmark.launch import _keep_to_this_process\n"
        "_keep_to_this_process(int(sys.argv[1]))\n"
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


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


# One cell


class Commands(list):
    """Pairs of a command and its log. results: by command, what happens when it is run."""

    results: dict


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """nnU-Net's commands of a cell, noted instead of run."""

    def run(self, *command, log, environment):
        assert command[:3] == (sys.executable, "-m", "nnunet_xattnres.benchmark.launch")
        seed, lock, folder, *own = command[3:]
        assert (int(seed), folder, self.keep_open) == (CELL.seed, str(CELL.folder(tmp_path)), (int(lock),))
        assert environment == {"nnUNet_results": str(CELL.results(tmp_path))}
        noted.append((own, log))
        results[own[0]]()

    def train():
        write_final_checkpoint(tmp_path)
        write_validation(tmp_path)

    def predict():
        (folder_of(tmp_path) / "test.incomplete").mkdir()

    noted = Commands()
    results = noted.results = {"nnUNetv2_train": train, "nnUNetv2_predict": predict}
    monkeypatch.setattr(NnUNet, "run", run)
    return noted


def test_a_cell_is_trained_predicted_and_recorded_once(commands, tmp_path):
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    (train, _), (predict, _) = commands
    model = ["-tr", "nnUNetTrainerPlanned", "-p", "nnUNetPlans", "-device", "cpu"]
    assert train == ["nnUNetv2_train", "Dataset123_Tiny", "small_wide", "1", *model]
    assert predict[:3] == ["nnUNetv2_predict", "-i", str(tmp_path / "nnUNet_raw" / "Dataset123_Tiny" / "imagesTs")]
    record = CELL.record(tmp_path)
    assert (record["state"], record["epochs"], record["seconds_per_epoch"]) == (FINISHED, 3, 3.0)
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (CELL.folder(tmp_path) / "test").is_dir()
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert len(commands) == 2


def test_a_cell_records_what_its_training_has_recorded(commands, tmp_path):
    costs = {"peak_memory_gb": 1.5, "devices": ["2 x A100", "2 x H100"]}
    (folder_of(tmp_path) / "costs.json").write_text(json.dumps(costs))
    run_cell(tmp_path, CELL, "cuda", num_gpus=2)
    record = CELL.record(tmp_path)
    # Its median time per epoch is neither's.
    assert (record["peak_memory_gb"], record["device"]) == (1.5, "2 x A100 and 2 x H100")


def test_an_interrupted_training_is_continued(commands, tmp_path):
    (folder_of(tmp_path) / "checkpoint_latest.pth").touch()
    run_cell(tmp_path, CELL, "cuda", num_gpus=2)
    (train, _), _ = commands
    assert train[-3:] == ["-num_gpus", "2", "--c"]


def test_an_interrupted_validation_is_repeated_without_training(commands, tmp_path):
    write_final_checkpoint(tmp_path)
    commands.results["nnUNetv2_train"] = lambda: write_validation(tmp_path)
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    (train, _), _ = commands
    assert train[-1] == "--val"
    assert CELL.state(tmp_path) == FINISHED


def test_the_validation_of_another_training_is_not_taken_for_its_own(commands, tmp_path):
    write_validation(tmp_path)
    commands.results["nnUNetv2_train"] = lambda: write_final_checkpoint(tmp_path)
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert not CELL.is_validated(tmp_path)


def test_an_interrupted_prediction_is_repeated_alone(commands, tmp_path):
    write_final_checkpoint(tmp_path)
    write_validation(tmp_path)
    (folder_of(tmp_path) / "test.incomplete").mkdir()
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    ((predict, _),) = commands
    assert predict[0] == "nnUNetv2_predict"


def test_a_failed_cell_says_why_and_keeps_the_log_of_every_attempt(commands, tmp_path):
    def fail():
        log = tmp_path / "logs" / f"{commands[-1][1]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        raise XAttnResError("out of\nluck")

    commands.results["nnUNetv2_train"] = fail
    for _ in range(2):
        run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert CELL.record(tmp_path)["reason"] == "out of luck"
    assert [log.name for log in sorted(CELL.log(tmp_path).iterdir())] == ["train_1.log", "train_2.log"]


def test_a_checkpoint_of_the_benchmarks_is_not_trusted_either(commands, tmp_path):
    write_final_checkpoint(tmp_path)
    write_validation(tmp_path)
    checkpoint = CELL.folder(tmp_path) / "checkpoint_final.pth"
    torch.save(torch.load(checkpoint) | {"extra": Path("here")}, checkpoint)
    run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    reason = CELL.record(tmp_path)["reason"]
    assert reason.startswith(f"{checkpoint} holds pathlib.")
    assert reason.endswith("let its trainer store numbers and tensors only")


def test_a_cell_that_another_process_runs_is_left_alone(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SECONDS_FOR_A_LOOK", 0.2)
    with locked(folder_of(tmp_path) / LOCK, 0):
        run_cell(tmp_path, CELL, "cpu", num_gpus=1)
    assert commands == []
    assert CELL.record(tmp_path) == {}


# Many cells


class FakeMachine:
    """Does with every cell, at once, what it is told to."""

    def __init__(self, root, do):
        self.root, self.do, self.submissions = root, do, []

    def has_room(self):
        return True

    def has(self, cell):
        return False

    def submit(self, cell):
        self.submissions.append(cell)
        self.do(cell)
        return True

    def stop(self):
        pass


class SlowMachine(FakeMachine):
    """What a cell does, it does just after somebody has seen that it has a process."""

    def __init__(self, root, do):
        super().__init__(root, do)
        self.live = []

    def has(self, cell):
        if cell not in self.live:
            return False
        self.live.remove(cell)
        self.do(cell)
        return True

    def submit(self, cell):
        self.submissions.append(cell)
        self.live.append(cell)
        return True


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)


def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again_by_the_next_run(tmp_path):
    cells = [replace(CELL, fold=fold) for fold in range(3)]

    def do(cell):
        cell.write_record(tmp_path, FAILED if cell.fold == 0 else FINISHED, reason="no luck")

    machine = FakeMachine(tmp_path, do)
    _Run(tmp_path, cells, machine).to_the_end()
    assert machine.submissions == cells
    again = FakeMachine(tmp_path, do)
    _Run(tmp_path, cells, again).to_the_end()
    assert again.submissions == cells[:1]


@pytest.mark.parametrize("state", [FINISHED, FAILED])
def test_what_another_run_has_settled_meanwhile_is_not_given_up(state, tmp_path):
    run = _Run(tmp_path, [CELL], FakeMachine(tmp_path, lambda cell: None))
    run.attempts[CELL] = ATTEMPTS
    CELL.write_record(tmp_path, state, reason="another's")
    run._start(CELL)
    assert CELL.record(tmp_path)["reason"] == "another's"


def test_what_another_run_does_is_not_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SECONDS_FOR_A_LOOK", 0.2)
    run = _Run(tmp_path, [CELL], FakeMachine(tmp_path, lambda cell: None))
    run.attempts[CELL] = ATTEMPTS
    with locked(folder_of(tmp_path) / LOCK, 0):
        run._start(CELL)
    assert CELL.record(tmp_path) == {}


def test_a_cell_gets_the_share_that_is_free(tmp_path, monkeypatch):
    class Job:
        def __init__(self, share):
            self.share, self.ended = share, False

        def done(self):
            return self.ended

    monkeypatch.setattr(running, "_shares", lambda executor: ["half", "other half"])
    machine = make_machine(tmp_path, Executor())
    monkeypatch.setattr(machine.submitit, "submit", lambda task, root, cell, num_gpus, share: Job(share))
    cells = [replace(CELL, fold=fold) for fold in range(4)]
    for cell in cells[:2]:
        assert machine.has_room()
        machine.submit(cell)
    assert not machine.has_room()
    machine.jobs[0][1].ended = True
    assert [machine.has(cell) for cell in cells[:2]] == [False, True]
    machine.submit(cells[2])
    assert not machine.has_room()
    assert [job.share for _, job in machine.jobs.values()] == ["other half", "half"]


def test_a_process_that_always_dies_is_given_up(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: None)
    _Run(tmp_path, [CELL], machine).to_the_end()
    assert len(machine.submissions) == ATTEMPTS
    assert str(tmp_path / "jobs") in CELL.record(tmp_path)["reason"]


@pytest.mark.parametrize("before", [None, "another"])
def test_a_cell_that_fails_between_two_looks_has_failed(before, tmp_path):
    if before:
        CELL.write_record(tmp_path, FAILED, reason=before)
    # On a node whose clock is behind.
    machine = SlowMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FAILED, reason="no luck", time=0.0))
    _Run(tmp_path, [CELL], machine).to_the_end()
    assert machine.submissions == [CELL]
    assert CELL.record(tmp_path)["reason"] == "no luck"


def test_a_cell_that_another_run_has_is_waited_for_and_not_begun(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    with locked(folder_of(tmp_path) / LOCK, 0):
        CELL.write_record(tmp_path, RUNNING)
        run = Thread(target=_Run(tmp_path, [CELL], machine).to_the_end)
        run.start()
        time.sleep(0.3)
        assert run.is_alive()
        CELL.write_record(tmp_path, FINISHED)
    run.join(10)
    assert not run.is_alive()
    assert machine.submissions == []


def test_a_cell_whose_other_run_dies_is_taken_over(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    with locked(folder_of(tmp_path) / LOCK, 0):
        CELL.write_record(tmp_path, RUNNING)
        run = Thread(target=_Run(tmp_path, [CELL], machine).to_the_end)
        run.start()
        time.sleep(0.3)
    run.join(10)
    assert machine.submissions == [CELL]


@pytest.mark.parametrize(
    ("visible", "there", "executor", "expected"),
    [
        (None, 2, Executor(), ["0", "1"]),
        ("3,5,GPU-ab", 3, Executor(), ["3", "5", "GPU-ab"]),
        (None, 2, Executor(jobs=3), ["0", "1", "0"]),
        (None, 5, Executor(num_gpus=2), ["0,1", "2,3"]),
    ],
)
def test_gpus_are_shared_out(visible, there, executor, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert running._shares(executor) == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in expected]


@pytest.mark.parametrize(
    ("executor", "user", "expected"),
    [
        (Executor(), None, ["6"]),
        (Executor(jobs=4), None, ["1"] * 4),
        (Executor(jobs=8), None, ["1"] * 8),
        (Executor(jobs=2), "5", ["5"] * 2),
    ],
)
def test_without_gpus_cores_are_shared_out(executor, user, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user:
        monkeypatch.setenv("OMP_NUM_THREADS", user)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(running, "available_cores", lambda: 6)
    shares = running._shares(executor)
    assert [share["OMP_NUM_THREADS"] for share in shares] == expected
    # None may see a GPU that this process has not been given.
    assert {share["CUDA_VISIBLE_DEVICES"] for share in shares} == {""}


def test_a_job_gets_its_share_of_the_machine(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    CellTask()(tmp_path, CELL, 1, {"OMP_NUM_THREADS": "7"})
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("there", [0, 1])
def test_more_gpus_than_there_are(there, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(XAttnResError, match="num_gpus of executor is 2"):
        running._shares(Executor(num_gpus=2))


RUN_WITH_A_JOB = """
import os, signal, subprocess, sys
from nnunet_xattnres.benchmark.running import _children_heed_interrupts
before = signal.getsignal(signal.SIGINT), os.getpgrp()
assert before[0] == signal.SIG_IGN
jobs = []
for _ in range(2):
    with _children_heed_interrupts():
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


def test_slurm_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(XAttnResError, match="no Slurm here"):
        make_machine(tmp_path, Executor("slurm"))


def test_a_parameter_that_slurm_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    with pytest.raises(XAttnResError, match="partitoin") as error:
        make_machine(tmp_path, Executor("slurm", parameters={"partitoin": "gpu"}))
    assert "\n" not in str(error.value)


@pytest.fixture
def queue(monkeypatch):
    """The names of the jobs of a Slurm whose user may have two."""

    def submit(self, *given):
        if len(queue) >= 2:
            raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsubmission failed")
        queue.append(self.parameters["job_name"])

    queue: list[str] = []
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    monkeypatch.setattr("submitit.SlurmExecutor.submit", submit)
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: SimpleNamespace(stdout="\n".join(queue)))
    monkeypatch.setattr(running, "QUEUE_SECONDS", 0.2)
    return queue


def test_what_slurm_does_not_take_now_it_is_given_again(queue, tmp_path, capsys):
    cells = [replace(CELL, seed=seed) for seed in range(3)]
    machine = make_machine(tmp_path, Executor("slurm"))
    assert [machine.submit(cell) for cell in cells] == [True, True, False]
    assert not machine.has_room()
    assert eventually(machine.has_room)
    assert not machine.submit(cells[2])
    assert capsys.readouterr().err == (
        "Slurm takes no job: sbatch: error: QOSMaxSubmitJobPerUserLimit submission failed; trying again until it does\n"
    )
    # A later run finds the jobs of this one.
    machine = make_machine(tmp_path, Executor("slurm"))
    assert [machine.has(cell) for cell in cells] == [True, True, False]
    assert not machine.submit(cells[2])
    queue.pop()
    assert machine.submit(cells[2])


def test_slurm_that_takes_no_job_at_all(queue, tmp_path):
    queue += ["something", "else"]
    with pytest.raises(XAttnResError, match="Slurm takes no job: sbatch: error: QOSMaxSubmitJobPerUserLimit"):
        running.run_cells(tmp_path, [CELL], make_machine(tmp_path, Executor("slurm")))


def test_what_a_machine_does_not_take_is_not_given_up(tmp_path):
    class Reluctant(FakeMachine):
        refusals = 2 * ATTEMPTS

        def submit(self, cell):
            self.refusals -= 1
            return self.refusals < 0 and super().submit(cell)

    machine = Reluctant(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    running.run_cells(tmp_path, [CELL], machine)
    assert CELL.state(tmp_path) == FINISHED


# What is shown

LOG = """
2026-11-23 16:00:00.1: Epoch 0
2026-11-23 16:00:00.2: Current learning rate: 0.01
2026-11-23 16:01:00.1: train_loss -0.1
2026-11-23 16:01:00.1: Pseudo dice [np.float32(0.25), np.float32(0.75)]
2026-11-23 16:01:00.1: Epoch time: 60.0 s
2026-11-23 16:01:00.1: Yayy! New best EMA pseudo Dice: 0.5
2026-11-23 16:01:00.2:
2026-11-23 16:01:00.2: Epoch 1
"""


def test_progress_is_read_from_nnunets_log(tmp_path):
    assert progress(tmp_path, CELL).line == "epoch 1/3, pseudo-Dice -"
    log = folder_of(tmp_path) / "training_log_2026_11_23_16_00_00.txt"
    log.write_text(LOG)
    assert progress(tmp_path, CELL).line == "epoch 2/3, pseudo-Dice 0.500, 2 min of training left"
    # Interrupted before it ended, and continued from the checkpoint of the first epoch.
    second = folder_of(tmp_path) / "training_log_2026_11_23_17_00_00.txt"
    second.write_text(LOG.replace("Epoch 1", "Epoch 2").replace("Epoch 0", "Epoch 1").replace("0.75", "0.95"))
    os.utime(log, (0, 0))
    assert progress(tmp_path, CELL).line == "epoch 3/3, pseudo-Dice 0.600, 1 min of training left"


@pytest.mark.parametrize(
    ("printed", "mean"),
    [
        ("[0.5, 0.7]", "0.600"),
        ("[np.float32(0.5), nan]", "0.500"),
        ("[np.float64(3e-04), 1.0]", "0.500"),
        ("[nan]", "-"),
    ],
)
def test_pseudo_dice_as_numpy_prints_it(printed, mean, tmp_path):
    line = "2026-11-23 16:01:00.1: Pseudo dice "
    (folder_of(tmp_path) / "training_log_1.txt").write_text(f"{line}{printed} \n")
    assert progress(tmp_path, CELL).line == f"epoch 1/3, pseudo-Dice {mean}"


def test_status_of_a_matrix(tmp_path, capsys):
    cells = [replace(CELL, fold=fold, seed=seed) for seed in (0, 1) for fold in (0, 1)]
    write_cells(tmp_path, cells)
    cells[0].write_record(tmp_path, FINISHED)
    cells[1].write_record(tmp_path, FAILED, reason="no luck")
    with locked(cells[2].folder(tmp_path) / LOCK, 0):
        assert main(["benchmark", "status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "running 0/3" in out
    assert "4 cells: 1 finished, 1 failed, 1 running, 0 interrupted, 1 waiting" in out
    assert "Dataset123_Tiny small wide fold 1 seed 0 failed: no luck" in out
    assert "Dataset123_Tiny small wide fold 0 seed 1: epoch 1/3" in out


def test_status_of_something_else(tmp_path, capsys):
    assert main(["benchmark", "status", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "matrix.json").write_text("")
    assert main(["benchmark", "status", str(tmp_path)]) == 1
    assert "is damaged: `nnunet-xattnres benchmark run` writes it again" in capsys.readouterr().err


def test_status_while_data_is_prepared(tmp_path, capsys):
    with locked(tmp_path / PREPARATION_LOCK, 0):
        assert main(["benchmark", "status", str(tmp_path)]) == 0
        assert "being prepared" in capsys.readouterr().out
        write_cells(tmp_path, [CELL])
        assert main(["benchmark", "status", str(tmp_path)]) == 0
    assert "1 cells" in capsys.readouterr().out


# What a launched training gets


def test_seeds_fix_what_the_process_draws():
    def draw():
        return [np.random.random(), torch.rand(()).item(), random.random()]

    set_seeds(3)
    first = draw()
    set_seeds(3)
    assert draw() == first
    set_seeds(4)
    assert draw() != first


def test_nnunet_is_seeded_and_keeps_to_the_threads_of_the_cell(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(multiprocessing, "cpu_count", multiprocessing.cpu_count)
    monkeypatch.setattr(launch, "_keep_to_this_process", lambda descriptor: None)
    # Whatever the installed command is called by, it is nnU-Net's own function.
    train = ["nnUNetv2_train", "999", "2d", "0", "-device", "cpu"]
    monkeypatch.setattr(run_training, "run_training", lambda *given, **options: seen.append(torch.rand(()).item()))
    threads = torch.get_num_threads()
    for seed in (3, 3, 4):
        monkeypatch.setattr(sys, "argv", ["launch", str(seed), "9", str(tmp_path), *train])
        (tmp_path / "checkpoint_final.pth").touch()
        # As it would be on a machine with other numbers of cores and threads.
        monkeypatch.setattr(multiprocessing, "cpu_count", lambda: threads + 1)
        launch.main()
        assert torch.get_num_threads() == threads
    assert seen[0] == seen[1] != seen[2]


def test_with_several_gpus_every_process_is_seeded(tmp_path, monkeypatch):
    drawn = {}

    def note(rank, *arguments):
        drawn[rank, arguments] = torch.rand(()).item()

    monkeypatch.setattr(run_training, "run_ddp", run_training.run_ddp)
    recorded = []
    monkeypatch.setattr(launch, "record_costs", lambda *given: recorded.append(given))
    launch._reach_every_gpu(3, tmp_path, 2)
    # nnU-Net sends it to processes of their own.
    seeded = pickle.loads(pickle.dumps(run_training.run_ddp))
    monkeypatch.setattr(run_training, "run_ddp", note)
    for rank in (0, 1):
        seeded(rank, "004", "2d")
    set_seeds(3)
    assert drawn[0, ("004", "2d")] == torch.rand(()).item()
    assert drawn[1, ("004", "2d")] != drawn[0, ("004", "2d")]
    # Once for all of them.
    assert recorded == [(tmp_path, 2)]


def test_memory_is_recorded_until_the_training_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SAMPLING_SECONDS", 0.01)
    launch.record_costs(tmp_path, num_gpus=0)
    held = np.ones(100_000_000 // 8)
    assert eventually((tmp_path / "costs.json").exists)
    time.sleep(0.1)
    (tmp_path / "checkpoint_final.pth").touch()
    assert eventually(lambda: recorded_costs(tmp_path)["peak_memory_gb"] >= held.nbytes / 1e9)


def test_every_device_of_a_training_is_recorded_once_and_none_of_its_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SAMPLING_SECONDS", 0.01)
    final = tmp_path / "checkpoint_final.pth"
    for cpu, cores in (("Slow", 2), ("Slow", 2), ("Slow", 3), ("Fast", 3)):
        monkeypatch.setattr(launch, "cpu_name", lambda cpu=cpu: cpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        launch.record_costs(tmp_path, num_gpus=0)
        final.touch()
        assert eventually(lambda: not any(thread.name == launch.COSTS for thread in threading.enumerate()))
        final.unlink()
    devices = ["Slow, 2 threads", "Slow, 3 threads", "Fast, 3 threads"]
    assert recorded_costs(tmp_path)["devices"] == devices
    final.touch()
    monkeypatch.setattr(launch, "cpu_name", lambda: "Another")
    launch.record_costs(tmp_path, num_gpus=0)
    time.sleep(0.1)
    assert recorded_costs(tmp_path)["devices"] == devices


@pytest.mark.parametrize(("num_gpus", "device"), [(1, "A100"), (4, "4 x A100")])
def test_gpus_are_named_with_their_number(num_gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    assert launch._device(num_gpus) == device


# Downloads


class RangeHandler(SimpleHTTPRequestHandler):
    """Python's server, with ranges."""

    requests: ClassVar[list] = []

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server that has Task04_Hippocampus.tar, and what it holds."""
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "Task04_Hippocampus.tar").write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(tmp_path / "www")))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch, "MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(fetch.MD5, "Task04_Hippocampus", md5(content).hexdigest())
    monkeypatch.setattr(RangeHandler, "requests", [])
    yield content
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("task", ["Task04_Hippocampus", "4", "04", "Task04"])
def test_a_task_is_fetched(task, mirror, tmp_path, capsys):
    assert main(["benchmark", "fetch", task, "-o", str(tmp_path / "msd")]) == 0
    assert (tmp_path / "msd" / "Task04_Hippocampus.tar").read_bytes() == mirror
    assert "100%" in capsys.readouterr().err
    assert main(["benchmark", "fetch", task, "-o", str(tmp_path / "msd")]) == 0
    assert len(RangeHandler.requests) == 1


@pytest.mark.parametrize("there", [1_000_000, 3_000_000])
def test_an_interrupted_download_is_continued(there, mirror, tmp_path):
    (tmp_path / "Task04_Hippocampus.tar.part").write_bytes(mirror[:there])
    assert main(["benchmark", "fetch", "4", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "Task04_Hippocampus.tar").read_bytes() == mirror
    assert RangeHandler.requests == [f"bytes={there}-"]


def test_a_download_with_another_checksum_is_thrown_away(mirror, tmp_path, capsys):
    (tmp_path / "Task04_Hippocampus.tar.part").write_bytes(b"something else")
    assert main(["benchmark", "fetch", "4", "-o", str(tmp_path)]) == 1
    assert "MD5" in capsys.readouterr().err
    assert not list(tmp_path.glob("Task04*"))


def test_a_folder_that_nothing_can_be_downloaded_to(mirror, capsys):
    assert main(["benchmark", "fetch", "4", "-o", "/dev/null"]) == 1
    assert "choose another -o" in capsys.readouterr().err
    assert RangeHandler.requests == []


def test_an_unknown_task_and_a_mirror_that_is_away(tmp_path, monkeypatch, capsys):
    assert main(["benchmark", "fetch", "Task04_Hipocampus", "-o", str(tmp_path)]) == 1
    assert "did you mean Task04_Hippocampus" in capsys.readouterr().err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(fetch, "MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert main(["benchmark", "fetch", "11", "-o", str(tmp_path)]) == 1
        capsys.readouterr()
        assert main(["benchmark", "fetch", "10", "-o", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "refused" in err
