"""Is a source of training rows better or worse than the others, whatever its size? Means, intervals, p: arrays alone.

Sources are groups of the ``n`` rows, ``m`` of them, by number. A source's *mean* is that of its rows' scores; its
*difference* is its mean less the mean of all other rows, which does not grow with its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.evaluation.common.statistics import FEW_VALUES

N_RESAMPLES = 1000
MOST_SHUFFLES, LEAST_SHUFFLES = 2000, 200
SHUFFLED_NUMBERS = 1 << 27  # scores that are put in other places in all, above which shuffles are fewer
BLOCK_NUMBERS = 1 << 22  # resampled scores that are held at once


@dataclass(frozen=True, eq=False)
class Worth:
    """What the rows of each source are worth to some test rows.

    Attributes:
        means: Mean score of each source's rows, ``(m,)``.
        mean_intervals: Their 95% intervals, ``(2, m)``; NaN of sources of fewer than ten rows.
        differences: Mean less the mean of all other rows, ``(m,)``.
        intervals: Their 95% intervals, ``(2, m)``; NaN where the source, or all others together, are fewer than ten
            rows.
    """

    means: np.ndarray
    mean_intervals: np.ndarray
    differences: np.ndarray
    intervals: np.ndarray


@dataclass(frozen=True, eq=False)
class Chance:
    """How often sources of the same sizes, whose rows are drawn by chance, differ as much.

    Attributes:
        p: Two-sided p of each source's difference, ``(m,)``.
        unusual: The differences in units of what chance gives at each source's size, below 0 where it is less than
            the others, ``(m,)``.
        p_of_all: The same, corrected for the number of sources: how often the most unusual of all m is as unusual.
        n_shuffles: Shuffles of the rows; no p is below 1 / (n_shuffles + 1).
    """

    p: np.ndarray
    unusual: np.ndarray
    p_of_all: np.ndarray
    n_shuffles: int


def less_the_rest(means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean of each source less the mean of all other rows.

    Args:
        means: ``(..., m)``.
        sizes: Rows of each source, ``(m,)``, two sources or more.
    """
    total = (means * sizes).sum(axis=-1, keepdims=True)
    return np.asarray(means - (total - means * sizes) / (sizes.sum() - sizes))


def worth(by_test_row: np.ndarray, scores: np.ndarray, numbers: np.ndarray, seed: int) -> Worth:
    """Means and differences, with intervals by a bootstrap over the test rows and over each source's rows.

    A draw takes test rows and, independently of them, rows of each source with replacement; deviations of the two add.
    Those of n rows are widened by sqrt(n / (n - 1)), as the spread of a sample is. Of one row they are those of all
    rows.

    Args:
        by_test_row: Mean score of each source's rows for each test row, ``(q, m)``.
        scores: Scores of the rows, means over the test rows, ``(n,)``.
        numbers: Source of each row, from 0 to m - 1, ``(n,)``.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    q, m = by_test_row.shape
    sizes = np.bincount(numbers, minlength=m)
    means = by_test_row.mean(axis=0)
    draws = rng.multinomial(q, np.full(q, 1 / q), size=N_RESAMPLES) @ by_test_row / q
    for number in range(m):
        draws[:, number] += _deviations(scores, numbers == number, rng)
    differences = less_the_rest(draws, sizes)
    is_small = sizes < FEW_VALUES
    return Worth(
        means=means,
        mean_intervals=_interval(draws, is_small),
        differences=less_the_rest(means, sizes),
        intervals=_interval(differences, is_small | (sizes.sum() - sizes < FEW_VALUES)),
    )


def _interval(draws: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    return np.where(unknown, np.nan, np.quantile(draws, [0.025, 0.975], axis=0))


def _deviations(scores: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of resampled scores of some rows less their mean, ``(N_RESAMPLES,)``."""
    n = int(own.sum())
    if n == 1:
        return np.asarray(rng.choice(scores, N_RESAMPLES) - scores.mean())
    some, out = scores[own], np.empty(N_RESAMPLES)
    step = max(1, BLOCK_NUMBERS // n)
    for start in range(0, N_RESAMPLES, step):
        count = min(step, N_RESAMPLES - start)
        out[start : start + count] = some[rng.integers(0, n, (count, n))].mean(axis=1)
    return np.asarray((out - some.mean()) * np.sqrt(n / (n - 1)))


def chance(scores: np.ndarray, numbers: np.ndarray, strata: np.ndarray | None, seed: int) -> Chance:
    """p of the differences by a permutation test: rows are shuffled among the sources, whose sizes stay.

    Args:
        scores: Scores of the rows, ``(n,)``.
        numbers: Source of each row, from 0 to m - 1, ``(n,)``.
        strata: Rows are shuffled among those of the same number alone, such as the same label, ``(n,)``; differences
            are then those of the scores less the mean of the row's stratum. None: among all rows.
        seed: Seed of the shuffles.
    """
    rng = np.random.default_rng([seed, 5])
    n = len(scores)
    groups = [np.arange(n)] if strata is None else [np.flatnonzero(strata == one) for one in np.unique(strata)]
    centred = scores.astype(np.float64)
    for group in groups:
        centred[group] -= centred[group].mean()
    by_source = np.argsort(numbers, kind="stable")
    sizes = np.bincount(numbers)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    # of centred scores: the difference's size in units of what chance gives to a source of this size
    scale = 1 / np.sqrt(sizes * (1 - sizes / n))
    unusual = np.add.reduceat(centred[by_source], starts) * scale
    found = np.abs(unusual)
    n_shuffles = int(np.clip(SHUFFLED_NUMBERS // n, LEAST_SHUFFLES, MOST_SHUFFLES))
    tolerance = 1e-12 * np.abs(centred).sum() * scale  # equal scores in another order are as unusual
    as_unusual, all_as_unusual = np.ones(len(sizes)), np.ones(len(sizes))
    places = np.arange(n)
    for _ in range(n_shuffles):
        for group in groups:
            places[group] = rng.permutation(group)
        shuffled = np.abs(np.add.reduceat(centred[places[by_source]], starts)) * scale
        as_unusual += shuffled >= found - tolerance
        all_as_unusual += shuffled.max() >= found - tolerance
    return Chance(as_unusual / (n_shuffles + 1), unusual, all_as_unusual / (n_shuffles + 1), n_shuffles)
