"""How PyTorch runs the code at the moment: whether it records a graph for export, and autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace is recording a forward pass."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for the tensor's device."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()
