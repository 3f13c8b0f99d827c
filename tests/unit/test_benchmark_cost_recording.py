"""The device, the versions and the peak memory of a training, recorded while it runs."""

import platform
import threading
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch

from helpers.benchmark import eventually
from nnunet_xattnres.benchmark import cost_recording
from nnunet_xattnres.benchmark.cost_recording import recorded_costs


def test_memory_is_recorded_until_the_training_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_recording, "SAMPLING_SECONDS", 0.01)
    cost_recording.record_costs(tmp_path, "cpu")
    held = np.ones(100_000_000 // 8)
    assert eventually((tmp_path / "costs.json").exists)
    time.sleep(0.1)
    (tmp_path / "checkpoint_final.pth").touch()
    assert eventually(lambda: recorded_costs(tmp_path)["peak_memory_gb"] >= held.nbytes / 1e9)


def test_every_device_and_version_of_a_training_is_recorded_once_and_none_of_its_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_recording, "SAMPLING_SECONDS", 0.01)
    monkeypatch.setattr(cost_recording, "RECORDED_VERSIONS", ("torch",))
    final = tmp_path / "checkpoint_final.pth"
    for cpu, cores, release in (("Slow", 2, "2.8"), ("Slow", 2, "2.8"), ("Slow", 3, "2.9"), ("Fast", 3, "2.9")):
        monkeypatch.setattr(cost_recording, "version", lambda package, release=release: release)
        monkeypatch.setattr(cost_recording, "cpu_name", lambda cpu=cpu: cpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        cost_recording.record_costs(tmp_path, "cpu")
        final.touch()
        assert eventually(lambda: not any(thread.name == cost_recording.COSTS for thread in threading.enumerate()))
        final.unlink()
    costs = recorded_costs(tmp_path)
    assert costs["device"] == "Slow, 2 threads and Slow, 3 threads and Fast, 3 threads"
    python = f"python {platform.python_version()}"
    assert costs["versions"] == f"torch 2.8; {python} and torch 2.9; {python}"
    final.touch()
    monkeypatch.setattr(cost_recording, "cpu_name", lambda: "Another")
    cost_recording.record_costs(tmp_path, "cpu")
    time.sleep(0.1)
    assert recorded_costs(tmp_path) == costs


@pytest.mark.parametrize(("num_gpus", "device"), [(1, "A100"), (4, "4 x A100")])
def test_gpus_are_named_with_their_number(num_gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    assert cost_recording._device_name("cuda", num_gpus) == device


def test_an_apple_gpu_is_not_taken_for_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_recording, "SAMPLING_SECONDS", 0.01)
    monkeypatch.setattr(cost_recording, "cpu_name", lambda: "Apple M9")
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3_000_000_000)
    cost_recording.record_costs(tmp_path, "mps")
    (tmp_path / "checkpoint_final.pth").touch()
    assert eventually(lambda: not any(thread.name == cost_recording.COSTS for thread in threading.enumerate()))
    costs = recorded_costs(tmp_path)
    versions = [f"{name} {version(name)}" for name in ("nnunet-xattnres", "nnunetv2", "torch", "numpy")]
    versions.append(f"python {platform.python_version()}")
    assert costs == {"peak_memory_gb": 3.0, "device": "Apple M9, MPS", "versions": "; ".join(versions)}


def test_no_record_and_a_damaged_one_say_nothing(tmp_path):
    nothing = {"peak_memory_gb": None, "device": "", "versions": ""}
    assert recorded_costs(tmp_path) == nothing
    (tmp_path / "costs.json").touch()
    assert recorded_costs(tmp_path) == nothing
