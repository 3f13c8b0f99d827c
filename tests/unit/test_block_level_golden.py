"""Block-level XAttnRes against numbers that the authors' own modules computed; see `tests/data/README.md`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_xattnres.model.block_level import IntraStageAttention, MemoryRouting
from nnunet_xattnres.model.config import BlockXAttnResConfig

FILE = Path(__file__).parents[1] / "data" / "block_level.npz"


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one part."""
    with np.load(FILE) as arrays:
        keys = [key for key in arrays if key.startswith(f"{name}/")]
        return {key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in keys}


def load_weights(part: nn.Module, tensors: dict[str, Tensor]) -> None:
    part.double()
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(tensors[name])


def assert_golden(tensors: dict[str, Tensor], output: Tensor, inputs: dict[str, Tensor], part: nn.Module) -> None:
    """The output and the gradient of every input and weight are the authors'."""
    torch.testing.assert_close(output, tensors["output"], atol=1e-12, rtol=0)
    output.backward(tensors["output_gradient"])
    computed = {name: tensor.grad for name, tensor in (inputs | dict(part.named_parameters())).items()}
    expected = {name: tensors[f"{name}_gradient"] for name in computed}
    torch.testing.assert_close(computed, expected, atol=1e-12, rtol=0)
    assert set(tensors) == {*computed, *(f"{name}_gradient" for name in computed), "output", "output_gradient"}


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("name, temperature", [("isar_t1", 1.0), ("isar_t07", 0.7)])
def test_isar_computes_what_the_authors_module_does(name, temperature, backend):
    tensors = golden(name)
    part = IntraStageAttention(6, BlockXAttnResConfig(temperature=temperature, backend=backend))
    load_weights(part, tensors)
    part.temperature.fill_(temperature)  # in float64, as the authors' module had it
    bank = tensors["bank"].clone().requires_grad_()
    assert_golden(tensors, part(bank.unbind()), {"bank": bank}, part)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_dkvmr_computes_what_the_authors_module_does(backend):
    tensors = golden("dkvmr")
    part = MemoryRouting(6, 3, BlockXAttnResConfig(backend=backend))
    load_weights(part, tensors)
    x, memory = (tensors[name].clone().requires_grad_() for name in ("x", "memory"))
    assert_golden(tensors, part(x, memory.unbind()), {"x": x, "memory": memory}, part)
