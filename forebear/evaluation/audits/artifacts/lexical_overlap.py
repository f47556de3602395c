"""Lexical overlap of sentence pairs, and how sure a mean of such numbers is.

The overlap is that of Pezeshkpour et al. (2021): the share of the hypothesis' words that the premise
holds too. A model that answers "entailment" because of it follows a shortcut (McCoy et al., 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from forebear.errors import DataError, InputError, NonFiniteError

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")
_ROUNDING = 1e-14  # of numbers computed in float64, relative to the largest


def premise_first(texts: Sequence[T], columns: Sequence[str]) -> tuple[T, T]:
    """Two columns of texts as (premises, hypotheses): by their names where these say so, else in their order."""
    first, second = texts
    names = [name.casefold() for name in columns]
    return (second, first) if "hypothesis" in names[0] or "premise" in names[1] else (first, second)


def lexical_overlap(premises: Sequence[str], hypotheses: Sequence[str]) -> FloatArray:
    """Share of each hypothesis' word types that occur in its premise.

    Words are lower-cased and split at white space; punctuation stays attached, as in the released code
    of Pezeshkpour et al. Each word counts once, however often it occurs. A hypothesis without words has
    overlap 0.0: nothing of it was found in the premise.

    Args:
        premises: The first texts, ``n`` of them.
        hypotheses: The second texts, ``n`` of them.

    Returns:
        Values in [0, 1], ``(n,)``; never NaN.

    Raises:
        DataError: The two sequences differ in length, or a text is no string.
    """
    if len(premises) != len(hypotheses):
        raise DataError(
            f"{len(premises)} premises but {len(hypotheses)} hypotheses; expected one of each per row. "
            "Give both columns of the same rows."
        )
    values = np.zeros(len(premises), dtype=np.float64)
    for row, (premise, hypothesis) in enumerate(zip(premises, hypotheses, strict=True)):
        if not isinstance(premise, str) or not isinstance(hypothesis, str):
            raise DataError(
                f"row {row} has a premise of type {type(premise).__name__} and a hypothesis of type "
                f"{type(hypothesis).__name__}; expected two strings. Drop the row or fill in the text."
            )
        words = set(hypothesis.lower().split())
        if words:
            values[row] = len(words & set(premise.lower().split())) / len(words)
    return values


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
        n_resamples: How many resamples of ``n`` values are drawn, with replacement.
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
    rng = np.random.default_rng(seed)
    n = len(array)
    means = np.array([array[rng.integers(0, n, size=n)].mean() for _ in range(n_resamples)])
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
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
