"""Finding the rows worth scoring exactly, and proving that none was missed.

Three searches:

* the *scan*: every row's score by vectors of 8 bits, each within a known reach of the exact one; on a CPU, for dot
  products, it visits rows by falling norm and stops as soon as Cauchy-Schwarz shows that no later row can enter either
  end of the ranking. Its lists are complete: they are scored in float64, and no other row can be better;
* *FAISS*, for cosines and distances of an index that was built with ``--ann``, on a CPU: FAISS over unit
  vectors (cosine) or vectors (Euclidean), opponents of v being the proponents of -v. A candidate list is accepted when
  its k-th exact score clears the best approximate score of a row left out by more than float32's rounding; otherwise it
  is made longer. Quantised FAISS indexes carry no such guarantee, only their calibrated recall;
* the *full* score of every row in float64: the yardstick, and the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from forebear.errors import InputError
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.storage.ann import AnnIndex, unit_rows
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import ScanTable
from forebear.retriever.head.scan import SCAN_TOLERANCE, Scan, group_rows
from forebear.retriever.head.scoring import Query, exact_scores
from forebear.retriever.ranking import Ranking, join, rank

_PRODUCT_QUERIES = 64  # queries whose candidates are multiplied together
_PRODUCT_ROUNDING = 1e-12  # of a float64 product, relative to the largest, with a wide margin
_LONG_LIST = 1024  # rows of one query that are narrowed down by products before they are scored pair by pair
SPARE = 8  # candidates beyond k that are scored pair by pair
MAX_SCORES = 1 << 26  # entries of a (queries, rows) block held at once
_BOUNDED_SCORES = 1 << 23  # the same where each entry has bounds of its own, five times the bytes
_HOST_QUERIES = 128  # of which a CPU's cache holds the scores of the rows that are multiplied at once
_DEVICE_QUERIES = 1024  # scanned together, so that the list of each may be some thousand rows long
_LISTED = 1 << 22  # rows that an end's lists of a block of queries may hold together; queries beyond are scored in full
_MAX_CANDIDATE_NUMBERS = 1 << 25  # entries of a (queries, candidates, width) block held at once
_CACHED_NUMBERS = 1 << 20  # the same of those that are scored together, in float64: more leave the processor's cache


@dataclass(frozen=True)
class RowFactors:
    """Stored factors of every training row in row order, one matrix a checkpoint of the method.

    Scores come in two kinds, which differ in the last few bits of float64 alone. *Products* are matrix products: fast,
    but the place of a row in the matrix decides its last bit. *Scores* are summed pair by pair: equal rows get equal
    scores, so that ties can be broken by row number.

    Attributes:
        features: f at each checkpoint.
        residuals: p - y at each checkpoint; empty for representations without residuals.
        live: Numbers of the live rows, ascending, ``(n_live,)``.
    """

    features: tuple[RowMatrix, ...]
    residuals: tuple[RowMatrix, ...]
    live: np.ndarray

    def scores(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """Scores ``(q, k)`` of each query's own rows ``(q, k)``."""
        n_queries = max(1, _CACHED_NUMBERS // (rows.shape[1] * self.width))
        parts = _chunks(np.arange(len(query)), n_queries)
        return np.concatenate([self._exact(query.take(indices), rows[indices]) for indices in parts])

    def products(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """Products ``(q, k)`` of each query's own rows ``(q, k)``.

        All queries are multiplied with all distinct rows, because queries share many candidates.
        """
        out = np.empty(rows.shape)
        for indices in _chunks(np.arange(len(query)), _PRODUCT_QUERIES):
            distinct, inverse = np.unique(rows[indices], return_inverse=True)
            products = self._exact(query.take(indices), distinct)
            out[indices] = np.take_along_axis(products, inverse.reshape(len(indices), -1), axis=1)
        return out

    def all_products(self, query: Query) -> np.ndarray:
        """Products of every live row, ``(q, n_live)``, columns in the order of ``live``."""
        out = np.empty((len(query), len(self.live)))
        step = max(256, _CACHED_NUMBERS // self.width)
        for start in range(0, len(self.live), step):
            rows = self.live[start : start + step]
            out[:, start : start + len(rows)] = self._exact(query, rows)
        return out

    @property
    def width(self) -> int:
        """Features of a row over all checkpoints."""
        return sum(m.width for m in self.features)

    def _exact(self, query: Query, rows: np.ndarray) -> np.ndarray:
        features = tuple(m.take(rows) for m in self.features)
        return exact_scores(query, features, tuple(m.take(rows) for m in self.residuals), rows)


# Candidates of the queries at some indices, `width` of each: row numbers (q, width) and, where the search bounds it,
# the largest score that a row left out can have (q,), in the units of the exact score, signed so that larger is better.
Candidates = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def settle(
    query: Query, factors: RowFactors, candidates: Candidates, k: int, *, largest: bool, first_width: int
) -> Ranking:
    """Score candidates exactly and widen the lists until no row left out can enter the top ``k``."""
    n_live = len(factors.live)
    rows = np.empty((len(query), k), np.int64)
    scores = np.empty((len(query), k))
    n_scored = np.zeros(len(query), np.int64)
    pending = np.arange(len(query))
    width = min(n_live, first_width)
    dim = factors.width
    while len(pending) and width < n_live and width * dim <= _MAX_CANDIDATE_NUMBERS:
        unsettled = []
        for chunk in _chunks(pending, max(1, _MAX_CANDIDATE_NUMBERS // (width * dim))):
            part = query.take(chunk)
            listed, ceiling = candidates(chunk, width)
            listed, ceiling = _narrow(part, factors, listed, ceiling, k + SPARE, largest=largest)
            rows[chunk], scores[chunk] = rank(factors.scores(part, listed), listed, k, largest=largest)
            n_scored[chunk] = width
            worst = scores[chunk, -1] if largest else -scores[chunk, -1]
            unsettled.append(chunk[~(worst > ceiling)])
        pending = np.concatenate(unsettled)
        width = min(n_live, 4 * width)
    if len(pending):
        rest = search_all(query.take(pending), factors, k, largest=largest)
        rows[pending], scores[pending], n_scored[pending] = rest.rows, rest.scores, rest.n_scored
    return Ranking(rows, scores, True, n_scored, query.convergence)


def _narrow(
    query: Query, factors: RowFactors, listed: np.ndarray, ceiling: np.ndarray, keep: int, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the best candidates by products, and raise the ceiling so that it bounds the dropped ones too."""
    if listed.shape[1] <= keep:
        return listed, ceiling
    products = factors.products(query, listed)
    if not largest:
        products = -products
    order = np.argpartition(-products, keep, axis=1)[:, : keep + 1]
    kept = np.take_along_axis(listed, order[:, :keep], axis=1)
    edge = np.take_along_axis(products, order[:, keep:], axis=1)[:, 0] + _PRODUCT_ROUNDING * np.abs(products).max(
        axis=1
    )
    return kept, np.maximum(ceiling, edge)


def search_all(query: Query, factors: RowFactors, k: int, *, largest: bool) -> Ranking:
    """One end of the ranking from every live row: products of all, then scores of those that could be in it."""
    rows = np.empty((len(query), k), np.int64)
    scores = np.empty((len(query), k))
    n_live = len(factors.live)
    for chunk in _chunks(np.arange(len(query)), max(1, MAX_SCORES // (2 * n_live))):
        products = factors.all_products(query.take(chunk))
        rows[chunk], scores[chunk] = best_of(products, query.take(chunk), factors, k, largest=largest)
    return Ranking(rows, scores, True, np.full(len(query), n_live), query.convergence)


class Scored(Protocol):
    """Numbered entries, rows or spans of rows, that can be scored pair by pair."""

    @property
    def live(self) -> np.ndarray:
        """Numbers of the live entries, ascending, ``(n,)``."""

    def scores(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """Scores ``(q, k)`` of each query's own entries ``(q, k)``."""


def best_of(
    products: np.ndarray, query: Query, scored: Scored, k: int, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One end of the ranking: scores of the live entries whose products ``(q, n)`` could place them in it.

    Returns:
        Numbers and scores, best first, ``(q, k)`` each; ties go to the lower number.
    """
    signed, n_live = products if largest else -products, len(scored.live)
    edges = np.partition(signed, n_live - k, axis=1)[:, n_live - k]
    edges = edges - _PRODUCT_ROUNDING * np.abs(products).max(axis=1)
    rows, scores = np.empty((len(query), k), np.int64), np.empty((len(query), k))
    for i in range(len(query)):
        near = scored.live[signed[i] >= edges[i]][None, :]
        near_scores = scored.scores(query.take(np.array([i])), near)
        rows[i], scores[i] = (part[0] for part in rank(near_scores, near, k, largest=largest))
    return rows, scores


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def search_scan(
    query: Query,
    table: ScanTable,
    factors: RowFactors,
    k: int,
    *,
    memory: DeviceMemory = HOST,
    ends: Sequence[bool] = (True, False),
) -> list[Ranking]:
    """Ends of the ranking by the scan, each proven; as default (proponents, opponents).

    Args:
        query: Query vectors of one method.
        table: The scan table of what it compares.
        factors: The same, exactly.
        k: Rows at an end.
        memory: Of the device that scans.
        ends: True for proponents, False for opponents.
    """
    size = max(1, (MAX_SCORES if group_rows(table, k) > 8 else _BOUNDED_SCORES) // len(table))
    size = min(size, _HOST_QUERIES if memory.on_host else _DEVICE_QUERIES)
    widest = min(len(table), _MAX_CANDIDATE_NUMBERS // factors.width)
    found: list[list[Ranking]] = [[] for _ in ends]
    for chunk in _chunks(np.arange(len(query)), size):
        most = min(widest, max(4 * k, _LISTED // len(chunk)))
        part = query.take(chunk)
        listed = memory.run(partial(Scan(part, table, memory).contenders, k, most, ends))
        for rankings, positions, largest in zip(found, listed, ends, strict=True):
            rows = [None if p is None else table.rows[p] for p in positions]
            rankings.append(_rank_listed(part, factors, rows, k, largest=largest))
    return [join(rankings) for rankings in found]


def _rank_listed(
    query: Query, factors: RowFactors, listed: list[np.ndarray | None], k: int, *, largest: bool
) -> Ranking:
    """The best of the rows that are listed for each query; of all rows where there is no list."""
    n_listed = np.array([len(factors.live) if rows is None else len(rows) for rows in listed])
    rows, scores = np.empty((len(query), k), np.int64), np.empty((len(query), k))
    unlisted = np.array([i for i, one in enumerate(listed) if one is None], np.int64)
    if len(unlisted):
        rest = search_all(query.take(unlisted), factors, k, largest=largest)
        rows[unlisted], scores[unlisted] = rest.rows, rest.scores
    for i, one in enumerate(listed):
        if one is not None and len(one) > _LONG_LIST:
            some = search_all(query.take(np.array([i])), replace(factors, live=np.sort(one)), k, largest=largest)
            rows[i], scores[i] = some.rows[0], some.scores[0]
    order = np.argsort(n_listed, kind="stable")
    order = order[[(one := listed[i]) is not None and len(one) <= _LONG_LIST for i in order]]
    dim = factors.width
    while len(order):  # the shortest lists first, as many as fit together at the width of the longest of them
        fits = n_listed[order] * np.arange(1, len(order) + 1) * dim <= _MAX_CANDIDATE_NUMBERS
        alike = n_listed[order] <= 2 * n_listed[order[0]]
        chunk, order = np.split(order, [max(1, int((fits & alike).sum()))])
        part, ends = query.take(chunk), np.cumsum(n_listed[chunk])[:, None]
        width = int(n_listed[chunk[-1]])
        places = np.minimum(ends - n_listed[chunk, None] + np.arange(width), ends - 1)
        padded = np.concatenate([one for i in chunk if (one := listed[i]) is not None])[places]
        values = factors.scores(part, padded)
        values[np.arange(width) >= n_listed[chunk, None]] = -np.inf if largest else np.inf
        rows[chunk], scores[chunk] = rank(values, padded, k, largest=largest)
    return Ranking(rows, scores, True, n_listed, query.convergence)


def search_ann(
    query: Query, ann: AnnIndex, table: ScanTable, factors: RowFactors, k: int, *, rerank: bool
) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking by FAISS; farthest rows (Euclidean opponents) by the scan.

    ``table`` is the scan table of the same representation.
    """
    right = query.terms[0].right
    assert right is not None
    unit = unit_rows(right) if ann.metric == "cos" else right.astype(np.float32)
    size = 1.0
    if ann.metric == "euc":  # a squared distance by matrix products is rounded at the size of ||q||^2 + ||f||^2
        longest = max(float(block.feature_norms[0].max()) for block in table.blocks)
        size = 2 * (float(query.norms.max()) ** 2 + longest**2)
    near = _ann_end(query, ann, unit, size, factors, k, largest=True, rerank=rerank)
    if ann.metric == "cos":
        return near, _ann_end(query, ann, -unit, size, factors, k, largest=False, rerank=rerank)
    return near, search_scan(query, table, factors, k, ends=(False,))[0]


def _ann_end(
    query: Query,
    ann: AnnIndex,
    vectors: np.ndarray,
    size: float,
    factors: RowFactors,
    k: int,
    *,
    largest: bool,
    rerank: bool,
) -> Ranking:
    """One end of the ranking; the rounding of FAISS' scores is relative to ``size``."""
    n_live = len(factors.live)

    def candidates(indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = ann.search(vectors[indices], width)
        short = (positions < 0).any(axis=1)
        if short.any():  # an inverted file found too few in the lists it visited
            positions[short] = np.arange(width)
        rows = factors.live[positions]
        if not ann.exact:
            return rows, np.where(short, np.inf, -np.inf)
        edge = scores[:, -1].astype(np.float64) + SCAN_TOLERANCE * size
        return rows, edge if ann.metric == "cos" else -np.sqrt(np.maximum(-edge, 0.0))

    if not rerank:
        return _unranked(ann, vectors, factors, k, largest=largest)
    width = min(n_live, max(ann.widen * k, k + 16))
    return settle(query, factors, candidates, k, largest=largest, first_width=width)


def _unranked(ann: AnnIndex, vectors: np.ndarray, factors: RowFactors, k: int, *, largest: bool) -> Ranking:
    """One end of the ranking by the scores of FAISS alone, with the method's sign."""
    scores, positions = ann.search(vectors, k)
    if (positions < 0).any():
        raise InputError(f"the FAISS index found fewer than {k} rows in the lists it visits. Use --exact rerank.")
    values = scores.astype(np.float64) if ann.metric == "cos" else -np.sqrt(np.maximum(-scores.astype(np.float64), 0.0))
    rows, values = rank(values if largest else -values, factors.live[positions], k, largest=largest)
    return Ranking(rows, values, False, np.zeros(len(vectors), np.int64))


def search_full(query: Query, factors: RowFactors, k: int) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking from the exact score of every live row."""
    return search_all(query, factors, k, largest=True), search_all(query, factors, k, largest=False)
