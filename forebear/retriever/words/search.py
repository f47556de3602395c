"""Search by shared words: upper bounds first, so that most postings are never read, then exact scores of what is left.

A row's score is at most U = sum over shared words of |dL_q/dE_w| |dL_n/dE_w|, which needs the stored lengths alone.
Rows are scored from the store by falling U until no later row can enter either end of the ranking; those that
rounding of the stored vectors leaves in question are scored again from the model (``--exact rerank``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from forebear.indexer.words.gradients import WordRows, word_gradients
from forebear.indexer.words.store import WordStore
from forebear.ratio import ratio
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.recall import NOT_RERANKED, PROVEN, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question, words_top
from forebear.retriever.ranking import Ends, Ranking, Words, join_ends, rank
from forebear.retriever.scores import Scores
from forebear.retriever.words.scores import QueryWords, Shared, query_words, shared_words, squares
from forebear.retriever.words.vocabulary import boundary_tokens, frequent_tokens, token_mask

FIRST_ROWS = 64  # rows scored in the first round, which gives a first k-th best score
FULL_ROWS = 1024  # rows run through the model at once by --exact full
RERANK_ROWS = 4096  # distinct candidates whose words are held together
_ROWS_AT_ONCE = 2048  # rows whose stored vectors are held together
_FLOAT32 = 1e-5  # rounding of the fast scores, as a share of U


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
    words: list[QueryWords]
    normalise: bool

    def take(self, first: int, last: int) -> WordQueries:
        """The queries ``first`` to ``last - 1``."""
        return replace(self, words=self.words[first:last])


@dataclass(frozen=True)
class _Bounds:
    """Upper bounds of the scores of all rows against one test row.

    Attributes:
        upper: U, ``(n,)`` float64 (where the model is sure of a row, U may be below float32's range); -1 for retired
            rows.
        error: Largest rounding error of a score from the store, as a share of U.
        factors: Normalising factor of each row's score, ``(n,)``; None without normalisation.
    """

    upper: np.ndarray
    error: float
    factors: np.ndarray | None


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
        k, exact = question.top, question.spec.exact
        method_queries = self.queries(question.methods, batch.columns, batch.targets, normalise=question.spec.normalise)
        if exact == "full":
            candidates_by_method = [self._ends_of(scores, k) for scores in self.scores(method_queries, self.index.live)]
        else:
            candidates_by_method = [self.candidates(queries, k, exact) for queries in method_queries]
        if exact == "none":
            pairs = zip(method_queries, candidates_by_method, strict=True)
            return {queries.method.name: self._rank(queries, rows, k, None, exact=False) for queries, rows in pairs}
        tops = sorted({queries.top for queries in method_queries})
        parts: list[dict[str, Ends]] = []
        for first, last in _few_rows(candidates_by_method, len(batch)):
            candidates = [rows[first:last] for rows in candidates_by_method]
            distinct = np.unique(np.concatenate([rows for of_method in candidates for rows in of_method]))
            fresh = self._words_of(distinct, tops)
            ends = {}
            for queries, rows in zip(method_queries, candidates, strict=True):
                words = (distinct, fresh[queries.top])
                ends[queries.method.name] = self._rank(queries.take(first, last), rows, k, words, exact=True)
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
        out = [np.zeros((len(q.words), len(rows))) for q in method_queries]
        for start in range(0, len(rows), FULL_ROWS):
            block = rows[start : start + FULL_ROWS]
            fresh = self._words_of(block, sorted({q.top for q in method_queries}))
            for queries, scores in zip(method_queries, out, strict=True):
                words = fresh[queries.top]
                lengths = np.sqrt(squares(words, self.etas, queries.allowed)) if queries.normalise else None
                for i, query in enumerate(queries.words):
                    shared_scores = shared_words(query, words).scores(len(block))
                    scores[i, start : start + len(block)] = _normalised(shared_scores, query, lengths)
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

    def bounds(self, queries: WordQueries, query: QueryWords) -> _Bounds:
        """Upper bounds of every row's score against a test row, from the stored lengths."""
        upper = np.zeros(self.index.manifest.n_rows)
        error = 0.0
        for store, tokens, vectors, eta in self._stores(queries, query):
            lengths = eta * np.linalg.norm(vectors.astype(np.float64), axis=1)
            upper += store.weighted_norms(tokens, lengths)
            error = max(error, store.error(tokens))
        factors = None
        if queries.normalise:
            query_length = np.sqrt(query.square())
            factors = ratio(1.0, query_length * self._row_lengths(queries))
            upper *= factors
        upper[self.index.retired] = -1.0
        return _Bounds(upper, error, factors)

    def _stores(self, queries: WordQueries, query: QueryWords) -> list[tuple[WordStore, np.ndarray, np.ndarray, float]]:
        parts = zip(query.tokens, query.vectors, query.etas, strict=True)
        return [(self.index.words(queries.top, c), *part) for c, part in enumerate(parts)]

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

    def stored_scores(self, queries: WordQueries, query: QueryWords, rows: np.ndarray) -> np.ndarray:
        """Scores of rows from the stored vectors, ``(m,)``, not normalised; float32 products."""
        out = np.zeros(len(rows))
        token_numbers = np.full(self._n_tokens, -1, np.int32)  # number of each token among the test row's, or -1
        for store, tokens, vectors, eta in self._stores(queries, query):
            token_numbers[tokens] = np.arange(len(tokens))
            directions = vectors.astype(np.float32)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                starts, entries = store.entries(rows[start : start + _ROWS_AT_ONCE])
                numbers = token_numbers[store.entry_tokens[entries]]
                hit = np.flatnonzero(numbers >= 0)
                places = store.entry_places[entries[hit]]
                # numpy: for products this small torch's threads cost more than they bring
                codes = store.codes.take(places, axis=0).astype(np.float32)
                dots = np.einsum("ij,ij->i", codes, directions.take(numbers[hit], axis=0)).astype(np.float64)
                dots *= store.scales[places]
                row_of_hit = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[hit]
                row_dots = np.bincount(row_of_hit, dots, minlength=len(starts) - 1)
                out[start : start + _ROWS_AT_ONCE] += eta * row_dots
            token_numbers[tokens] = -1
        return out

    def candidates(self, queries: WordQueries, k: int, exact: str) -> list[np.ndarray]:
        """Rows, ascending, that hold both ends of each test row's ranking, as :meth:`_candidates` finds them."""
        first = [self._candidates(queries, i, k, exact) for i in range(min(1, len(queries.words)))]
        rest = range(1, len(queries.words))  # in threads; the first query has filled the caches that all share
        if not rest:
            return first
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return first + list(pool.map(lambda i: self._candidates(queries, i, k, exact), rest))

    def _candidates(self, queries: WordQueries, i: int, k: int, exact: str) -> np.ndarray:
        """Rows, ascending, that hold both ends of a test row's exact ranking.

        With ``exact="none"`` that is the ranking by the stored vectors; else the ranking by the models' vectors, from
        which the stored ones differ by rounding, so that more rows are kept.
        """
        query = queries.words[i]
        bounds = self.bounds(queries, query)
        upper = bounds.upper
        share = _FLOAT32 + (bounds.error if exact != "none" else 0.0)
        scores = np.full(len(upper), np.nan)
        pending = upper > 0
        remaining = np.flatnonzero(pending)
        n_next = FIRST_ROWS + 4 * k if self.prune else len(remaining)
        needed = 0.0  # smallest U of a row that can still enter either end
        while len(remaining):
            block = remaining
            if len(remaining) > n_next:
                block = np.sort(remaining[np.argpartition(-upper[remaining], n_next - 1)[:n_next]])
            stored = self.stored_scores(queries, query, block)
            scores[block] = stored if bounds.factors is None else stored * bounds.factors[block]
            pending[block] = False
            done = np.flatnonzero(~np.isnan(scores))
            low, high = _kth(scores[done], share * upper[done], k)
            needed = max(0.0, min(low, -high))
            remaining = np.flatnonzero(pending & (upper * (1 + share) >= needed))
            n_next *= 4
        done = np.flatnonzero(~np.isnan(scores))
        slack = share * upper[done]
        low, high = _kth(scores[done], slack, k)
        near = done[(scores[done] + slack >= low) | (scores[done] - slack <= high)]
        if len(done) < k or needed <= 0.0:  # rows that share no word, at 0, may be among the best
            near = np.union1d(near, np.flatnonzero(upper == 0)[:k])
        return near

    def _rank(
        self,
        queries: WordQueries,
        candidates: Sequence[np.ndarray],
        k: int,
        model_words: tuple[np.ndarray, list[WordRows]] | None,
        *,
        exact: bool,
    ) -> tuple[Ranking, Ranking]:
        """Both ends of the ranking among the candidates of each test row.

        Args:
            queries: The test rows.
            candidates: Row numbers, ascending, for each test row.
            k: Results at each end.
            model_words: Row numbers, ascending, and their words from the models; None takes the stored words.
            exact: Whether the rankings are marked as exact.
        """
        q = len(candidates)
        rows, scores = np.empty((2, q, k), np.int64), np.empty((2, q, k))
        words: tuple[list[Words], list[Words]] = ([], [])
        for i, (query, listed) in enumerate(zip(queries.words, candidates, strict=True)):
            if model_words is None:
                row_words = [self.index.words(queries.top, c).take(listed) for c in range(len(self.etas))]
            else:
                positions = np.searchsorted(model_words[0], listed)
                row_words = [w.take(positions) for w in model_words[1]]
            shared = shared_words(query, row_words)
            lengths = np.sqrt(squares(row_words, self.etas, queries.allowed)) if queries.normalise else None
            all_scores = _normalised(shared.scores(len(listed)), query, lengths)
            for side in (0, 1):
                best, value = rank(all_scores[None], listed, k, largest=side == 0)
                rows[side, i], scores[side, i] = best[0], value[0]
                places = np.searchsorted(listed, best[0])
                words[side].append([_contributions(shared, place, query, lengths) for place in places])
        n_scored = np.array([len(listed) for listed in candidates]) if exact else np.zeros(q, np.int64)
        return tuple(  # type: ignore[return-value]
            Ranking(rows[side], scores[side], exact, n_scored, words=words[side]) for side in (0, 1)
        )


def _few_rows(candidates_by_method: Sequence[Sequence[np.ndarray]], n_queries: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) of test rows whose distinct candidates, over all methods, fit in memory together."""
    first, distinct = 0, np.empty(0, np.int64)
    for i in range(n_queries):
        extended = np.unique(np.concatenate([distinct, *(rows[i] for rows in candidates_by_method)]))
        if i > first and len(extended) > RERANK_ROWS:
            yield first, i
            first, extended = i, np.unique(np.concatenate([rows[i] for rows in candidates_by_method]))
        distinct = extended
    yield first, n_queries


def _normalised(scores: np.ndarray, query: QueryWords, lengths: np.ndarray | None) -> np.ndarray:
    """Scores divided by the lengths of both rows, sqrt(self x self); 0 where a length is 0."""
    if lengths is None:
        return scores
    norms = np.sqrt(query.square()) * lengths
    return ratio(scores, norms)


def _contributions(
    shared: Shared, place: int, query: QueryWords, lengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    tokens, values = shared.of(int(place))
    return tokens, _normalised(values, query, None if lengths is None else np.full(len(values), lengths[place]))


def _kth(scores: np.ndarray, slack: np.ndarray, k: int) -> tuple[float, float]:
    """A score that at least k rows reach, and one that at least k rows do not exceed, whatever the rounding.

    With fewer than k scores both are 0, the score of the rows that share no word.
    """
    if len(scores) < k:
        return 0.0, 0.0
    low = np.partition(scores - slack, len(scores) - k)[len(scores) - k]
    high = np.partition(scores + slack, k - 1)[k - 1]
    return float(low), float(high)
