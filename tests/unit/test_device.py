"""The choice of a device, its memory: the peak, and errors that say that there is too little."""

import time

import pytest
import torch

from nnunet_xattnres.common.device import SAMPLING_SECONDS, PeakMemory, choose_device, is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_is_chosen_where_there_is_one(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == choose_device(chosen) == chosen
    assert choose_device("cpu") == "cpu"
    for missing in {"cuda", "mps"} - {chosen}:
        with pytest.raises(XAttnResError, match=f"no {missing.upper()} device here: use --device {chosen}"):
            choose_device(missing)


def test_peak_memory_is_what_was_allocated_in_between():
    memory = PeakMemory(torch.device("cpu"))
    with memory.observed():
        allocated = torch.ones(64_000_000)  # 256 MB
        time.sleep(20 * SAMPLING_SECONDS)
        del allocated
    assert 256e6 <= memory.peak < 300e6
    with memory.observed():
        torch.ones(1000)
    assert 256e6 <= memory.peak < 300e6


def test_peak_memory_can_be_sampled_by_hand():
    memory = PeakMemory(torch.device("cpu"))
    memory.sample()
    assert memory.peak < 40e6
    allocated = torch.ones(64_000_000)
    memory.sample()
    del allocated
    memory.sample()
    assert 256e6 <= memory.peak < 300e6


def test_peak_memory_of_a_gpu_is_that_of_pytorchs_allocator(monkeypatch):
    allocated = iter([3, 1])
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(None))
    memory = PeakMemory(torch.device("cuda"))
    for _ in range(2):
        with memory.observed():
            pass
    assert memory.peak == 3
    assert len(resets) == 2


def test_peak_memory_of_an_apple_gpu_is_sampled(monkeypatch):
    allocated = iter([2, 3])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(allocated, 1))
    memory = PeakMemory(torch.device("mps"))
    with memory.observed():
        time.sleep(20 * SAMPLING_SECONDS)
    assert memory.peak == 3


def test_other_errors_are_not_taken_for_want_of_memory():
    assert not is_out_of_memory(RuntimeError("sizes of tensors must match"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
