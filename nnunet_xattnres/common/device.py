"""The device that PyTorch computes on: its choice, its name, its memory."""

import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from nnunet_xattnres.common.errors import XAttnResError

# The messages of PyTorch, oneDNN, cuDNN and the C++ library.
NO_MEMORY_LEFT = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|could not create a memory|ALLOC_FAILED", re.I
)
SAMPLING_SECONDS = 1e-3


def choose_device(name: str | None = None) -> str:
    """The device of that name: "cuda", "mps" (the GPU of an Apple computer) or "cpu". Without a name: a GPU, if any.

    Raises `XAttnResError` if PyTorch does not find the device.
    """
    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [device for device in is_here if is_here[device]]
    if name is not None and name not in here:
        kind = name.upper()
        raise XAttnResError(
            f"PyTorch finds no {kind} device here: use --device {here[0]}, or install a PyTorch with {kind}"
        )
    return name or here[0]


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system does not tell the model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def available_cores() -> int:
    """The number of cores that this process may use: in a container or on a cluster often fewer than there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A cluster may tell a job how many cores are its own, and still let it see those of the whole node.
    return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))


def limit_memory(growth: int) -> None:
    """Let allocations fail once the process has grown by `growth` bytes, before the kernel kills the process.

    Does nothing where the system has no such limit, and never raises an existing limit.
    """
    if sys.platform == "linux":
        import resource

        used = psutil.Process().memory_info().data
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (soft, hard, used + growth) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def free_memory() -> int:
    """The bytes that this process can still allocate, swap included, within its limits."""
    free = [psutil.virtual_memory().available + psutil.swap_memory().free]
    if sys.platform == "linux":
        import resource

        used = psutil.Process().memory_info()
        for limited, in_use in ((resource.RLIMIT_DATA, used.data), (resource.RLIMIT_AS, used.vms)):
            soft, _ = resource.getrlimit(limited)
            if soft != resource.RLIM_INFINITY:
                free.append(soft - in_use)
    return max(0, min(free))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY_LEFT.search(str(error)) is not None


class PeakMemory:
    """The largest amount of memory in use, in bytes: `peak`, as far as it was sampled.

    CUDA: the memory that PyTorch has allocated on the current GPU. The allocator itself keeps the maximum, so that one
    sample at the end is enough. MPS: the same, without the maximum.
    CPU: the growth of the process's resident size since this object was made. The kernel's own maximum, ru_maxrss, is
    no alternative: a program inherits it from the process that started it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        self._process = psutil.Process()
        self._resident_at_start = self._process.memory_info().rss

    def sample(self) -> None:
        """Compare the memory in use with the peak."""
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated()
        elif self.device.type == "mps":
            used = torch.mps.current_allocated_memory()
        else:
            used = self._process.memory_info().rss - self._resident_at_start
        self.peak = max(self.peak, used)

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Sample until the block is left: every millisecond, except on CUDA.

        On CUDA the allocator's maximum is reset first, so that what was in use before does not count.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self.sample()
            return
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample_until, args=(stop,), daemon=True)
        sampler.start()
        try:
            yield
        finally:
            stop.set()
            sampler.join()

    def _sample_until(self, stop: threading.Event) -> None:
        while not stop.wait(SAMPLING_SECONDS):
            self.sample()
        self.sample()
