"""Intervals of a mean over queries, and tests whether two methods differ on the queries that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from forebear.errors import InputError, NonFiniteError
from forebear.evaluation.reports.report import Cell, Table

FloatArray = npt.NDArray[np.float64]
_BATCH_NUMBERS = 1 << 22  # resampled values that are held at once
_ROUNDING = 1e-14  # rounding error of float64 sums, relative to the largest number

FEW_VALUES = 10
INTERVALS = f"percentile bootstrap; Student's t of fewer than {FEW_VALUES} values"  # a provenance line of reports


@dataclass(frozen=True)
class Mean:
    """A mean over queries.

    Attributes:
        mean: The mean, in the unit of the values.
        error: Standard error of the mean; None for a single value.
        low: Lower end of the 95% interval of the mean, see :func:`mean_of`; None for a single value.
        high: Upper end.
        n: Number of values.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of first - second over shared queries.

    Attributes:
        p: Two-sided p of Wilcoxon's signed-rank test that the differences are symmetric about 0. Queries without a
            difference are left out; 1 where no query has a difference; None for a single query, which tests nothing.
    """

    p: float | None


def mean_of(values: npt.ArrayLike, seed: int = 0) -> Mean:
    """Mean of one value a query, ``(n,)``, with its standard error and a 95% interval.

    The interval is a seeded percentile bootstrap; with fewer than ten values, where a bootstrap's interval is too
    narrow (with five values it covers 85%, not 95%), it is Student's t. Equal values have an error of 0 and an
    interval of no width.

    Raises:
        InputError: There are no values, or they have more than one axis.
        NonFiniteError: A value is NaN or infinite.
    """
    mean, error = mean_and_error(values)
    n = len(np.asarray(values))
    if error is None:
        return Mean(mean, None, None, None, n)
    if n >= FEW_VALUES:
        return Mean(mean, error, *bootstrap_interval(values, seed), n)
    if error == 0.0:
        return Mean(mean, error, mean, mean, n)
    from scipy.stats import t

    low, high = t.interval(0.95, n - 1, loc=mean, scale=error)
    return Mean(mean, error, float(low), float(high), n)


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> Difference:
    """Compare two methods on the queries that they share.

    Args:
        first: One value a query, ``(n,)``.
        second: One value for each of the same queries, in the same order, ``(n,)``.
        seed: Seed of the bootstrap.

    Raises:
        InputError: The lengths differ, or there are no values.
        NonFiniteError: A value is NaN or infinite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise InputError(
            f"values of shapes {a.shape} and {b.shape} are no pairs; expected one of each for every shared query."
        )
    differences = a - b
    mean = mean_of(differences, seed)
    return Difference(mean.mean, mean.error, mean.low, mean.high, mean.n, _wilcoxon(differences))


def _wilcoxon(differences: np.ndarray) -> float | None:
    from scipy.stats import wilcoxon

    if len(differences) == 1:
        return None
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def difference_table(title: str, values: Mapping[str, npt.ArrayLike], seed: int = 0) -> Table:
    """Every pair of methods, compared on shared queries.

    Args:
        title: Title of the table.
        values: One value a query, ``(n,)``, by method; the same queries in the same order.
        seed: Seed of the bootstrap.
    """
    rows: list[list[Cell]] = []
    for first, second in combinations(values, 2):
        d = paired_difference(values[first], values[second], seed)
        rows.append([first, second, d.mean, d.low, d.high, d.p, d.n])
    return Table(
        title,
        ["first", "second", "first − second", "95% low", "95% high", "p", "queries"],
        rows,
        "Mean difference over the same queries, its 95% interval, and p of Wilcoxon's signed-rank test, not "
        "corrected for the number of pairs.",
    )


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float | None]:
    """Mean of the values and its standard error.

    Args:
        values: At least one finite number, ``(n,)``.

    Returns:
        The mean, and the standard error (sample deviation, ``n - 1``, over ``sqrt(n)``). It is None for
        a single value, which says nothing about its spread, and 0.0 for values that are equal but for rounding.

    Raises:
        InputError: There are no values, or they have more than one axis.
        NonFiniteError: A value is NaN or infinite.
    """
    array = _finite_vector(values)
    mean = _clipped_mean(array)
    if len(array) == 1:
        return mean, None
    rounding = _ROUNDING * float(np.abs(array).max())
    if np.ptp(array) <= rounding:
        return mean, 0.0
    return 0.0 if abs(mean) <= rounding else mean, float(array.std(ddof=1)) / math.sqrt(len(array))


def bootstrap_interval(
    values: npt.ArrayLike, seed: int = 0, n_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: At least one finite number, ``(n,)``.
        seed: Seed of the resampling; the same seed gives the same interval.
        n_resamples: Number of resamples of ``n`` values that are drawn, with replacement.
        level: Share of the resampled means inside the interval, in (0, 1).

    Returns:
        The lower and the upper end. A single value, or equal values, give an interval of no width at
        that value: every resample is the same.

    Raises:
        InputError: No values, more than one axis, or a level or number of resamples out of range.
        NonFiniteError: A value is NaN or infinite.
    """
    array = _finite_vector(values)
    if not 0.0 < level < 1.0:
        raise InputError(f"level={level}; expected a share strictly between 0 and 1, such as 0.95.")
    if n_resamples < 1:
        raise InputError(f"n_resamples={n_resamples}; expected at least 1, usually 2000.")
    if np.ptp(array) == 0.0:
        return float(array[0]), float(array[0])
    from scipy.stats import bootstrap

    resampled = bootstrap(
        (array,), np.mean, n_resamples=n_resamples, batch=max(1, _BATCH_NUMBERS // len(array)), method="percentile",
        random_state=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = np.quantile(resampled.bootstrap_distribution, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _clipped_mean(array: FloatArray) -> float:
    """Mean that rounding cannot push outside the values' own range."""
    return float(np.clip(array.mean(), array.min(), array.max()))


def _finite_vector(values: npt.ArrayLike) -> FloatArray:
    """Check that the values are a non-empty, finite vector; return them as float64."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"values of shape {array.shape}; expected a list of at least one number.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise NonFiniteError(
            f"value {bad[0]} is {array[bad[0]]} ({bad.size} of {array.size} are not finite); "
            "a mean over them means nothing. Mend or drop those rows first."
        )
    return array
