"""Where the best rows of a sample stand among all rows by their estimates: how many candidates find them.

:mod:`forebear.indexer.building.calibration.calibrate` describes the queries and the sample, and what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from forebear.conformal import least_share, supported_recall
from forebear.indexer.sketches.candidates import BLOCK_ROWS, estimate
from forebear.indexer.sketches.estimates import Part, Proposal
from forebear.ratio import ratio

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)  # the manifest states candidates for these, and for the largest supported recall
TOP = 10
MARGIN_UNIT = "residuals"  # margins of indexes whose calibration does not say so are of both lengths
AIM = 0.95  # weight and margin are chosen so that few candidates give this recall
CODE_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MARGINS = (0.0, 0.5, 1.0)  # of dot products where a fixed number is scored, times the usual error
ESTIMATED_QUERIES = 64  # queries whose estimates of all rows are held at once, 8 bytes for each query and row
CHOOSING_SHARE = 1 / 3  # of the queries; they choose weight and margin, the others state the recall


LIST_GROWTH = 2  # of the longest list that a query which chooses needs: so long a list is scored until it may stop


@dataclass(frozen=True)
class Ranking:
    """Exact scores of the sample by one method, ``(q, m)``, and whether they are cosines or dot products."""

    scores: np.ndarray
    by_cosine: bool


@dataclass(frozen=True)
class _Needed:
    """What it takes to find the sample's best rows of some queries, at both ends, ``(2, q, n_best)`` each.

    Attributes:
        shares: Share of all rows that must be candidates.
        errors: How far the exact score is beyond the estimate, in units of :meth:`Proposal.units`.
    """

    shares: np.ndarray
    errors: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[_Needed]) -> _Needed:
        """Those of one group of queries after another."""
        return cls(*(np.concatenate([getattr(part, own.name) for part in parts], axis=1) for own in fields(cls)))


@dataclass(frozen=True)
class _Choice:
    """How candidates of a method are chosen and when their scoring stops, as some queries chose it.

    Attributes:
        proposal: Weight of the code, and margin.
        list_share: Share of all rows that are listed and scored until no other can be among the best; None where a
            fixed number of candidates takes fewer.
    """

    proposal: Proposal
    list_share: float | None


@dataclass(frozen=True)
class _Tried:
    """A choice that was tried with some queries.

    Attributes:
        n_scored: Share of all rows that is scored at an end, on average.
        cost: What the best of several such choices has least of.
        choice: The choice.
    """

    n_scored: float
    cost: float
    choice: _Choice

    @classmethod
    def of_number(cls, setting: Proposal, needed: _Needed) -> _Tried:
        """A fixed number of candidates. What most queries need steadies a choice that a few would make alone."""
        number = float(_aimed(needed.shares).max())
        return cls(number, float(np.log(number) + np.log(needed.shares).mean()), _Choice(setting, None))


@dataclass(frozen=True)
class _Estimates:
    """Estimated cosines of all rows in two terms, so that another weight of the code takes no second pass.

    Attributes:
        by_coordinates: From the coordinates alone, ``(q, n)`` float32.
        by_code: The code's term at weight 1, ``(q, n)`` float32; None without codes.
        units: What an error of 1 is, ``(q, n)`` float32: :meth:`Proposal.units` of cosines.
    """

    by_coordinates: np.ndarray
    by_code: np.ndarray | None
    units: np.ndarray

    def weighted(self, code_weight: float) -> np.ndarray:
        """The estimates with the code counted at a weight, ``(q, n)``."""
        if not code_weight or self.by_code is None:
            return self.by_coordinates
        return np.asarray(self.by_coordinates + np.float32(code_weight) * self.by_code)

    def take(self, queries: slice, rows: np.ndarray | slice = slice(None)) -> _Estimates:
        """The estimates of some queries and rows."""
        by_code = None if self.by_code is None else self.by_code[queries, rows]
        return _Estimates(self.by_coordinates[queries, rows], by_code, self.units[queries, rows])


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

    def calibrate(
        self, rankings: Mapping[str, Ranking], cosines: np.ndarray, *, stops: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Choose the code's weight and the margin by a third of the queries, and state recalls by the others.

        Args:
            rankings: By method name.
            cosines: Exact cosines of the sample, ``(q, m)``.
            stops: Whether scoring can stop when it is enough, where that takes fewer rows than a fixed number.

        Returns:
            Facts of each method for the manifest.
        """
        n_queries, n = self.excluded.shape
        order = np.random.default_rng(self.seed).permutation(n_queries)
        n_choosing = int(n_queries * CHOOSING_SHARE)
        choosing, stating = np.sort(order[:n_choosing]), np.sort(order[n_choosing:])
        n_others = n - int(self.excluded.sum(axis=1).max())
        n_sampled, n_best = n_ranked(self.sample, n_others)
        choices = self._choose(choosing, rankings, cosines, n_best, stops=stops)
        needed = self._needed_when_stating(stating, rankings, choices, n_best)
        supported = supported_recall(len(stating))
        recalls = sorted({*(recall for recall in RECALLS if recall < supported), supported})
        return {
            name: {
                "code_weight": choices[name].proposal.code_weight,
                "margin": choices[name].proposal.margin,
                "margin_unit": MARGIN_UNIT,
                "candidates": {str(recall): _least(found.shares, recall) for recall in recalls},
                "supported": supported,
                "top": n_best * n_others // n_sampled,
                "n_choosing": n_choosing,
                "n_stating": len(stating),
            }
            | _stop_facts(choices[name].list_share, found, recalls)
            for name, found in needed.items()
        }

    def _choose(
        self, queries: np.ndarray, rankings: Mapping[str, Ranking], cosines: np.ndarray, n_best: int, *, stops: bool
    ) -> dict[str, _Choice]:
        """How each method's best rows are found by scoring few rows; without queries, uncalibrated choices."""
        if not len(queries):
            return {name: _Choice(Proposal(ranking.by_cosine, 1.0), None) for name, ranking in rankings.items()}
        estimates = self._estimates(queries)
        columns = np.searchsorted(self.live, self.sample)
        counted = ~self.excluded[np.ix_(queries, columns)]
        of_sample = estimates.take(slice(None), columns)
        numbers: dict[str, list[_Tried]] = {name: [] for name in rankings}
        stopping: dict[str, list[_Tried]] = {name: [] for name in rankings}
        for weight in CODE_WEIGHTS if estimates.by_code is not None else (0.0,):
            errors = ratio(of_sample.weighted(weight) - cosines[queries], of_sample.units)
            usual = float(np.sqrt(np.mean(errors[counted] ** 2)))
            for name, ranking in rankings.items():
                for share in (0.0,) if ranking.by_cosine else MARGINS:
                    setting = Proposal(ranking.by_cosine, weight, share * usual)
                    needed = self._needed(queries, estimates, ranking, setting, n_best)
                    numbers[name].append(_Tried.of_number(setting, needed))
                if stops:  # whatever the margin, the errors are the same
                    allowed = max(0.0, float(_aimed(needed.errors).max()))
                    setting = Proposal(ranking.by_cosine, weight, allowed)
                    stopping[name].append(self._until_enough(queries, estimates, ranking, setting, n_best))
        best = {
            name: [min(tried[name], key=lambda one: one.cost) for tried in (numbers, stopping) if tried[name]]
            for name in rankings
        }
        return {name: min(both, key=lambda one: one.n_scored).choice for name, both in best.items()}

    def _until_enough(
        self, queries: np.ndarray, estimates: _Estimates, ranking: Ranking, setting: Proposal, n_best: int
    ) -> _Tried:
        """What it costs to score rows until no other can be among the best, if errors stay within the margin.

        Where the sample's best rows stand for more than the best 10 of all, the tenth best score is taken to be above
        theirs by as much as its estimate is.
        """
        listed = self._needed(queries, estimates, ranking, setting, n_best).shares.max()
        list_share = min(1.0, LIST_GROWTH * float(listed))
        columns, n_scored = np.searchsorted(self.live, self.sample), []
        for i, query in enumerate(queries):
            included, lengths = ~self.excluded[query], self._lengths(ranking, query)
            of_query = estimates.take(slice(i, i + 1))
            estimated = of_query.weighted(setting.code_weight)[0] * lengths
            margin = setting.margin * of_query.units[0] * lengths
            for sign in (1.0, -1.0):
                scores = sign * np.where(included[columns], ranking.scores[query], np.nan)
                ordered = np.sort((sign * estimated)[included])[::-1]
                stands_for = min(n_best * len(ordered) // len(columns), len(ordered))
                edge = float(scores[_best(scores, n_best)].min())
                edge += max(0.0, float(ordered[min(TOP, stands_for) - 1] - ordered[stands_for - 1]))
                open_share = float((included & (sign * estimated + margin >= edge)).mean())
                n_scored.append(min(list_share, open_share))
        mean = float(np.mean(n_scored))
        return _Tried(mean, mean, _Choice(setting, list_share))

    def _lengths(self, ranking: Ranking, query: int) -> np.ndarray:
        """From cosines of a query with every live row to scores, ``(n,)``: 1, or the product of lengths."""
        if ranking.by_cosine:
            return np.ones(len(self.live), np.float32)
        return np.asarray(self.part.store.lengths[self.live] * np.float32(self.part.queries.lengths[query]))

    def _needed_when_stating(
        self, queries: np.ndarray, rankings: Mapping[str, Ranking], choices: dict[str, _Choice], n_best: int
    ) -> dict[str, _Needed]:
        """What finds the best rows, by method; computed for a few queries at a time."""
        groups = [queries[start : start + ESTIMATED_QUERIES] for start in range(0, len(queries), ESTIMATED_QUERIES)]
        needed: dict[str, list[_Needed]] = {name: [] for name in rankings}
        for group in groups:
            estimates = self._estimates(group)
            for name, ranking in rankings.items():
                needed[name].append(self._needed(group, estimates, ranking, choices[name].proposal, n_best))
        return {name: _Needed.join(parts) for name, parts in needed.items()}

    def _estimates(self, queries: np.ndarray) -> _Estimates:
        """Estimated cosines of all live rows with some queries, in one pass over the stored sketches."""
        part = replace(self.part, queries=self.part.queries.take(queries))
        numbers = np.arange(len(queries))
        by_coordinates, units = (np.empty((len(queries), len(self.live)), np.float32) for _ in range(2))
        by_code = None if part.store.codes is None else np.empty_like(by_coordinates)
        for start in range(0, len(self.live), BLOCK_ROWS):
            columns = slice(start, start + BLOCK_ROWS)
            by_coordinates[:, columns] = estimate([part], self.live[columns], cosine=True)
            units[:, columns] = Proposal(True, 1.0).units([part], self.live[columns])
            if by_code is not None:
                by_code[:, columns] = part.code_products(numbers, self.live[columns])
        return _Estimates(by_coordinates, by_code, units)

    def _needed(
        self, queries: np.ndarray, estimates: _Estimates, ranking: Ranking, setting: Proposal, n_best: int
    ) -> _Needed:
        """What finds each of the sample's best rows.

        Goes query by query, so that intermediate arrays have the size of one query's rows.
        """
        columns = np.searchsorted(self.live, self.sample)
        needed = _Needed(*(np.empty((2, len(queries), n_best)) for _ in fields(_Needed)))
        for i, query in enumerate(queries):
            excluded = self.excluded[query : query + 1]
            scores = np.where(excluded[:, columns], np.nan, ranking.scores[query])
            of_query, lengths = estimates.take(slice(i, i + 1)), self._lengths(ranking, query)
            estimated, units = of_query.weighted(setting.code_weight), of_query.units[0]
            for end, sign in enumerate((1.0, -1.0)):
                ranked = (sign * estimated + np.float32(setting.margin) * units) * lengths
                needed.shares[end, i] = needed_shares(sign * scores, ranked, columns, excluded, n_best)[0]
                best = _best(sign * scores[0], n_best)
                places = columns[best]
                beyond = ratio(scores[0][best], lengths[places]) - estimated[0][places]
                needed.errors[end, i] = ratio(sign * beyond, units[places])
        return needed


def _best(scores: np.ndarray, n_best: int) -> np.ndarray:
    """Positions of the largest scores ``(m,)``, NaN for none, the best first."""
    return np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")[:n_best]


def _aimed(values: np.ndarray) -> np.ndarray:
    """The value at each end that :data:`AIM` of the best rows of all queries stay within, ``(2,)``."""
    return np.asarray(np.quantile(values.reshape(2, -1), AIM, axis=1, method="higher"))


def _least(values: np.ndarray, recall: float) -> float:
    """The least value that keeps a recall at both ends; the queries support the recall."""
    return max(least for end in values if (least := least_share(end, recall)) is not None)


def _stop_facts(list_share: float | None, needed: _Needed, recalls: Sequence[float]) -> dict[str, Any]:
    """Facts for the manifest on when scoring stops; none where a fixed number of candidates is scored.

    A row is found if it is listed, and if its score is no farther beyond its estimate than is allowed.
    """
    if list_share is None:
        return {}
    errors = np.where(needed.shares <= list_share, needed.errors, np.inf)
    allowed = {str(recall): least for recall in recalls if np.isfinite(least := _least(errors, recall))}
    return {"list_share": list_share, "errors": allowed} if allowed else {}


def needed_shares(
    scores: np.ndarray, estimates: np.ndarray, sample: np.ndarray, excluded: np.ndarray, n_best: int
) -> np.ndarray:
    """For each of the sample's best rows, the share of all rows that must be candidates for it to be among them.

    Rows with an equal estimate count as ranked before it.

    Args:
        scores: Exact scores of the sample, NaN where excluded, ``(q, m)``.
        estimates: Estimates of all live rows by which candidates are ranked, ``(q, n)``.
        sample: Positions of the sampled rows among all live rows, ``(m,)``.
        excluded: Rows that are not ranked for a query, ``(q, n)`` bool.
        n_best: Number of best rows of the sample that are looked for.

    Returns:
        Shares of all live rows, ``(q, n_best)``, the best row first.
    """
    out = np.empty((len(scores), n_best))
    for q, query_scores in enumerate(scores):
        best = sample[_best(query_scores, n_best)]
        ranked = np.where(excluded[q], -np.inf, estimates[q])
        out[q] = (ranked >= ranked[best, None]).sum(axis=1) / len(ranked)
    return out
