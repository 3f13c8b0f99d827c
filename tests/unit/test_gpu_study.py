"""The study `studies/gpu.py` with made-up measurements: its order, its files, its failures."""

import json
import subprocess

import pytest

from helpers.overhead import PLANNED, made_up_answers
from helpers.studies import load_study
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.overhead.measurement import FAILED, OUT_OF_MEMORY, Answer

MEASURED_NETWORKS = 4 * 2 * (2 + 2 * 3)


@pytest.fixture(scope="module")
def study():
    return load_study("gpu")


class Gpu:
    """A made-up GPU and clock. Tests and networks take ten seconds each, unless `seconds` says otherwise."""

    def __init__(self):
        self.now = 0.0
        self.seconds = {}
        self.answers = {}
        self.order = []

    def spend(self, name, timeout):
        needed = self.seconds.get(name, 10)
        self.now += min(needed, timeout)
        if needed > timeout:
            raise subprocess.TimeoutExpired(name, timeout)
        self.order.append(name)

    def run_tests(self, timeout):
        self.spend("tests", timeout)
        return self.answers.get("tests", {"status": "measured", "reason": "29 passed", "failed": []})

    def measure(self, request, compile, timeout):
        assert request.device == "cuda"
        stages = request.plans["configurations"][request.configuration]["architecture"]["arch_kwargs"]["n_stages"]
        name = (stages, compile, request.trainer, request.backend)
        self.spend(name, timeout)
        return self.answers.get(name, made_up_answers([1.0])[0])


@pytest.fixture
def gpu(study, tmp_path, monkeypatch):
    def check(backend, device):
        if backend == "native":
            raise XAttnResError("the backend 'native' computes on a CPU")

    gpu = Gpu()
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(study.torch.cuda, "get_device_name", lambda: "NVIDIA H200 (MIG 1g)")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "SECONDS", 10_000)
    monkeypatch.setattr(study, "check_backend", check)
    monkeypatch.setattr(study, "monotonic", lambda: gpu.now)
    monkeypatch.setattr(study, "run_tests", gpu.run_tests)
    monkeypatch.setattr(study, "measure_in_new_process", gpu.measure)
    return gpu


@pytest.fixture
def record_file(tmp_path):
    return tmp_path / "nvidia_h200_mig_1g.json"


def results_in(path):
    return json.loads(path.read_text())["results"]


def test_without_a_gpu_one_line_says_so(study, monkeypatch, capsys):
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    assert study.main() == 1
    assert capsys.readouterr().err == "gpu: PyTorch finds no CUDA device here, so there is nothing to measure\n"


def test_all_is_measured_once_and_nothing_again(study, gpu, record_file, capsys):
    assert study.main() == 0
    assert gpu.order[:4] == [
        "tests",
        (6, True, PLANNED, None),
        (6, True, "nnUNetTrainerNoSkip", None),
        (6, True, "nnUNetTrainerXAttnRes", "streaming"),
    ]
    assert len(gpu.order) == len(set(map(str, gpu.order))) + 16 == MEASURED_NETWORKS + 1  # msd03 and msd07: 6 stages
    last = gpu.order[-16:]
    assert {backend for _, _, _, backend in last} == {"reference"}
    assert len(results_in(record_file)) == MEASURED_NETWORKS + 1
    table = record_file.with_suffix(".md").read_text()
    assert "29 passed" in table and "'native' computes on a CPU" in table
    assert table.count("Planned") == 8 and table.count("XAttnResNoSkip (triton)") == 8
    capsys.readouterr()
    gpu.order.clear()
    assert study.main() == 0
    assert gpu.order == []
    assert "0 of them failures; to measure anew, delete nvidia_h200_mig_1g.json first" in capsys.readouterr().out


def test_a_call_ends_in_time_and_the_next_one_goes_on(study, gpu, record_file, monkeypatch, capsys):
    monkeypatch.setattr(study, "SECONDS", 95)
    gpu.seconds[(6, True, "nnUNetTrainerXAttnResNoSkip", "reference")] = 60
    study.main()
    assert gpu.now == 95
    assert len(results_in(record_file)) == 9
    assert "run make gpu again" in capsys.readouterr().out
    first = list(gpu.order)
    while len(results_in(record_file)) < MEASURED_NETWORKS + 1:
        study.main()
    assert gpu.order[:9] == first
    assert len(gpu.order) == MEASURED_NETWORKS + 1
    assert all(result["status"] == "measured" for result in results_in(record_file).values())


def test_failures_are_recorded_and_tried_again_after_the_rest(study, gpu, record_file, monkeypatch, capsys):
    failing, slow, large = [
        (4, True, "nnUNetTrainerXAttnRes", backend) for backend in ("triton", "streaming", "reference")
    ]
    gpu.answers = {
        "tests": {"status": FAILED, "reason": "1 failed, 28 passed", "failed": ["FAILED triton_cases.py::test_it"]},
        failing: Answer(FAILED, reason="RuntimeError: no kernel"),
        large: Answer(OUT_OF_MEMORY),
    }
    gpu.seconds[slow] = 1000
    assert study.main() == 0
    results = results_in(record_file)
    assert len(results) == MEASURED_NETWORKS + 1
    assert [result["reason"] for result in results.values() if result["status"] == FAILED] == [
        "1 failed, 28 passed",
        "not done within 240 s",
        "RuntimeError: no kernel",
    ]
    assert "3 of them failures" in capsys.readouterr().out
    table = record_file.with_suffix(".md").read_text()
    assert "- `FAILED triton_cases.py::test_it`" in table
    assert "XAttnRes (triton) failed: RuntimeError: no kernel" in table and "out of memory" in table
    gpu.order.clear()
    gpu.answers, gpu.seconds = {}, {}
    study.main()
    assert gpu.order == ["tests", slow, failing]
    assert not any(result["status"] == FAILED for result in results_in(record_file).values())


def test_results_of_other_versions_are_not_mixed(study, gpu, record_file, monkeypatch, capsys):
    monkeypatch.setattr(study, "SECONDS", 15)
    study.main()
    before = record_file.read_text()
    monkeypatch.setattr(study, "environment", lambda: json.loads(before)["environment"] | {"torch": "3.0"})
    capsys.readouterr()
    assert study.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(here '3.0'): move it away to measure anew" in error
    assert record_file.read_text() == before


def test_the_record_has_the_tests_that_failed(study, tmp_path, monkeypatch):
    file = tmp_path / "test_two.py"
    file.write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    raise ValueError\n")
    monkeypatch.setattr(study, "TESTS", file)
    result = study.run_tests(60)
    assert result["status"] == FAILED
    assert result["reason"].startswith("1 failed, 1 passed")
    assert len(result["failed"]) == 1 and "test_bad" in result["failed"][0]
