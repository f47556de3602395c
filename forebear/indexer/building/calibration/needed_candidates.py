"""Where the best rows of a sample stand among all rows by their estimates: how many candidates find them.

:mod:`forebear.indexer.building.calibration.calibrate` describes the queries and the sample, and what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.conformal import least_share, supported_recall
from forebear.indexer.sketches.candidates import BLOCK_ROWS, candidates_needed, estimate
from forebear.indexer.sketches.estimates import Part, Proposal

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)  # the manifest states candidates for these, and for the largest supported recall
TOP = 10
AIM = 0.95  # weight and margin are chosen so that few candidates give this recall
CODE_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
MARGINS = (0.0, 0.5, 1.0)  # in units of the usual error of a cosine
ESTIMATED_QUERIES = 64  # queries whose estimates of all rows are held at once, 8 bytes for each query and row
CHOOSING_SHARE = 1 / 3  # of the queries; they choose weight and margin, the others state the recall


@dataclass(frozen=True)
class Ranking:
    """Exact scores of the sample by one method, ``(q, m)``, and whether they are cosines or dot products."""

    scores: np.ndarray
    by_cosine: bool


@dataclass(frozen=True)
class _Estimates:
    """Estimated cosines of all rows in two terms, so that another weight of the code takes no second pass.

    Attributes:
        by_coordinates: From the coordinates alone, ``(q, n)`` float32.
        by_code: The code's term at weight 1, ``(q, n)`` float32; None without codes.
    """

    by_coordinates: np.ndarray
    by_code: np.ndarray | None

    def weighted(self, code_weight: float) -> np.ndarray:
        """The estimates with the code counted at a weight, ``(q, n)``."""
        if not code_weight or self.by_code is None:
            return self.by_coordinates
        return np.asarray(self.by_coordinates + np.float32(code_weight) * self.by_code)

    def take(self, queries: slice, rows: np.ndarray | slice = slice(None)) -> _Estimates:
        """The estimates of some queries and rows."""
        by_code = None if self.by_code is None else self.by_code[queries, rows]
        return _Estimates(self.by_coordinates[queries, rows], by_code)


def n_ranked(sample: np.ndarray, n_others: int) -> tuple[int, int]:
    """How many of the sampled rows a query ranks, and how many of the best of these stand for the best of all.

    Args:
        sample: Numbers of the sampled rows, ``(m,)``.
        n_others: Number of live rows without those that are the query itself.
    """
    n_sampled = min(len(sample), n_others)
    return n_sampled, min(n_sampled, -(-TOP * n_sampled // n_others))


@dataclass(frozen=True)
class RankCalibration:
    """Where the sample's best rows stand among all rows by their estimates.

    Attributes:
        part: Sketches of the queries beside the stored ones.
        live: Numbers of all live rows (or spans), ``(n,)``, ascending.
        sample: Numbers of the rows that are scored exactly, ``(m,)``.
        excluded: Which of the live rows are a query itself, and so not ranked for it, ``(q, n)``.
        seed: Random seed of the split into queries that choose and queries that state.
    """

    part: Part
    live: np.ndarray
    sample: np.ndarray
    excluded: np.ndarray
    seed: int

    def calibrate(self, rankings: Mapping[str, Ranking], cosines: np.ndarray) -> dict[str, dict[str, Any]]:
        """Choose the code's weight and the margin by a third of the queries, and state recalls by the others.

        Args:
            rankings: By method name.
            cosines: Exact cosines of the sample, ``(q, m)``.

        Returns:
            Facts of each method for the manifest.
        """
        n_queries, n = self.excluded.shape
        order = np.random.default_rng(self.seed).permutation(n_queries)
        n_choosing = int(n_queries * CHOOSING_SHARE)
        choosing, stating = np.sort(order[:n_choosing]), np.sort(order[n_choosing:])
        n_others = n - int(self.excluded.sum(axis=1).max())
        n_sampled, n_best = n_ranked(self.sample, n_others)
        settings = self._choose(choosing, rankings, cosines, n_best)
        needed = self._needed_when_stating(stating, rankings, settings, n_best)
        supported = supported_recall(len(stating))
        recalls = sorted({*(recall for recall in RECALLS if recall < supported), supported})
        return {
            name: {
                "code_weight": settings[name].code_weight,
                "margin": settings[name].margin,
                "candidates": {
                    str(recall): max(share for end in ends if (share := least_share(end, recall)) is not None)
                    for recall in recalls
                },
                "supported": supported,
                "top": n_best * n_others // n_sampled,
                "n_choosing": n_choosing,
                "n_stating": len(stating),
            }
            for name, ends in needed.items()
        }

    def _choose(
        self, queries: np.ndarray, rankings: Mapping[str, Ranking], cosines: np.ndarray, n_best: int
    ) -> dict[str, Proposal]:
        """Weight and margin that put each method's best rows highest; without queries, uncalibrated ones."""
        if not len(queries):
            return {n: Proposal(r.by_cosine, 1.0 if r.by_cosine else 0.0) for n, r in rankings.items()}
        estimates = self._estimates(queries)
        columns = np.searchsorted(self.live, self.sample)
        counted = ~self.excluded[np.ix_(queries, columns)]
        sample_estimates = estimates.take(slice(None), columns)
        costs: dict[str, list[tuple[float, Proposal]]] = {name: [] for name in rankings}
        for weight in CODE_WEIGHTS if estimates.by_code is not None else (0.0,):
            error = float(np.sqrt(np.mean((sample_estimates.weighted(weight) - cosines[queries])[counted] ** 2)))
            for name, ranking in rankings.items():
                for share in (0.0,) if ranking.by_cosine else MARGINS:
                    setting = Proposal(ranking.by_cosine, weight, share * error)
                    ends = self._needed(queries, estimates, ranking, setting, n_best)
                    cost = float(np.mean(np.log(np.concatenate(ends)))) + max(
                        float(np.log(np.quantile(end, AIM, method="higher"))) for end in ends
                    )
                    costs[name].append((cost, setting))
        return {name: min(tried, key=lambda cost_and_setting: cost_and_setting[0])[1] for name, tried in costs.items()}

    def _needed_when_stating(
        self, queries: np.ndarray, rankings: Mapping[str, Ranking], settings: dict[str, Proposal], n_best: int
    ) -> dict[str, list[np.ndarray]]:
        """Shares of rows needed at both ends, by method, ``(q, n_best)`` each; computed for a few queries at a time."""
        groups = [queries[start : start + ESTIMATED_QUERIES] for start in range(0, len(queries), ESTIMATED_QUERIES)]
        needed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in rankings}
        for group in groups:
            estimates = self._estimates(group)
            for name, ranking in rankings.items():
                needed[name].append(self._needed(group, estimates, ranking, settings[name], n_best))
        return {name: [np.concatenate(end) for end in zip(*ends, strict=True)] for name, ends in needed.items()}

    def _estimates(self, queries: np.ndarray) -> _Estimates:
        """Estimated cosines of all live rows with some queries, in one pass over the stored sketches."""
        part = replace(self.part, queries=self.part.queries.take(queries))
        numbers = np.arange(len(queries))
        by_coordinates = np.empty((len(queries), len(self.live)), np.float32)
        by_code = None if part.store.codes is None else np.empty_like(by_coordinates)
        for start in range(0, len(self.live), BLOCK_ROWS):
            columns = slice(start, start + BLOCK_ROWS)
            by_coordinates[:, columns] = estimate([part], self.live[columns], cosine=True)
            if by_code is not None:
                by_code[:, columns] = part.code_products(numbers, self.live[columns])
        return _Estimates(by_coordinates, by_code)

    def _needed(
        self, queries: np.ndarray, estimates: _Estimates, ranking: Ranking, setting: Proposal, n_best: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Share of all rows that must be candidates for each of the sample's best rows, at both ends ``(q, n_best)``.

        Goes query by query, so that intermediate arrays have the size of one query's rows.
        """
        columns = np.searchsorted(self.live, self.sample)
        lengths = 1.0 if ranking.by_cosine else self.part.store.lengths[self.live]
        ends = np.empty((2, len(queries), n_best))
        for i, query in enumerate(queries):
            excluded = self.excluded[query : query + 1]
            scores = np.where(excluded[:, columns], np.nan, ranking.scores[query])
            query_estimates = estimates.take(slice(i, i + 1))
            steps = [query_estimates.weighted(weight) for weight in sorted({0.0, setting.code_weight})]
            for end, sign in zip(ends, (1.0, -1.0), strict=True):
                ranked = [(sign * step + np.float32(setting.margin)) * lengths for step in steps]
                end[i] = needed_shares(sign * scores, ranked[0], ranked[-1], columns, excluded, n_best)[0]
        return ends[0], ends[1]


def needed_shares(
    scores: np.ndarray,
    scanned: np.ndarray,
    estimates: np.ndarray,
    sample: np.ndarray,
    excluded: np.ndarray,
    n_best: int,
) -> np.ndarray:
    """For each of the sample's best rows, the share of all rows that must be candidates for it to be among them.

    Rows with an equal estimate count as ranked before it.

    Args:
        scores: Exact scores of the sample, NaN where excluded, ``(q, m)``.
        scanned: Estimates of all live rows by which the scan ranks, ``(q, n)``.
        estimates: Estimates of all live rows by which candidates are ranked after the scan, ``(q, n)``.
        sample: Positions of the sampled rows among all live rows, ``(m,)``.
        excluded: Rows that are not ranked for a query, ``(q, n)`` bool.
        n_best: Number of best rows of the sample that are looked for.

    Returns:
        Shares of all live rows, ``(q, n_best)``, the best row first.
    """
    out = np.empty((len(scores), n_best))
    for q, query_scores in enumerate(scores):
        best = sample[np.argsort(np.where(np.isnan(query_scores), np.inf, -query_scores), kind="stable")[:n_best]]
        ranks = [
            (estimates_of_all >= estimates_of_all[best, None]).sum(axis=1)
            for estimates_of_all in (np.where(excluded[q], -np.inf, ranked[q]) for ranked in (scanned, estimates))
        ]
        out[q] = candidates_needed(*ranks) / len(excluded[q])
    return out
