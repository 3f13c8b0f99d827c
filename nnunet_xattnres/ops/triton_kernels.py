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

The backward pass takes the same way back. `_gradient_kernel` computes dv_k of all sources for a tile of target
positions, with the gradient read once. That of a fine source is written. That of a coarse one is summed over target
positions, times their weights along x, for every position of its rows in the tile. `_row_gradient_kernel` sums what the
tiles and rows of a plane add to the positions of a source, and `_plane_gradient_kernel` what the planes add. All sums
have a fixed order.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# `_mix_kernel` and `_gradient_kernel` hold all channels of a tile of target positions in registers. A thread has 16
# elements, and 8 in `_gradient_kernel` where a program has at most 16 warps. In half precision, `_gradient_kernel` is
# kept to 128 registers, so that two programs of 8 warps fit a multiprocessor. Compiled for compute capabilities 8.0 and
# 9.0, no kernel spills any then. In float32, it takes up to 255 registers, and spills 48 bytes at 512 channels. In
# float64, it spills about 1 KB from 320 channels on.
MAX_CHANNELS = 512
TILE_ELEMENTS = 2048
ELEMENTS_PER_WARP = 512
GRADIENT_WARPS, GRADIENT_REGISTERS = 16, 128
MIN_TILE_POSITIONS, MAX_TILE_POSITIONS = 16, 64
# Offsets within a batch item are 32-bit integers.
MAX_ELEMENTS = 2**31 - 1

# `_rows_kernel`: elements of a program.
ROW_ELEMENTS = 1024
# What the kernels hold of some planes at once takes at most so many bytes, or as many as one plane takes.
PLANES_BYTES = 2**26
MAX_PLANES = 2**16 - 3

# `_row_gradient_kernel` and `_plane_gradient_kernel`: elements of a program, and summands of one step.
SUM_ELEMENTS = 256
SUM_STEPS = 8

Size = tuple[int, int, int]


def mix(query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], size: Sequence[int], eps: float) -> Tensor:
    """out(p) = sum_k a_k(p) v_k(p). coarse, fine: the sources, those at the resolution of the target in `fine`."""
    sources = [*coarse, *fine]
    mixture = sources[0].new_empty(len(sources[0]), len(query), *size)
    options = _tile_options(query, coarse, mixture, eps)
    with torch.cuda.device_of(mixture):
        for first, planes, rows in _interpolate_rows(coarse, mixture, _precision(query, mixture)):
            _mix_kernel[_tiles(mixture), planes](query, rows, tuple(fine), mixture, first, *_planes(size), **options)
    return mixture


def mix_gradients(
    gradient: Tensor, query: Tensor, coarse: Sequence[Tensor], fine: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of `mix` with respect to query and sources. gradient: that of the result."""
    batch_size, channels, *size = gradient.shape
    size_z, plane_size, size_x = _planes(size)
    options = _tile_options(query, coarse, gradient, eps)
    warps = {"num_warps": max(options["num_warps"], min(2 * options["num_warps"], GRADIENT_WARPS))}
    # Triton refuses the option for AMD GPUs.
    if gradient.dtype.itemsize == 2 and torch.version.hip is None:
        warps["maxnreg"] = GRADIENT_REGISTERS
    precision = _precision(query, gradient)
    tiles, tile = _tiles(gradient), options["TILE"]
    factors = [_factors(source.shape[1:-1], size) for source in coarse]
    # Positions that a tile touches in the rows of a source.
    touched = tuple(min(tile, tile // factor_x + 4) for *_, factor_x in factors)
    tile_shapes = [(tiles, count, channels) for count in touched]
    plane_shapes = [(*_three_axes(source.shape[1:-1])[1:], channels) for source in coarse]

    of_query = gradient.new_empty(batch_size * size_z * tiles, channels, dtype=precision)
    of_coarse = tuple(torch.empty_like(source) for source in coarse)
    # Planes of a source to which later chunks add: at most two at the end of a chunk. Chunks write one half in turn.
    unfinished = tuple(gradient.new_empty(2, 2, *shape, dtype=precision) for shape in plane_shapes)
    of_fine = tuple(torch.empty_like(source) for source in fine)
    with torch.cuda.device_of(gradient):
        chunks = _interpolate_rows(coarse, gradient, precision, tile_shapes, plane_shapes)
        for chunk, (first, planes, rows, of_tiles, of_planes) in enumerate(chunks):
            _gradient_kernel[tiles, planes](
                query,
                rows,
                tuple(fine),
                gradient,
                of_query,
                of_tiles,
                of_fine,
                first,
                size_z,
                plane_size,
                size_x,
                **options | warps,
                TOUCHED=touched,
                BLOCK_SOURCES=triton.next_power_of_2(len(coarse) + len(fine)),
                DOT=_dot_precision(gradient.dtype),
            )
            if not coarse:
                continue
            blocks = triton.cdiv(max(map(prod, plane_shapes)), SUM_ELEMENTS)
            _row_gradient_kernel[blocks, planes, len(coarse)](
                of_tiles,
                of_planes,
                plane_size,
                size_x,
                tiles,
                FACTORS_Y=tuple(factor for _, factor, _ in factors),
                FACTORS_X=options["FACTORS_X"],
                TOUCHED=touched,
                TILE=tile,
                CHANNELS=channels,
                STEPS=SUM_STEPS,
                BLOCK=SUM_ELEMENTS,
                PRECISION=options["PRECISION"],
            )
            # The planes touch at most two more planes of a source than they are.
            _plane_gradient_kernel[blocks, planes + 2, len(coarse)](
                of_planes,
                unfinished,
                of_coarse,
                tuple(map(prod, plane_shapes)),
                chunk % 2,
                first,
                planes,
                size_z,
                FACTORS_Z=tuple(factor for factor, _, _ in factors),
                STEPS=SUM_STEPS,
                BLOCK=SUM_ELEMENTS,
                PRECISION=options["PRECISION"],
            )
    return of_query.sum(dim=0).to(query.dtype), list(of_coarse), list(of_fine)


def _interpolate_rows(
    coarse: Sequence[Tensor], target: Tensor, precision: torch.dtype, *others: Sequence[Sequence[int]]
) -> Iterator[tuple[Any, ...]]:
    """Chunks of the planes of the target: the first one, their number, the rows of all sources, and other memory.

    The rows (planes, y, source_x, C) of a source are interpolated along z and y. Every chunk overwrites those before.
    others: shapes, for each of which there is memory for every plane, in `precision`.
    """
    batch_size, channels, *size = target.shape
    size_z, size_y, size_x = _three_axes(size)
    factors = [_factors(source.shape[1:-1], size) for source in coarse]
    row_shapes = [(size_y, size_x // factor_x, channels) for *_, factor_x in factors]
    wanted = [(row_shapes, target.dtype), *((shapes, precision) for shapes in others)]
    plane_bytes = sum(dtype.itemsize * prod(shape) for shapes, dtype in wanted for shape in shapes)
    planes = batch_size * size_z
    at_once = min(planes, max(1, PLANES_BYTES // max(1, plane_bytes)), MAX_PLANES)
    rows, *memory = (
        tuple(target.new_empty(at_once, *shape, dtype=dtype) for shape in shapes) for shapes, dtype in wanted
    )
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
                PRECISION=_TRITON_DTYPES[precision],
            )
        yield first, count, rows, *memory


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _dot_precision(dtype: torch.dtype) -> str:
    """How matrix products are computed: at least as exactly as dtype holds the results."""
    # Triton has no tf32x3 for AMD GPUs, and tf32 only for some of them.
    if dtype == torch.float64 or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


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


def _tiles(target: Tensor) -> int:
    """The number of tiles of a plane."""
    return triton.cdiv(_planes(target.shape[2:])[1], _tile_positions(target.shape[1]))


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
def _gradient_kernel(
    query,
    rows,
    fine,
    gradient,
    of_query,
    of_tiles,
    of_fine,
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
    TOUCHED: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Backward pass: dv_k(p) of all sources for a tile of target positions, and what they add to dq.

    For coarse sources, it is summed into the positions of the rows that the tile touches. They follow each other.
    """
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

    a = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    a = a / tl.sum(a, axis=0)[None, :]
    b = a * (products - tl.sum(a * products, axis=0)[None, :]) * inverse_rms
    n = b * tl.where(row < SOURCES, scores, 0.0) * inverse_rms / CHANNELS

    # dq is the sum of b_k(p) v_k(p).
    along_query = tl.zeros((TILE, BLOCK_CHANNELS), PRECISION)
    for k in range(SOURCES):
        v = _value(rows, fine, k, position, channel, inside, at, plane_size, size_x, FACTORS_X, CHANNELS, PRECISION)
        a_k = tl.sum(tl.where(row == k, a, 0.0), axis=0)[:, None]
        b_k = tl.sum(tl.where(row == k, b, 0.0), axis=0)[:, None]
        n_k = tl.sum(tl.where(row == k, n, 0.0), axis=0)[:, None]
        along_query += b_k * v
        dv = a_k * g + b_k * q[None, :] - n_k * v
        if k < len(rows):
            if len(rows) > 0:
                factor_x = _select(FACTORS_X, k)
                touched = _select(TOUCHED, k)
                below, above, weight = _row_taps(position, size_x, factor_x, PRECISION)
                start, _, _ = _row_taps(tl.program_id(0) * TILE, size_x, factor_x, PRECISION)
                number = tl.arange(0, TILE)
                of_number = start + number[:, None]
                weights = tl.where(of_number == below[None, :], 1 - weight[None, :], 0.0)
                weights += tl.where(of_number == above[None, :], weight[None, :], 0.0)
                du = tl.dot(weights, dv, input_precision=DOT, out_dtype=PRECISION)
                to = (
                    _select(of_tiles, k)
                    + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * touched * CHANNELS
                )
                of_touched = number[:, None] * CHANNELS + channel[None, :]
                tl.store(to + of_touched, du, mask=(number < touched)[:, None] & (channel < CHANNELS)[None, :])
        else:
            if len(fine) > 0:
                tl.store(_select(of_fine, k - len(rows)) + at, dv.to(gradient.dtype.element_ty), mask=inside)
    tile = (first + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(of_query + tile * CHANNELS + channel, tl.sum(along_query, axis=0), mask=channel < CHANNELS)


@triton.jit
def _row_gradient_kernel(
    of_tiles,
    of_planes,
    plane_size,
    size_x,
    tiles,
    FACTORS_Y: tl.constexpr,
    FACTORS_X: tl.constexpr,
    TOUCHED: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the tiles of one plane of the target add to the positions (y, x) of a source: a sum over rows and tiles."""
    k = tl.program_id(2)
    factor_y = _select(FACTORS_Y, k)
    factor_x = _select(FACTORS_X, k)
    touched = _select(TOUCHED, k)
    source_x = size_x // factor_x
    source_y = plane_size // size_x // factor_y
    elements = source_y * source_x * CHANNELS
    if tl.program_id(0) * BLOCK >= elements:
        return
    source = _select(of_tiles, k) + tl.program_id(1).to(tl.int64) * tiles * touched * CHANNELS
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j_y = (element // CHANNELS // source_x)[None, :]
    j_x = (element // CHANNELS % source_x)[None, :]
    # The targets in a row that have a position as a tap are consecutive.
    first_x = tl.maximum(j_x * factor_x - factor_x // 2, 0)
    last_x = tl.minimum(j_x * factor_x - factor_x // 2 + 2 * factor_x - 1, size_x - 1)
    most_tiles = 1 + tl.cdiv(2 * factor_x, TILE)
    du = tl.zeros((STEPS, BLOCK), PRECISION)
    for start in range(0, 2 * factor_y * most_tiles, STEPS):
        step = (start + tl.arange(0, STEPS))[:, None]
        y, weight, exists = _target(j_y, step // most_tiles, source_y, factor_y, PRECISION)
        tile = (y * size_x + first_x) // TILE + step % most_tiles
        before, _, _ = _row_taps(tile * TILE, size_x, factor_x, PRECISION)
        number = y * source_x + j_x - before
        kept = exists & (tile <= (y * size_x + last_x) // TILE) & (number >= 0) & (number < touched)
        kept = kept & (element < elements)[None, :]
        at = (tile * touched + number) * CHANNELS + (element % CHANNELS)[None, :]
        du += weight * tl.load(source + at, mask=kept, other=0.0)
    to = _select(of_planes, k) + tl.program_id(1).to(tl.int64) * elements + element
    tl.store(to, tl.sum(du, axis=0), mask=element < elements)


@triton.jit(do_not_specialize=["half", "first", "planes"])
def _plane_gradient_kernel(
    of_planes,
    unfinished,
    of_coarse,
    elements_of_planes,
    half,
    first,
    planes,
    size_z,
    FACTORS_Z: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What planes of the target, those of one chunk, add to a plane of a source.

    A plane to which other chunks add, too, is handed on in `unfinished`: this chunk reads the other half of it.
    """
    k = tl.program_id(2)
    factor_z = _select(FACTORS_Z, k)
    elements = _select(elements_of_planes, k)
    source_z = size_z // factor_z
    last = first + planes - 1
    below, _ = _below(first % size_z, factor_z, PRECISION)
    last_below, _ = _below(last % size_z, factor_z, PRECISION)
    plane = first // size_z * source_z + below + tl.program_id(1)
    last_plane = last // size_z * source_z + tl.minimum(last_below + 1, source_z - 1)
    if (tl.program_id(0) * BLOCK >= elements) | (plane > last_plane):
        return
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    du = tl.zeros((STEPS, BLOCK), PRECISION)
    for start in range(0, 2 * factor_z, STEPS):
        step = start + tl.arange(0, STEPS)
        z, weight, exists = _target(plane % source_z, step, source_z, factor_z, PRECISION)
        of_target = plane // source_z * size_z + z - first
        kept = exists & (of_target >= 0) & (of_target < planes)
        at = of_target.to(tl.int64)[:, None] * elements + element[None, :]
        du += weight[:, None] * tl.load(_select(of_planes, k) + at, mask=kept[:, None] & inside[None, :], other=0.0)
    # The targets that have the plane as a tap.
    before = plane // source_z * size_z
    in_item = plane % source_z * factor_z - factor_z // 2
    first_target = before + tl.maximum(in_item, 0)
    last_target = before + tl.minimum(in_item + 2 * factor_z - 1 - factor_z % 2, size_z - 1)
    slot = _select(unfinished, k) + plane % 2 * elements + element
    sofar = tl.load(slot + (1 - half) * 2 * elements, mask=inside & (first_target < first), other=0.0)
    total = sofar + tl.sum(du, axis=0)
    tl.store(slot + half * 2 * elements, total, mask=inside & (last_target > last))
    to = _select(of_coarse, k) + plane.to(tl.int64) * elements + element
    tl.store(to, total.to(to.dtype.element_ty), mask=inside & (last_target <= last))


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
            source = _select(rows, k) + tl.program_id(1).to(tl.int64) * (plane_size // factor_x * CHANNELS)
            below, above, weight = _row_taps(position, size_x, factor_x, PRECISION)
            for tap in range(tl.minimum(factor_x, 2)):
                of_row = tl.where(tap == 1, above, below)[:, None] * CHANNELS + channel[None, :]
                u = tl.load(source + of_row, mask=inside, other=0.0).to(PRECISION)
                v += tl.where(tap == 1, weight, 1 - weight)[:, None] * u
    else:
        if len(fine) > 0:
            v = tl.load(_select(fine, k - len(rows)) + at, mask=inside, other=0.0).to(PRECISION)
    return v


@triton.jit
def _row_taps(position, size_x, factor_x, PRECISION: tl.constexpr):
    """Positions of a plane: their taps below and above in the rows of a source, and the weight of the tap above."""
    below, weight = _below(position % size_x, factor_x, PRECISION)
    source_x = size_x // factor_x
    row = position // size_x * source_x
    return row + below, row + tl.minimum(below + 1, source_x - 1), weight


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
def _target(j, step, source, factor, PRECISION: tl.constexpr):
    """Along one axis: a target position that has source position j as a tap, the weight of j there, and if it exists.

    step: its number among 2 * factor of them.
    """
    position = j * factor - factor // 2 + step
    at = tl.minimum(tl.maximum(2 * position + 1 - factor, 0), 2 * factor * (source - 1))
    weight = 1 - tl.abs(at - 2 * factor * j).to(PRECISION) / (2 * factor)
    return position, weight, (step < 2 * factor) & (position >= 0) & (position < source * factor)


# Whether the kernels run under Triton's interpreter. Triton decides it when it decorates them.
INTERPRETED = not isinstance(_mix_kernel, triton.JITFunction)
