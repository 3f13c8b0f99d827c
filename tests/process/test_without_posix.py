"""Commands in a process that lacks what Windows lacks. Torch and nnU-Net need it on Linux and are imported before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers.images import write_oblique_phantom

WITHOUT_POSIX = """
import os, signal, sys, types
import matplotlib.pyplot, nnunetv2.training.nnUNetTrainer.nnUNetTrainer, psutil, torch

for name in ("fcntl", "resource", "pwd"):
    sys.modules[name] = None
for name in ("killpg", "getpgrp", "setpgrp", "setpgid", "register_at_fork", "sched_getaffinity"):
    delattr(os, name)
psutil.Process.kill = lambda self, number=int(signal.SIGKILL): self.send_signal(number)
for name in ("SIGHUP", "SIGKILL"):
    delattr(signal, name)

from nnunet_xattnres.common import device
device.sys = types.SimpleNamespace(platform="win32")
from nnunet_xattnres.cli import main
"""


def without_posix(program: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_POSIX + program]
    return subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)


@pytest.mark.long
def test_commands_work_or_say_that_they_do_not(trained_model, nnunet, tmp_path):
    image = write_oblique_phantom(tmp_path / "images")
    program = f"""
assert main(["trainers"]) == 0
from nnunet_xattnres.tools import doctor
doctor.list_trainers = lambda: []
assert main(["doctor"]) == 0
assert main(["inspect", "-m", {str(trained_model)!r}, "-f", "0", "-i", {str(image)!r}, "-o", {str(tmp_path / "out")!r},
             "--targets", "D0", "--device", "cpu"]) == 0
import nnunet_xattnres.tools.demo, nnunet_xattnres.tools.warm_start
assert main(["benchmark", "run", "spec.yaml", "-o", "anywhere"]) == 1
assert main(["benchmark", "status", "anywhere"]) == 1
"""
    (tmp_path / "results").mkdir()
    ended = without_posix(program, nnunet.folders() | {"nnUNet_results": str(tmp_path / "results")})
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "case" / "routing.json").exists()
    assert [line[-23:] for line in ended.stderr.splitlines()[-2:]] == ["use Linux, macOS or WSL"] * 2


def test_processes_are_started_and_ended_with_those_that_they_start(tmp_path):
    """overhead and demo: a measurement that fails, a command that is run, and one that is interrupted."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "broken.py").write_text("print('no such thing')\nraise SystemExit(3)")
    for name, source in {
        "works": "print('it works')",
        "waits": "import os, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{worker.pid}}')\n"
        "print('ready', flush=True)\ntime.sleep(60)",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{source}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    program = f"""
from pathlib import Path
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.overhead import runner

runner.MEASUREMENT = "broken"
answer = runner.measure_in_new_process(runner.Request({{}}, "2d", {{}}, "nnUNetTrainerPlanned", "cpu"))
assert answer.reason == "exit status 3: no such thing", answer
nnunet = NnUNet(Path({str(tmp_path)!r}), "cpu")
nnunet.run("works", log="works")
write = sys.stdout.write
def interrupt(text):
    raise KeyboardInterrupt
sys.stdout.write = interrupt
try:
    nnunet.run("waits", log="waits")
except KeyboardInterrupt:
    sys.exit(7)
"""
    search = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    ended = without_posix(program, search)
    assert ended.returncode == 7, ended.stderr
    assert "it works" in (tmp_path / "logs" / "works.log").read_text()
    for pid in map(int, Path(tmp_path, "pids").read_text().split()):
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"process {pid} still runs")
