"""The Triton backend against the formulas. `test_triton.py` runs this file under Triton's interpreter, on a CPU.

On a machine with a GPU, `pytest tests/process/triton_cases.py` runs it with compiled kernels.
"""

import pytest
import torch

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import triton_kernels as kernels
from nnunet_xattnres.ops.reference import Candidate, attend_reference
from nnunet_xattnres.ops.triton_operator import (
    attend_triton,
    attend_upsampled,
    attend_upsampled_backward,
    check_device,
)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
# Where the kernels cannot run, `attend_triton` would compute everything with another backend.
check_device(DEVICE)
CASES = {  # batch size, target size, source sizes; small, because the interpreter takes its time
    "2d": (1, (2, 4), [(1, 2), (2, 1)]),
    "2d, one source": (2, (1, 4), [(1, 2)]),
    "2d, odd sizes and factors": (1, (3, 10), [(1, 2), (3, 5)]),
    "2d, several tiles along x": (1, (2, 36), [(1, 2)]),
    "2d, only fine": (2, (2, 2), [(2, 2)]),
    "3d": (1, (2, 4, 2), [(1, 2, 1)]),
}
SLOW_CASES = {
    "3d, odd factor along z": (1, (6, 1, 1), [(2, 1, 1)]),
    "3d, two images": (2, (6, 1, 2), [(3, 1, 1), (2, 1, 2)]),
    "2d, several tiles": (2, (5, 7), [(5, 7), (5, 1)]),
    "2d, large factors": (2, (2, 96), [(1, 2), (1, 4)]),
    "3d, several tiles": (1, (4, 6, 6), [(2, 3, 3), (1, 3, 1), (4, 6, 6)]),
    "3d, anisotropic": (2, (3, 2, 26), [(3, 1, 13), (1, 2, 26)]),
    "3d, factors of 4, 8, 8": (2, (8, 8, 16), [(2, 1, 2)]),
}
CHANNELS = 5
Inputs = tuple[list[torch.Tensor], tuple[int, ...]]


def _inputs(case: str, channels: int = CHANNELS, dtype: torch.dtype = torch.float64) -> Inputs:
    """[query, norm_scale, x, features ..., projections ...], all of which require gradients, and the target's size"""
    torch.manual_seed(0)
    batch_size, size, source_sizes = (CASES | SLOW_CASES)[case]
    features = [torch.randn(batch_size, 2 + k, *source_size) for k, source_size in enumerate(source_sizes)]
    projections = [torch.randn(channels, 2 + k) / (2 + k) ** 0.5 for k in range(len(source_sizes))]
    x = torch.randn(batch_size, channels, *size)
    query, norm_scale = torch.randn(channels), torch.rand(channels) + 0.5
    tensors = [query, norm_scale, x, *features, *projections]
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors], size


def _candidates(inputs: list[torch.Tensor]) -> list[Candidate]:
    _, _, x, *sources = inputs
    half = len(sources) // 2
    return [*map(Candidate, sources[:half], sources[half:]), Candidate(x, None)]


def _output_and_gradients(attend, inputs: list[torch.Tensor], size: tuple[int, ...]) -> list[torch.Tensor]:
    out = attend(inputs[0], inputs[1], _candidates(inputs), size)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def _assert_equals_reference(inputs: list[torch.Tensor], size: tuple[int, ...]) -> None:
    computed = _output_and_gradients(attend_triton, inputs, size)
    for a, b in zip(computed, _output_and_gradients(attend_reference, inputs, size), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_it_equals_the_reference_in_output_and_every_gradient(case):
    _assert_equals_reference(*_inputs(case))


@pytest.mark.parametrize("case", ["2d, one source", "3d", "3d, odd factor along z"])
def test_planes_in_several_chunks_equal_the_reference(case, monkeypatch):
    monkeypatch.setattr(kernels, "PLANES_BYTES", 1)
    _assert_equals_reference(*_inputs(case))


@pytest.mark.slow
@pytest.mark.parametrize("planes", [4, 5])
def test_chunks_of_several_planes_of_two_images_equal_the_reference(planes, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PLANES", planes)
    _assert_equals_reference(*_inputs("3d, two images"))


def test_values_as_small_as_eps_equal_the_reference():
    inputs, size = _inputs("2d, one source")
    inputs = [inputs[0], inputs[1], *((1e-4 * tensor).detach().requires_grad_() for tensor in inputs[2:])]
    computed = _output_and_gradients(attend_triton, inputs, size)
    for a, b in zip(computed, _output_and_gradients(attend_reference, inputs, size), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("channels", [1, 35])
def test_numbers_of_channels_that_fill_no_tile_equal_the_reference(channels):
    _assert_equals_reference(*_inputs("2d, one source", channels=channels))


# Rounding errors of sources and results in half precision, some of which add up in the gradients.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_lower_precisions_come_close(dtype, tolerance):
    inputs, size = _inputs("2d, one source", dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    computed = _output_and_gradients(attend_triton, inputs, size)
    assert all(tensor.dtype == dtype for tensor in computed)
    for a, b in zip(computed, _output_and_gradients(attend_reference, exact, size), strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance * b.abs().max().item(), rtol=0)


def test_under_autocast_the_largest_half_precision_values_stay_finite():
    inputs, size = _inputs("2d", dtype=torch.float32)
    query, norm_scale, x, *_ = inputs
    coarse = torch.full((1, CHANNELS, 2, 1), -60000.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    fine = (60000 * x.detach().sign()).half().requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        out = attend_triton(query, norm_scale, [Candidate(coarse, None), Candidate(fine, None)], size)
    assert out.dtype == torch.float16
    gradients = torch.autograd.grad(out.float().mean(), [query, norm_scale, coarse, fine])
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    expected = attend_reference(query, norm_scale, [Candidate(h.float(), None) for h in (coarse, fine)], size)
    torch.testing.assert_close(out.float(), expected, atol=60, rtol=0)


@pytest.mark.parametrize("chosen", [[0], [0, 1], [2]], ids=["one coarse", "only coarse", "one fine"])
def test_candidates_of_one_kind_equal_the_reference(chosen):
    inputs, size = _inputs("2d")
    query, norm_scale, *_ = inputs
    candidates = [_candidates(inputs)[k] for k in chosen]
    outputs = [attend(query, norm_scale, candidates, size) for attend in (attend_triton, attend_reference)]
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=0)
    tensors = [query, *(candidate.features for candidate in candidates)]
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in outputs]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)


def test_candidates_of_several_precisions_give_the_highest():
    inputs, size = _inputs("2d", dtype=torch.float32)
    candidates = [Candidate(inputs[2].half(), None), *_candidates(inputs)]
    out = attend_triton(inputs[0], inputs[1], candidates, size)
    expected = attend_reference(inputs[0], inputs[1], candidates, size)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_large_scores_stay_finite_and_choose_one_candidate():
    x = torch.ones(1, CHANNELS, 2, 2, device=DEVICE)
    query = torch.full((CHANNELS,), 1e4, device=DEVICE)
    out = attend_triton(query, torch.ones_like(query), [Candidate(x, None), Candidate(-2 * x, None)], (2, 2))
    assert torch.equal(out, x)


@pytest.mark.parametrize("query_size, key_channels", [((2, 4), None), ((), 3), ((2, 4), 3)])
def test_at_block_level_it_equals_the_reference(query_size, key_channels):
    inputs, size = _inputs("2d")
    channels = key_channels or CHANNELS
    query = torch.randn(*((1, channels, *query_size) if query_size else (channels,))).to(inputs[0])
    arguments = query, inputs[1][:channels], _candidates(inputs), size, key_channels
    torch.testing.assert_close(attend_triton(*arguments), attend_reference(*arguments), atol=1e-9, rtol=0)


def test_more_channels_than_a_tile_holds_equal_the_reference():
    channels = kernels.MAX_CHANNELS + 1
    candidates = [Candidate(torch.randn(1, channels, 1, extent, device=DEVICE), None) for extent in (1, 2)]
    arguments = torch.randn(channels, device=DEVICE), torch.ones(channels, device=DEVICE), candidates, (1, 2)
    torch.testing.assert_close(attend_triton(*arguments), attend_reference(*arguments))


def test_more_elements_than_32_bits_address_equal_the_reference(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("the kernels were called")

    monkeypatch.setattr("nnunet_xattnres.ops.triton_operator.attend_upsampled", refuse)
    inputs, size = _inputs("2d")
    with pytest.raises(AssertionError):
        attend_triton(inputs[0], inputs[1], _candidates(inputs), size)
    monkeypatch.setattr("nnunet_xattnres.ops.triton_operator.MAX_ELEMENTS", CHANNELS * 2 * 4 - 1)
    _assert_equals_reference(inputs, size)


def test_candidates_that_are_finer_than_the_target_are_refused():
    x, finer = (torch.randn(1, CHANNELS, *size, device=DEVICE) for size in [(2, 4), (4, 8)])
    query = torch.randn(CHANNELS, device=DEVICE)
    with pytest.raises(XAttnResError, match=r"\(4, 8\) to \(2, 4\): average finer features first"):
        attend_triton(query, torch.ones_like(query), [Candidate(finer, None), Candidate(x, None)], (2, 4))


def test_two_runs_are_identical_to_the_bit():
    inputs, size = _inputs("2d, one source", dtype=torch.float32)
    first, second = (_output_and_gradients(attend_triton, inputs, size) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operators_pass_opcheck():
    shapes = [(3,), (1, 1, 1, 3), (1, 3, 1, 2)]
    query, coarse, fine = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    torch.library.opcheck(attend_upsampled, (query, [coarse], [fine], (1, 2), 1e-6))
    gradient, query, coarse, fine = (torch.randn(shape, device=DEVICE) for shape in [(1, 3, 1, 2), *shapes])
    torch.library.opcheck(attend_upsampled_backward, (gradient, query, [coarse], [fine], 1e-6))


def test_torch_compile_traces_it_in_one_graph():
    inputs, size = _inputs("2d, one source")
    compiled = torch.compile(attend_triton, fullgraph=True, backend="aot_eager")
    computed = _output_and_gradients(compiled, inputs, size)
    for a, b in zip(computed, _output_and_gradients(attend_triton, inputs, size), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
