"""Lengths of training rows that cosines are divided by: stored ones where they are exact, else made of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from forebear.indexer.curvature.ekfac import ekfac_self_influence
from forebear.indexer.gradients.vectors import dot
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.model.encoding import Texts, as_encoded, distinct_rows
from forebear.indexer.sketches.estimates import may_be_best
from forebear.indexer.sketches.norms import exact_squares
from forebear.retriever.deep.query_gradients import QueryGradients
from forebear.retriever.question.methods import Method

SELF_ROWS = 8  # candidates whose self-influence is solved for at once


class Rows(Protocol):
    """The entries that a search scores, each with a number: training rows, or spans of training rows."""

    def texts(self, numbers: np.ndarray) -> Texts:
        """Texts of the entries with these numbers, ``(n,)``."""

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """Gold classes of the entries with these numbers, ``(n,)`` int64."""


class RowLengths:
    """Lengths of entries at the last checkpoint; those that were made are kept, for all blocks of test rows."""

    def __init__(self, gradients: QueryGradients, rows: Rows) -> None:
        """Nothing is made yet.

        Args:
            gradients: Gives index, models, scope and curvature.
            rows: The entries.
        """
        self._gradients, self._rows = gradients, rows
        self._index, self._scope, self._curvature = gradients.index, gradients.scope, gradients.curvature
        self._norms: dict[int, float] = {}  # by number of an entry
        self._solved: dict[int, float] = {}

    def of_rows(
        self, method: Method, rows: np.ndarray, products: np.ndarray, asked: np.ndarray, best: int | None
    ) -> np.ndarray:
        """||G_n||, or sqrt(<H^-1 G_n, G_n>), ``(n,)`` float64.

        Args:
            method: A method of cosines.
            rows: Rows, ``(n,)``.
            products: What is divided by their lengths, ``(q, n)``.
            asked: Which rows each test row is compared with, ``(q, n)`` bool.
            best: How many scores at each end must be exact; lengths of other rows may be estimates. None: all.
        """
        is_rounded = self._index.manifest.spec.precision != "fp32"  # what is stored, beyond any bounds on it
        if method.query != "preconditioned" or self._curvature.at(self._scope) == "identity":
            if is_rounded:
                return _made_once(self._norms, rows, self._norms_of)
            return np.asarray(self._index.gradients(self._scope).norms[rows].astype(np.float64))
        white = self._stored_damping()
        if white is None or is_rounded:  # none are stored for solvers that iterate, or at other dampings
            return _made_once(self._solved, rows, self._solve_lengths)
        store = self._index.gradients(self._scope, damping=white)
        lengths, least, most = store.norms_within(rows)
        if store.norm_bounds is not None:
            open_rows = np.ones(len(rows), bool) if best is None else may_be_best(products, asked, least, most, best)
            lengths[open_rows] = _made_once(self._solved, rows[open_rows], self._solve_lengths)
        return lengths

    def _norms_of(self, rows: np.ndarray) -> np.ndarray:
        """||G_n|| of rows, ``(n,)`` float64, in a pass of its own."""
        classifier, scope = self._gradients.models.exact(), self._gradients.parameters
        return np.asarray(np.sqrt(exact_squares(classifier, scope, self._rows.texts(rows), self._rows.labels(rows))))

    def _solve_lengths(self, rows: np.ndarray) -> np.ndarray:
        """sqrt(<H^-1 G_n, G_n>) of rows, ``(n,)`` float64.

        By EK-FAC in one pass; by a solver that iterates each distinct row is a right-hand side of its own. ``astra``
        refines the test rows' side alone.
        """
        models, scope = self._gradients.models, self._gradients.parameters
        classifier = models.exact()
        encoded, labels = as_encoded(classifier, self._rows.texts(rows)), self._rows.labels(rows)
        if self._by_ekfac:
            device, dtype = classifier.device, classifier.head.weight.dtype
            ekfac = models.kept.get(
                ("ekfac", self._scope, device), lambda: self._index.ekfac(self._scope).to(device, dtype)
            )
            damping = self._curvature.absolute(self._index, self._scope)
            return np.asarray(np.sqrt(ekfac_self_influence(classifier, scope, ekfac, damping, encoded, labels)))
        distinct, inverse = distinct_rows(encoded, labels)
        squares = np.empty(len(distinct))
        for start in range(0, len(distinct), SELF_ROWS):
            block = distinct[start : start + SELF_ROWS]
            gradients = whole_gradients(classifier, scope, encoded.take(block), labels[block])
            squares[start : start + SELF_ROWS] = dot(self._gradients.solve(gradients)[0], gradients).cpu().numpy()
        return np.asarray(np.sqrt(np.maximum(squares, 0.0))[inverse])

    @property
    def _by_ekfac(self) -> bool:
        return self._curvature.at(self._scope) in ("ekfac", "astra")

    def _stored_damping(self) -> int | None:
        """Number of the damping at which the index holds sqrt(<H^-1 G_n, G_n>) of every row; None if it holds none."""
        return self._index.find_ekfac_damping(self._scope, self._curvature.damping) if self._by_ekfac else None


def _made_once(kept: dict[int, float], rows: np.ndarray, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Lengths of rows, ``(n,)``, of which those that are not kept are made."""
    missing = np.array([row for row in rows.tolist() if row not in kept], np.int64)
    if len(missing):
        kept.update(zip(missing.tolist(), make(missing).tolist(), strict=True))
    return np.array([kept[row] for row in rows.tolist()])
