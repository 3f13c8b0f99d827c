"""FLOPs inside registered operators, which PyTorch's counter cannot see.

An operator registers a formula with `register_flop_formula`. It gets the operator's arguments, tensors as their shapes.
As in what the counter sees of the streaming backend, projections and interpolations count, and norms, scores and
mixtures do not.
"""

import logging
from collections.abc import Sequence
from math import prod

from nnunet_xattnres.ops.interpolation import upsampling_factors

# Without Triton, the import warns that Triton kernels are not counted. Ours are counted as operators.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

__all__ = ["interpolation_flops", "projection_flops", "register_flop_formula"]


def projection_flops(features: Sequence[Sequence[int]], projections: Sequence[Sequence[int] | None]) -> int:
    """Of all projections in the forward pass. features: shapes (B, C_k, *source_size). projections: (C_t, C_k).

    The gradients of features and projections take the same number each.
    """
    pairs = zip(features, projections, strict=True)
    return sum(2 * prod(shape) * projection[0] for shape, projection in pairs if projection is not None)


def interpolation_flops(sources: Sequence[Sequence[int]], channels: int, size: Sequence[int]) -> int:
    """Of the linear interpolation of all projected sources to `size`: two for every tap. The adjoint takes as many.

    sources: shapes (B, C_k, *source_size). channels: C_t.
    """
    total = 0
    for batch_size, _, *source_size in sources:
        taps = prod(min(factor, 2) for factor in upsampling_factors(source_size, size))
        if taps > 1:
            total += 2 * taps * batch_size * channels * prod(size)
    return total
