"""The command `nnunet-xattnres overhead` with measurements in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import torch

from helpers.overhead import (
    DATASET,
    NO_SKIP,
    PLANNED,
    output_options,
    small_request,
    use_own_trainer,
    write_small_plans,
)
from nnunet_xattnres.cli import main
from nnunet_xattnres.overhead import runner
from nnunet_xattnres.overhead.measurement import OUT_OF_MEMORY
from nnunet_xattnres.overhead.runner import measure_in_new_process

TESTS = Path(__file__).parents[1]


@pytest.fixture
def plans_file(tmp_path):
    return write_small_plans(tmp_path / "preprocessed")


@pytest.fixture
def outputs(tmp_path):
    return output_options(tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize(
    "program", [pytest.param(runner.MEASUREMENT, marks=pytest.mark.slow), "helpers.quick_measurement"]
)
def test_the_whole_command(program, plans_file, outputs, monkeypatch, capsys):
    monkeypatch.setattr(runner, "MEASUREMENT", program)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("nnUNet_preprocessed", str(plans_file.parents[1]))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    arguments = ["-d", "4", "-c", "small", "--trainers", NO_SKIP, "--repeats", "1", "--device", "cpu", *outputs]
    assert main(["overhead", *arguments]) == 0
    captured = capsys.readouterr()
    # While it runs there is one bar and nothing of nnU-Net's own output.
    assert all("process" in line for line in captured.err.strip().split("\r") if line.strip()), captured.err
    assert "Please cite" not in captured.out
    assert f"{DATASET}, small of nnUNetPlans" in captured.out
    assert "XAttnResNoSkip reads at: E2 D0 D1" in captured.out
    assert "MALLOC_ARENA_MAX=3" in captured.out
    assert max(map(len, captured.out.splitlines()[:6])) <= 120

    content = json.loads(Path(outputs[1]).read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["allocator"]["MALLOC_ARENA_MAX"] == "3"
    planned, ours = content["plans"][0]["trainers"]
    assert (planned["trainer"], ours["trainer"]) == (PLANNED, NO_SKIP)
    assert planned["step_seconds_ratio"] == planned["peak_memory_bytes_ratio"] == 1
    assert ours["parameters"] < planned["parameters"]
    assert len(ours["rounds"]) == 1
    assert ours["step_seconds_min"] == min(ours["rounds"][0]["step_seconds"])
    with open(outputs[3]) as file:
        assert [row["trainer"] for row in csv.DictReader(file)] == [PLANNED, NO_SKIP]
    assert matplotlib.image.imread(outputs[5]).std() > 0


def pretended_measurement(folder, *lines):
    """Make a module `pretended` that takes the place of a measurement, without its imports. It knows `folder`."""
    (folder / "pretended.py").write_text("\n".join(["import json, os, sys, time", "folder = sys.argv[1]", *lines]))


def test_a_process_that_the_kernel_kills_was_out_of_memory(tmp_path, monkeypatch):
    pretended_measurement(
        tmp_path,
        "json.dump({'status': 'failed', 'parameters': 7}, open(f'{folder}/answer.json', 'w'))",
        "os.kill(os.getpid(), 9)",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "MEASUREMENT", "pretended")
    answer = measure_in_new_process(small_request())
    assert (answer.status, answer.reason, answer.parameters) == (OUT_OF_MEMORY, "", 7)


def test_ctrl_c_ends_the_measurement_and_leaves_nothing(plans_file, outputs, tmp_path, monkeypatch, capsys):
    pid_file = tmp_path / "pid"
    pretended_measurement(tmp_path, f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))", "time.sleep(60)")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "MEASUREMENT", "pretended")

    def interrupt():
        if eventually(lambda: pid_file.is_file() and pid_file.read_text()):
            os.kill(os.getpid(), signal.SIGINT)

    # Whoever runs the tests may ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interruption = threading.Thread(target=interrupt)
    interruption.start()
    try:
        plans = ["--plans", str(plans_file), "-c", "small", "--trainers", PLANNED]
        assert main(["overhead", *plans, "--device", "cpu", *outputs]) == 130
    finally:
        interruption.join()
        signal.signal(signal.SIGINT, handler)
    last_line = "nnunet-xattnres: interrupted; plans whose table was printed are in the files\n"
    assert capsys.readouterr().err.endswith(last_line)
    assert not psutil.pid_exists(int(pid_file.read_text()))
    assert not list(temporary.glob("nnunet_xattnres_*"))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(plans_file, tmp_path, monkeypatch):
    """The same with all of its processes, and a real measurement."""
    pid_file = tmp_path / "pid"
    wait = f"open({str(pid_file)!r}, 'w').write(str(__import__('os').getpid())); __import__('time').sleep(600)"
    use_own_trainer(wait, tmp_path / "mine", monkeypatch)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # With CUDA_HOME but without a GPU, some modules of PyTorch print a warning when they are imported.
    no_gpu = {"CUDA_HOME": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    program = (
        "import nnunet_xattnres.overhead.runner as runner; runner.PLANNED = 'nnUNetTrainerMine'; "
        "from nnunet_xattnres.cli import main; raise SystemExit(main())"
    )
    plans = ["--plans", str(plans_file), "-c", "small", "--trainers", "nnUNetTrainerMine"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "overhead", *plans, "--device", "cpu"],
        env=os.environ | no_gpu | {"TMPDIR": str(temporary)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert eventually(lambda: (pid_file.is_file() and pid_file.read_text()) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    *bar, last = err.strip().splitlines()
    assert last == "nnunet-xattnres: interrupted; plans whose table was printed are in the files"
    assert all("process" in line for line in "".join(bar).split("\r") if line.strip()), err
    assert not psutil.pid_exists(int(pid_file.read_text()))
    assert not list(temporary.glob("nnunet_xattnres_*"))


def eventually(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
