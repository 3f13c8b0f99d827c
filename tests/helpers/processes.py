"""Processes for tests, forked from a server that has imported PyTorch and nnU-Net once."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

multiprocessing.set_forkserver_preload(["pytest", "nnunet_xattnres.training.mixin", "nnunetv2.run.run_training"])


def run_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two processes and wait for them. Raises what the first that fails raises."""
    start_processes(_run, (function, dict(os.environ), arguments), nprocs=2, start_method="forkserver")


def _run(rank: int, function: Callable[..., None], environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)  # the server's is that of its own start
    function(rank, *arguments)
