"""How PyTorch runs the code at the moment: whether it records a graph, and autocast."""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace is recording a forward pass."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


# Runs while a graph is compiled and is no part of the graph.
@torch.compiler.assume_constant_result
def log_fallback(why: str) -> None:
    """Log that `streaming` computes instead of a backend, once for every reason. Not while a graph is exported."""
    if not is_exporting():
        _warn(f"{why}; 'streaming' computes instead")


@cache
def _warn(message: str) -> None:
    logging.getLogger("nnunet_xattnres").warning(message)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for the tensor's device."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()
