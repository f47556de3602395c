"""Scores that a method must beat to say anything of its own, each named in parentheses, unlike a method.

They know nothing of the model's gradients: the label, chance, common words, likeness of texts or features, a row's own
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from forebear.evaluation.common.queries import QueryRows, score_queries
from forebear.indexer.model.loading import MINILM, has_packaged_minilm
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.words.gradients import count_tokens
from forebear.ratio import ratio
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores

LABEL, CHANCE, TFIDF, BM25 = "(label)", "(random scores)", "(tf-idf)", "(BM25)"
SENTENCE, FEATURE, OWN_LOSS = "(sentence embedding)", "(nn-cos)", "(own loss)"
BASELINES = (LABEL, CHANCE, TFIDF, BM25, SENTENCE, FEATURE, OWN_LOSS)
BM25_K1, BM25_B = 1.2, 0.75  # as Lucene has them
STREAM = 19  # of the random numbers of random scores, apart from other uses of the same seed


def baseline_scores(
    retriever: Retriever, queries: QueryRows, target: str, targets: np.ndarray, seed: int
) -> Iterator[Scores]:
    """Scores of all live rows by each baseline, ``(q, n)`` float64, one baseline after another.

    - label: 1 where the row has the query's target as its label, -1 elsewhere.
    - random scores: standard normal.
    - tf-idf: cosine of tf-idf vectors of word pieces; see :mod:`forebear.retriever.words.tfidf`.
    - BM25: see :func:`bm25`; word pieces are the terms.
    - sentence embedding: cosine, by the index's un-tuned encoder, or else by the packaged one. Left out where there is
      neither.
    - nn-cos: the method of this name.
    - own loss: minus the training row's loss, the same for all queries. Larger = proponent, as everywhere: a row that
      the model fits well goes along with what it says, one that it cannot fit (a wrong label, say) speaks against it.

    Args:
        retriever: Over the index.
        queries: Test rows.
        target: See :class:`~forebear.retriever.question.spec.QuerySpec`.
        targets: The class of each query whose loss the scores explain, ``(q,)``.
        seed: Seed of the random scores.
    """
    index, live = retriever.index, retriever.index.live
    shape = (len(queries), len(live))
    yield Scores({LABEL: np.where(index.labels[live] == targets[:, None], 1.0, -1.0)})
    yield Scores({CHANCE: np.random.default_rng([seed, STREAM]).standard_normal(shape)})
    row_counts, query_counts = _token_counts(retriever, index.text_lists(live), queries.texts)
    yield Scores({TFIDF: tfidf_cosines(row_counts, query_counts)})
    yield Scores({BM25: bm25(row_counts, query_counts)})
    if "sbert-cos" in retriever.available_methods():
        yield Scores({SENTENCE: _by_method("sbert-cos", retriever, queries, target)})
    elif has_packaged_minilm():
        encoder = load_sentence_encoder(MINILM, device=str(retriever.models.device))
        yield Scores({SENTENCE: cosines(encoder.embed(queries.texts), encoder.embed(index.text_lists(live)))})
    yield Scores({FEATURE: _by_method("nn-cos", retriever, queries, target)})
    yield Scores({OWN_LOSS: np.broadcast_to(-index.losses[live].astype(np.float64), shape)})


def _by_method(name: str, retriever: Retriever, queries: QueryRows, target: str) -> np.ndarray:
    return score_queries(retriever, queries, QuerySpec(methods=(name,), target=target))[name]


def _token_counts(retriever: Retriever, *texts: Sequence[Sequence[str]]) -> list[sparse.csr_array]:
    """How often each word piece occurs in each row, special tokens left out, ``(rows, vocabulary)`` of each texts."""
    counted = [count_tokens(retriever.classifier(), columns) for columns in texts]
    n_tokens = 1 + max(int(tokens.max(initial=0)) for _, tokens, _ in counted)
    return [
        sparse.csr_array((counts.astype(np.float64), tokens, starts), shape=(len(starts) - 1, n_tokens))
        for starts, tokens, counts in counted
    ]


def tfidf_cosines(row_counts: sparse.csr_array, query_counts: sparse.csr_array) -> np.ndarray:
    """Cosines of tf-idf vectors, ``(q, n)``; the idf is that of the training rows, smooth as scikit-learn's.

    Args:
        row_counts: How often each term occurs in each training row, ``(n, t)``.
        query_counts: The same of the queries, ``(q, t)``.
    """
    from sklearn.feature_extraction.text import TfidfTransformer

    weighting = TfidfTransformer()
    rows = weighting.fit_transform(row_counts)
    return np.asarray((weighting.transform(query_counts) @ rows.T).toarray())


def bm25(row_counts: sparse.csr_array, query_counts: sparse.csr_array) -> np.ndarray:
    """BM25 (Robertson and Zaragoza, 2009) with Lucene's idf, which is never negative; ``(q, n)`` float64.

    Sum over the query's terms t, each as often as it occurs there, of
    ``ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) * f (k + 1) / (f + k (1 - b + b |row| / mean |row|))`` with f the times that
    t occurs in the training row, n_t the number of rows that hold t, |row| the row's number of terms, k = 1.2 and
    b = 0.75.

    Args:
        row_counts: How often each term occurs in each training row, ``(n, t)``.
        query_counts: The same of the queries, ``(q, t)``.
    """
    n_rows, n_terms = row_counts.shape
    lengths = np.asarray(row_counts.sum(axis=1))
    n_with_term = np.bincount(row_counts.indices, minlength=n_terms)
    idf = np.log1p((n_rows - n_with_term + 0.5) / (n_with_term + 0.5))
    shrinking = BM25_K1 * (1 - BM25_B + BM25_B * ratio(lengths, lengths.mean()))
    f = row_counts.data
    saturated = f * (BM25_K1 + 1) / (f + np.repeat(shrinking, np.diff(row_counts.indptr)))
    weights = sparse.csr_array(
        (saturated * idf[row_counts.indices], row_counts.indices, row_counts.indptr), shape=row_counts.shape
    )
    return np.asarray((query_counts @ weights.T).toarray())


def cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cosines of vectors ``(q, s)`` and ``(n, s)``, ``(q, n)`` float64; 0 with a zero vector."""
    left, right = queries.astype(np.float64), rows.astype(np.float64)
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    return ratio(left @ right.T, norms)
