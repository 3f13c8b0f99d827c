"""nnU-Net's commands in processes of their own: output, environment, failure and interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet import commands
from nnunet_xattnres.nnunet.commands import NnUNet, find_command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a console command on PATH out of Python source."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.1)

    def make(source, name="nnUNetv2_pretend"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{source}")
        path.chmod(0o755)
        return name

    return make


def test_output_goes_to_the_terminal_and_to_the_log(command, tmp_path, capsys):
    name = command("import sys\nsys.stdout.write('10%|\\r20%|\\rdöne\\n')\nsys.stderr.write('warned\\n')")
    NnUNet(tmp_path, "cpu").run(name, log="pretend")
    assert "10%|\r20%|\rdöne\n" in capsys.readouterr().out
    log = (tmp_path / "logs" / "pretend.log").read_bytes().decode()
    assert "10%|\r20%|\rdöne\n" in log
    assert "warned" in log


def test_failure_is_one_line_with_the_reason_and_the_log(command, tmp_path):
    name = command("print('fine so far', flush=True)\nraise RuntimeError('no such case')")
    with pytest.raises(XAttnResError) as error:
        NnUNet(tmp_path, "cpu").run(name, "-d", "4", log="pretend")
    message = str(error.value)
    assert "\n" not in message
    assert f"{name} -d 4" in message
    assert "RuntimeError: no such case" in message
    assert str(tmp_path / "logs" / "pretend.log") in message


def test_killed_command_names_the_signal(command, tmp_path):
    name = command("import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(XAttnResError, match="SIGKILL"):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")


def test_workers_of_a_killed_command_end_with_it(command, tmp_path):
    name = command(
        "import os, subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(worker.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(XAttnResError, match="SIGKILL"):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")
    assert wait_until_ended(int((tmp_path / "pid").read_text()))


def test_missing_command_says_how_to_get_it():
    with pytest.raises(XAttnResError, match="pip install nnunetv2"):
        find_command("nnUNetv2_does_not_exist")


def test_nnunet_is_found_without_an_activated_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert Path(find_command("nnUNetv2_train")).parent == Path(sys.executable).parent


def interrupted(text):
    raise KeyboardInterrupt


def terminated(text):
    os.kill(os.getpid(), signal.SIGTERM)
    # The handler runs as soon as Python code does.
    time.sleep(5)


@pytest.mark.parametrize(
    ("interruption", "exception"), [(interrupted, KeyboardInterrupt), (terminated, SystemExit)], ids=["ctrl-c", "term"]
)
def test_interruption_ends_the_command_and_its_workers(command, tmp_path, monkeypatch, interruption, exception):
    name = command(
        "import os, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{worker.pid}}')\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys.stdout, "write", interruption)
    with pytest.raises(exception):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == handler
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert wait_until_ended(pid), f"process {pid} still runs"


def wait_until_ended(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_commands_work_in_the_workdir_whatever_the_shell_says(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, "/precious")
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    environment = NnUNet(tmp_path, "cpu").environment()
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert environment["nnUNet_preprocessed"] == str(tmp_path / "nnUNet_preprocessed")
    assert environment["nnUNet_results"] == str(tmp_path / "nnUNet_results")
    assert environment["nnUNet_extTrainer"].split(os.pathsep)[0] == "/mine"
    assert "/precious" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["nnUNet_n_proc_DA"] == "7"


def test_memory_settings_are_for_the_cpu_only(tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert "MALLOC_TRIM_THRESHOLD_" in NnUNet(tmp_path, "cpu").environment()
    assert "MALLOC_TRIM_THRESHOLD_" not in NnUNet(tmp_path, "cuda").environment()


@pytest.mark.parametrize(
    ("allotted", "job", "expected"),
    [
        (1, {}, ["1 1 1 1"] * 3),
        (64, {"SLURM_CPUS_PER_TASK": "4"}, ["4 4 2 4", "4 4 4 4", "4 4 4 4"]),
        (3, {"SLURM_CPUS_PER_TASK": "4"}, ["3 3 2 3", "3 3 3 3", "3 3 3 3"]),
        (64, {}, ["8 8 2 64", "8 8 12 64", "8 8 12 64"]),
    ],
)
def test_workers_are_as_many_as_the_cores_that_the_process_may_use(allotted, job, expected):
    """As under `taskset` or in a job of Slurm, on a machine of 64 cores."""
    program = (
        "import os\n"
        f"os.cpu_count, os.sched_getaffinity = lambda: 64, lambda process: range({allotted})\n"
        "from pathlib import Path\n"
        "from nnunet_xattnres.nnunet.commands import NUM_WORKERS, NnUNet\n"
        "names = ('nnUNet_def_n_proc', 'nnUNet_n_proc_DA', 'PYTHON_CPU_COUNT')\n"
        "for device in ('cpu', 'cuda', 'mps'):\n"
        "    environment = NnUNet(Path(), device).environment()\n"
        "    print(NUM_WORKERS, *(environment[name] for name in names))\n"
    )
    others = ("nnUNet", "PYTHON_CPU", "SLURM")
    own = {name: value for name, value in os.environ.items() if not name.startswith(others)} | job
    printed = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == expected
