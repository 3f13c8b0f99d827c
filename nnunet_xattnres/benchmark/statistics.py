"""Statistics of samples of cases: test and correction for multiple testing. `common.samples` has the interval."""

import gc

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from nnunet_xattnres.common.samples import DIGITS

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"


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
