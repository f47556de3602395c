"""Finding the rows worth scoring exactly, and proving that none was missed.

Three searches, by representation and metric:

* the *scan*: float32 scores of the factored rows, block by block in order of falling norm; on a CPU, for dot
  products, it stops as soon as Cauchy-Schwarz shows that no later row can enter either end of the ranking;
* the *direction index*, on a CPU: FAISS over unit vectors (cosine) or vectors (Euclidean), opponents of v being the
  proponents of -v; a GPU scans these vectors, too;
* the *full* score of every row in float64: the yardstick, and the fallback.

The first two yield candidates, which are scored again in float64. A candidate list is accepted when its k-th
exact score clears the best approximate score of a row left out by more than float32's rounding; otherwise it is
made longer. Quantised FAISS indexes carry no such guarantee, only their calibrated recall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.storage.ann import AnnIndex, unit_rows
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import ScanTable
from forebear.retriever.head.scan import SCAN_TOLERANCE, Scan
from forebear.retriever.head.scoring import Query, exact_scores
from forebear.retriever.ranking import Ranking, join, rank

_PRODUCT_QUERIES = 64  # queries whose candidates are multiplied together
_PRODUCT_ROUNDING = 1e-12  # of a float64 product, relative to the largest, with a wide margin
SPARE = 8  # candidates beyond k that are scored pair by pair
MAX_SCORES = 1 << 26  # entries of a (queries, rows) block held at once
_MAX_CANDIDATE_NUMBERS = 1 << 25  # entries of a (queries, candidates, width) block held at once


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
        return self._exact(query, rows)

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
        width = sum(m.width for m in self.features)
        step = max(256, _MAX_CANDIDATE_NUMBERS // width)
        for start in range(0, len(self.live), step):
            rows = self.live[start : start + step]
            out[:, start : start + len(rows)] = self._exact(query, rows)
        return out

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
    dim = sum(m.width for m in factors.features)
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
    query: Query, table: ScanTable, factors: RowFactors, k: int, *, rerank: bool, memory: DeviceMemory = HOST
) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking by the scan, as (proponents, opponents).

    With ``rerank`` the scores are exact; without, the float32 scores of the scan are returned as they are.
    """
    chunks = _chunks(np.arange(len(query)), max(1, MAX_SCORES // len(table)))
    chunk_ends = [_scan_chunk(query.take(chunk), table, factors, k, rerank=rerank, memory=memory) for chunk in chunks]
    return join([a for a, _ in chunk_ends]), join([b for _, b in chunk_ends])


def _scan_chunk(
    query: Query, table: ScanTable, factors: RowFactors, k: int, *, rerank: bool, memory: DeviceMemory
) -> tuple[Ranking, Ranking]:
    scan = Scan(query, table, memory)
    scores, unvisited = memory.run(lambda: scan.run(k))
    at_position = table.rows[: scores.shape[1]]
    ends = []
    for largest in (True, False):

        def candidates(indices: np.ndarray, width: int, largest: bool = largest) -> tuple[np.ndarray, np.ndarray]:
            width = min(width, scores.shape[1])
            values, positions = _best(scores, indices, width, memory, largest=largest)
            last = values[:, -1] if largest else -values[:, -1]
            takes_all = width == scores.shape[1]
            ceiling = np.full(len(indices), unvisited) if takes_all else np.maximum(last, unvisited)
            return at_position[positions], (ceiling + scan.rounding[indices]) * scan.scale[indices]

        if rerank:
            ends.append(settle(query, factors, candidates, k, largest=largest, first_width=2 * k + 16))
        else:
            values, positions = _best(scores, np.arange(len(query)), k, memory, largest=largest)
            rows, values = rank(values * scan.scale[:, None], at_position[positions], k, largest=largest)
            ends.append(Ranking(rows, values, False, np.zeros(len(query), np.int64)))
    return ends[0], ends[1]


def _best(
    scores: torch.Tensor, indices: np.ndarray, width: int, memory: DeviceMemory, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The best of the scores ``(q, n)`` at some queries: values ``(m, width)`` float64, and their positions."""
    part = scores if len(indices) == len(scores) else scores[memory.send(indices)]
    best = part.topk(width, dim=1, largest=largest)
    values, positions = fetch(best.values.double(), best.indices)
    return values, positions


def search_ann(
    query: Query, ann: AnnIndex, table: ScanTable, factors: RowFactors, k: int, *, rerank: bool
) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking by the direction index; farthest rows (Euclidean opponents) by the scan.

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
    return near, _Distances(query, table, HOST).end(factors, k, largest=False, rerank=True)


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


def scan_nearest(query: Query, table: ScanTable, width: int, memory: DeviceMemory) -> np.ndarray:
    """Numbers of the rows of largest float32 score, ``(q, width)``, best first."""
    found = []
    for chunk in _chunks(np.arange(len(query)), max(1, MAX_SCORES // len(table))):
        scores, _ = memory.run(partial(Scan(query.take(chunk), table, memory).run, width))
        found.append(table.rows[_best(scores, np.arange(len(chunk)), width, memory, largest=True)[1]])
    return np.concatenate(found)


def search_distances(
    query: Query, table: ScanTable, factors: RowFactors, k: int, *, rerank: bool, memory: DeviceMemory
) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking by Euclidean distance, by a scan: the nearest rows, and the farthest."""
    chunks = _chunks(np.arange(len(query)), max(1, MAX_SCORES // len(table)))
    distances = [_Distances(query.take(chunk), table, memory) for chunk in chunks]
    near, far = (
        join([part.end(factors, k, largest=largest, rerank=rerank) for part in distances]) for largest in (True, False)
    )
    return near, far


class _Distances:
    """Squared distances, less ||f_q||^2, in float32: <[-2 f_q, 1], [f_n, ||f_n||^2]>, ``(q, n)``."""

    def __init__(self, query: Query, table: ScanTable, memory: DeviceMemory) -> None:
        x = query.terms[0].right
        assert x is not None
        self._query, self._memory, self._at_position = query, memory, table.rows
        self._query_squares = (x.astype(np.float64) ** 2).sum(axis=1)
        self._largest_square = max(float(block.feature_norms[0].max()) for block in table.blocks) ** 2
        memory.begin()
        with repeatable(memory.device):
            self._values = memory.run(lambda: self._of_all(x.astype(np.float32), table))

    def _of_all(self, queries: np.ndarray, table: ScanTable) -> torch.Tensor:
        memory, start = self._memory, 0
        vectors = memory.send(queries)
        values = torch.empty((len(queries), len(table)), device=memory.device)
        for block in table.blocks:
            squares = memory.tensor(block.feature_norms[0]).double() ** 2
            products = vectors @ memory.tensor(block.features[0]).T
            values[:, start : start + len(squares)] = squares - 2 * products
            start += len(squares)
        return values

    def end(self, factors: RowFactors, k: int, *, largest: bool, rerank: bool) -> Ranking:
        """One end of the ranking; the score is minus the distance, so the ``largest`` are the nearest."""

        def listed(indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            values, positions = _best(self._values, indices, width, self._memory, largest=not largest)
            return self._at_position[positions], values + self._query_squares[indices, None]

        def candidates(indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            rows, squares = listed(indices, width)
            rounding = 2 * SCAN_TOLERANCE * (self._largest_square + self._query_squares[indices])
            edge = squares[:, -1] - rounding if largest else squares[:, -1] + rounding
            reach = np.sqrt(np.maximum(edge, 0.0))
            return rows, -reach if largest else reach

        if rerank:
            return settle(self._query, factors, candidates, k, largest=largest, first_width=2 * k + 16)
        rows, squares = listed(np.arange(len(self._query)), k)
        rows, scores = rank(-np.sqrt(np.maximum(squares, 0.0)), rows, k, largest=largest)
        return Ranking(rows, scores, False, np.zeros(len(self._query), np.int64))


def search_full(query: Query, factors: RowFactors, k: int) -> tuple[Ranking, Ranking]:
    """Both ends of the ranking from the exact score of every live row."""
    return search_all(query, factors, k, largest=True), search_all(query, factors, k, largest=False)
