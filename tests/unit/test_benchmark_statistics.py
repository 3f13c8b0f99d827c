"""The statistics of samples of cases, by hand, by known values and by their laws."""

import math

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_xattnres.benchmark.statistics import (
    BETTER,
    DIFFERENT,
    EQUIVALENT,
    INCONCLUSIVE,
    NO_DIFFERENCE,
    WORSE,
    direction,
    equivalence,
    holm,
    interval_over_trainings,
    wilcoxon,
)
from nnunet_xattnres.common.samples import sample

P_VALUES = st.lists(st.floats(1e-9, 1).map(lambda p: float(f"{p:.6g}")), max_size=8)
DIFFERENCES = st.lists(st.integers(-50, 50).map(lambda difference: difference / 100), min_size=1, max_size=30)


class TestHolm:
    def test_by_hand(self):
        # 4 * 0.01, 3 * 0.02, then never less than before: 2 * 0.03, 1 * 0.5
        assert holm([0.03, 0.01, 0.5, 0.02]) == [0.06, 0.04, 0.5, 0.06]
        assert holm([0.4, 0.9]) == [0.8, 0.9]
        assert holm([0.01, 0.012]) == [0.02, 0.02]
        assert holm([0.3]) == [0.3]
        assert holm([]) == []

    @settings(max_examples=50, deadline=None)
    @given(P_VALUES)
    def test_by_the_definition(self, p_values):
        """The i-th smallest of n: the largest of (n - j + 1) p_j for j <= i, and at most 1."""
        ordered = sorted(p_values)
        expected = {
            p: min(1.0, max((len(ordered) - j) * ordered[j] for j in range(ordered.index(p) + 1))) for p in ordered
        }
        assert holm(p_values) == pytest.approx([expected[p] for p in p_values], rel=1e-5)


class TestWilcoxon:
    def test_signed_ranks_of_six_wins(self):
        # All of 2^6 sign patterns are equally likely, two are as extreme.
        assert wilcoxon(np.arange(1.0, 7)) == pytest.approx(2 / 64)
        assert wilcoxon(np.zeros(5)) == 1.0

    def test_equal_cases_do_not_turn_the_ranks(self):
        # With ranks for 200 ties, the 21 small losses would outweigh the 19 large gains.
        differences = np.concatenate([np.zeros(200), -0.001 * np.arange(1, 22), 0.03 + 0.001 * np.arange(19)])
        assert wilcoxon(differences) < 0.05
        assert direction(differences) == BETTER

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8), st.randoms())
    def test_swapped_trainers_and_the_order_of_cases_change_nothing(self, differences, random):
        shuffled = [-difference for difference in differences]
        random.shuffle(shuffled)
        assert wilcoxon(np.array(shuffled)) == pytest.approx(wilcoxon(np.array(differences)), rel=1e-5)


class TestDirection:
    @settings(max_examples=50, deadline=None)
    @given(DIFFERENCES)
    def test_swapped_trainers_swap_the_verdict(self, differences):
        opposite = {BETTER: WORSE, WORSE: BETTER, NO_DIFFERENCE: NO_DIFFERENCE}
        assert direction(-np.array(differences)) == opposite[direction(np.array(differences))]

    def test_by_hand(self):
        assert direction(np.array([0.1, -0.2, 0.3])) == BETTER
        assert direction(np.array([-0.1, 0.2, -0.3])) == WORSE
        assert direction(np.zeros(3)) == NO_DIFFERENCE
        # The mean says worse, the ranks say better.
        assert direction(np.array([0.1, 0.1, 0.1, -0.9])) == NO_DIFFERENCE


class TestSample:
    def test_the_interval_is_that_of_resampled_means(self):
        values = np.random.default_rng(3).normal(0.02, 0.05, 30)
        rng = np.random.default_rng(7)
        means = values[rng.integers(0, 30, (40000, 30))].mean(axis=1)
        found = sample(values)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), abs=7e-4)
        assert found.mean == pytest.approx(values.mean(), abs=1e-6)
        assert sample(values) == found

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(0, 1000), min_size=2, max_size=10), st.integers(-1000, 1000))
    def test_the_interval_moves_with_the_values_and_contains_the_mean(self, values, shift):
        found, moved = sample(np.array(values, float)), sample(np.array(values, float) + shift)
        assert found.low <= found.mean <= found.high
        assert (moved.low, moved.mean, moved.high) == pytest.approx(
            (found.low + shift, found.mean + shift, found.high + shift), abs=1e-5
        )

    def test_too_few_values(self):
        one, none = sample(np.array([0.25])), sample(np.array([]))
        assert (one.number, one.mean) == (1, 0.25)
        assert none.number == 0
        assert all(map(math.isnan, (one.low, one.high, none.mean, none.low, none.high)))


class TestEquivalence:
    def test_by_hand(self):
        # Mean 0.001, standard error 0.004 / sqrt(3) / 2, 3 degrees of freedom.
        differences = np.array([-0.003, -0.001, 0.003, 0.005])
        error = np.sqrt(np.sum((differences - 0.001) ** 2) / 3) / 2
        p, verdict = equivalence(differences, 0.005)
        assert p == pytest.approx(stats.t.sf((0.005 - 0.001) / error, 3), rel=1e-5)
        assert (p > 0.05, verdict) == (True, INCONCLUSIVE)
        assert equivalence(differences, 0.05)[1] == EQUIVALENT
        # The lower bound decides for a negative mean.
        assert equivalence(-differences, 0.005) == (p, INCONCLUSIVE)

    @pytest.mark.parametrize(
        "mean, verdict", [(0.0, EQUIVALENT), (0.003, EQUIVALENT), (0.005, INCONCLUSIVE), (0.009, DIFFERENT)]
    )
    def test_the_mean_and_the_margin(self, mean, verdict):
        differences = mean + np.tile([-0.001, 0.001], 20)
        assert equivalence(differences, 0.005)[1] == equivalence(-differences, 0.005)[1] == verdict

    def test_the_error_of_the_first_kind(self):
        """At the margin, equivalence is wrongly found as often as the level says."""
        rng = np.random.default_rng(0)
        found = [equivalence(rng.normal(0.005, 0.002, 20), 0.005)[1] for _ in range(400)]
        assert found.count(EQUIVALENT) / 400 == pytest.approx(0.05, abs=0.025)
        assert found.count(DIFFERENT) / 400 == pytest.approx(0.025, abs=0.02)

    def test_equal_and_few_values(self):
        assert equivalence(np.full(5, 0.002), 0.005) == (0, EQUIVALENT)
        assert equivalence(np.full(5, 0.02), 0.005) == (1, DIFFERENT)
        p, verdict = equivalence(np.array([0.001]), 0.005)
        assert math.isnan(p) and verdict == INCONCLUSIVE


def of_trainings(differences: np.ndarray, share_cases: bool = False) -> pandas.DataFrame:
    """The rows of folds x seeds x cases. share_cases: whether all folds have the same cases."""
    folds, seeds, cases = (axis.ravel() for axis in np.indices(differences.shape))
    names = [f"{0 if share_cases else fold}_{case}" for fold, case in zip(folds, cases, strict=True)]
    return pandas.DataFrame({"fold": folds, "seed": seeds, "case": names, "value": differences.ravel()})


class TestIntervalOverTrainings:
    def test_two_trainings_that_contradict_each_other(self):
        # The mean of two drawn folds: -0.1, 0 and 0.1 with chances of 1/4, 1/2 and 1/4, whatever the cases.
        values = of_trainings(np.stack([np.full((1, 30), 0.1), np.full((1, 30), -0.1)]))
        assert interval_over_trainings(values) == (-0.1, 0.1)
        # The interval over the 60 cases does not see it.
        assert sample(values.value.to_numpy()).high < 0.03

    def test_two_seeds_that_contradict_each_other(self):
        values = of_trainings(np.stack([np.full(30, 0.1), np.full(30, -0.1)])[None])
        assert interval_over_trainings(values) == (-0.1, 0.1)

    @pytest.mark.parametrize("share_cases", [False, True])
    def test_the_variance_is_that_of_its_parts(self, share_cases):
        """Folds, seeds and cases add up: the variance of the mean of drawn ones is known."""
        rng = np.random.default_rng(1)
        num_folds, num_seeds, num_cases = 6, 3, 25
        folds = rng.normal(0, 0.02, (num_folds, 1, 1))
        seeds = rng.normal(0, 0.03, (num_folds, num_seeds, 1))
        cases = rng.normal(0, 0.1, (1 if share_cases else num_folds, 1, num_cases))
        differences = folds + seeds + cases
        low, high = interval_over_trainings(of_trainings(differences, share_cases))
        of_drawn_fold = differences.mean((1, 2)).var() + differences.mean(2).var(1).mean() / num_seeds
        if share_cases:
            variance = of_drawn_fold / num_folds + cases.var() / num_cases
        else:
            variance = (of_drawn_fold + cases.var(2).mean() / num_cases) / num_folds
        assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.002)
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.04)

    def test_trainings_without_a_difference_show_the_cases(self):
        cases = np.random.default_rng(2).normal(0, 0.1, 40)
        low, high = interval_over_trainings(of_trainings(np.tile(cases, (2, 2, 1)), share_cases=True))
        assert (low, high) == pytest.approx((sample(cases).low, sample(cases).high), abs=0.002)

    def test_a_case_counts_once(self):
        # Half of the folds have two seeds, the others have one: the mean over cases is 0.2.
        values = of_trainings(np.stack([np.full((2, 4), 0.1), np.full((2, 4), 0.3)] * 20))
        lacking = values[(values.fold % 2 == 0) | (values.seed == 0)]
        for rows in (values, lacking):
            low, high = interval_over_trainings(rows)
            assert (low + high) / 2 == pytest.approx(0.2, abs=0.01)

    def test_a_case_that_a_training_lacks_is_in_no_resample_of_it(self):
        values = of_trainings(np.array([[[0.1] * 4] * 2, [[0.3] * 4] * 2]))
        assert interval_over_trainings(values.iloc[1:]) == (0.1, 0.3)

    def test_a_single_training_has_none(self):
        assert all(map(math.isnan, interval_over_trainings(of_trainings(np.ones((1, 1, 9))))))


def test_the_corrected_test_is_scipys():
    differences = np.array([0.3, -0.1, 0.2, 0.25, 0.05, 0.15, 0.1])
    p = stats.wilcoxon(differences).pvalue
    assert holm([wilcoxon(differences), 1.0]) == pytest.approx([2 * p, 1.0], rel=1e-5)
