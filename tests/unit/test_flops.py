"""FLOPs inside registered operators."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_xattnres.ops import native_library, native_operator
from nnunet_xattnres.ops.flops import interpolation_flops, projection_flops
from nnunet_xattnres.ops.reference import Candidate, Upsampled, upsample
from nnunet_xattnres.ops.streaming import attend_streaming


def flops_of(attend, *candidates, size):
    query = torch.zeros(5, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attend(query, None, candidates, size).sum().backward()
    return counter.get_total_flops()


def parameter(*shape):
    return torch.zeros(shape, device="meta", requires_grad=True)


def test_projections_count_as_the_counter_counts_them():
    h, projection, size = parameter(2, 3, 4, 4, 4), parameter(5, 3), (4, 4, 4)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(projection.expand(2, -1, -1), h.flatten(2))
    assert projection_flops([h.shape, (2, 5, *size)], [projection.shape, None]) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    "source, size, taps", [((4, 4, 4), (8, 8, 8), 8), ((4, 4), (4, 16), 2), ((2, 2), (6, 4), 4), ((4, 4), (4, 4), 0)]
)
def test_interpolation_counts_its_taps(source, size, taps):
    outputs = 2 * 5 * torch.Size(size).numel()
    assert interpolation_flops([(2, 3, *source)], 5, size) == 2 * taps * outputs


def test_the_triton_operators_are_counted():
    """Projections and their two gradients, and what is interpolated once forward and twice backward."""
    operator = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
    h, projection, x, size = parameter(2, 3, 4, 4, 4), parameter(5, 3), parameter(2, 5, 8, 8, 8), (8, 8, 8)
    projections = projection_flops([h.shape], [projection.shape])
    counted = flops_of(operator.attend_triton, Candidate(h, projection), Candidate(x, None), size=size)
    assert counted == 3 * projections + 3 * interpolation_flops([h.shape, x.shape], 5, size)
    # Streaming projects once more in the backward pass, and interpolates with matrices.
    assert flops_of(attend_streaming, Candidate(h, projection), Candidate(x, None), size=size) > 4 * projections


def test_the_native_operators_are_counted(monkeypatch):
    """Projections and transposed convolution twice, their two gradients, and interpolations as for Triton."""
    monkeypatch.setattr(native_library, "why_not_available", lambda: "")  # shapes need no library
    h, projection, size = parameter(2, 3, 4, 4, 4), parameter(5, 3), (8, 8, 8)
    described = Upsampled(parameter(2, 7, 4, 4, 4), parameter(7, 5, 2, 2, 2), parameter(5))
    with FlopCounterMode(display=False) as counter:
        upsample(described)
    products = projection_flops([h.shape], [projection.shape]) + counter.get_total_flops()
    counted = flops_of(native_operator.attend_native, Candidate(h, projection), described, size=size)
    assert counted == 4 * products + 3 * interpolation_flops([h.shape], 5, size)
