"""Where the best rows of a sample stand among all rows by their estimates: how many candidates find them.

See :mod:`forebear.indexer.building.calibrate` for what is asked, and what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.conformal import least_share, supported_recall
from forebear.indexer.sketches.candidates import BLOCK_ROWS, Part, Proposal, candidates_needed, estimate

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)  # what the manifest says the candidates of; and the largest that is supported
TOP = 10
AIM = 0.95  # recall whose candidates the choice of weight and margin keeps few
CODE_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
MARGINS = (0.0, 0.5, 1.0)  # in units of the usual error of a cosine
ESTIMATED_QUERIES = 64  # whose estimates of all rows are held at once: 8 bytes a query and row
CHOOSING_SHARE = 1 / 3  # of the queries, which choose weight and margin; the others state the recall


@dataclass(frozen=True)
class Ranking:
    """How one method ranks: exact scores of the sample, ``(q, m)``, and whether they are cosines; else dots."""

    scores: np.ndarray
    by_cosine: bool


@dataclass(frozen=True)
class _Estimates:
    """Estimated cosines of all rows in two terms, so that each weight of the code takes a sum and no second pass.

    Attributes:
        by_coordinates: From the coordinates alone, ``(q, n)`` float32.
        by_code: What the code adds at weight 1, ``(q, n)`` float32; None without codes.
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


@dataclass(frozen=True)
class RankCalibration:
    """Where the sample's best rows stand among all rows by their estimates.

    Attributes:
        part: Sketches of the queries beside the stored ones.
        live: Numbers of all rows that take part, ``(n,)``, ascending.
        sample: Those that are scored exactly, ``(m,)``.
        excluded: Which of all rows are a query's own, ``(q, n)``.
        seed: Of the split into queries that choose and queries that state.
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
            What the manifest keeps of each method.
        """
        n_queries, n = self.excluded.shape
        order = np.random.default_rng(self.seed).permutation(n_queries)
        n_choosing = int(n_queries * CHOOSING_SHARE)
        choosing, stating = np.sort(order[:n_choosing]), np.sort(order[n_choosing:])
        n_others = n - int(self.excluded.sum(axis=1).max())
        n_sampled = min(len(self.sample), n_others)
        n_best = min(n_sampled, -(-TOP * n_sampled // n_others))
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
        """Weight and margin by which each method's best rows stand highest; as uncalibrated where no query chooses."""
        if not len(queries):
            return {n: Proposal(r.by_cosine, 1.0 if r.by_cosine else 0.0) for n, r in rankings.items()}
        estimates = self._estimates(queries)
        columns = np.searchsorted(self.live, self.sample)
        counted = ~self.excluded[np.ix_(queries, columns)]
        of_sample = estimates.take(slice(None), columns)
        costs: dict[str, list[tuple[float, Proposal]]] = {name: [] for name in rankings}
        for weight in CODE_WEIGHTS if estimates.by_code is not None else (0.0,):
            error = float(np.sqrt(np.mean((of_sample.weighted(weight) - cosines[queries])[counted] ** 2)))
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
        """Shares at both ends by method, ``(q, n_best)`` each; estimates of few queries are held at once."""
        groups = [queries[start : start + ESTIMATED_QUERIES] for start in range(0, len(queries), ESTIMATED_QUERIES)]
        needed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in rankings}
        for group in groups:
            estimates = self._estimates(group)
            for name, ranking in rankings.items():
                needed[name].append(self._needed(group, estimates, ranking, settings[name], n_best))
        return {name: [np.concatenate(end) for end in zip(*ends, strict=True)] for name, ends in needed.items()}

    def _estimates(self, queries: np.ndarray) -> _Estimates:
        """Of all rows for some queries, in one pass over the stored sketches."""
        part = replace(self.part, asked=self.part.asked.take(queries))
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

        One query at a time: what is made on the way is of one query's rows.
        """
        columns = np.searchsorted(self.live, self.sample)
        lengths = 1.0 if ranking.by_cosine else self.part.store.lengths[self.live]
        ends = np.empty((2, len(queries), n_best))
        for i, query in enumerate(queries):
            excluded = self.excluded[query : query + 1]
            scores = np.where(excluded[:, columns], np.nan, ranking.scores[query])
            of_query = estimates.take(slice(i, i + 1))
            steps = [of_query.weighted(weight) for weight in sorted({0.0, setting.code_weight})]
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

    Of equal estimates every row counts as standing before it.

    Args:
        scores: Exact ones of the sample, NaN where excluded, ``(q, m)``.
        scanned: Estimates of all live rows by which the scan ranks, ``(q, n)``.
        estimates: Those by which candidates are ranked in the end, ``(q, n)``.
        sample: Its positions among them.
        excluded: Rows that take no part, ``(q, n)``.
        n_best: Of the sample.

    Returns:
        ``(q, n_best)``.
    """
    out = np.empty((len(scores), n_best))
    for q, of_query in enumerate(scores):
        best = sample[np.argsort(np.where(np.isnan(of_query), np.inf, -of_query), kind="stable")[:n_best]]
        ranks = [
            (others >= others[best, None]).sum(axis=1)
            for others in (np.where(excluded[q], -np.inf, ranked[q]) for ranked in (scanned, estimates))
        ]
        out[q] = candidates_needed(*ranks) / len(excluded[q])
    return out
