"""Triton kernels of the stage-level attention. They upsample sources in registers, along z and y before along x.

Shapes: query (C,); sources u_k, of one dtype, which are (B, *source_size, C) where coarse, and (B, C, *size) where they
have the target's resolution; mixture and gradient (B, C, *size). All tensors are contiguous. Coarse sources have
channels last, so that a thread loads 16 bytes at a time. The kernels have three axes: a 2D image is a 3D image of
depth 1.

A factor is the size of the target divided by that of a source, per axis. Along an axis of factor F, target position p
lies at (p + 1/2) / F - 1/2 on the grid of the source, clamped to the ends of the grid. The two source positions around
it are its taps. Where F is 1, it has one tap.

The formulas are those of `reference.py`, with q = w * g and r_k(p) = (mean_c v_k(p)^2 + eps)^(-1/2). The gradient of an
aligned source is, with d_k = < dout , v_k >,

    dv_k = a_k dout + b_k q - n_k v_k      b_k = a_k (d_k - sum_j a_j d_j) r_k,  n_k = b_k e_k r_k / C

A plane is the target positions of one batch item and one z. `_rows_kernel` interpolates the coarse sources along z and
y, once for every coarse position of a row. It does so for some planes at a time, so that the result takes little
memory. Then tiles of a plane need only interpolate along x.

The backward pass has two more kernels. The first writes the coefficients a_k, b_k and n_k of all sources and target
positions. The second computes du_k: for every source position, it sums dv_k over the target positions that have it as a
tap, times its weight there. In the term n_k v_k, v_k is a weighted sum of taps. The kernel therefore sums n_k times the
weights of each tap, which has no channels, and multiplies every sum by the features of its tap once. All sums have a
fixed order.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# `_mix_kernel` and `_coefficients_kernel` hold all channels of a tile of target positions in registers, 16 elements per
# thread. Compiled for compute capabilities 8.0 and 9.0, they take at most 160 registers in float32, and spill none.
MAX_CHANNELS = 512
TILE_ELEMENTS = 2048
ELEMENTS_PER_WARP = 512
MIN_TILE_POSITIONS, MAX_TILE_POSITIONS = 16, 128
# Offsets within a batch item, and between coefficients, are 32-bit integers.
MAX_ELEMENTS = 2**31 - 1

# `_rows_kernel`: elements of a program. Rows of at most so many bytes are held at once, or those of one plane.
ROW_ELEMENTS = 1024
ROWS_BYTES = 2**26
MAX_PLANES = 2**16 - 1

# `_source_gradient_kernel`: channels and target positions of a tile, and the most tiles that one part of a sum takes.
SUM_CHANNELS = 32
SUM_POSITIONS = 64
SUM_TILES = 64

Size = tuple[int, int, int]


def mix(query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    """out(p) = sum_k a_k(p) v_k(p). coarse, fine: the sources, those at the resolution of the target in `fine`."""
    sources = [*coarse, *fine]
    mixture = sources[0].new_empty(len(sources[0]), len(query), *size)
    options = _tile_options(query, coarse, mixture, eps)
    with torch.cuda.device_of(mixture):
        for first, planes, rows in _interpolate_rows(coarse, mixture, options["PRECISION"]):
            _mix_kernel[_grid(mixture, planes)](query, rows, tuple(fine), mixture, first, *_planes(size), **options)
    return mixture


def mix_gradients(
    gradient: Tensor, query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of `mix` with respect to query and sources. gradient: that of the result."""
    size = gradient.shape[2:]
    options = _tile_options(query, coarse, gradient, eps)
    sources = [*coarse, *fine]
    precision = _precision(query, gradient)
    coefficients = gradient.new_empty(len(sources), 3, len(gradient), prod(size), dtype=precision)
    with torch.cuda.device_of(gradient):
        for first, planes, rows in _interpolate_rows(coarse, gradient, options["PRECISION"]):
            _coefficients_kernel[_grid(gradient, planes)](
                query,
                rows,
                tuple(fine),
                gradient,
                coefficients,
                first,
                len(gradient),
                *_planes(size),
                **options,
                BLOCK_SOURCES=triton.next_power_of_2(len(sources)),
            )
        query_parts, source_gradients = zip(
            *(
                _source_gradient(query, source, gradient, of_source, channels_last=k < len(coarse))
                for k, (source, of_source) in enumerate(zip(sources, coefficients, strict=True))
            ),
            strict=True,
        )
    query_gradient = torch.cat(query_parts).sum(dim=0).to(query.dtype)
    return query_gradient, list(source_gradients[: len(coarse)]), list(source_gradients[len(coarse) :])


def _interpolate_rows(
    coarse: Sequence[Tensor], target: Tensor, precision: tl.dtype
) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
    """Chunks of the planes (batch item, z) of the target: the first one, their number, and the rows of all sources.

    The rows (planes, y, source_x, C) of a source are interpolated along z and y. Every chunk overwrites those before.
    """
    batch_size, channels, *size = target.shape
    size_z, size_y, size_x = _three_axes(size)
    factors = [_factors(source.shape[1:-1], size) for source in coarse]
    row_shapes = [(size_y, size_x // factor_x, channels) for *_, factor_x in factors]
    planes = batch_size * size_z
    most = max(1, ROWS_BYTES // max(1, target.element_size() * sum(map(prod, row_shapes))))
    at_once = min(planes, most, MAX_PLANES)
    rows = tuple(target.new_empty(at_once, *shape) for shape in row_shapes)
    for first in range(0, planes, at_once or 1):
        count = min(at_once, planes - first)
        if rows:
            _rows_kernel[triton.cdiv(max(map(prod, row_shapes)), ROW_ELEMENTS), count, len(rows)](
                tuple(coarse),
                rows,
                first,
                size_z,
                size_y,
                size_x,
                *zip(*factors, strict=True),
                CHANNELS=channels,
                BLOCK=ROW_ELEMENTS,
                PRECISION=precision,
            )
        yield first, count, rows


def _source_gradient(
    query: Tensor, source: Tensor, gradient: Tensor, coefficients: Tensor, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """What one source adds to the gradient of the query, (parts, C), to be summed over parts, and its own gradient.

    coefficients: a, b and n of this source, (3, B, positions).
    """
    batch_size, channels, *size = gradient.shape
    source_size = source.shape[1:-1] if channels_last else source.shape[2:]
    factors = _factors(source_size, size)
    # A tile has up to 16 target positions along x for each of its source positions, and as many of those as fit.
    tile_x = min(triton.next_power_of_2(factors[2]), 16)
    tile_sources = SUM_POSITIONS // tile_x
    tiles_x = triton.cdiv(factors[2], tile_x)
    rows = factors[0] * factors[1]
    rows_per_part = min(rows, max(1, SUM_TILES // tiles_x))
    halves = prod(min(factor, 2) for factor in factors)
    parts = halves * triton.cdiv(rows, rows_per_part)
    # Large factors mean few source positions with long sums. Then every part of a sum has a program of its own.
    splits = parts if halves * rows * tiles_x > 2 * SUM_TILES else 1
    block_channels = min(triton.next_power_of_2(channels), SUM_CHANNELS)
    grid = (
        triton.cdiv(prod(source_size), tile_sources),
        splits,
        batch_size * triton.cdiv(channels, block_channels),
    )
    precision = coefficients.dtype
    source_parts = source.new_empty(splits, *source.shape, dtype=source.dtype if splits == 1 else precision)
    query_parts = source.new_empty(grid[0] * splits * batch_size, channels, dtype=precision)
    _source_gradient_kernel[grid](
        query,
        source,
        gradient,
        coefficients,
        source_parts,
        query_parts,
        batch_size,
        *_three_axes(source_size),
        *factors,
        ROWS=rows_per_part,
        PARTS=parts // splits,
        TILE_X=tile_x,
        TILE_SOURCES=tile_sources,
        CHANNELS_LAST=channels_last,
        CHANNELS=channels,
        BLOCK_CHANNELS=block_channels,
        PRECISION=_TRITON_DTYPES[precision],
    )
    return query_parts, source_parts[0] if splits == 1 else source_parts.sum(dim=0).to(source.dtype)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _precision(query: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 where an argument is float64."""
    return torch.promote_types(torch.promote_types(query.dtype, target.dtype), torch.float32)


def _three_axes(size: Sequence[int]) -> Size:
    z, y, x = (1, *size)[-3:]
    return z, y, x


def _planes(size: Sequence[int]) -> Size:
    """The number of planes of an image, the positions of a plane, and those of a row."""
    z, y, x = _three_axes(size)
    return z, y * x, x


def _factors(source_size: Sequence[int], size: Sequence[int]) -> Size:
    return _three_axes([target // extent for extent, target in zip(source_size, size, strict=True)])


def _tile_positions(channels: int) -> int:
    positions = TILE_ELEMENTS // triton.next_power_of_2(channels)
    return min(max(positions, MIN_TILE_POSITIONS), MAX_TILE_POSITIONS)


def _grid(target: Tensor, planes: int) -> tuple[int, int]:
    return triton.cdiv(_planes(target.shape[2:])[1], _tile_positions(target.shape[1])), planes


def _tile_options(query: Tensor, coarse: Sequence[Tensor], target: Tensor, eps: float) -> dict[str, Any]:
    channels, *size = target.shape[1:]
    block_channels = triton.next_power_of_2(channels)
    tile = _tile_positions(channels)
    return {
        "FACTORS_X": tuple(_factors(source.shape[1:-1], size)[2] for source in coarse),
        "CHANNELS": channels,
        "BLOCK_CHANNELS": block_channels,
        "TILE": tile,
        # A compile-time constant, because Triton passes floats as float32.
        "EPS": eps,
        "PRECISION": _TRITON_DTYPES[_precision(query, target)],
        "num_warps": max(4, block_channels * tile // ELEMENTS_PER_WARP),
    }


@triton.jit(do_not_specialize=["first"])
def _rows_kernel(
    coarse,
    rows,
    first,
    size_z,
    size_y,
    size_x,
    FACTORS_Z: tl.constexpr,
    FACTORS_Y: tl.constexpr,
    FACTORS_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows of a source in one plane (batch item, z) of the target: interpolated along z and y."""
    k = tl.program_id(2)
    factor_z = _select(FACTORS_Z, k)
    factor_y = _select(FACTORS_Y, k)
    source_z = size_z // factor_z
    source_y = size_y // factor_y
    row = size_x // _select(FACTORS_X, k) * CHANNELS
    plane = first + tl.program_id(1)
    source = _select(coarse, k) + (plane // size_z).to(tl.int64) * source_z * source_y * row
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= size_y * row:
        return
    inside = element < size_y * row
    below_z, fraction_z = _below(plane % size_z, factor_z, PRECISION)
    below_y, fraction_y = _below(element // row, factor_y, PRECISION)
    taps_y = tl.minimum(factor_y, 2)
    u = tl.zeros((BLOCK,), PRECISION)
    for tap in range(tl.minimum(factor_z, 2) * taps_y):
        z, weight_z = _tap(below_z, fraction_z, tap // taps_y, source_z)
        y, weight_y = _tap(below_y, fraction_y, tap % taps_y, source_y)
        at = (z * source_y + y) * row + element % row
        u += weight_z * weight_y * tl.load(source + at, mask=inside, other=0.0).to(PRECISION)
    to = _select(rows, k) + tl.program_id(1).to(tl.int64) * size_y * row + element
    tl.store(to, u.to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _mix_kernel(
    query,
    rows,
    fine,
    mixture,
    first,
    size_z,
    plane_size,
    size_x,
    FACTORS_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward pass: out(p) = sum_k a_k(p) v_k(p) for a tile of target positions."""
    position, channel, inside, at = _tile(first, size_z, plane_size, CHANNELS, BLOCK_CHANNELS, TILE)
    q = tl.load(query + channel, mask=channel < CHANNELS, other=0.0).to(PRECISION)

    # Softmax in one pass: the sums are relative to the largest score so far.
    largest = tl.full((TILE,), -float("inf"), PRECISION)
    total = tl.zeros((TILE,), PRECISION)
    weighted = tl.zeros((TILE, BLOCK_CHANNELS), PRECISION)
    for k in range(len(rows) + len(fine)):
        v = _value(rows, fine, k, position, channel, inside, at, plane_size, size_x, FACTORS_X, CHANNELS, PRECISION)
        score, _ = _score(q, v, CHANNELS, EPS)
        new_largest = tl.maximum(largest, score)
        rescale = tl.exp(largest - new_largest)
        weight = tl.exp(score - new_largest)
        total = total * rescale + weight
        weighted = weighted * rescale[:, None] + weight[:, None] * v
        largest = new_largest

    tl.store(mixture + at, (weighted / total[:, None]).to(mixture.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _coefficients_kernel(
    query,
    rows,
    fine,
    gradient,
    coefficients,
    first,
    items,
    size_z,
    plane_size,
    size_x,
    FACTORS_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr,
):
    """Backward pass, first kernel: a_k(p), b_k(p) and n_k(p) of all sources for a tile of target positions."""
    position, channel, inside, at = _tile(first, size_z, plane_size, CHANNELS, BLOCK_CHANNELS, TILE)
    q = tl.load(query + channel, mask=channel < CHANNELS, other=0.0).to(PRECISION)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(PRECISION)

    # The scores e_k, the factors r_k and the products d_k of all sources stay in registers.
    SOURCES: tl.constexpr = len(rows) + len(fine)
    row = tl.arange(0, BLOCK_SOURCES)[:, None]
    scores = tl.full((BLOCK_SOURCES, TILE), -float("inf"), PRECISION)
    inverse_rms = tl.zeros((BLOCK_SOURCES, TILE), PRECISION)
    products = tl.zeros((BLOCK_SOURCES, TILE), PRECISION)
    for k in range(SOURCES):
        v = _value(rows, fine, k, position, channel, inside, at, plane_size, size_x, FACTORS_X, CHANNELS, PRECISION)
        score, inverse_rms_k = _score(q, v, CHANNELS, EPS)
        inverse_rms = tl.where(row == k, inverse_rms_k[None, :], inverse_rms)
        scores = tl.where(row == k, score[None, :], scores)
        products = tl.where(row == k, tl.sum(g * v, axis=1)[None, :], products)

    is_source = row < SOURCES
    a = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    a = a / tl.sum(a, axis=0)[None, :]
    b = a * (products - tl.sum(a * products, axis=0)[None, :]) * inverse_rms
    n = b * tl.where(is_source, scores, 0.0) * inverse_rms / CHANNELS
    plane = first + tl.program_id(1)
    of_coefficient = items * size_z * plane_size
    at = coefficients + row * 3 * of_coefficient + plane * plane_size + position[None, :]
    kept = is_source & (position < plane_size)[None, :]
    tl.store(at, a, mask=kept)
    tl.store(at + of_coefficient, b, mask=kept)
    tl.store(at + 2 * of_coefficient, n, mask=kept)


@triton.jit
def _source_gradient_kernel(
    query,
    source,
    gradient,
    coefficients,
    source_parts,
    query_parts,
    items,
    source_z,
    source_y,
    source_x,
    FACTOR_Z: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_SOURCES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward pass, second kernel: du_k of TILE_SOURCES source positions, and what they add to the query's gradient.

    A source position j is a tap of the target positions between its neighbours j - 1 and j + 1. Along an axis of factor
    F > 1 these are two halves of F positions each: half 0 is on the side of j - 1, half 1 on that of j + 1. Along an
    axis of factor 1 there is one position, in half 0. One half per axis makes a box of target positions that all have
    the same taps: along every axis tap 0, which is j, and where F > 1 tap 1, the neighbour on the side of the half.

    A part of a sum is ROWS rows along x of one box. A program sums PARTS parts, tile by tile. A tile has TILE_X target
    positions of one row for each of the TILE_SOURCES source positions.
    """
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    HALVES_Z: tl.constexpr = min(FACTOR_Z, 2)
    HALVES_Y: tl.constexpr = min(FACTOR_Y, 2)
    HALVES_X: tl.constexpr = min(FACTOR_X, 2)
    TAPS: tl.constexpr = HALVES_Z * HALVES_Y * HALVES_X
    ROW_BLOCKS: tl.constexpr = (FACTOR_Z * FACTOR_Y + ROWS - 1) // ROWS
    TILE: tl.constexpr = TILE_SOURCES * TILE_X

    split = tl.program_id(1)
    item = (tl.program_id(2) // CHANNEL_BLOCKS).to(tl.int64)
    channel = tl.program_id(2) % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    source_positions = source_z * source_y * source_x
    size_y = source_y * FACTOR_Y
    size_x = source_x * FACTOR_X
    positions = source_z * FACTOR_Z * size_y * size_x
    of_channel = channel if CHANNELS_LAST else channel * source_positions
    of_position: tl.constexpr = CHANNELS if CHANNELS_LAST else 1
    q = tl.load(query + channel, mask=channel < CHANNELS, other=0.0).to(PRECISION)
    source += item * CHANNELS * source_positions
    gradient += item * CHANNELS * positions
    coefficients += item * positions

    # For every target position of a tile: the source position j that it is summed for.
    lane = tl.arange(0, TILE)
    j = tl.program_id(0) * TILE_SOURCES + lane // TILE_X
    j_z = j // (source_y * source_x)
    j_y = j // source_x % source_y
    j_x = j % source_x
    # The source positions themselves.
    own = tl.program_id(0) * TILE_SOURCES + tl.arange(0, TILE_SOURCES)
    own_z = own // (source_y * source_x)
    own_y = own // source_x % source_y
    own_x = own % source_x
    own_inside = (channel < CHANNELS)[:, None] & (own < source_positions)[None, :]

    tap = tl.arange(0, TAPS)
    tap_x = (tap % HALVES_X)[:, None]
    tap_y = (tap // HALVES_X % HALVES_Y)[:, None]
    tap_z = (tap // (HALVES_X * HALVES_Y))[:, None]

    from_gradient = tl.zeros((BLOCK_CHANNELS, TILE), PRECISION)
    from_values = tl.zeros((BLOCK_CHANNELS, TILE_SOURCES), PRECISION)
    along_query = tl.zeros((TILE,), PRECISION)
    for part in range(split * PARTS, (split + 1) * PARTS):
        half = part // ROW_BLOCKS
        half_x = half % HALVES_X
        half_y = half // HALVES_X % HALVES_Y
        half_z = half // (HALVES_X * HALVES_Y)
        first_row = part % ROW_BLOCKS * ROWS
        along_taps = tl.zeros((TAPS, TILE), PRECISION)
        for row in range(first_row, min(first_row + ROWS, FACTOR_Z * FACTOR_Y)):
            z, weight_z = _target(j_z, half_z, row // FACTOR_Y, source_z, FACTOR_Z, PRECISION)
            y, weight_y = _target(j_y, half_y, row % FACTOR_Y, source_y, FACTOR_Y, PRECISION)
            for start in range(0, FACTOR_X, TILE_X):
                step = start + lane % TILE_X
                x, weight_x = _target(j_x, half_x, step, source_x, FACTOR_X, PRECISION)
                weight = weight_z * weight_y * weight_x
                inside = (step < FACTOR_X) & (j < source_positions) & (weight > 0)
                position = (z * size_y + y) * size_x + x
                at = coefficients + position
                a = weight * tl.load(at, mask=inside, other=0.0)
                along_query += weight * tl.load(at + items * positions, mask=inside, other=0.0)
                n = weight * tl.load(at + 2 * items * positions, mask=inside, other=0.0)
                g = tl.load(
                    gradient + channel[:, None] * positions + position[None, :],
                    mask=(channel < CHANNELS)[:, None] & inside[None, :],
                    other=0.0,
                ).to(PRECISION)
                from_gradient += a[None, :] * g
                along_taps += (
                    n[None, :]
                    * tl.where(tap_z == 0, weight_z[None, :], 1 - weight_z[None, :])
                    * tl.where(tap_y == 0, weight_y[None, :], 1 - weight_y[None, :])
                    * tl.where(tap_x == 0, weight_x[None, :], 1 - weight_x[None, :])
                )
        along_taps_of_source = tl.sum(tl.reshape(along_taps, (TAPS, TILE_SOURCES, TILE_X)), axis=2)
        for k in tl.static_range(TAPS):
            z = _corner(own_z, half_z, k // (HALVES_X * HALVES_Y), source_z)
            y = _corner(own_y, half_y, k // HALVES_X % HALVES_Y, source_y)
            x = _corner(own_x, half_x, k % HALVES_X, source_x)
            at = of_channel[:, None] + ((z * source_y + y) * source_x + x)[None, :] * of_position
            u = tl.load(source + at, mask=own_inside, other=0.0).to(PRECISION)
            along_tap = tl.sum(tl.where(tap[:, None] == k, along_taps_of_source, 0.0), axis=0)
            from_values += along_tap[None, :] * u

    along_query_of_source = tl.sum(tl.reshape(along_query, (TILE_SOURCES, TILE_X)), axis=1)
    from_gradient_of_source = tl.sum(tl.reshape(from_gradient, (BLOCK_CHANNELS, TILE_SOURCES, TILE_X)), axis=2)
    du = from_gradient_of_source + along_query_of_source[None, :] * q[:, None] - from_values
    at = of_channel[:, None] + own[None, :] * of_position
    part_of_item = (split * items + item) * CHANNELS
    tl.store(source_parts + part_of_item * source_positions + at, du.to(source_parts.dtype.element_ty), mask=own_inside)
    # dq is the sum of b_k(p) v_k(p) over p. That is the sum of along_query_of_source u_k over source positions.
    u = tl.load(source + at, mask=own_inside, other=0.0).to(PRECISION)
    dq = tl.sum(along_query_of_source[None, :] * u, axis=1)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * items * CHANNELS
    tl.store(query_parts + program + part_of_item + channel, dq, mask=channel < CHANNELS)


@triton.jit
def _select(tensors, k):
    """Number k of a tuple."""
    selected = tensors[0]
    for other in tl.static_range(1, len(tensors)):
        selected = tl.where(k == other, tensors[other], selected)
    return selected


@triton.jit
def _tile(
    first,
    size_z,
    plane_size,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The positions of a tile in a plane of the target, its channels, the mask of those that exist, and where they are.

    Mask and offsets (of mixture, gradient and fine sources) are (positions, channels).
    """
    plane = first + tl.program_id(1)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_CHANNELS)
    inside = (position < plane_size)[:, None] & (channel < CHANNELS)[None, :]
    item = (plane // size_z).to(tl.int64) * CHANNELS * size_z * plane_size
    at = channel[None, :] * (size_z * plane_size) + (plane % size_z * plane_size + position)[:, None]
    return position, channel, inside, item + at


@triton.jit
def _score(q, v, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """The score e_k(p), and its factor r_k(p). v: v_k, (positions, channels)."""
    inverse_rms = tl.rsqrt(tl.sum(v * v, axis=1) / CHANNELS + EPS)
    return tl.sum(q[None, :] * v, axis=1) * inverse_rms, inverse_rms


@triton.jit
def _value(
    rows,
    fine,
    k,
    position,
    channel,
    inside,
    at,
    plane_size,
    size_x,
    FACTORS_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """v_k(p) of a tile of target positions, (positions, channels). Coarse sources come first.

    The loops over sources and taps are not unrolled: a compiler that sees all loads at once spills registers.
    """
    v = tl.zeros(inside.shape, PRECISION)
    if k < len(rows):
        if len(rows) > 0:
            factor_x = _select(FACTORS_X, k)
            source_x = size_x // factor_x
            source = _select(rows, k) + tl.program_id(1).to(tl.int64) * (plane_size // factor_x * CHANNELS)
            below, fraction = _below(position % size_x, factor_x, PRECISION)
            for tap in range(tl.minimum(factor_x, 2)):
                x, weight = _tap(below, fraction, tap, source_x)
                from_row = (position // size_x * source_x + x)[:, None] * CHANNELS + channel[None, :]
                v += weight[:, None] * tl.load(source + from_row, mask=inside, other=0.0).to(PRECISION)
    else:
        if len(fine) > 0:
            v = tl.load(_select(fine, k - len(rows)) + at, mask=inside, other=0.0).to(PRECISION)
    return v


@triton.jit
def _below(position, factor, PRECISION: tl.constexpr):
    """Along one axis: the tap below every target position, and the weight of the tap above."""
    # The position on the grid of the source, in units of 1 / (2 * factor), is an integer.
    at = tl.maximum(2 * position + 1 - factor, 0)
    below = at // (2 * factor)
    return below, (at - below * 2 * factor).to(PRECISION) / (2 * factor)


@triton.jit
def _tap(below, fraction, above, source):
    """Along one axis: the taps below (above=0) or above (above=1), and their weights."""
    return tl.minimum(below + above, source - 1), tl.where(above == 1, fraction, 1 - fraction)


@triton.jit
def _target(j, half, step, source, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """Along one axis: the target position number `step` in a half of source position j, and the weight of j there.

    The weight is zero where there is no such target position.
    """
    position = j * FACTOR - FACTOR // 2 + half * FACTOR + step
    at = tl.minimum(tl.maximum(2 * position + 1 - FACTOR, 0), 2 * FACTOR * (source - 1))
    weight = 1 - tl.abs(at - 2 * FACTOR * j).to(PRECISION) / (2 * FACTOR)
    return position, tl.where((position >= 0) & (position < source * FACTOR), weight, 0.0)


@triton.jit
def _corner(own, half, TAP: tl.constexpr, source):
    """Along one axis: tap 0 of a half, the source position itself, or tap 1, its neighbour on that side."""
    return tl.minimum(tl.maximum(own + 2 * half - 1, 0), source - 1) if TAP else own


# Whether the kernels run under Triton's interpreter. Triton decides it when it decorates them.
INTERPRETED = not isinstance(_mix_kernel, triton.JITFunction)
