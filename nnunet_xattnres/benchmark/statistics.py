"""Statistics of samples of cases: tests, and corrections for multiple testing; the interval over trainings.

`common.samples` has the interval over cases.
"""

import gc

import numpy as np
import pandas
from numpy.typing import NDArray
from scipy import stats

from nnunet_xattnres.common import samples
from nnunet_xattnres.common.samples import CONFIDENCE, DIGITS, SEED, rounded

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
EQUIVALENT, DIFFERENT, INCONCLUSIVE = "equivalent", "different", "inconclusive"
SIGNIFICANCE = 0.05


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


def equivalence(differences: NDArray[np.floating], margin: float) -> tuple[float, str]:
    """The p of two one-sided t tests (TOST), and the verdict on the mean difference. NaN if there are too few values.

    Equivalent: the tests show that the mean is within +-margin. Different: its t interval is all outside.
    """
    from statsmodels.stats.weightstats import DescrStatsW  # type: ignore[import-untyped]

    if len(differences) < 2:
        return np.nan, INCONCLUSIVE
    # Equal differences have no spread to divide by.
    with np.errstate(divide="ignore", invalid="ignore"):
        described = DescrStatsW(differences.round(DIGITS))
        p = float(f"{described.ttost_mean(-margin, margin)[0]:.6g}")
        low, high = described.tconfint_mean(SIGNIFICANCE)
    if p < SIGNIFICANCE:
        return p, EQUIVALENT
    return p, DIFFERENT if low > margin or high < -margin else INCONCLUSIVE


def interval_over_trainings(values: pandas.DataFrame) -> tuple[float, float]:
    """The percentile interval of a hierarchical bootstrap of the mean over cases. NaN if there is only one training.

    Every resample draws folds, in every drawn fold seeds, and in every drawn fold cases, which all its seeds have in
    common. Cases that several folds have, as those of a test set, are drawn once for all folds.

    values: the columns fold, seed, case and value.
    """
    if len(values[["fold", "seed"]].drop_duplicates()) < 2:
        return np.nan, np.nan
    # A case counts once, however many trainings have it.
    weighted = values.assign(weight=1 / values.groupby("case").value.transform("size"))
    folds = [of_fold for _, of_fold in weighted.groupby("fold")]
    cases = pandas.Index(values.case.unique())
    are_shared = sum(of_fold.case.nunique() for of_fold in folds) > len(cases)
    rng = np.random.default_rng(SEED)
    drawn_folds = rng.integers(len(folds), size=(samples.RESAMPLES, len(folds)))
    shared = rng.integers(len(cases), size=(samples.RESAMPLES, len(cases))) if are_shared else None
    sums, weights = np.zeros((2, samples.RESAMPLES))
    for number, of_fold in enumerate(folds):
        names = cases if are_shared else pandas.Index(of_fold.case.unique())
        seed_of_row, seeds = pandas.factorize(of_fold.seed)
        weight, value = np.zeros((2, len(seeds), len(names)))
        weight[seed_of_row, names.get_indexer(of_fold.case)] = of_fold.weight
        value[seed_of_row, names.get_indexer(of_fold.case)] = of_fold.weight * of_fold.value
        # A fold may be drawn several times for one resample.
        resamples = np.nonzero(drawn_folds == number)[0]
        drawn = rng.integers(len(names), size=(len(resamples), len(names))) if shared is None else shared[resamples]
        drawn_seeds = rng.integers(len(seeds), size=(len(resamples), len(seeds)))
        for seed in range(len(seeds)):
            times = (drawn_seeds == seed).sum(axis=1)
            np.add.at(sums, resamples, times * value[seed][drawn].sum(axis=1))
            np.add.at(weights, resamples, times * weight[seed][drawn].sum(axis=1))
    # A resample may have no value if trainings lack cases.
    means = sums[weights > 0] / weights[weights > 0]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, (tail, 100 - tail))
    return rounded(low), rounded(high)
