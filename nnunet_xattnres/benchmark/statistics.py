"""Statistics of samples of cases: mean and interval, test, correction for multiple testing."""

import gc
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
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


def wilcoxon(differences: NDArray[np.floating]) -> float:
    """The two-sided p of the signed-rank test. Cases without a difference are left out."""
    if not differences.any():
        return 1.0
    # Rounded, so that equal differences are ties whatever their last digits.
    return float(f"{stats.wilcoxon(differences.round(DIGITS)).pvalue:.6g}")


def direction(differences: NDArray[np.floating]) -> str:
    """The verdict of a significant test. Shows no difference if mean and sum of signed ranks differ in sign."""
    # Cases without a difference have no rank, as in the test.
    differences = differences[differences != 0]
    mean = np.sign(differences.sum())
    ranks = np.sign((np.sign(differences) * stats.rankdata(np.abs(differences))).sum())
    return NO_DIFFERENCE if mean != ranks or not mean else BETTER if mean > 0 else WORSE


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction: each corrected p may be compared with the level that all tests together are to keep."""
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    if not p_values:
        return []
    # multipletests collects garbage: half a second, with the objects of PyTorch, unless these are frozen.
    gc.freeze()
    try:
        corrected = multipletests(p_values, method="holm")[1]
    finally:
        gc.unfreeze()
    return [float(f"{p:.6g}") for p in corrected]


def rounded(value: float) -> float:
    return round(float(value), DIGITS)
