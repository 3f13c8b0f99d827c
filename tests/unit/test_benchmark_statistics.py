"""The statistics of samples of cases, by hand, by known values and by their laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_xattnres.benchmark.statistics import BETTER, NO_DIFFERENCE, WORSE, direction, holm, wilcoxon
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


def test_the_corrected_test_is_scipys():
    differences = np.array([0.3, -0.1, 0.2, 0.25, 0.05, 0.15, 0.1])
    p = stats.wilcoxon(differences).pvalue
    assert holm([wilcoxon(differences), 1.0]) == pytest.approx([2 * p, 1.0], rel=1e-5)
