"""Means over queries and differences between methods, against scipy and cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forebear.errors import InputError, NonFiniteError
from forebear.evaluation.common.statistics import difference_table, mean_of, paired_difference


def test_mean_has_scipys_standard_error_and_bootstrap_interval() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(size=40)
    found = mean_of(values, seed=1)
    assert found.mean == pytest.approx(values.mean(), abs=1e-15)
    assert found.error == pytest.approx(stats.sem(values), rel=1e-12)
    oracle = stats.bootstrap((values,), np.mean, method="percentile", random_state=np.random.default_rng(2))
    interval = oracle.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.03)
    assert found == mean_of(values, seed=1)
    assert found != mean_of(values, seed=2)
    assert found.n == 40


def test_rounding_is_no_spread_and_no_difference() -> None:
    found = mean_of(np.array([0.3, 0.1 + 0.2, 0.3]))
    assert found.error == 0.0
    assert mean_of([0.02, -0.02, 1e-19]).mean == 0.0


def test_few_values_have_students_interval() -> None:
    from scipy import stats

    values = np.random.default_rng(5).normal(size=9)
    found = mean_of(values)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_one_query_has_a_mean_and_nothing_else() -> None:
    found = mean_of([0.25])
    assert (found.mean, found.error, found.low, found.high, found.n) == (0.25, None, None, None, 1)
    found = paired_difference([3.0], [1.0])
    assert (found.mean, found.error, found.low, found.high, found.n, found.p) == (2.0, None, None, None, 1, None)


def test_constant_scores_have_no_spread() -> None:
    found = mean_of([0.1] * 5)
    assert (found.mean, found.error, found.low, found.high) == (0.1, 0.0, 0.1, 0.1)


def test_p_of_a_case_done_by_hand() -> None:
    # All five differences are positive: 2 of the 2^5 sign patterns are as extreme.
    found = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 1.8, 2.7, 3.6, 4.5])
    assert found.p == pytest.approx(2 / 32)
    assert found.mean == pytest.approx(0.3)


def test_p_is_that_of_the_sign_patterns_counted_one_by_one() -> None:
    d = np.random.default_rng(3).normal(0.4, 1.0, size=9)
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    total = ranks.sum()
    observed = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    sums = [sum(r for j, r in enumerate(ranks) if pattern >> j & 1) for pattern in range(2**9)]
    share = sum(min(s, total - s) <= observed for s in sums) / 2**9
    assert paired_difference(d, np.zeros(9)).p == pytest.approx(share)


def test_the_interval_is_of_the_differences_not_of_the_methods() -> None:
    base = np.random.default_rng(4).normal(0.0, 100.0, size=30)
    found = paired_difference(base + 1.0, base)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_no_difference_anywhere_has_p_1() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.error, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_queries_without_a_difference_are_left_out_of_the_test() -> None:
    with_zeros = paired_difference([0.0] * 30 + list(range(1, 61)), [0.0] * 90)
    without = paired_difference(list(range(1, 61)), [0.0] * 60)
    assert with_zeros.p == pytest.approx(without.p)
    assert with_zeros.n == 90


def test_swapping_the_methods_changes_the_sign_alone() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 3, 25), rng.integers(0, 3, 25)  # ties
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.mean == -other.mean
    assert one.p == pytest.approx(other.p)
    assert one.low is not None and other.high is not None
    assert one.low == pytest.approx(-other.high, abs=0.1)


def test_table_holds_every_pair_once() -> None:
    table = difference_table("t", {"a": [1.0, 2.0], "b": [0.0, 0.0], "c": [1.0, 2.0]})
    assert [row[:3] for row in table.rows] == [["a", "b", 1.5], ["a", "c", 0.0], ["b", "c", -1.5]]


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="no pairs"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="at least one number"):
        paired_difference([], [])
    with pytest.raises(NonFiniteError, match="value 1"):
        mean_of([0.0, math.nan])
    with pytest.raises(NonFiniteError, match="value 0"):
        paired_difference([math.inf, 1.0], [1.0, 1.0])
