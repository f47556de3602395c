"""Spans of the index's store at the head of the last checkpoint: scored from stored factors, without the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from forebear.indexer.index import Index
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import MAX_SCORES, RowFactors, best_of
from forebear.retriever.question.methods import METHODS, Method


def head_query(search: GradientSearch, method: Method, queries: Queries) -> Query:
    """Query vectors at the head of the last checkpoint, in the loss' basis."""
    gradients = search.gradients.at_checkpoint(search.gradients.last, queries)
    if method.query == "preconditioned":
        gradients = search.gradients.solutions(queries)[0]
    (whole,) = gradients.values()
    basis = search.index.loss.basis(whole.shape[1])
    reduced = np.einsum("ac,qch->qah", basis, whole.double().cpu().numpy())
    return Query(METHODS["gd"], (Term(1.0, None, matrix=reduced, basis=basis),), np.ones(len(reduced)))


def stored_ends(
    search: GradientSearch, method: Method, queries: Queries, k: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both ends of all live stored spans at the head of the last checkpoint, from stored factors.

    Returns:
        (entries, scores) of proponents, best first, and of opponents, ``(q, k)`` each.
    """
    query, stored = head_query(search, method, queries), _StoredAtHead(search.index)
    ends = [(np.empty((len(query), k), np.int64), np.empty((len(query), k))) for _ in range(2)]
    for indices in stored.chunks(len(query)):
        products = stored.products(query.take(indices))
        for (entries, scores), largest in zip(ends, (True, False), strict=True):
            entries[indices], scores[indices] = best_of(products, query.take(indices), stored, k, largest=largest)
    return ends[0], ends[1]


def stored_row_scores(search: GradientSearch, method: Method, queries: Queries) -> np.ndarray:
    """The best stored span of each live row at the head of the last checkpoint, from stored factors.

    Returns:
        ``(q, n_live)`` float64, columns in the order of ``index.live``; -inf for a row without a stored span.
    """
    query, stored = head_query(search, method, queries), _StoredAtHead(search.index)
    out = np.full((len(query), len(search.index.live)), -np.inf)
    rows, starts = np.unique(stored.rows, return_index=True)  # entries are stored in row order
    columns = np.searchsorted(search.index.live, rows)
    for indices in stored.chunks(len(query)):
        out[np.ix_(indices, columns)] = np.maximum.reduceat(stored.products(query.take(indices)), starts, axis=1)
    return out


class _StoredAtHead:
    """<V, g_n - g_n(-ij)> of all live stored spans: <V, r_n f_n^T> less that of the masked row, both in float64.

    Attributes:
        live: Numbers of the live spans in the store, ``(m,)``.
        rows: Training row of each live span, ``(m,)``, ascending.
    """

    def __init__(self, index: Index) -> None:
        store = index.spans()
        self.live = index.live_spans
        self.rows = store.rows[self.live]
        self._all_rows = store.rows
        self._whole = RowFactors((index.features(),), (index.residuals(),), np.unique(self.rows))
        self._masked = RowFactors((store.features,), (store.residuals,), self.live)

    def chunks(self, n_queries: int) -> Iterator[np.ndarray]:
        """Indices of the queries, in chunks whose scores of all spans fit in memory together."""
        size = max(1, MAX_SCORES // max(1, len(self.live)))
        for start in range(0, n_queries, size):
            yield np.arange(start, min(start + size, n_queries))

    def products(self, query: Query) -> np.ndarray:
        """Scores of all live spans by matrix products, ``(q, m)``."""
        owner = np.searchsorted(self._whole.live, self.rows)
        return np.asarray(self._whole.all_products(query)[:, owner] - self._masked.all_products(query))

    def scores(self, query: Query, entries: np.ndarray) -> np.ndarray:
        """Scores of entries ``(q, k)`` of each query, summed pair by pair."""
        whole = self._whole.scores(query, self._all_rows[entries])
        return np.asarray(whole - self._masked.scores(query, entries))
