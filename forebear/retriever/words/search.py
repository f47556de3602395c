"""Search by shared words: candidates from the store of words, which hold both ends, then exact scores of these.

The rows that rounding of the stored vectors leaves in question are scored again from the model (``--exact rerank``).
How most postings are never read: :mod:`forebear.retriever.words.candidates`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from typing_extensions import override

from forebear.indexer.storage.ragged import distinct_of, offsets
from forebear.indexer.words.gradients import WordRows, word_gradients
from forebear.ratio import ratio
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.recall import NOT_RERANKED, PROVEN, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question, words_top
from forebear.retriever.ranking import Ends, Ranking, join_ends
from forebear.retriever.scores import Scores
from forebear.retriever.words.candidates import CandidateSearch
from forebear.retriever.words.scores import QueryWords, query_words, shared_words, squares
from forebear.retriever.words.vocabulary import boundary_tokens, frequent_tokens, token_mask

FULL_ROWS = 1024  # rows run through the model at once by --exact full
RERANK_ROWS = 4096  # distinct candidates whose words are held together
BLOCK_QUERIES = 32  # test rows whose candidates are searched together, as long as there are no more than
BLOCK_BOUNDS = 1 << 23  # bounds of rows, (queries, rows)


@dataclass(frozen=True)
class WordQueries:
    """The test rows of a batch as one method by words compares them.

    Attributes:
        method: The method.
        top: Positions of each row that the method's store of words keeps; 0: all.
        allowed: Mask by token id of the words that take part; None: all.
        words: Words of each test row.
        normalise: Whether scores are divided by sqrt(self x self).
    """

    method: Method
    top: int
    allowed: np.ndarray | None
    words: QueryWords
    normalise: bool

    def take(self, first: int, last: int) -> WordQueries:
        """The queries ``first`` to ``last - 1``."""
        if first == 0 and last == len(self.words):
            return self
        return replace(self, words=self.words.take(np.arange(first, last)))


class WordSearcher(Searcher):
    """Ranks training rows by shared words.

    Attributes:
        prune: Whether rows whose upper bound is too low are skipped; off, every row that shares a word is scored. The
            answer is the same.
    """

    def __init__(self, models: Models) -> None:
        """Set up without loading a model; the index must hold a store of words."""
        super().__init__(models)
        self.prune = True
        self._lengths: dict[tuple[int, str], np.ndarray] = {}

    @property
    def etas(self) -> tuple[float, ...]:
        """Weights of the checkpoints."""
        return tuple(c.eta for c in self.index.manifest.checkpoints)

    def allowed(self, method: Method) -> np.ndarray | None:
        """Mask by token id of the words that take part in a method."""
        if method.words == "common":
            return token_mask(self._n_tokens, self._boundary, keep=True)
        if method.words == "nocommon":
            return token_mask(self._n_tokens, np.union1d(self._boundary, self._frequent), keep=False)
        return None

    @cached_property
    def _n_tokens(self) -> int:
        return int(self.models.classifier().model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    @cached_property
    def _boundary(self) -> np.ndarray:
        return boundary_tokens(self.models.classifier().tokenizer)

    @cached_property
    def _frequent(self) -> np.ndarray:
        return frequent_tokens(self.models.classifier().tokenizer)

    def queries(
        self, methods: Sequence[Method], texts: Sequence[Sequence[str]], targets: np.ndarray, *, normalise: bool
    ) -> list[WordQueries]:
        """Words of a block of test rows for each method, from one pass a checkpoint."""
        tops = sorted({words_top(self.index, method) for method in methods})
        words_by_top = self._from_models(texts, targets, tops)
        out = []
        for method in methods:
            top, allowed = words_top(self.index, method), self.allowed(method)
            queries = query_words([words[top] for words in words_by_top], self.etas, allowed)
            out.append(WordQueries(method, top, allowed, queries, normalise))
        return out

    def _from_models(
        self, texts: Sequence[Sequence[str]], labels: np.ndarray, tops: Sequence[int]
    ) -> list[dict[int, WordRows]]:
        classifiers = (self.models.classifier(c) for c in range(len(self.etas)))
        return [word_gradients(c, texts, labels, tops, batch_tokens=c.batch_tokens())[0] for c in classifiers]

    def _words_of(self, rows: np.ndarray, tops: Sequence[int]) -> dict[int, list[WordRows]]:
        """Words of training rows from the models, by store, one entry a checkpoint."""
        texts = self.index.text_lists(rows)
        checkpoints = self._from_models(texts, self.index.targets(rows), tops)
        return {top: [words[top] for words in checkpoints] for top in tops}

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        """Both ends of the ranking for each test row, with contributions, by method name.

        The scores are those of the stored vectors (``none``), or the model's.
        """
        method_queries = self.queries(question.methods, batch.columns, batch.targets, normalise=question.spec.normalise)
        return self.answer(method_queries, question.top, question.spec.exact)

    def answer(self, method_queries: Sequence[WordQueries], k: int, exact: str) -> dict[str, Ends]:
        """:meth:`search` for test rows whose words are known.

        Args:
            method_queries: The test rows, for each method.
            k: Results at each end.
            exact: ``none``, ``rerank`` or ``full``.
        """
        if exact == "full":
            candidates_by_method = [self._ends_of(scores, k) for scores in self.scores(method_queries, self.index.live)]
        else:
            candidates_by_method = [self.candidates(queries, k, exact) for queries in method_queries]
        tops = sorted({queries.top for queries in method_queries})
        parts: list[dict[str, Ends]] = []
        for first, last, distinct in _few_rows(candidates_by_method, len(method_queries[0].words)):
            listed = [rows[first:last] for rows in candidates_by_method]
            fresh = {} if exact == "none" else self._words_of(distinct, tops)
            ends = {}
            for queries, rows in zip(method_queries, listed, strict=True):
                some = queries.take(first, last)
                words = self._stored_words(some, distinct) if exact == "none" else fresh[some.top]
                ends[some.method.name] = _rank(some, rows, k, distinct, words, exact=exact != "none")
            parts.append(ends)
        return join_ends(parts)

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        method_queries = self.queries(question.methods, batch.columns, batch.targets, normalise=question.spec.normalise)
        all_scores = self.scores(method_queries, rows)
        return Scores({queries.method.name: scores for queries, scores in zip(method_queries, all_scores, strict=True)})

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        recall = PROVEN if question.spec.exact != "none" else NOT_RERANKED
        return with_note(recall) | {"normalise": question.spec.normalise}

    def scores(self, method_queries: Sequence[WordQueries], rows: np.ndarray) -> list[np.ndarray]:
        """Exact scores of training rows ``(n,)`` from the models, ``(q, n)`` float64, for each method's queries.

        One pass over the rows serves all methods.
        """
        out = [np.zeros((len(queries.words), len(rows))) for queries in method_queries]
        for start in range(0, len(rows), FULL_ROWS):
            block = rows[start : start + FULL_ROWS]
            fresh = self._words_of(block, sorted({q.top for q in method_queries}))
            for queries, scores in zip(method_queries, out, strict=True):
                words = fresh[queries.top]
                lengths = _lengths(queries, words)
                for i in range(len(queries.words)):  # one by one: most rows share some word with every test row
                    pairs = np.full(len(block), i), np.arange(len(block))
                    found = shared_words(queries.words, words, pairs).scores(len(block))
                    scores[i, start : start + len(block)] = _normalised(found, lengths, pairs)
        return out

    def _ends_of(self, scores: np.ndarray, k: int) -> list[np.ndarray]:
        """Rows at both ends of each test row's ranking, and rows that tie with the last of them up to rounding."""
        out = []
        for row in scores:
            margin = 1e-9 * np.abs(row).max(initial=0.0)
            ordered = np.partition(row, (k - 1, len(row) - k))
            near = (row >= ordered[len(row) - k] - margin) | (row <= ordered[k - 1] + margin)
            zero = np.flatnonzero(row == 0.0)
            near[zero[k:]] = False  # ties at 0 go to the lower rows
            out.append(self.index.live[near])
        return out

    def _row_lengths(self, queries: WordQueries) -> np.ndarray:
        """sqrt(self x self) of every row over the method's words, ``(n,)`` float64."""
        key = (queries.top, queries.method.name)
        if key not in self._lengths:
            total = np.zeros(self.index.manifest.n_rows)
            all_tokens = np.ones(self._n_tokens, bool)
            for c, eta in enumerate(self.etas):
                allowed = all_tokens if queries.allowed is None else queries.allowed
                total += eta * self.index.words(queries.top, c).squares(allowed)
            self._lengths[key] = np.sqrt(total)
        return self._lengths[key]

    def candidates(self, queries: WordQueries, k: int, exact: str) -> list[np.ndarray]:
        """Rows, ascending, that hold both ends of each test row's ranking by the stored vectors or the models'."""
        stores = [self.index.words(queries.top, c) for c in range(len(self.etas))]
        step = min(BLOCK_QUERIES, max(1, BLOCK_BOUNDS // self.index.manifest.n_rows))
        out = []
        for start in range(0, len(queries.words), step):
            block = queries.take(start, min(start + step, len(queries.words)))
            factors = None
            if block.normalise:
                factors = ratio(1.0, np.sqrt(block.words.squares())[:, None] * self._row_lengths(block))
            search = CandidateSearch(block.words, stores, factors, self.index.retired)
            out += search.find(k, stored=exact == "none", prune=self.prune)
        return out

    def _stored_words(self, queries: WordQueries, rows: np.ndarray) -> list[WordRows]:
        """Stored words of rows, one entry a checkpoint: where lengths do not count, those of the test rows alone."""
        among = None
        if not queries.normalise:
            among = np.zeros(self._n_tokens, bool)
            among[np.concatenate([words.tokens for words in queries.words.words])] = True
        return [self.index.words(queries.top, c).take(rows, among) for c in range(len(self.etas))]


def _rank(
    queries: WordQueries,
    candidates: Sequence[np.ndarray],
    k: int,
    rows: np.ndarray,
    words: Sequence[WordRows],
    *,
    exact: bool,
) -> Ends:
    """Both ends of the ranking among the candidates of each test row.

    Args:
        queries: The test rows.
        candidates: Row numbers, ascending, for each test row.
        k: Results at each end.
        rows: Row numbers, ascending, that hold all candidates.
        words: Words of these rows, one entry a checkpoint.
        exact: Whether the rankings are marked as exact.
    """
    n_listed = np.array([len(listed) for listed in candidates])
    pair_queries, pair_rows = np.repeat(np.arange(len(candidates)), n_listed), np.concatenate(candidates)
    pairs = pair_queries, np.searchsorted(rows, pair_rows)
    shared, lengths = shared_words(queries.words, words, pairs), _lengths(queries, words)
    scores = _normalised(shared.scores(len(pair_rows)), lengths, pairs)
    n_scored = n_listed if exact else np.zeros(len(candidates), np.int64)
    in_order = (np.lexsort((pair_rows, sign * scores, pair_queries)) for sign in (-1, 1))
    best = np.stack([order[offsets(n_listed)[:-1, None] + np.arange(k)] for order in in_order])  # pairs, (2, q, k)
    shared = shared.of(best.ravel())
    of_word = best.ravel()[shared.pairs]
    values = _normalised(shared.values, lengths, (pairs[0][of_word], pairs[1][of_word]))
    bounds = np.searchsorted(shared.pairs, np.arange(best.size + 1)).tolist()
    words_of_results = [(shared.tokens[a:b], values[a:b]) for a, b in itertools.pairwise(bounds)]
    words_of_queries = [words_of_results[i : i + k] for i in range(0, best.size, k)]
    n_queries = len(candidates)
    first, last = (
        Ranking(
            pair_rows[best[side]], scores[best[side]], exact, n_scored,
            words=words_of_queries[side * n_queries : (side + 1) * n_queries],
        )
        for side in (0, 1)
    )  # fmt: skip
    return first, last


def _few_rows(
    candidates_by_method: Sequence[Sequence[np.ndarray]], n_queries: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Ranges (first, end) of test rows whose distinct candidates, over all methods, fit in memory together; and these.

    The candidates ascend.
    """
    listed = [np.concatenate([rows[i] for rows in candidates_by_method]) for i in range(n_queries)]
    first, distinct = 0, distinct_of(np.concatenate(listed))
    if len(distinct) > RERANK_ROWS:
        distinct = np.empty(0, np.int64)
        for i, rows in enumerate(listed):
            extended = distinct_of(np.concatenate([distinct, rows]))
            if i > first and len(extended) > RERANK_ROWS:
                yield first, i, distinct
                first, extended = i, distinct_of(rows)
            distinct = extended
    yield first, n_queries, distinct


Lengths = tuple[np.ndarray, np.ndarray] | None  # sqrt(self x self) of test rows and rows; None: not normalised


def _lengths(queries: WordQueries, words: Sequence[WordRows]) -> Lengths:
    if not queries.normalise:
        return None
    return np.sqrt(queries.words.squares()), np.sqrt(squares(words, queries.words.etas, queries.allowed))


def _normalised(scores: np.ndarray, lengths: Lengths, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Scores of pairs divided by the lengths of both rows, sqrt(self x self); 0 where a length is 0."""
    if lengths is None:
        return scores
    return ratio(scores, lengths[0][pairs[0]] * lengths[1][pairs[1]])
