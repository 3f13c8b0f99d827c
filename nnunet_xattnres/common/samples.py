"""Samples of values, one per case: their mean and its bootstrap interval."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0
# Sums differ between machines in their last digits.
DIGITS = 6


@dataclass(frozen=True)
class Sample:
    """The mean of a number of values, and its bootstrap interval. NaN if there are too few values."""

    number: int
    mean: float
    low: float
    high: float


def sample(values: NDArray[np.floating]) -> Sample:
    """The percentile bootstrap over cases, always with the same resamples. values: one per case."""
    mean = rounded(values.mean()) if len(values) else np.nan
    if len(values) < 2:
        return Sample(len(values), mean, np.nan, np.nan)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Sample(len(values), mean, *map(rounded, interval))


def rounded(value: float) -> float:
    return round(float(value), DIGITS)
