"""``tracin-tfidf``: cosine of tf-idf vectors times the dot of logit gradients (Yeh22, eq. 7).

Terms are the model's own word pieces without special tokens; tf-idf is scikit-learn's (smooth idf over the live
training rows, unit length). Every row is scored exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from typing_extensions import override

from forebear.indexer.words.gradients import count_tokens
from forebear.ratio import ratio
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.recall import PROVEN, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends, Ranking, Words, rank
from forebear.retriever.scores import Scores

_MAX_SCORES = 1 << 25  # entries of a (queries, rows) block held at once


class TfidfSearcher(Searcher):
    """Ranks training rows by tf-idf similarity times the similarity of errors."""

    @cached_property
    def _fitted(self) -> tuple[Any, sparse.csr_array]:
        """The weighting, and tf-idf vectors of the live rows ``(n_live, vocabulary)``."""
        from sklearn.feature_extraction.text import TfidfTransformer

        counts = self._wide(self.index.token_counts())[self.index.live]
        transformer = TfidfTransformer()
        return transformer, sparse.csr_array(transformer.fit_transform(counts))

    def _wide(self, counts: sparse.csr_array) -> sparse.csr_array:
        """Token counts ``(n, m)`` widened to one column for every token id of the model."""
        n_tokens = self.models.classifier().model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return sparse.csr_array((counts.data, counts.indices, counts.indptr), shape=(counts.shape[0], n_tokens))

    def _of_texts(self, texts: Sequence[Sequence[str]]) -> sparse.csr_array:
        starts, tokens, counts = count_tokens(self.models.classifier(), texts)
        vectors = self._wide(
            sparse.csr_array((counts, tokens, starts), shape=(len(starts) - 1, 1 + tokens.max(initial=0)))
        )
        return sparse.csr_array(self._fitted[0].transform(vectors))

    def cosines(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Cosine of tf-idf vectors of every live row, ``(q, n_live)`` float64: how much the texts overlap."""
        return np.asarray((self._of_texts(texts) @ self._fitted[1].T).toarray())

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        scores = self._scores(batch, normalise=question.spec.normalise)
        return Scores({m.name: scores[:, np.searchsorted(self.index.live, rows)] for m in question.methods})

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        return with_note(PROVEN) | {"normalise": question.spec.normalise}

    def _scores(self, batch: Batch, *, normalise: bool) -> np.ndarray:
        """Scores of every live row, ``(q, n_live)`` float64; divided by sqrt(self x self) if ``normalise``."""
        products = self.cosines(batch.columns) * self._errors(batch, self.index.live, normalise=normalise)
        return np.asarray(products + 0.0)  # no -0.0

    def _errors(self, batch: Batch, rows: np.ndarray, *, normalise: bool) -> np.ndarray:
        """sum over checkpoints of eta <p_q - y_q, p_n - y_n>, ``(q, len(rows))`` float64."""
        q = len(batch.targets)
        dots, query_squares, row_squares = np.zeros((q, len(rows))), np.zeros(q), np.zeros(len(rows))
        for c, checkpoint in enumerate(self.index.manifest.checkpoints):
            left, _ = batch.forwards[c].residuals_and_losses(batch.targets)
            right = self.index.residuals(c).take(rows).astype(np.float64)
            dots += checkpoint.eta * (left @ right.T)
            query_squares += checkpoint.eta * (left**2).sum(axis=1)
            row_squares += checkpoint.eta * (right**2).sum(axis=1)
        if not normalise:
            return dots
        norms = np.sqrt(query_squares)[:, None] * np.sqrt(row_squares)
        return ratio(dots, norms)

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        """Both ends of the ranking for each test row, with contributions, by method name."""
        live, k = self.index.live, question.top
        step = max(1, _MAX_SCORES // len(live))
        q = len(batch)
        rows, scores = np.empty((2, q, k), np.int64), np.empty((2, q, k))
        for start in range(0, q, step):
            indices = np.arange(start, min(start + step, q))
            block_scores = self._scores(batch.take(indices), normalise=question.spec.normalise)
            for side in (0, 1):
                rows[side, indices], scores[side, indices] = rank(block_scores, live, k, largest=side == 0)
        n_scored, query_vectors = np.full(q, len(live)), self._of_texts(batch.columns)
        first, last = (
            Ranking(
                rows[side],
                scores[side],
                True,
                n_scored,
                words=self._contributions(query_vectors, rows[side], scores[side]),
            )
            for side in (0, 1)
        )
        return {method.name: (first, last) for method in question.methods}

    def _contributions(self, query_vectors: sparse.csr_array, rows: np.ndarray, scores: np.ndarray) -> list[Words]:
        """What each shared token contributes to a score, in proportion to what it contributes to the cosine."""
        out: list[Words] = []
        for i, (query_rows, values) in enumerate(zip(rows, scores, strict=True)):
            row_vectors = self._fitted[1][np.searchsorted(self.index.live, query_rows)]
            products = sparse.csr_array(row_vectors.multiply(query_vectors[[i]]))
            words: Words = []
            for j, score in enumerate(values):
                entries = slice(products.indptr[j], products.indptr[j + 1])
                tokens, parts = products.indices[entries].astype(np.int64), products.data[entries]
                share = score * parts / parts.sum() if parts.sum() > 0 else np.zeros(len(parts))
                order = np.lexsort((tokens, -np.abs(share)))
                words.append((tokens[order], share[order]))
            out.append(words)
        return out
