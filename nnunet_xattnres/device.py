"""Where PyTorch computes."""

import torch

from nnunet_xattnres.errors import XAttnResError


def choose_device(name: str | None = None) -> str:
    """The device of that name, "cpu" or "cuda"; without a name CUDA where there is a GPU.

    Raises `XAttnResError` for a GPU that PyTorch does not find.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise XAttnResError("PyTorch finds no CUDA device here: use --device cpu, or install a PyTorch with CUDA")
    return name or ("cuda" if available else "cpu")
