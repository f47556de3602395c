"""Scores of given training spans for given test rows, at any models; evaluations compare the methods by them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.batch_size import vector_bytes_on
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import VECTOR_BYTES
from forebear.retriever.question.inverse import CurvatureSpec, deep_solver
from forebear.retriever.spans.rows import SpanRows


class SpanScores:
    """Compares, over one scope, what spans of training rows and of test rows add to the gradients of their rows."""

    def __init__(self, index: Index, classifier: Classifier, scope: str, queries: Queries, entries: SpanRows) -> None:
        """Hold the rows and spans; no gradient is computed yet.

        Args:
            index: The index whose curvature is used.
            classifier: The model that is explained.
            scope: A scope of the index.
            queries: Test rows with their masked versions, ``q`` of them.
            entries: Spans of training rows, ``m`` of them.
        """
        self._index, self._classifier = index, classifier
        self._queries, self._entries = queries, entries
        self._scope = index.scope(classifier, scope)

    def summed(self, models: Iterable[Classifier]) -> np.ndarray:
        """Sum over models of <g_q - g_q(-kl), g_n - g_n(-ij)>, unweighted, ``(q, m)`` float64.

        The Span paper's TracIn++ with its sign flipped: larger = proponent. The models have the classifier's layers.
        """
        out = np.zeros((len(self._queries.targets), len(self._entries.rows)))
        for model in models:
            for indices in self._chunks(1):
                out[indices] += self._dots(model, self._gradients(model, indices))
        return out

    def preconditioned(self, curvature: CurvatureSpec) -> tuple[np.ndarray, Convergence | None]:
        """<H^-1 (g_q - g_q(-kl)), g_n - g_n(-ij)>, the Span paper's IF++ with its sign flipped, at the model explained.

        Returns:
            Scores ``(q, m)`` float64, and how far H^-1 came where a solver iterated.
        """
        solve = deep_solver(curvature, self._index, self._classifier, self._scope)
        scores, convergences = [], []
        for indices in self._chunks(curvature.n_vectors(self._scope.name)):
            solved, convergence = solve(self._gradients(self._classifier, indices))
            scores.append(self._dots(self._classifier, solved))
            convergences.append(convergence)
        return np.concatenate(scores), Convergence.join(convergences)

    def _chunks(self, kinds: int) -> list[np.ndarray]:
        """Indices of the test rows, in chunks whose whole vectors (``kinds`` for each row) fit in memory together."""
        n_bytes = vector_bytes_on(self._classifier.device, VECTOR_BYTES)
        size = max(1, n_bytes // (4 * kinds * self._scope.size))
        q = len(self._queries.targets)
        return [np.arange(i, min(i + size, q)) for i in range(0, q, size)]

    def _gradients(self, model: Classifier, indices: np.ndarray) -> Vectors:
        chunk = self._queries.take(indices)
        return whole_gradients(model, self._scope, chunk.texts, chunk.targets)

    def _dots(self, model: Classifier, vectors: Vectors) -> np.ndarray:
        return exact_dots(model, self._scope, vectors, self._entries.encoded, self._entries.gold)
