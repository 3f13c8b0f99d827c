"""Times of backends for one call of the attention, on a CPU in place of a GPU."""

import pytest
import torch

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import timing
from nnunet_xattnres.ops.reference import Candidate, Upsampled, attend_reference

CPU = torch.device("cpu")


@pytest.fixture
def call():
    """Two sources and a transposed convolution's output, 12 x 8: four times as large as the smallest call along x."""

    def meta(*shape):
        return torch.empty(shape, device="meta")

    candidates = [
        Candidate(meta(2, 3, 12, 8), meta(5, 3)),
        Candidate(meta(2, 4, 3, 4), meta(5, 4)),
        Upsampled(meta(2, 6, 6, 4), meta(6, 5, 2, 2), meta(5)),
    ]
    return timing.Call(meta(5), meta(5), candidates, (12, 8))


@pytest.fixture
def backends(monkeypatch):
    """The backends that exist, by name, to add others. None of them looks at the device."""
    known = {"streaming": timing.attention_backend("streaming")}
    monkeypatch.setattr(timing, "check_backend", lambda backend, device: None)
    monkeypatch.setattr(timing, "attention_backend", known.__getitem__)
    return known


def test_the_call_for_the_comparison_is_small_and_has_the_same_proportions(call):
    small = timing._smallest(call)
    assert small.size == [4, 2]
    assert [tuple(each.features.shape) for each in small.candidates] == [(1, 3, 4, 2), (1, 4, 1, 1), (1, 6, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_computes_the_function_is_timed(call, backends, dtype):
    findings = timing.measure(call, CPU, dtype, ["streaming"])
    assert isinstance(findings["streaming"], float) and findings["streaming"] > 0


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_backend_that_differs_from_the_reference_is_out(call, backends, what):
    def wrong(query, norm_scale, candidates, size):
        if what == "output":
            return 1.1 * attend_reference(query, norm_scale, candidates, size)
        features, projection, _ = candidates[0]
        half_of_the_gradient = (features + features.detach()) / 2
        return attend_reference(query, norm_scale, [Candidate(half_of_the_gradient, projection), *candidates[1:]], size)

    backends["wrong"] = wrong
    assert timing.measure(call, CPU, torch.float32, ["wrong"]) == {"wrong": "it differs from reference"}


def test_a_backend_that_fails_is_out_and_the_others_are_measured(call, backends, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("no kernel for this device")

    def check(backend, device):
        if backend == "old":
            raise XAttnResError("a GPU too old")

    backends["failing"] = failing
    monkeypatch.setattr(timing, "check_backend", check)
    findings = timing.measure(call, CPU, torch.float32, ["old", "failing", "streaming"])
    assert findings["old"] == "a GPU too old"
    assert findings["failing"] == "RuntimeError: no kernel for this device"
    assert isinstance(findings["streaming"], float)


def test_not_a_number_is_no_agreement(call, backends):
    backends["nan"] = lambda *arguments: attend_reference(*arguments) * float("nan")
    assert timing.measure(call, CPU, torch.float32, ["nan"]) == {"nan": "it differs from reference"}


@pytest.mark.parametrize(
    "findings, chosen",
    [
        ({"streaming": 1.0, "triton": 0.94}, "triton"),
        ({"streaming": 1.0, "triton": 0.96}, "streaming"),
        ({"streaming": "out of memory", "triton": 3.0}, "triton"),
        ({"streaming": 1.0, "triton": "it differs"}, "streaming"),
        ({"streaming": "it fails", "triton": "it fails"}, None),
        ({}, None),
    ],
)
def test_a_later_backend_must_win_clearly(findings, chosen):
    assert timing.fastest(findings) == chosen
