"""How well predicted changes fit retrained ones: slope through the origin and correlations, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.ratio import ratio

N_RESAMPLES = 2000
LEAST_PAIRS = 3  # of a correlation


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Retrained on predicted changes.

    Attributes:
        n_pairs: Number of pairs.
        slope: Sum of predicted x retrained over sum of predicted^2: the slope through the origin; None where every
            predicted change is 0.
        slope_interval: Its 95% interval, by a bootstrap over test rows; None with a single one.
        correlation: Pearson's correlation; None where it is undefined, or of fewer than three pairs, which have no
            other than 1 and -1.
        correlation_interval: Likewise.
        rank_correlation: Spearman's correlation.
    """

    n_pairs: int
    slope: float | None
    slope_interval: tuple[float, float] | None
    correlation: float | None
    correlation_interval: tuple[float, float] | None
    rank_correlation: float | None


def fit(predicted: np.ndarray, retrained: np.ndarray, queries: np.ndarray, seed: int) -> Fit:
    """The fit of some pairs.

    Args:
        predicted: Predicted changes, ``(n,)``.
        retrained: Changes after retraining, ``(n,)``.
        queries: The test row of each pair, ``(n,)``: pairs of one test row are drawn together.
        seed: Seed of the bootstrap.
    """
    _, places = np.unique(queries, return_inverse=True)
    ones = np.ones(len(predicted))
    products = (ones, predicted, retrained, predicted**2, retrained**2, predicted * retrained)
    sums = np.stack([np.bincount(places, weights=values) for values in products])  # (6, q)
    slope, correlation = _fitted(sums.sum(axis=1, keepdims=True))
    intervals: list[tuple[float, float] | None] = [None, None]
    n_queries = sums.shape[1]
    if n_queries > 1:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), size=N_RESAMPLES)
        intervals = [_interval(values) for values in _fitted(sums @ counts.T)]
    if len(predicted) < LEAST_PAIRS:
        correlation, intervals[1] = np.array([np.nan]), None
    return Fit(
        n_pairs=len(predicted), slope=_number(slope[0]), slope_interval=intervals[0],
        correlation=_number(correlation[0]), correlation_interval=intervals[1],
        rank_correlation=_ranks(predicted, retrained),
    )  # fmt: skip


def _fitted(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and Pearson's correlations of sums ``(6, m)``; NaN where they are undefined."""
    n, x, y, xx, yy, xy = sums
    spread = np.maximum(n * xx - x**2, 0.0) * np.maximum(n * yy - y**2, 0.0)
    return ratio(xy, xx, np.nan), np.clip(ratio(n * xy - x * y, np.sqrt(spread), np.nan), -1.0, 1.0)


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    kept = values[~np.isnan(values)]
    if not len(kept):
        return None
    low, high = np.quantile(kept, [0.025, 0.975])
    return float(low), float(high)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _ranks(first: np.ndarray, second: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    if len(first) < LEAST_PAIRS or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
