"""How many values a verdict takes: the power of the t test by the noncentral t distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from forebear.evaluation.common.power import about, compare, no_verdict, values_for_verdict


def power_of(n: int, effect: float) -> float:
    """Power of a two-sided paired t test at 5% with n differences whose mean is ``effect`` standard deviations."""
    critical, shift = stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


@pytest.mark.parametrize("effect", [1.2, 0.5, -0.2, 0.05])
def test_so_many_values_have_a_power_of_80_percent(effect: float) -> None:
    values = np.random.default_rng(0).normal(size=30)
    values = effect + (values - values.mean()) / values.std(ddof=1)
    n = values_for_verdict(values)
    assert n is not None
    assert power_of(n + 1, abs(effect)) > 0.8
    assert power_of(n - 2, abs(effect)) < 0.8


def test_the_unit_of_the_values_makes_no_difference() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, size=20)
    assert values_for_verdict(values) == values_for_verdict(1e-6 * values)


@pytest.mark.parametrize("values", [[0.3], [0.2, 0.2, 0.2], [-1.0, 1.0], []])
def test_nothing_is_foretold_without_a_spread_or_a_mean(values: list[float]) -> None:
    assert values_for_verdict(values) is None


def test_a_number_is_asked_for_only_where_the_interval_holds_0() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=40)
    near, far = compare(noise + 0.01, noise * 0), compare(noise + 5.0, noise * 0)
    assert near[0].low is not None
    assert near[0].low < 0
    assert near[1] == values_for_verdict(noise + 0.01)
    assert far[1] is None
    assert compare([1.0], [1.0])[1] is None


def test_what_is_said_of_no_verdict() -> None:
    assert [about(n) for n in (7, 63, 170, 1313, 63047)] == ["7", "63", "170", "1,300", "63,000"]
    said = no_verdict(1249, "retrainings")
    assert said == "No verdict: about 1,200 retrainings would tell a difference of this size."
    assert no_verdict(None, "queries") == "No verdict."
