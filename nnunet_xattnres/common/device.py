"""Where PyTorch computes, and the memory that it finds there."""

import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch

from nnunet_xattnres.common.errors import XAttnResError

# PyTorch, oneDNN, cuDNN and the C++ library each have words of their own for it.
NO_MEMORY_LEFT = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|could not create a memory|ALLOC_FAILED", re.I
)


def choose_device(name: str | None = None) -> str:
    """The device of that name, "cpu" or "cuda"; without a name CUDA where there is a GPU.

    Raises `XAttnResError` for a GPU that PyTorch does not find.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise XAttnResError("PyTorch finds no CUDA device here: use --device cpu, or install a PyTorch with CUDA")
    return name or ("cuda" if available else "cpu")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def available_cores() -> int:
    """Those that this process may use, which a container or a cluster can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_memory(growth: int) -> None:
    """Let allocations fail once the process has grown by so many bytes, instead of waking the kernel's OOM killer.

    Does nothing where there is no such limit, and never raises one that is set already.
    """
    if sys.platform == "linux":
        import resource

        used = psutil.Process().memory_info().data
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (soft, hard, used + growth) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY_LEFT.search(str(error)) is not None
