"""A matrix of real trainings, on this machine and on a Slurm of one node: slow."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import SimpleITK as sitk
import yaml

from nnunet_xattnres.benchmark.cells import FINISHED, read_cells
from nnunet_xattnres.benchmark.locks import is_locked
from nnunet_xattnres.benchmark.preparation import prepare
from nnunet_xattnres.benchmark.spec import read_spec
from nnunet_xattnres.benchmark.spec_check import check_spec
from nnunet_xattnres.benchmark.tables import read_tables
from nnunet_xattnres.cli import main
from nnunet_xattnres.nnunet.phantom import write_phantom_dataset

pytestmark = pytest.mark.slow

DATASET = "Dataset905_Phantom"
NUM_EPOCHS = 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a spec and its dataset, of which the data is prepared: two trainers, one fold, a test set."""
    folder = tmp_path_factory.mktemp("benchmark")
    data = folder / "data" / DATASET
    write_phantom_dataset(data, num_cases=6, seed=0)
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (data / f"{kind}Ts").mkdir()
        (data / f"{kind}Tr" / f"phantom_005{ending}").rename(data / f"{kind}Ts" / f"phantom_005{ending}")
    dataset_json = json.loads((data / "dataset.json").read_text()) | {"numTraining": 5}
    (data / "dataset.json").write_text(json.dumps(dataset_json))
    small = {"base": "3d_fullres", "features": 4, "patch_voxels": 8000, "batch_size": 2, "epochs": NUM_EPOCHS}
    spec = {
        "datasets": [{"path": f"data/{DATASET}"}],
        "configurations": {"small": small | {"iterations": 3, "validation_iterations": 1}},
        "trainers": ["nnUNetTrainerPlanned", "nnUNetTrainerXAttnRes"],
        "folds": [0],
        "seeds": [0],
    }
    write_spec(folder, spec)
    checked, inputs = check_spec(read_spec(folder / "spec.yaml"))
    (folder / "out").mkdir()
    prepare(folder / "out", checked, inputs)
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    """The same with results of its own. The data stays where it is, for a path in the spec tells specs apart."""
    shutil.copytree(prepared / "out", tmp_path / "out", symlinks=True)
    shutil.copy(prepared / "out" / "spec.yaml", tmp_path / "spec.yaml")
    return tmp_path


def write_spec(folder, content):
    (folder / "spec.yaml").write_text(yaml.safe_dump(content))


def edit_spec(folder, **changes):
    content = yaml.safe_load((folder / "spec.yaml").read_text())
    write_spec(folder, content | changes)


def start(folder, *, in_background=False, **environment):
    """in_background: as a script's `&` starts it, deaf to Ctrl-C."""
    command = [sys.executable, "-m", "nnunet_xattnres", "benchmark", "run", str(folder / "spec.yaml")]
    return subprocess.Popen(
        [*command, "-o", str(folder / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN) if in_background else None,
    )


def finish(run):
    # A slow machine takes ten times as long as a fast one.
    output, _ = run.communicate(timeout=1500)
    assert run.returncode == 0, output
    return output


def eventually(condition, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_finished(folder):
    """Every cell has been trained for as many epochs as it should be, each once, and has its predictions."""
    out = folder / "out"
    for cell in read_cells(out):
        assert cell.state(out) == FINISHED
        record = cell.record(out)
        assert record["epochs"] == NUM_EPOCHS
        assert record["seconds_per_epoch"] > 0
        assert record["parameters"] > 0
        assert record["peak_memory_gb"] > 0
        assert record["device"].endswith("threads")
        assert (cell.folder(out) / "validation" / "summary.json").is_file()
        image = sitk.ReadImage(cell.folder(out) / "test" / "phantom_005.nii.gz")
        reference = sitk.ReadImage(out / "nnUNet_raw" / DATASET / "labelsTs" / "phantom_005.nii.gz")
        assert image.GetSize() == reference.GetSize()
    check_report(out, folder)


def check_report(out, folder):
    """Every prediction is measured, and the tables alone make the same report."""
    for source, target in ((out, folder / "report"), (folder / "report", folder / "again")):
        assert main(["benchmark", "report", str(source), "-o", str(target)]) == 0
    cases = read_tables(folder / "report").cases
    trainers = {cell.trainer for cell in read_cells(out)}
    predicted = set(zip(cases.trainer, cases.set, strict=True))
    assert predicted == {(trainer, kind) for trainer in trainers for kind in ("validation", "test")}
    assert cases[cases.set == "test"].case.unique().tolist() == ["phantom_005"]
    assert cases[cases.reference_voxels > 0].dice.between(0, 1).all()
    assert "XAttnRes - Planned" in (folder / "report" / "report.md").read_text()
    for name in ("cases.csv", "report.md", "report.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "report" / name).read_bytes()


def epochs_begun(out, cell):
    logs = sorted(cell.folder(out).glob("training_log_*.txt"), key=lambda log: log.stat().st_mtime)
    return [int(line.split()[-1]) for log in logs for line in log.read_text().splitlines() if ": Epoch " in line[-14:]]


def kill_everything_in(folder):
    """Every process that has to do with the folder."""
    for process in psutil.process_iter():
        try:
            about = " ".join(process.cmdline()) + str(process.environ().get("nnUNet_results", ""))
            if str(folder) in about and process.pid != os.getpid():
                process.kill()
        except psutil.Error:
            continue


def test_a_matrix_that_is_killed_continues_and_does_nothing_twice(folder):
    out = folder / "out"
    first, second = read_cells(out)
    run = start(folder)
    eventually((first.folder(out) / "checkpoint_latest.pth").exists)
    kill_everything_in(folder)
    run.communicate()
    eventually(lambda: not is_locked(first.lock(out)))

    finish(start(folder))
    check_finished(folder)
    for cell in (first, second):
        # An epoch that was not finished begins again, no other does.
        begun = epochs_begun(out, cell)
        assert set(begun) == set(range(NUM_EPOCHS))
        assert len(begun) <= NUM_EPOCHS + (cell == first)

    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "seed_0" in path.parts}
    assert "finished" in finish(start(folder))
    assert {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "seed_0" in path.parts
    } == files


def test_two_runs_share_a_matrix(folder):
    runs = [start(folder), start(folder)]
    for run in runs:
        finish(run)
    check_finished(folder)
    out = folder / "out"
    assert [epochs_begun(out, cell) for cell in read_cells(out)] == 2 * [list(range(NUM_EPOCHS))]
    # As many attempts as cells: nobody has begun what another had.
    assert len(list(out.glob("logs/seed_0/**/train_*.log"))) == 2


def test_a_killed_run_leaves_its_trainings_to_the_next(folder):
    out = folder / "out"
    first, _ = read_cells(out)
    run = start(folder)
    eventually(lambda: is_locked(first.lock(out)))
    os.kill(run.pid, signal.SIGKILL)
    # Its output ends with the training that it has left.
    run.wait()
    assert is_locked(first.lock(out))
    finish(start(folder))
    check_finished(folder)
    assert epochs_begun(out, first) == list(range(NUM_EPOCHS))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_that_is_ended_ends_its_training(in_background, folder):
    out = folder / "out"
    first, _ = read_cells(out)
    run = start(folder, in_background=in_background)
    eventually((first.folder(out) / "costs.json").exists)
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode
    assert not is_locked(first.lock(out))


@pytest.fixture
def slurm(tmp_path):
    """The environment variables of a Slurm of one node, this machine; its daemons end with the test."""
    daemons = ("munged", "slurmctld", "slurmd", "sbatch")
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in daemons if shutil.which(name, path=search) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    host = socket.gethostname().partition(".")[0]
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key, munge = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    configuration = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "AuthInfo": f"socket={munge}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
        "PartitionName": f"main Nodes={host} Default=YES MaxTime=INFINITE State=UP",
    }
    (folder / "slurm.conf").write_text("".join(f"{key}={value}\n" for key, value in configuration.items()))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search}
    own = {name: str(folder / f"munged.{name}") for name in ("pid", "log", "seed")}
    files = [f"--{name}-file={path}" for name, path in own.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={key}", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    processes = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as output:
                variables = os.environ | environment
                processes.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))
            if command[0] == "munged":
                eventually(munge.exists, 20)
        eventually(lambda: "idle" in slurm_command(environment, "sinfo", "-h", "-o", "%t"), 30)
        yield environment
        subprocess.run(["scancel", "--user", "root"], env=os.environ | environment, timeout=30)
        eventually(lambda: not slurm_command(environment, "squeue", "-h"), 60)
    finally:
        # pytest shows it where the test fails, a Slurm that does not start included.
        for output in folder.glob("*.out"):
            print(f"{output.name}:\n{output.read_text(errors='replace')[-2000:]}")
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def slurm_command(environment, *command):
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_matrix_runs_on_slurm_and_a_killed_run_finds_its_jobs_again(folder, slurm):
    edit_spec(folder, executor={"kind": "slurm", "parameters": {"cpus_per_task": os.cpu_count(), "time": 20}})
    run = start(folder, **slurm)
    # One job runs, the other waits for the cores.
    eventually(lambda: len(slurm_command(slurm, "squeue", "-h").splitlines()) == 2)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    finish(start(folder, **slurm))
    check_finished(folder)
    # As many jobs as cells, although two runs have wanted them.
    assert len(list((folder / "out" / "jobs").glob("*_submitted.pkl"))) == 2
    assert all(Path(log).read_text() for log in (folder / "out" / "jobs").glob("*_log.out"))
