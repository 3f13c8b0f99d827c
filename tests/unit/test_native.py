"""The backend `native`: against `reference`, its operator, what it leaves to `streaming`, and its library."""

import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from helpers.memory import peak_and_live_bytes, saved_bytes
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import context, native_library
from nnunet_xattnres.ops.alignment import average_on_cpu, resize
from nnunet_xattnres.ops.backends import attention_backend, check_backend, chosen_backend
from nnunet_xattnres.ops.native_operator import attend_native, attend_on_cpu, attend_on_cpu_backward
from nnunet_xattnres.ops.reference import Candidate, Upsampled, attend_reference

needs_library = pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
Inputs = tuple[torch.Tensor, torch.Tensor, list[Candidate]]


def make_inputs(
    size: tuple[int, ...],
    factors: list[tuple[int, ...]],
    batch: int = 2,
    channels: int = 5,
    projected: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """query, norm_scale, and a candidate per factor of the resolution; the last one is x, without a projection."""
    torch.manual_seed(0)
    candidates = []
    for k, factor in enumerate([*factors, (1,) * len(size)]):
        has_projection = projected and k < len(factors)
        source_size = [extent // each for extent, each in zip(size, factor, strict=True)]
        features = torch.randn(batch, 3 + k if has_projection else channels, *source_size, dtype=dtype)
        projection = torch.randn(channels, 3 + k, dtype=dtype).requires_grad_() if has_projection else None
        candidates.append(Candidate(features.requires_grad_(), projection))
    query = torch.randn(channels, dtype=dtype, requires_grad=True)
    return query, (torch.rand(channels, dtype=dtype) + 0.5).requires_grad_(), candidates


def output_and_gradients(attend, inputs: Inputs, size: tuple[int, ...]) -> list[torch.Tensor]:
    query, norm_scale, candidates = inputs
    out = attend(query, norm_scale, candidates, size)
    leaves = [query, norm_scale, *(tensor for candidate in candidates for tensor in candidate if tensor is not None)]
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream)]


def assert_equals_reference(inputs: Inputs, size: tuple[int, ...], tolerance: float = 1e-9) -> None:
    expected = output_and_gradients(attend_reference, inputs, size)
    for a, b in zip(output_and_gradients(attend_native, inputs, size), expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * (1 + b.abs().max().item() if b.numel() else 1), rtol=0)


@needs_library
class TestValues:
    @pytest.mark.parametrize(
        "size, factors",
        [
            ((6, 4, 8), [(1, 1, 1), (2, 2, 2), (6, 4, 8)]),
            ((2, 12, 8), [(1, 2, 2), (1, 4, 4), (2, 4, 8), (1, 3, 1)]),
            ((68, 2, 4), [(2, 2, 2), (17, 1, 2), (34, 2, 4), (68, 1, 1)]),  # blocks shorter than a coarse voxel
            ((3, 68, 2), [(1, 2, 1), (3, 34, 2), (1, 4, 2)]),
            ((72, 6), [(2, 2), (3, 3), (36, 6), (72, 2)]),
            ((1, 1), [(1, 1)]),
            ((5, 1), []),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 32, 40])
    def test_they_equal_those_of_reference(self, size, factors, channels):
        assert_equals_reference(make_inputs(size, factors, channels=channels), size)

    @given(data=st.data())
    @settings(max_examples=30, deadline=None)
    def test_they_equal_those_of_reference_for_all_shapes(self, data):
        axes = data.draw(st.integers(2, 3))
        coarse = data.draw(st.tuples(*[st.integers(1, 3)] * axes))
        steps = data.draw(st.lists(st.tuples(*[st.integers(1, 3)] * axes), min_size=1, max_size=2))
        factors = [(1,) * axes]
        for step in steps:
            factors.append(tuple(a * b for a, b in zip(factors[-1], step, strict=True)))
        size = tuple(a * b for a, b in zip(coarse, factors[-1], strict=True))
        chosen = data.draw(st.lists(st.sampled_from(factors), max_size=4))
        options = {"channels": data.draw(st.integers(1, 70)), "batch": data.draw(st.integers(1, 3))}
        assert_equals_reference(make_inputs(size, chosen, projected=data.draw(st.booleans()), **options), size)

    # A tile's buffers take 512 KB, but it has 8 voxels at least. Here it has 8 to 29, and for some factors the voxels
    # left over are two or more, so that they may reach one more coarse voxel.
    @pytest.mark.parametrize(
        "width, factors, channels",
        [
            (30, [3, 5, 15], 4096),
            (84, [7, 14, 6, 3], 1500),
            (112, [1, 4, 8, 16, 7], 900),
            (120, [5, 6, 4, 12], 1500),
            (240, [3, 5, 12, 40], 600),
        ],
    )
    @pytest.mark.parametrize("height", [1, 2])
    def test_a_long_row_is_computed_in_tiles(self, width, factors, channels, height):
        size = (height, width)
        inputs = make_inputs(size, [(height, factor) for factor in factors], batch=1, channels=channels)
        assert_equals_reference(inputs, size)

    @given(data=st.data())
    @settings(max_examples=20, deadline=None)
    def test_rows_of_many_tiles_equal_those_of_reference(self, data):
        steps = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
        factors = [prod(steps[:length]) for length in range(len(steps) + 1)]
        size = (2, factors[-1] * data.draw(st.integers(40 // factors[-1] + 1, 80 // factors[-1] + 1)))
        chosen = data.draw(st.lists(st.sampled_from(factors), min_size=2, max_size=5))
        channels = data.draw(st.integers(1000, 2000))
        inputs = make_inputs(size, [(2, factor) for factor in chosen], batch=1, channels=channels)
        assert_equals_reference(inputs, size)

    def test_single_precision(self):
        size = (12, 8, 16)
        inputs = make_inputs(size, [(1, 1, 1), (2, 2, 2), (4, 4, 8)], channels=33, dtype=torch.float32)
        assert_equals_reference(inputs, size, tolerance=1e-5)

    def test_an_empty_batch(self):
        assert_equals_reference(make_inputs((4, 4), [(2, 2)], batch=0), (4, 4))

    def test_it_passes_gradcheck(self):
        query, norm_scale, candidates = make_inputs((2, 4), [(1, 2), (2, 2)], batch=1, channels=2)
        projections = [candidate.projection for candidate in candidates[:-1]]

        def attend(query, norm_scale, x, *tensors):
            sources = map(Candidate, tensors[:2], tensors[2:])
            return attend_native(query, norm_scale, [*sources, Candidate(x, None)], (2, 4))

        features = [candidate.features for candidate in candidates]
        assert torch.autograd.gradcheck(attend, (query, norm_scale, features[-1], *features[:-1], *projections))

    @pytest.mark.parametrize("frozen", ["features", "projections", "both"])
    def test_what_is_frozen_gets_no_gradient(self, frozen):
        size = (4, 6, 4)
        inputs = make_inputs(size, [(1, 1, 1), (2, 2, 2)])
        for features, projection, _ in inputs[2][:-1]:
            features.requires_grad_(frozen == "projections")
            projection.requires_grad_(frozen == "features")
        assert_equals_reference(inputs, size)

    def test_other_memory_layouts(self):
        size = (4, 6, 4)
        query, norm_scale, candidates = make_inputs(size, [(1, 1, 1), (2, 2, 2)], channels=1)
        strided = [
            Candidate(h.detach().to(memory_format=torch.channels_last_3d).requires_grad_(), projection)
            for h, projection, _ in candidates
        ]
        sliced = Candidate(torch.randn(2, 2, 4, 6, 4, dtype=torch.float64)[:, 1:].requires_grad_(), None)
        assert_equals_reference((query, norm_scale, [*strided, sliced]), size)

    def test_the_bits_do_not_depend_on_the_number_of_threads(self):
        size = (40, 8, 8)
        inputs = make_inputs(size, [(1, 1, 1), (2, 2, 2), (8, 8, 8)], dtype=torch.float32)
        threads = torch.get_num_threads()
        results = []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append(output_and_gradients(attend_native, inputs, size))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_own_threads_compute_the_same(self, monkeypatch):
        size = (40, 8, 8)
        inputs = make_inputs(size, [(1, 1, 1), (2, 2, 2), (8, 8, 8)], dtype=torch.float32)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        expected = output_and_gradients(attend_native, inputs, size)
        monkeypatch.setattr(native_library, "parallel_runner", lambda: None)
        for a, b in zip(output_and_gradients(attend_native, inputs, size), expected, strict=True):
            assert torch.equal(a, b)

    # The squares of the last value overflow, and those of its neighbours if they are opposite.
    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e25])
    @pytest.mark.parametrize("opposite", [False, True])
    def test_values_are_finite_exactly_where_those_of_reference_are(self, value, opposite):
        size = (6, 12)
        factors = [(1, 1), (2, 2), (3, 3), (6, 4)]
        query, norm_scale, candidates = make_inputs(size, factors, channels=32, dtype=torch.float32)
        for features, _, _ in candidates:
            for column in range(features.shape[-1]):
                damaged = features.detach().clone()
                damaged[0, :, -1, column] = value
                damaged[0, :, 0, column : column + 2] = value
                if opposite:
                    damaged[:, :, 0, column + 1 : column + 2] *= -1
                replaced = [Candidate(damaged if h is features else h, P) for h, P, _ in candidates]
                expected = attend_reference(query, norm_scale, replaced, size).isfinite()
                assert torch.equal(attend_native(query, norm_scale, replaced, size).isfinite(), expected)

    def test_concurrent_callers(self):
        size = (24, 8, 8)
        inputs = [make_inputs(size, [(1, 1, 1), (2, 2, 2)], batch=n, dtype=torch.float32) for n in (1, 2, 3, 4)]
        expected = [output_and_gradients(attend_native, each, size) for each in inputs]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda each: output_and_gradients(attend_native, each, size), inputs * 3))
        for result, same in zip(results, expected * 3, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, same, strict=True))


@needs_library
class TestMemoryOfTheBackwardPass:
    """What exists at the peak beyond inputs and outputs, in maps of the target: batch x channels x voxels."""

    # The values of all candidates and the gradients of the coarser ones exist at once. So the output of the transposed
    # convolution is a map, and so is every projected finer source. The gradients that are returned outweigh the rest.
    @pytest.mark.parametrize(
        "size, channels, factors, finer",
        [
            ((32, 32, 32), 16, [1, 2, 4, 8, 4, 2], 0),
            ((128, 64), 16, [1, 2, 4, 8, 4, 2], 0),
            ((16, 16, 16), 32, [1, 2, 4, 2], 1),
            ((16, 16, 16), 32, [1, 2], 2),
        ],
    )
    def test_it_is_bounded(self, size, channels, factors, finer):
        def source(source_channels: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
            features = torch.randn(2, source_channels, *(int(extent / factor) for extent in size), requires_grad=True)
            return features, torch.randn(channels, source_channels, requires_grad=True)

        candidates = [Candidate(*source(channels * factor, factor)) for factor in factors]
        for step in range(1, finer + 1):
            h, projection = source(channels // 2**step, 1 / 2**step)
            candidates.append(Candidate(resize(h, size), projection, h))
        x, _ = source(2 * channels, 2)
        weight = torch.randn(2 * channels, channels, *(2 for _ in size), requires_grad=True)
        query = torch.zeros(channels, requires_grad=True)
        out = attend_native(query, None, [*candidates, Upsampled(x, weight, None)], size)
        leaves = [query, x, weight, *(tensor for candidate in candidates for tensor in candidate[:2])]
        upstream = torch.randn_like(out)
        returned = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        peak, _ = peak_and_live_bytes(lambda: torch.autograd.grad(out, leaves, upstream))
        assert peak <= sum(gradient.nbytes for gradient in returned) + (1 + finer) * out.nbytes

    def test_the_halos_of_a_batch_are_added_to_its_own_items(self, monkeypatch):
        """With these channels and threads, the gradients of two batch items are computed at a time."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        size = (64, 16)
        query, _, candidates = make_inputs(size, [(2, 2)] * 6, batch=3, channels=1024, dtype=torch.float32)
        upstream = torch.randn(3, 1024, *size)

        def gradients(item: slice) -> list[torch.Tensor]:
            parts = [Candidate(h.detach()[item].requires_grad_(), P) for h, P, _ in candidates]
            out = attend_native(query, None, parts, size)
            return list(torch.autograd.grad(out, [part.features for part in parts], upstream[item]))

        alone = zip(*(gradients(slice(item, item + 1)) for item in range(3)), strict=True)
        for together, each in zip(gradients(slice(3)), alone, strict=True):
            torch.testing.assert_close(together, torch.cat(each))


def _sum_in_child(queue, threads: int) -> None:
    torch.set_num_threads(threads)
    queue.put(attend_native(*_small_call()).sum().item())


def _small_call() -> tuple[torch.Tensor, torch.Tensor, list[Candidate], tuple[int, ...]]:
    query, norm_scale, candidates = make_inputs((8, 8), [(2, 2)])
    detached = [Candidate(h.detach(), None if P is None else P.detach()) for h, P, _ in candidates]
    return query.detach(), norm_scale.detach(), detached, (8, 8)


@needs_library
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_computes_the_same(method):
    """As nnU-Net's workers do: they are forked after PyTorch has been used, and use one thread."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    expected = attend_native(*_small_call()).sum().item()
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_sum_in_child, args=(queue, 1))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert queue.get() == expected


@needs_library
class TestValuesOfAverages:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "source_size, factors",
        [
            ((12, 9), (4, 3)),
            ((6, 10), (1, 2)),
            ((8, 6, 10), (2, 3, 5)),
            ((8, 6, 10), (2, 1, 1)),
            ((4, 2, 70), (2, 2, 2)),
        ],
    )
    def test_they_equal_those_of_pytorch(self, source_size, factors, dtype):
        pool = F.avg_pool2d if len(factors) == 2 else F.avg_pool3d
        features = torch.randn(*source_size[::-1], 3, 2, dtype=dtype).permute(*range(len(factors) + 1, -1, -1))
        torch.testing.assert_close(average_on_cpu(features, factors), pool(features, factors))

    def test_of_nothing_it_is_nothing(self):
        assert average_on_cpu(torch.empty(0, 3, 4, 4), (2, 2)).shape == (0, 3, 2, 2)

    def test_a_voxel_that_is_not_finite_stays_in_its_cell(self):
        features = torch.zeros(1, 1, 4, 6)
        features[0, 0, 1, 2] = torch.inf
        assert average_on_cpu(features, (2, 2))[0, 0].isinf().nonzero().tolist() == [[0, 1]]

    def test_the_operator_is_registered_as_pytorch_wants_it(self):
        torch.library.opcheck(average_on_cpu, (torch.randn(1, 2, 4, 6), [2, 3]))

    def test_pytorch_averages_without_the_library(self, monkeypatch):
        features = torch.randn(1, 2, 4, 6)
        expected = resize(features, (2, 3))
        monkeypatch.setattr(native_library, "is_available", lambda: False)
        monkeypatch.setattr(native_library, "library", None)
        torch.testing.assert_close(resize(features, (2, 3)), expected)


@needs_library
class TestOperator:
    def test_it_is_registered_as_pytorch_wants_it(self):
        query, norm_scale, candidates = make_inputs((4, 4), [(1, 1), (2, 2)])
        features = [candidate.features for candidate in candidates]
        projections = [candidate.projection for candidate in candidates[:-1]]
        upsampling = [torch.randn(shape, dtype=torch.float64) for shape in [(2, 3, 2, 2), (3, 5, 2, 2), (5,)]]
        scaled = (query * norm_scale).detach().requires_grad_()
        finer = features[0].detach().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        kept = [finer, *features[1:]]
        torch.library.opcheck(attend_on_cpu, (scaled, features, projections, upsampling, kept, [4, 4], 1e-6))

    @pytest.mark.parametrize("size", [(8, 4), (4, 8, 4)])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_compilers_are_told_the_memory_layout_of_its_results(self, size, batch):
        """The gradients of sources with and without a projection, coarser, finer and of the same size as the target."""
        factors = (2, 1, 0.5)
        sources = [torch.randn(batch, 3, *(int(extent / factor) for extent in size)) for factor in factors * 2]
        projections = [torch.randn(3, 3) for _ in factors]
        upsampling = [sources[0], torch.randn(3, 3, *(2 for _ in size)), torch.randn(3)]
        wanted = [[True] * len(tensors) for tensors in (sources, projections, upsampling)]
        given = [torch.randn(batch, 3, *size), torch.randn(3), sources, projections, upsampling]
        results = attend_on_cpu_backward(*given, 1e-6, *wanted)
        with FakeTensorMode() as mode:
            told = attend_on_cpu_backward(*tree_map(mode.from_tensor, given), 1e-6, *wanted)
        for result, fake in zip(tree_leaves(results), tree_leaves(told), strict=True):
            assert result.shape == fake.shape
            # Steps along an axis of one position do not matter.
            steps = [each for each in zip(result.shape, result.stride(), fake.stride(), strict=True) if each[0] > 1]
            assert all(of_result == of_fake for _, of_result, of_fake in steps), steps

    def test_it_compiles_as_a_whole_for_all_shapes(self):
        torch._dynamo.reset()
        compiled = torch.compile(attend_native, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((8, 4, 12), (4, 8, 8)):
            inputs = make_inputs(size, [(1, 1, 1), (2, 2, 4)])
            expected = output_and_gradients(attend_native, inputs, size)
            for a, b in zip(output_and_gradients(compiled, inputs, size), expected, strict=True):
                torch.testing.assert_close(a, b)

    def test_it_computes_in_inference_mode(self):
        inputs = make_inputs((4, 4), [(2, 2)])
        expected = attend_native(*inputs, (4, 4))
        with torch.inference_mode():
            assert torch.equal(attend_native(*inputs, (4, 4)), expected)

    def test_it_keeps_no_projected_candidates_for_the_backward_pass(self):
        query, norm_scale, candidates = make_inputs((16, 16), [(1, 1), (2, 2)], channels=32)
        given = [norm_scale, *(tensor for candidate in candidates for tensor in candidate if tensor is not None)]
        kept = saved_bytes(lambda: attend_native(query, norm_scale, candidates, (16, 16)), given)
        assert kept <= 3 * query.nbytes


@needs_library
class TestFallback:
    @pytest.fixture(autouse=True)
    def _fresh_log(self):
        context._warn.cache_clear()
        yield
        context._warn.cache_clear()

    @pytest.mark.parametrize("reason", ["dtype", "mixed", "field", "keys"])
    def test_what_it_does_not_compute_is_streamed_and_logged_once(self, reason, caplog):
        query, norm_scale, candidates = make_inputs((4, 4), [(2, 2)])
        key_channels, scale = None, norm_scale
        if reason == "dtype":
            query, scale = query.bfloat16(), norm_scale.bfloat16()
            candidates = [Candidate(h.bfloat16(), None if P is None else P.bfloat16()) for h, P, _ in candidates]
        elif reason == "mixed":
            candidates = [Candidate(h.float(), P) for h, P, _ in candidates]
        elif reason == "field":
            query, scale = torch.randn(2, 5, 4, 4, dtype=torch.float64), None
        else:
            query, key_channels, scale = query[:2], 2, norm_scale[:2]
        with caplog.at_level(logging.WARNING):
            outputs = [attend_native(query, scale, candidates, (4, 4), key_channels) for _ in range(2)]
        exact = [Candidate(h.double(), None if P is None else P.double()) for h, P, _ in candidates]
        exact_scale = None if scale is None else scale.double()
        expected = attend_reference(query.double(), exact_scale, exact, (4, 4), key_channels)
        torch.testing.assert_close(outputs[0].double(), expected, atol=0.05, rtol=0.05)
        assert [record.message.count("'streaming' computes instead") for record in caplog.records] == [1]

    def test_an_exported_graph_runs_without_the_operator(self):
        class Module(torch.nn.Module):
            def forward(self, x, coarse):
                return attend_native(torch.ones(2), None, [Candidate(coarse, None), Candidate(x, None)], (4, 4))

        arguments = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)
        graph = torch.export.export(Module(), arguments)
        assert "attend_on_cpu" not in str(graph)
        torch.testing.assert_close(graph.module()(*arguments), Module()(*arguments))

    def test_meta_tensors(self):
        query, norm_scale, candidates = (
            torch.empty(5, device="meta"),
            torch.empty(5, device="meta"),
            [Candidate(torch.empty(1, 5, 4, 4, device="meta"), None)],
        )
        assert attend_native(query, norm_scale, candidates, (4, 4)).shape == (1, 5, 4, 4)


class TestLibrary:
    @pytest.fixture(autouse=True)
    def _loaded_anew(self):
        native_library.library.cache_clear()
        native_library._problem.cache_clear()
        context._warn.cache_clear()
        yield
        native_library.library.cache_clear()
        native_library._problem.cache_clear()
        context._warn.cache_clear()

    def test_without_it_auto_streams_and_the_backend_by_name_says_what_to_do(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "missing.so")
        assert chosen_backend("auto", "cpu", is_stage_level=True)[0] == "streaming"
        inputs = make_inputs((4, 4), [(2, 2)])
        expected = attend_reference(*inputs, (4, 4))
        for name in ("auto", "native"):  # a trained network predicts here too
            torch.testing.assert_close(attention_backend(name)(*inputs, (4, 4)), expected)
        with pytest.raises(XAttnResError, match="install a C compiler, such as gcc, and install nnunet-xattnres again"):
            check_backend("native", "cpu")

    def test_a_file_that_is_no_library(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "native_attention.so")
        native_library.FILE.write_text("no library")
        with pytest.raises(XAttnResError, match="cannot be loaded: install nnunet-xattnres again"):
            native_library.library()

    @needs_library
    def test_a_library_of_another_interface(self, monkeypatch):
        monkeypatch.setattr(native_library, "ABI", -1)
        with pytest.raises(XAttnResError, match="and this package needs -1: install"):
            native_library.library()

    def test_a_failure_is_logged_once_and_not_tried_again(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "native_attention.so")
        native_library.FILE.write_text("no library")
        inputs = make_inputs((4, 4), [(2, 2)])
        expected = attend_reference(*inputs, (4, 4))
        torch.testing.assert_close(attention_backend("auto")(*inputs, (4, 4)), expected)
        (record,) = caplog.records
        assert "cannot be loaded: install nnunet-xattnres again (" in record.getMessage()
        assert record.getMessage().endswith("; 'streaming' computes instead")
        monkeypatch.setattr(native_library.ctypes, "CDLL", None)
        torch.testing.assert_close(attention_backend("auto")(*inputs, (4, 4)), expected)
        assert len(caplog.records) == 1
        backend, problem = chosen_backend("auto", "cpu", is_stage_level=True)
        assert backend == "streaming" and "cannot be loaded" in problem

    @pytest.mark.parametrize("backend", ["native", "auto"])
    def test_without_it_one_line_says_why(self, backend, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "missing.so")
        attention_backend(backend)(*make_inputs((4, 4), [(2, 2)]), (4, 4))
        (record,) = caplog.records
        assert "no compiled library here" in record.getMessage()

    def test_without_it_nothing_is_said_where_nothing_is_streamed_instead(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "missing.so")
        resize(torch.randn(1, 2, 4, 6), (2, 3))
        attention_backend("reference")(*make_inputs((4, 4), [(2, 2)]), (4, 4))
        assert chosen_backend("native", "cpu", is_stage_level=True)[0] == "streaming"
        assert caplog.records == []

    def test_a_failure_is_logged_while_a_graph_is_compiled(self, monkeypatch, tmp_path, caplog):
        torch._dynamo.reset()
        monkeypatch.setattr(native_library, "FILE", tmp_path / "missing.so")
        inputs = make_inputs((4, 4), [(2, 2)])
        compiled = torch.compile(attention_backend("auto"), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs, (4, 4)), attend_reference(*inputs, (4, 4)))
        assert [record.getMessage() for record in caplog.records if "no compiled library here" in record.getMessage()]

    @needs_library
    def test_another_device(self):
        with pytest.raises(XAttnResError, match="runs on a CPU, and the network is on cuda: use the backend 'auto'"):
            check_backend("native", "cuda")

    @needs_library
    def test_too_little_memory_says_how_much_and_what_to_do(self, monkeypatch):
        message = r"cannot allocate {} MB for its buffers: free memory, or choose a smaller patch or batch size"
        # Nothing to compute, but the library begins with a table of the voxels along x: 8 bytes each, and a bit more.
        with pytest.raises(MemoryError, match=message.format(r"90071992\d\d\.\d")):
            attend_native(torch.ones(1), None, [Candidate(torch.empty(0, 1, 1, 2**50), None)], (1, 2**50))
        monkeypatch.setattr(native_library, "library", lambda: _Failing())
        with pytest.raises(MemoryError, match=message.format(r"2\.5")):
            average_on_cpu(torch.ones(1, 1, 2, 2), [2, 2])

    @needs_library
    def test_auto_is_native_on_a_cpu(self):
        assert chosen_backend("auto", "cpu", is_stage_level=True) == ("native", "")
        assert chosen_backend("auto", "cuda", is_stage_level=True) == ("streaming", "")
        assert chosen_backend("native", "cpu", is_stage_level=False) == ("streaming", "")


class _Failing:
    def nnunet_xattnres_average(self, call) -> int:
        return 2_500_000
