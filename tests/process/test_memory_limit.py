"""The limit on the memory of a process, set in the process of the tests and taken back."""

import resource

import psutil
import pytest
import torch

from helpers.memory import limited
from nnunet_xattnres.common.device import free_memory, is_out_of_memory, limit_memory


def test_memory_is_limited_before_the_kernel_has_to_kill():
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    kept = []
    with limited(resource.RLIMIT_DATA, soft):  # restores what the next line sets
        limit_memory(300_000_000)
        with pytest.raises(RuntimeError) as error:
            for _ in range(10):
                kept.append(torch.ones(20_000_000))  # 80 MB each
    # At least as much as was granted. Free memory of the process adds to it.
    assert len(kept) >= 3
    assert is_out_of_memory(error.value)


def test_an_existing_limit_is_never_raised():
    with limited(resource.RLIMIT_DATA, 2**40):
        limit_memory(2**41)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 2**40


@pytest.mark.parametrize("kind, in_use", [(resource.RLIMIT_DATA, "data"), (resource.RLIMIT_AS, "vms")])
def test_free_memory_ends_at_the_limits_of_the_process(kind, in_use):
    assert free_memory() > 2**22
    limit = getattr(psutil.Process().memory_info(), in_use) + 2**22
    with limited(kind, limit):
        assert free_memory() <= 2**22
