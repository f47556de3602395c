"""How many values a verdict takes: the power of a paired comparison, from the spread that was observed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from forebear.evaluation.common.statistics import Difference, paired_difference
from forebear.evaluation.reports.report import Cell

POWER = 0.8
LEVEL = 0.05
FOR_A_VERDICT = (
    "For a verdict: where the interval holds 0, how many {unit} would tell a true difference as large as the observed "
    "one from 0 (paired t test, two-sided at 5%, power 80%)."
)


def values_for_verdict(differences: npt.ArrayLike) -> int | None:
    """Number of paired differences that would tell a mean as large as the observed one from 0.

    Two-sided t test at 5% with a power of 80%, by Guenther's formula (1981): (z_0.975 + z_0.8)^2 (sd / mean)^2 +
    z_0.975^2 / 2, rounded up. It takes the observed mean and spread for the true ones; of few values it is a guess.

    Args:
        differences: ``(n,)``, finite.

    Returns:
        The number of values; None where it is unknown: fewer than two values, no spread, or a mean of 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0.0:
        return None
    return number_for_verdict(float(values.mean()), float(values.std(ddof=1)))


def number_for_verdict(mean: float, deviation: float) -> int | None:
    """:func:`values_for_verdict` of values with this mean and standard deviation; None for a mean of 0."""
    from scipy.stats import norm

    if mean == 0.0:
        return None
    z_level, z_power = norm.ppf([1 - LEVEL / 2, POWER])
    number = (z_level + z_power) ** 2 * (deviation / mean) ** 2 + z_level**2 / 2
    return math.ceil(number) if math.isfinite(number) and number < 1e15 else None


def compare(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> tuple[Difference, int | None]:
    """The paired difference of two methods; and, where its interval holds 0, how many values a verdict takes.

    Args:
        first: One value a query, ``(n,)``.
        second: One value for each of the same queries, ``(n,)``.
        seed: Seed of the bootstrap.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference = paired_difference(a, b, seed)
    open_ended = difference.low is None or difference.high is None
    if open_ended or not difference.low <= 0.0 <= difference.high:  # type: ignore[operator]  # both are numbers
        return difference, None
    return difference, values_for_verdict(a - b)


def compared_cells(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> list[Cell]:
    """Cells of a table: mean difference, 95% interval, p, and how many values a verdict takes; see :func:`compare`."""
    difference, needed = compare(first, second, seed)
    return [difference.mean, difference.low, difference.high, difference.p, needed]


def about(number: int) -> str:
    """A number with two significant digits, such as ``1,200``."""
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}"


def no_verdict(number: int | None, unit: str) -> str:
    """A sentence on a difference whose interval holds 0.

    Args:
        number: How many values would give a verdict; None: unknown.
        unit: What a value is, in the plural, such as ``retrainings``.
    """
    if number is None:
        return "No verdict."
    return f"No verdict: about {about(number)} {unit} would tell a difference of this size."
