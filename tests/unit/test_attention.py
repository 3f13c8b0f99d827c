"""The backends `reference`, `streaming` and `native`: against the formulas, and against each other."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from packaging.version import Version

from helpers import formulas
from helpers.memory import saved_bytes
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import native_library, streaming
from nnunet_xattnres.ops.alignment import align, is_finer, resize
from nnunet_xattnres.ops.native_operator import attend_native
from nnunet_xattnres.ops.reference import Candidate, Upsampled, attend_reference, attention_weights, upsample
from nnunet_xattnres.ops.streaming import ChunkAlignment, attend_streaming, streaming_weights

CASES = {  # target size: source sizes
    "2d": ((4, 6), [(4, 6), (2, 3), (8, 12), (1, 3), (4, 2)]),
    "3d": ((4, 2, 6), [(4, 2, 6), (2, 1, 3), (8, 4, 12), (1, 1, 1), (4, 2, 3)]),
}
CHANNELS = 5
without_library = pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
ATTENTIONS = [attend_reference, attend_streaming, pytest.param(attend_native, marks=without_library)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one or a few rows."""
    monkeypatch.setitem(streaming.CHUNK_ELEMENTS, "cpu", 50)


def _inputs(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """[query, norm_scale, x, features ..., projections ...], all of which require gradients, and the target's size"""
    torch.manual_seed(0)
    size, source_sizes = CASES[case]
    features = [torch.randn(3, 2 + k, *source_size, dtype=dtype) for k, source_size in enumerate(source_sizes)]
    projections = [torch.randn(CHANNELS, 2 + k, dtype=dtype) for k in range(len(source_sizes))]
    x = torch.randn(3, CHANNELS, *size, dtype=dtype)
    query, norm_scale = torch.randn(CHANNELS, dtype=dtype), torch.rand(CHANNELS, dtype=dtype) + 0.5
    return [tensor.requires_grad_() for tensor in (query, norm_scale, x, *features, *projections)], size


def _candidates(inputs: list[torch.Tensor]) -> list[Candidate]:
    _, _, x, *sources = inputs
    half = len(sources) // 2
    return [
        *(averaged(h, P, x.shape[2:]) for h, P in zip(sources[:half], sources[half:], strict=True)),
        Candidate(x, None),
    ]


def averaged(h: torch.Tensor, projection: torch.Tensor | None, size: Sequence[int]) -> Candidate:
    """What the history pool gives: features that are finer than the target are averaged."""
    return Candidate(resize(h, size), projection, h) if is_finer(h.shape[2:], size) else Candidate(h, projection)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attend", ATTENTIONS)
def test_it_computes_the_formulas(case, attend):
    inputs, size = _inputs(case)
    query, norm_scale, x, *sources = (tensor.detach().numpy() for tensor in inputs)
    features, projections = sources[: len(sources) // 2], sources[len(sources) // 2 :]
    expected = [
        formulas.read(x[b], [h[b] for h in features], projections, query, norm_scale, gamma=None) for b in range(len(x))
    ]
    out = attend(inputs[0], inputs[1], _candidates(inputs), size)
    np.testing.assert_allclose(out.detach().numpy(), np.stack(expected), atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_elements", [1, 50, 2**23])
def test_streaming_equals_reference_in_output_and_every_gradient(case, chunk_elements, monkeypatch):
    monkeypatch.setitem(streaming.CHUNK_ELEMENTS, "cpu", chunk_elements)
    inputs, size = _inputs(case)
    outputs = [
        attend(inputs[0], inputs[1], _candidates(inputs), size) for attend in (attend_reference, attend_streaming)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=0)
    gradient = torch.randn_like(outputs[0])
    expected, streamed = (torch.autograd.grad(out, inputs, gradient) for out in outputs)
    for a, b in zip(streamed, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


UPSAMPLED = {  # source size, steps
    "2d": ((3, 2), (2, 3)),
    "3d": ((2, 3, 2), (2, 2, 2)),
    "anisotropic": ((4, 3, 2), (1, 2, 2)),
    "along x only": ((2, 3, 2), (1, 1, 2)),
}


def _upsampled_inputs(case: str, with_bias: bool = True, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """[query, h, its projection, features, weight, bias] of an attention over a coarse h and an upsampled candidate"""
    torch.manual_seed(0)
    source_size, steps = UPSAMPLED[case]
    shapes = [(CHANNELS,), (2, 4, *source_size), (CHANNELS, 4), (2, 3, *source_size), (3, CHANNELS, *steps)]
    shapes += [(CHANNELS,)] * with_bias
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _attend_upsampled(attend, inputs: list[torch.Tensor], is_described: bool) -> torch.Tensor:
    query, h, projection, features, weight, *bias = inputs
    described = Upsampled(features, weight, bias[0] if bias else None)
    last = described if is_described else Candidate(upsample(described), None)
    return attend(query, None, [Candidate(h, projection), last], described.size)


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", UPSAMPLED)
@pytest.mark.usefixtures("small_chunks")
def test_a_described_candidate_equals_the_computed_one(case, with_bias, attend):
    inputs = _upsampled_inputs(case, with_bias)
    outputs = [_attend_upsampled(attend_reference, inputs, False), _attend_upsampled(attend, inputs, True)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=0)
    upstream = torch.randn_like(outputs[0])
    expected, gradients = (torch.autograd.grad(out, inputs, upstream) for out in outputs)
    for a, b in zip(gradients, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attend", ATTENTIONS[1:])
@pytest.mark.parametrize("wanted", [[0], [3], [4], [5], [0, 3, 5], [2, 4]])
def test_a_described_candidate_has_the_gradients_that_are_wanted(wanted, attend):
    inputs = _upsampled_inputs("3d")
    expected = torch.autograd.grad(_attend_upsampled(attend_reference, inputs, False).square().sum(), inputs)
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number in wanted)
    _attend_upsampled(attend, inputs, True).square().sum().backward()
    for number, tensor in enumerate(inputs):
        if number in wanted:
            torch.testing.assert_close(tensor.grad, expected[number], atol=1e-9, rtol=0)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("attend", ATTENTIONS[1:])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_described_candidate_is_not_kept(attend, autocast):
    inputs = _upsampled_inputs("3d", dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_bytes(lambda: outputs.append(_attend_upsampled(attend, inputs, True)), inputs)
        expected = _attend_upsampled(attend_reference, inputs, False)
    assert kept == 0
    assert outputs[0].dtype == expected.dtype
    torch.testing.assert_close(outputs[0], expected, atol=0.05 if autocast else 1e-5, rtol=0)
    # The backward pass runs outside autocast.
    gradients, of_expected = (torch.autograd.grad(out.float().sum(), inputs) for out in (outputs[0], expected))
    for a, b in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(a, b, atol=(0.05 if autocast else 1e-5) * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("attend", ATTENTIONS[1:])
def test_an_average_is_not_kept_where_what_it_is_the_average_of_is_given(attend):
    inputs, size = _inputs("3d")
    candidates = _candidates(inputs)
    finer = [candidate.averaged_from for candidate in candidates if candidate.averaged_from is not None]
    assert finer
    kept = saved_bytes(lambda: attend(*inputs[:2], candidates, size), [*inputs, *finer])
    assert kept <= 3 * inputs[0].nbytes


@pytest.mark.parametrize("attend", ATTENTIONS[1:])
def test_a_described_candidate_compiles(attend):
    torch._dynamo.reset()
    inputs = _upsampled_inputs("3d")
    compiled = torch.compile(lambda: _attend_upsampled(attend, inputs, True), fullgraph=True, backend="aot_eager")
    outputs = [compiled(), _attend_upsampled(attend, inputs, True)]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    torch.testing.assert_close([outputs[0], *gradients[0]], [outputs[1], *gradients[1]])


@pytest.mark.parametrize("frozen", ["features", "projections", "both"])
@pytest.mark.usefixtures("small_chunks")
def test_streaming_computes_no_gradients_of_what_is_frozen(frozen, monkeypatch):
    inputs, size = _inputs("3d")
    gradient = torch.randn_like(inputs[2])
    num_sources = (len(inputs) - 3) // 2
    outputs = attend_streaming(inputs[0], inputs[1], _candidates(inputs), size)
    expected = torch.autograd.grad(outputs, inputs, gradient)

    parts = {"features": slice(2, 3 + num_sources), "projections": slice(3 + num_sources, None), "both": slice(2, None)}
    for tensor in inputs[parts[frozen]]:
        tensor.requires_grad_(False)
    asked_for = []
    gradients_of = ChunkAlignment.gradients
    monkeypatch.setattr(ChunkAlignment, "gradients", lambda self: asked_for.append(gradients_of(self)) or asked_for[-1])
    attend_streaming(inputs[0], inputs[1], _candidates(inputs), size).backward(gradient)

    for tensor, same in zip(inputs, expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, same, atol=1e-12, rtol=0)
    for of_features, of_projection in asked_for:
        assert (of_features is None) == (frozen != "projections")
        assert of_projection is None or frozen == "features"
    assert len(asked_for) == num_sources + 1


@pytest.mark.parametrize("attend", ATTENTIONS[1:])
def test_single_precision_is_as_exact_as_that_of_reference(attend):
    """Where neighbours cancel, too: there the norm of what lies between them is small against their own."""
    torch.manual_seed(0)
    u = torch.randn(1, CHANNELS, 8, 8)
    u[..., 1::2] = -3 * u[..., ::2] + 0.3 * torch.randn(1, CHANNELS, 8, 4)
    x = torch.randn(1, CHANNELS, 16, 16)
    query, norm_scale = torch.randn(CHANNELS), torch.ones(CHANNELS)

    def run(attend, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, u, x)]
        candidates = [Candidate(inputs[1], None), Candidate(inputs[2], None)]
        out = attend(inputs[0], norm_scale.to(dtype), candidates, (16, 16))
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    exact = run(attend_reference, torch.float64)
    for a, b in zip(run(attend, torch.float32), exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4 * b.abs().max().item(), rtol=0)


@pytest.mark.usefixtures("small_chunks")
def test_streaming_passes_gradcheck():
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2,), (2,), (2, 2, 2, 4), (2, 3, 1, 2), (2, 1, 4, 4), (2, 3), (2, 1)]
    ]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return attend_streaming(tensors[0], tensors[1], _candidates(list(tensors)), (2, 4))

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("field", [False, True])
@pytest.mark.parametrize("key_channels", [None, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_chunks")
def test_streaming_weights_equal_those_of_the_formulas(case, key_channels, field):
    inputs, size = _inputs(case)
    query_channels = key_channels or CHANNELS
    query = torch.randn(3, query_channels, *size, dtype=torch.float64) if field else inputs[0][:query_channels]
    norm_scale, candidates = inputs[1][:query_channels], _candidates(inputs)
    keys = torch.stack([align(each.features, each.projection, size) for each in candidates])
    expected = attention_weights(query, norm_scale, keys[:, :, :key_channels])
    weights = streaming_weights(query, norm_scale, candidates, size, key_channels)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, expected.detach(), atol=1e-9, rtol=0)


def test_candidates_that_are_finer_than_the_target_are_refused():
    x, finer = torch.randn(1, CHANNELS, 4, 4), torch.randn(1, CHANNELS, 4, 8)
    arguments = torch.randn(CHANNELS), torch.ones(CHANNELS), [Candidate(finer, None), Candidate(x, None)], (4, 4)
    for refuses in (attend_streaming, attend_native, streaming_weights):
        with pytest.raises(XAttnResError, match=r"\(4, 8\) to \(4, 4\): average finer features first"):
            refuses(*arguments)


def test_a_zero_query_weighs_all_candidates_alike():
    values = torch.randn(4, 2, CHANNELS, 3, 3)
    weights = attention_weights(torch.zeros(CHANNELS), torch.ones(CHANNELS), values)
    assert torch.equal(weights, torch.full((4, 2, 3, 3), 0.25))


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_large_scores_stay_finite_and_choose_one_candidate(attend):
    x = torch.ones(1, CHANNELS, 2, 2)
    query = torch.full((CHANNELS,), 1e4)
    out = attend(query, torch.ones(CHANNELS), [Candidate(x, None), Candidate(-2 * x, None)], (2, 2))
    assert torch.equal(out, x)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_under_autocast_squares_do_not_overflow(attend):
    inputs, size = _inputs("2d", torch.float32)
    candidates = [Candidate(1000 * h.detach().half(), P) for h, P, _ in _candidates(inputs)]
    with torch.autocast("cpu", torch.float16):
        out = attend(inputs[0], inputs[1], candidates, size)
    expected = attend(
        inputs[0], inputs[1], [Candidate(each.features.float(), each.projection) for each in candidates], size
    )
    torch.testing.assert_close(out.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    gradients = torch.autograd.grad(out.float().mean(), [inputs[0], inputs[-1]])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_under_autocast_scores_are_as_exact_as_in_single_precision(attend):
    torch.manual_seed(0)
    # Scores of ten and more: in half precision, they and the weights would be wrong by a percent.
    query = 10 * torch.randn(CHANNELS)
    features = [torch.randn(1, CHANNELS, 8, 8).half() for _ in range(3)]
    with torch.autocast("cpu", torch.float16):
        out = attend(query, torch.ones(CHANNELS), [Candidate(h, None) for h in features], (8, 8))
    expected = attend(query, torch.ones(CHANNELS), [Candidate(h.float(), None) for h in features], (8, 8))
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize(
    "source_size, size", [((2, 4), (4, 8)), ((2, 1, 4), (4, 4, 8)), ((8, 8), (4, 8)), ((8, 4, 16), (4, 4, 8))]
)
def test_the_largest_half_precision_values_stay_finite(attend, source_size, size):
    features = [
        torch.empty(1, CHANNELS, *extents).uniform_(-60000, 60000).half().requires_grad_()
        for extents in (source_size, size)
    ]
    query, norm_scale = torch.randn(CHANNELS, requires_grad=True), torch.ones(CHANNELS, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        candidates = [averaged(h, None, size) for h in features]
        out = attend(query, norm_scale, candidates, size)
    # On a CPU, autocast averages three axes in single precision.
    assert out.half().isfinite().all()
    parameters = [query, norm_scale, *features]
    # nnU-Net's loss is a mean, scaled by up to 2^16 against underflow.
    for gradient in torch.autograd.grad(out.float().mean(), parameters):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_in_half_precision_the_mixture_is_finite_wherever_it_fits(attend):
    """Aligned candidates may exceed 65504 where their mixture does not."""
    torch.manual_seed(0)
    query, norm_scale = 3 * torch.randn(CHANNELS), torch.ones(CHANNELS)
    candidates = [
        Candidate(1e4 * torch.randn(2, 4, *size).half(), 4 * torch.randn(CHANNELS, 4)) for size in ((8, 8), (4, 4))
    ]
    candidates.append(Candidate(torch.randn(2, CHANNELS, 8, 8).half(), None))
    exact = [Candidate(h.double(), None if P is None else P.double()) for h, P, _ in candidates]
    assert max(align(h, P, (8, 8)).abs().max() for h, P, _ in exact) > 65504
    expected = attend_reference(query.double(), norm_scale.double(), exact, (8, 8))
    with torch.autocast("cpu", torch.float16):
        out = attend(query, norm_scale, candidates, (8, 8))
    fits = expected.abs() < 65000
    assert 0 < (~fits).sum() < fits.sum()
    assert out[fits].isfinite().all()
    torch.testing.assert_close(out[fits].double(), expected[fits], atol=100, rtol=2e-3)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_the_result_has_the_precision_of_the_aligned_candidates(attend):
    image, projection = torch.randn(1, 3, 4, 4), torch.randn(CHANNELS, 3)
    x = torch.randn(1, CHANNELS, 4, 4).half()
    with torch.autocast("cpu", torch.float16):
        candidates = [Candidate(image, projection), Candidate(x, None)]
        out = attend(torch.randn(CHANNELS), torch.ones(CHANNELS), candidates, (4, 4))
    assert out.dtype == torch.float16


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_may_have_parameters_of_half_precision(attend, dtype):
    """As after `network.half()`, without autocast."""
    inputs, size = _inputs("2d", dtype)
    with torch.no_grad():
        candidates = _candidates(inputs)
        out = attend(*inputs[:2], candidates, size)
        single = [Candidate(*(None if each is None else each.float() for each in pair)) for pair in candidates]
        expected = attend(*(each.float() for each in inputs[:2]), single, size)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0)


def _saved_bytes(attend, num_sources: int, key_channels: int | None, field: bool) -> int:
    sources = [(torch.randn(1, 8, 2, 2, 2), torch.randn(8, 8, requires_grad=True)) for _ in range(num_sources)]
    candidates = [
        *(Candidate(*each) for each in sources),
        Candidate(torch.randn(1, 8, 16, 16, 16, requires_grad=True), None),
    ]
    query_channels = key_channels or 8
    query = torch.randn(1, query_channels, 16, 16, 16) if field else torch.randn(query_channels)
    # A field comes scaled.
    norm_scale = None if field else torch.ones(query_channels)
    given = [tensor for candidate in candidates for tensor in candidate if tensor is not None]
    return saved_bytes(
        lambda: attend(query.requires_grad_(), norm_scale, candidates, (16, 16, 16), key_channels), given
    )


@pytest.mark.parametrize("field", [False, True])
@pytest.mark.parametrize("key_channels", [None, 3])
def test_streaming_keeps_no_aligned_copies_for_the_backward_pass(field, key_channels):
    aligned_copy = 8 * 16**3 * 4
    few, many = (_saved_bytes(attend_reference, number, key_channels, field) for number in (2, 6))
    assert many - few >= 4 * aligned_copy
    few, many = (_saved_bytes(attend_streaming, number, key_channels, field) for number in (2, 6))
    assert many - few < aligned_copy / 16
    assert many < aligned_copy / 16 + field * aligned_copy


@pytest.mark.skipif(Version(torch.__version__) < Version("2.14"), reason="older compilers keep aligned copies")
def test_compiled_streaming_computes_the_same_and_keeps_no_aligned_copies():
    """A compiler that sees both passes may keep aligned features instead of aligning them once more."""
    torch._dynamo.reset()
    compiled = torch.compile(attend_streaming, fullgraph=True, backend="aot_eager_decomp_partition")
    features = [torch.randn(2, CHANNELS, *size, requires_grad=True) for size in [(16, 2), (16, 16)]]
    query, projection = (torch.randn(*size, requires_grad=True) for size in [(CHANNELS,), (CHANNELS, CHANNELS)])
    candidates = [Candidate(features[0], projection), Candidate(features[1], None)]
    arguments = query, torch.ones(CHANNELS), candidates, (16, 16)
    given, outputs = [query, projection, *features], []

    saved = saved_bytes(lambda: outputs.append(compiled(*arguments)), given)
    assert saved < features[1].nbytes / 16
    outputs.append(attend_streaming(*arguments))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out.square().mean(), given) for out in outputs]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_a_compiler_keeps_does_not_grow_with_the_number_of_candidates():
    torch._dynamo.reset()
    compiled = torch.compile(attend_streaming, fullgraph=True, backend="aot_eager_decomp_partition")
    few, many = (_saved_bytes(compiled, number, None, field=False) for number in (2, 6))
    assert many - few < 8 * 16**3 * 4 / 16


def test_a_compiled_graph_does_not_grow_with_the_number_of_chunks(monkeypatch):
    coarse, x = torch.randn(3, CHANNELS, 4, 3), torch.randn(3, CHANNELS, 4, 6)
    arguments = torch.randn(CHANNELS), torch.ones(CHANNELS), [Candidate(coarse, None), Candidate(x, None)], (4, 6)
    for tensor in (*arguments[:2], coarse, x):
        tensor.requires_grad_()

    def compiled_nodes() -> int:
        graphs = []

        def count(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
            # Together with the graphs of an autograd.Function's forward and backward.
            graphs.extend(part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
            return graph

        torch._dynamo.reset()
        torch.compile(attend_streaming, fullgraph=True, backend=count)(*arguments)
        return sum(len(graph.graph.nodes) for graph in graphs)

    nodes = compiled_nodes()
    monkeypatch.setitem(streaming.CHUNK_ELEMENTS, "cpu", 50)
    assert compiled_nodes() == nodes
