"""The machines that cells run on: shares of this machine, and a Slurm that is made up."""

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.benchmark import CELL, eventually
from nnunet_xattnres.benchmark import machines
from nnunet_xattnres.benchmark.machines import make_machine, shares_of_machine
from nnunet_xattnres.benchmark.scheduling import run_cells
from nnunet_xattnres.benchmark.spec import Executor
from nnunet_xattnres.common.errors import XAttnResError

SLURM = Executor(kind="slurm")


class TestThisMachine:
    @pytest.mark.parametrize(
        ("visible", "there", "executor", "expected"),
        [
            (None, 2, Executor(), ["0", "1"]),
            ("3,5,GPU-ab", 3, Executor(), ["3", "5", "GPU-ab"]),
            (None, 2, Executor(jobs=3), ["0", "1", "0"]),
            (None, 5, Executor(num_gpus=2), ["0,1", "2,3"]),
        ],
    )
    def test_gpus_are_shared_out(self, visible, there, executor, expected, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
        assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of_machine(executor)] == expected

    @pytest.mark.parametrize(
        ("gpus", "executor", "user", "expected"),
        [
            (1, Executor(), None, "12"),
            (4, Executor(), None, "4"),
            (4, Executor(num_gpus=4), None, "4"),
            (2, Executor(jobs=4), None, "4"),
            (32, Executor(), None, "1"),
            (4, Executor(), "7", "7"),
            (0, Executor(), None, "2"),
            (0, Executor(jobs=16), None, "1"),
            (0, Executor(), "0", "0"),
        ],
    )
    def test_augmentation_workers_follow_the_cores(self, gpus, executor, user, expected, monkeypatch):
        for name in ("CUDA_VISIBLE_DEVICES", "nnUNet_n_proc_DA"):
            monkeypatch.delenv(name, raising=False)
        if user:
            monkeypatch.setenv("nnUNet_n_proc_DA", user)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(machines, "available_cores", lambda: 16)
        assert {share["nnUNet_n_proc_DA"] for share in shares_of_machine(executor)} == {expected}

    def test_an_apple_gpu_gets_as_many_augmentation_workers_as_another(self, monkeypatch):
        monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(machines, "available_cores", lambda: 10)
        assert [share["nnUNet_n_proc_DA"] for share in shares_of_machine(Executor())] == ["10"]

    @pytest.mark.parametrize(
        ("executor", "user", "expected"),
        [
            (Executor(), None, ["6"]),
            (Executor(jobs=4), None, ["1"] * 4),
            (Executor(jobs=8), None, ["1"] * 8),
            (Executor(jobs=2), "5", ["5"] * 2),
        ],
    )
    def test_without_gpus_cores_are_shared_out(self, executor, user, expected, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if user:
            monkeypatch.setenv("OMP_NUM_THREADS", user)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(machines, "available_cores", lambda: 6)
        shares = shares_of_machine(executor)
        assert [share["OMP_NUM_THREADS"] for share in shares] == expected
        # None may see a GPU that this process has not been given.
        assert {share["CUDA_VISIBLE_DEVICES"] for share in shares} == {""}

    @pytest.mark.parametrize("there", [0, 1])
    def test_more_gpus_than_there_are(self, there, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
        with pytest.raises(XAttnResError, match="num_gpus of executor is 2"):
            shares_of_machine(Executor(num_gpus=2))

    def test_a_cell_gets_the_share_that_is_free(self, tmp_path, monkeypatch):
        class Job:
            def __init__(self, share):
                self.share, self.ended = share, False

            def done(self):
                return self.ended

        monkeypatch.setattr(machines, "shares_of_machine", lambda executor: ["half", "other half"])
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


class TestSlurm:
    def test_slurm_where_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(XAttnResError, match="no Slurm here"):
            make_machine(tmp_path, SLURM)

    def test_a_parameter_that_slurm_does_not_have(self, tmp_path, monkeypatch):
        monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
        with pytest.raises(XAttnResError, match="partitoin") as error:
            make_machine(tmp_path, Executor(kind="slurm", parameters={"partitoin": "gpu"}))
        assert "\n" not in str(error.value)

    @pytest.fixture
    def queue(self, monkeypatch):
        """The names of the jobs of a Slurm whose user may have two."""

        def submit(self, *given):
            if len(queue) >= 2:
                raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsubmission failed")
            queue.append(self.parameters["job_name"])

        queue: list[str] = []
        monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
        monkeypatch.setattr("submitit.SlurmExecutor.submit", submit)
        monkeypatch.setattr(subprocess, "run", lambda *given, **options: SimpleNamespace(stdout="\n".join(queue)))
        monkeypatch.setattr(machines, "QUEUE_SECONDS", 0.2)
        return queue

    def test_what_slurm_does_not_take_now_it_is_given_again(self, queue, tmp_path, capsys):
        cells = [replace(CELL, dataset="Dataset123_Two words", seed=seed) for seed in range(3)]
        machine = make_machine(tmp_path, SLURM)
        assert [machine.submit(cell) for cell in cells] == [True, True, False]
        assert not machine.has_room()
        assert eventually(machine.has_room)
        assert not machine.submit(cells[2])
        assert capsys.readouterr().err == (
            "Slurm takes no job: sbatch: error: QOSMaxSubmitJobPerUserLimit submission failed; "
            "trying again until it does\n"
        )
        # A later run finds the jobs of this one.
        machine = make_machine(tmp_path, SLURM)
        assert [machine.has(cell) for cell in cells] == [True, True, False]
        assert not machine.submit(cells[2])
        queue.pop()
        assert machine.submit(cells[2])

    def test_the_cells_of_a_cluster_are_looked_at_less_often(self, queue, tmp_path):
        assert make_machine(tmp_path, SLURM).poll_seconds == 30.0
        assert make_machine(tmp_path, Executor()).poll_seconds == 1.0

    def test_slurm_that_takes_no_job_at_all(self, queue, tmp_path):
        queue += ["something", "else"]
        with pytest.raises(XAttnResError, match="Slurm takes no job: sbatch: error: QOSMaxSubmitJobPerUserLimit"):
            run_cells(tmp_path, [CELL], make_machine(tmp_path, SLURM))
