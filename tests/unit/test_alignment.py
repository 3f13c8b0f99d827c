"""Resampling and projection: as a whole against the formulas, and chunk by chunk against the whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import formulas
from helpers.memory import saved_bytes
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import interpolation
from nnunet_xattnres.ops.alignment import align, is_finer, resize
from nnunet_xattnres.ops.streaming import Chunk, ChunkAlignment, chunks


@pytest.mark.parametrize(
    "source_size, size",
    [
        pytest.param((3, 4), (6, 8), id="2d-up"),
        pytest.param((2, 3), (8, 6), id="2d-up-by-4"),
        pytest.param((6, 8), (3, 2), id="2d-down"),
        pytest.param((5, 2), (5, 6), id="2d-up-anisotropic"),
        pytest.param((5, 7), (5, 7), id="2d-equal"),
        pytest.param((5, 7, 5), (10, 14, 10), id="3d-up-odd"),
        pytest.param((4, 2, 3), (4, 8, 6), id="3d-up-anisotropic"),
        pytest.param((3, 2, 1), (9, 2, 3), id="3d-up-by-3"),
        pytest.param((8, 4, 6), (2, 4, 3), id="3d-down-anisotropic"),
        pytest.param((2, 3, 2), (2, 3, 2), id="3d-equal"),
        pytest.param((1, 2, 10), (2, 2, 160), id="3d-up-by-16"),
    ],
)
def test_resize_equals_the_formula(source_size, size):
    features = torch.randn(2, 3, *source_size, dtype=torch.float64)
    expected = np.stack([formulas.resize(item.numpy(), size) for item in features])
    np.testing.assert_allclose(resize(features, size).numpy(), expected, atol=1e-12)


@st.composite
def upsampled_sizes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The size of a source and that of a target, in two or three axes. Nowhere is the source finer."""
    axes = draw(st.lists(st.tuples(st.integers(1, 5), st.sampled_from((1, 2, 3, 4))), min_size=2, max_size=3))
    return tuple(source for source, _ in axes), tuple(source * factor for source, factor in axes)


@contextmanager
def short_blocks(in_blocks: bool) -> Iterator[None]:
    """in_blocks: axes of few voxels are interpolated in blocks too, of four voxels each."""
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(interpolation, "BLOCK", 4)
            patch.setattr(interpolation, "MIN_EXTENT_FOR_BLOCKS", 4)
        yield


def of_chunk_alignments(test):
    """60 combinations of sizes, chunk sizes, interpolation in blocks or not, and the kind of query.

    They are the same in every run. The explicit ones have axes that are long enough for blocks of the real length.
    """
    test = given(
        sizes=upsampled_sizes(),
        max_voxels=st.sampled_from((1, 20, 10**6)),
        in_blocks=st.booleans(),
        expand_last_axis=st.booleans(),
    )(test)
    for expand_last_axis in (True, False):
        for sizes in (((2, 80, 1), (2, 160, 4)), ((1, 2, 10), (2, 2, 160))):
            test = example(sizes=sizes, max_voxels=20, in_blocks=False, expand_last_axis=expand_last_axis)(test)
    return settings(max_examples=60, derandomize=True, deadline=None, database=None)(test)


@of_chunk_alignments
def test_chunks_make_up_the_aligned_source(sizes, max_voxels, in_blocks, expand_last_axis):
    source_size, size = sizes
    features, projection = features_and_projection(source_size)
    expected = align(features, projection, size)
    covered = torch.zeros_like(expected)
    with short_blocks(in_blocks):
        alignment = ChunkAlignment(features, projection, size, torch.float64, expand_last_axis)
        for chunk in chunks(len(features), size, max_voxels):
            partial = alignment.partial(chunk)
            assert partial.shape[-1] == (size if expand_last_axis else source_size)[-1]
            torch.testing.assert_close(alignment.expand(partial), chunk.of(expected), atol=1e-12, rtol=0)
            squared_norm = chunk.of(expected).square().sum(dim=1)
            torch.testing.assert_close(alignment.squared_norm(partial), squared_norm, atol=1e-11, rtol=0)
            chunk.of(covered).add_(1)
    assert (covered == 1).all()


@of_chunk_alignments
def test_gradients_of_chunks_add_up_to_those_of_autograd(sizes, max_voxels, in_blocks, expand_last_axis):
    source_size, size = sizes
    features, projection = features_and_projection(source_size)
    aligned = align(features.requires_grad_(), projection.requires_grad_(), size)
    gradient, norm_gradient = torch.randn_like(aligned), torch.randn_like(aligned[:, 0])
    outputs = aligned, aligned.square().sum(dim=1)
    expected = torch.autograd.grad(outputs, (features, projection), (gradient, norm_gradient))

    with short_blocks(in_blocks):
        alignment = ChunkAlignment(features.detach(), projection.detach(), size, torch.float64, expand_last_axis)
        alignment.start_gradients(of_features=True, of_projection=True)
        for chunk in chunks(len(features), size, max_voxels):
            partial_gradient = alignment.expand_adjoint(chunk.of(gradient).clone())
            partial = alignment.partial(chunk)
            alignment.add_squared_norm_adjoint(norm_gradient[chunk.items, chunk.rows], partial, partial_gradient)
            alignment.accumulate_gradients(chunk, partial_gradient)
    for computed, exact in zip(alignment.gradients(), expected, strict=True):
        torch.testing.assert_close(computed, exact, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_an_unresized_source_takes_no_more_memory_than_the_source(dtype):
    features, projection = features_and_projection((5, 7))
    gradient = torch.randn(3, 5, 5, 7)

    def features_gradient(features):
        alignment = ChunkAlignment(features, projection.float(), (5, 7), torch.float32, expand_last_axis=False)
        alignment.start_gradients(of_features=True, of_projection=True)
        for chunk in chunks(len(features), (5, 7), 20):
            alignment.accumulate_gradients(chunk, chunk.of(gradient))
        return alignment.gradients()[0]

    half = features_gradient(features.to(dtype))
    assert half.dtype == dtype
    assert torch.equal(half, features_gradient(features.to(dtype).float()).to(dtype))


def features_and_projection(source_size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, *source_size, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "source, target, device, in_blocks",
    [(80, 160, "cpu", True), (79, 158, "cpu", False), (82, 164, "cpu", False), (80, 160, "meta", False)],
    ids=["long", "short", "not-of-whole-blocks", "elsewhere"],
)
def test_long_axes_are_interpolated_in_blocks_on_a_cpu(source, target, device, in_blocks):
    axis = interpolation.axis_interpolation(source, target, torch.empty(0, device=device))
    assert axis.forward.in_blocks == in_blocks
    assert not axis.adjoint.in_blocks


def test_chunks_hold_whole_batch_items_where_they_fit_and_rows_of_one_where_not():
    assert list(chunks(3, (4, 5), 40)) == [Chunk(slice(0, 2), slice(0, 4)), Chunk(slice(2, 3), slice(0, 4))]
    assert list(chunks(1, (4, 5), 10)) == [Chunk(slice(0, 1), slice(0, 2)), Chunk(slice(0, 1), slice(2, 4))]


@pytest.mark.parametrize("source_size, size", [((4, 6), (6, 6)), ((4, 8), (8, 4)), ((5, 5, 5), (7, 10, 10))])
def test_sizes_that_are_no_multiples_of_each_other_are_an_error(source_size, size):
    with pytest.raises(XAttnResError, match="integer multiple"):
        is_finer(source_size, size)


@pytest.mark.parametrize("size, source_size", [((2, 3), (4, 6)), ((2, 3, 2), (6, 3, 4))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_an_average_nothing_is_kept(size, source_size, dtype):
    features = torch.randn(2, 3, *source_size, dtype=dtype, requires_grad=True)
    outputs = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert saved_bytes(lambda: outputs.append(resize(features, size)), []) == 0
    assert outputs[0].dtype == dtype
    exact = features.detach().double().requires_grad_()
    pool = torch.nn.functional.avg_pool2d if len(size) == 2 else torch.nn.functional.avg_pool3d
    expected = pool(exact, [source // target for source, target in zip(source_size, size, strict=True)])
    torch.testing.assert_close(outputs[0].double(), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    upstream = torch.randn_like(outputs[0])
    (gradient,) = torch.autograd.grad(outputs[0], features, upstream)
    (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(gradient.double(), of_exact, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
