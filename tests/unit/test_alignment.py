import numpy as np
import pytest
import torch

from helpers import formulas
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import interpolation as module
from nnunet_xattnres.ops.alignment import align, is_finer, resize
from nnunet_xattnres.ops.streaming import Chunk, ChunkAlignment, chunks

SIZES = [  # source size, target size
    pytest.param((3, 4), (6, 8), id="2d-up"),
    pytest.param((2, 3), (8, 6), id="2d-up-by-4"),
    pytest.param((6, 8), (3, 2), id="2d-down"),
    pytest.param((5, 2), (5, 6), id="2d-up-anisotropic"),
    pytest.param((5, 7), (5, 7), id="2d-equal"),
    pytest.param((1, 2, 3), (4, 8, 6), id="3d-up"),
    pytest.param((5, 7, 5), (10, 14, 10), id="3d-up-odd"),
    pytest.param((4, 2, 3), (4, 8, 6), id="3d-up-anisotropic"),
    pytest.param((3, 2, 1), (9, 2, 3), id="3d-up-by-3"),
    pytest.param((4, 1, 2), (16, 1, 8), id="3d-up-by-4"),
    pytest.param((8, 4, 6), (2, 4, 3), id="3d-down-anisotropic"),
    pytest.param((2, 3, 2), (2, 3, 2), id="3d-equal"),
    pytest.param((2, 80, 1), (2, 160, 4), id="3d-up-wide"),
    pytest.param((1, 2, 10), (2, 2, 160), id="3d-up-wide-by-16"),
]


@pytest.mark.parametrize("source_size, size", SIZES)
def test_resize_equals_the_slow_formula(source_size, size):
    features = torch.randn(2, 3, *source_size, dtype=torch.float64)
    expected = np.stack([formulas.resize(item.numpy(), size) for item in features])
    np.testing.assert_allclose(resize(features, size).numpy(), expected, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["whole", "in-blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "BLOCK", 4)
        monkeypatch.setattr(module, "MIN_EXTENT_FOR_BLOCKS", 4)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("source_size, size", [case for case in SIZES if "down" not in case.id])
@pytest.mark.parametrize("max_voxels", [1, 20, 10**6])
@pytest.mark.parametrize("expand_last_axis", [True, False])
class TestChunkAlignment:
    def test_its_chunks_make_up_the_aligned_source(self, source_size, size, max_voxels, expand_last_axis):
        features, projection = _source(source_size)
        expected = align(features, projection, size)
        alignment = ChunkAlignment(features, projection, size, torch.float64, expand_last_axis)
        covered = torch.zeros_like(expected)
        for chunk in chunks(len(features), size, max_voxels):
            partial = alignment.partial(chunk)
            assert partial.shape[-1] == (size if expand_last_axis else source_size)[-1]
            torch.testing.assert_close(alignment.expand(partial), chunk.of(expected), atol=1e-12, rtol=0)
            squared_norm = chunk.of(expected).square().sum(dim=1)
            torch.testing.assert_close(alignment.squared_norm(partial), squared_norm, atol=1e-11, rtol=0)
            chunk.of(covered).add_(1)
        assert (covered == 1).all()

    def test_its_gradients_are_those_of_autograd(self, source_size, size, max_voxels, expand_last_axis):
        features, projection = _source(source_size)
        aligned = align(features.requires_grad_(), projection.requires_grad_(), size)
        gradient, norm_gradient = torch.randn_like(aligned), torch.randn_like(aligned[:, 0])
        outputs = aligned, aligned.square().sum(dim=1)
        expected = torch.autograd.grad(outputs, (features, projection), (gradient, norm_gradient))

        alignment = ChunkAlignment(features.detach(), projection.detach(), size, torch.float64, expand_last_axis)
        alignment.start_gradients(of_features=True, of_projection=True)
        for chunk in chunks(len(features), size, max_voxels):
            partial_gradient = alignment.expand_adjoint(chunk.of(gradient).clone())
            partial = alignment.partial(chunk)
            alignment.add_squared_norm_adjoint(norm_gradient[chunk.items, chunk.rows], partial, partial_gradient)
            alignment.accumulate_gradients(chunk, partial_gradient)
        for a, b in zip(alignment.gradients(), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_an_unresized_source_takes_no_more_memory_than_the_source(dtype):
    features, projection = _source((5, 7))
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


def _source(source_size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, *source_size, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "source, target, device, in_blocks",
    [(80, 160, "cpu", True), (79, 158, "cpu", False), (82, 164, "cpu", False), (80, 160, "meta", False)],
    ids=["long", "short", "not-of-whole-blocks", "elsewhere"],
)
def test_long_axes_are_interpolated_in_blocks_on_a_cpu(source, target, device, in_blocks):
    interpolation = module.axis_interpolation(source, target, torch.empty(0, device=device))
    assert interpolation.forward.in_blocks == in_blocks
    assert not interpolation.adjoint.in_blocks


def test_chunks_hold_whole_batch_items_where_they_fit_and_rows_of_one_where_not():
    assert list(chunks(3, (4, 5), 40)) == [Chunk(slice(0, 2), slice(0, 4)), Chunk(slice(2, 3), slice(0, 4))]
    assert list(chunks(1, (4, 5), 10)) == [Chunk(slice(0, 1), slice(0, 2)), Chunk(slice(0, 1), slice(2, 4))]


@pytest.mark.parametrize("source_size, size", [((4, 6), (6, 6)), ((4, 8), (8, 4)), ((5, 5, 5), (7, 10, 10))])
def test_sizes_that_are_no_multiples_of_each_other_are_an_error(source_size, size):
    with pytest.raises(XAttnResError, match="integer multiple"):
        is_finer(source_size, size)
