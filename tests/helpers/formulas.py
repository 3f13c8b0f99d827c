"""XAttnRes written a second time from its formulas, in NumPy and float64. Nothing is imported from the package.

One image at a time: feature maps are (C, *size).
"""

import numpy as np


def resize(h: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(C, *source_size) -> (C, *size): linear (half-pixel centres, clamped) up, mean over blocks down, axis by axis."""
    for axis, target in enumerate(size, start=1):
        source = h.shape[axis]
        rows = [
            sum(weight * h.take(index, axis) for index, weight in _taps(position, target, source))
            for position in range(target)
        ]
        h = np.stack(rows, axis)
    return h


def _taps(position: int, target: int, source: int) -> list[tuple[int, float]]:
    """Along one axis: the source positions that a target position is computed from, and their weights."""
    if source >= target:
        factor = source // target
        return [(position * factor + i, 1 / factor) for i in range(factor)]
    at = (position + 0.5) * source / target - 0.5
    below = int(np.floor(at))
    fraction = at - below
    return [(max(below, 0), 1 - fraction), (min(below + 1, source - 1), fraction)]


def mixture(values: list[np.ndarray], query: np.ndarray, norm_scale: np.ndarray) -> np.ndarray:
    """out(p) = sum_k a_k(p) v_k(p) with a(p) = softmax over k of < w , RMSNorm(v_k(p)) >"""
    v = np.stack(values)
    rms = np.sqrt(np.mean(v**2, axis=1, keepdims=True) + 1e-6)
    scores = np.sum(_per_channel(query * norm_scale, v[0]) * v / rms, axis=1)
    exponentials = np.exp(scores - scores.max(axis=0))
    weights = exponentials / exponentials.sum(axis=0)
    return np.sum(weights[:, None] * v, axis=0)


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
    return x + _per_channel(gamma, x) * mixture(values, query, norm_scale)


def _per_channel(vector: np.ndarray, feature_map: np.ndarray) -> np.ndarray:
    """(C,) -> (C, 1, ...), which broadcasts over the positions of a feature map."""
    return vector.reshape(-1, *(1,) * (feature_map.ndim - 1))
