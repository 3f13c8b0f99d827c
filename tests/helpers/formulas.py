"""XAttnRes written a second time from its formulas: loops over positions, float64, no autograd, nothing imported."""

from itertools import product

import numpy as np


def resize(h: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(C, *source_size) -> (C, *size): linear (half-pixel centres, clamped) up, mean over blocks down."""
    source_size = h.shape[1:]
    out = np.zeros((len(h), *size))
    for p in product(*map(range, size)):
        corners = [_corners(*axis) for axis in zip(p, size, source_size, strict=True)]
        for corner in product(*corners):
            index, weights = zip(*corner, strict=True)
            out[(slice(None), *p)] += np.prod(weights) * h[(slice(None), *index)]
    return out


def _corners(position: int, target: int, source: int) -> list[tuple[int, float]]:
    if source >= target:
        factor = source // target
        return [(position * factor + i, 1 / factor) for i in range(factor)]
    at = (position + 0.5) * source / target - 0.5
    below = int(np.floor(at))
    fraction = at - below
    return [(max(below, 0), 1 - fraction), (min(below + 1, source - 1), fraction)]


def mixture(values: list[np.ndarray], query: np.ndarray, norm_scale: np.ndarray) -> np.ndarray:
    """sum_k softmax_k( <w, RMSNorm(v_k(p))> ) v_k(p) for aligned values (C, *size)"""
    out = np.zeros_like(values[0])
    for p in product(*map(range, out.shape[1:])):
        at = (slice(None), *p)
        scores = []
        for v in values:
            rms = np.sqrt(np.mean(v[at] ** 2) + 1e-6)
            scores.append(float(np.dot(query, norm_scale * v[at] / rms)))
        exponentials = np.exp(np.array(scores) - max(scores))
        for weight, v in zip(exponentials / exponentials.sum(), values, strict=True):
            out[at] += weight * v[at]
    return out


def read(
    x: np.ndarray,
    pool: list[np.ndarray],
    projections: list[np.ndarray],
    query: np.ndarray,
    norm_scale: np.ndarray,
    gamma: np.ndarray | None,
) -> np.ndarray:
    """The new input of a stage: x (C_t, *size), pool of (C_k, *size_k), projections (C_t, C_k)."""
    size = x.shape[1:]
    values = [np.tensordot(P, resize(h, size), axes=1) for h, P in zip(pool, projections, strict=True)]
    if gamma is None:
        return mixture([*values, x], query, norm_scale)
    return x + gamma.reshape(-1, *(1,) * len(size)) * mixture(values, query, norm_scale)
