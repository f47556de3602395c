"""Search by shared words: upper bounds first, so that most postings are never read, then exact scores of what is left.

A row's score is at most U = sum over shared words of |dL_q/dE_w| |dL_n/dE_w|, which needs the stored lengths alone.
Rows are scored from the store by falling U until no later row can enter either end of the ranking; those that
rounding of the stored vectors leaves in question are scored again from the model (``--exact rerank``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from forebear.indexer.index import Index
from forebear.indexer.model.forward import DEFAULT_BATCH_TOKENS
from forebear.indexer.words.gradients import WordRows, word_gradients
from forebear.indexer.words.store import WordStore
from forebear.ratio import ratio
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.ranking import Ranking, Words, join, rank
from forebear.retriever.words.scores import QueryWords, Shared, query_words, shared_words, squares
from forebear.retriever.words.vocabulary import boundary_tokens, frequent_tokens, token_mask

FIRST_ROWS = 64  # scored before anything is known of the k-th best
FULL_ROWS = 1024  # run through the model at once by --exact full
RERANK_ROWS = 4096  # distinct candidates whose words are held together
_ROWS_AT_ONCE = 2048  # whose stored vectors are held together
_FLOAT32 = 1e-5  # rounding of the fast scores, as a share of U


@dataclass(frozen=True)
class Question:
    """One word method's side of a block of test rows.

    Attributes:
        method: Which.
        top: Its store.
        allowed: Mask by token id of the words that take part; None: all.
        queries: Words of each test row.
        normalise: Whether scores are divided by sqrt(self x self).
    """

    method: Method
    top: int
    allowed: np.ndarray | None
    queries: list[QueryWords]
    normalise: bool

    def take(self, first: int, last: int) -> Question:
        """The same of some of the test rows."""
        return replace(self, queries=self.queries[first:last])


@dataclass(frozen=True)
class _Bounds:
    """Rows of the store against one test row.

    Attributes:
        upper: U, ``(n,)`` float64 (of confident rows it may be below float32's range); -1 for retired rows.
        error: Largest share of U that rounding of the store can be.
        factors: What scores are multiplied by, ``(n,)``, or None.
    """

    upper: np.ndarray
    error: float
    factors: np.ndarray | None


def words_top(index: Index, method: Method) -> int:
    """Positions kept a row in the store that a method needs; 0: all."""
    tops = index.manifest.spec.words_tops
    return next((top for top in tops if top), 10) if method.words == "topk" else 0


@dataclass
class WordSearch:
    """Ranks training rows by shared words.

    Attributes:
        index: With a words store.
        models: Its models.
        prune: Off: every posting of the test row's words is read. The answer is the same.
    """

    index: Index
    models: Models
    prune: bool = True
    _lengths: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

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

    def questions(
        self, methods: Sequence[Method], texts: Sequence[Sequence[str]], targets: np.ndarray, *, normalise: bool
    ) -> list[Question]:
        """Words of a block of test rows for each method; one pass a checkpoint."""
        tops = sorted({words_top(self.index, method) for method in methods})
        found = self._from_models(texts, targets, tops)
        out = []
        for method in methods:
            top, allowed = words_top(self.index, method), self.allowed(method)
            queries = query_words([words[top] for words in found], self.etas, allowed)
            out.append(Question(method, top, allowed, queries, normalise))
        return out

    def _from_models(
        self, texts: Sequence[Sequence[str]], labels: np.ndarray, tops: Sequence[int]
    ) -> list[dict[int, WordRows]]:
        return [
            word_gradients(self.models.classifier(c), texts, labels, tops, batch_tokens=DEFAULT_BATCH_TOKENS)[0]
            for c in range(len(self.etas))
        ]

    def _words_of(self, rows: np.ndarray, tops: Sequence[int]) -> dict[int, list[WordRows]]:
        """Words of training rows from the models, by store, one entry a checkpoint."""
        texts = self.index.text_lists(rows)
        found = self._from_models(texts, self.index.labels[rows].astype(np.int64), tops)
        return {top: [words[top] for words in found] for top in tops}

    def search(
        self,
        methods: Sequence[Method],
        texts: Sequence[Sequence[str]],
        targets: np.ndarray,
        k: int,
        *,
        exact: str,
        normalise: bool,
    ) -> dict[str, tuple[Ranking, Ranking]]:
        """Both ends of each method's ranking, (proponents, opponents), with contributions.

        Args:
            methods: Word methods.
            texts: Test rows, one list a text column.
            targets: Class whose loss is explained, ``(q,)``.
            k: Results at each end.
            exact: ``none`` (the stored vectors' scores), ``rerank`` or ``full`` (the model's).
            normalise: Divide scores by sqrt(self x self).
        """
        questions = self.questions(methods, texts, targets, normalise=normalise)
        if exact == "full":
            listed = [self._ends_of(scores, k) for scores in self.score(questions)]
        else:
            listed = [self.candidates(question, k, exact) for question in questions]
        if exact == "none":
            return {
                q.method.name: self._rank(q, rows, k, None, exact=False)
                for q, rows in zip(questions, listed, strict=True)
            }
        parts: list[dict[str, tuple[Ranking, Ranking]]] = []
        for first, last in _few_rows(listed, len(targets)):
            some = [rows[first:last] for rows in listed]
            distinct = np.unique(np.concatenate([rows for of_method in some for rows in of_method]))
            fresh = self._words_of(distinct, sorted({q.top for q in questions}))
            parts.append(
                {
                    q.method.name: self._rank(q.take(first, last), rows, k, (distinct, fresh[q.top]), exact=True)
                    for q, rows in zip(questions, some, strict=True)
                }
            )
        return {name: (join([p[name][0] for p in parts]), join([p[name][1] for p in parts])) for name in parts[0]}

    def score(self, questions: Sequence[Question], wanted: np.ndarray | None = None) -> list[np.ndarray]:
        """Exact scores of training rows (None: all live ones) from the models, ``(q, n)`` float64, for each question.

        One pass over the rows serves all questions.
        """
        wanted = self.index.live if wanted is None else wanted
        out = [np.zeros((len(q.queries), len(wanted))) for q in questions]
        for start in range(0, len(wanted), FULL_ROWS):
            rows = wanted[start : start + FULL_ROWS]
            fresh = self._words_of(rows, sorted({q.top for q in questions}))
            for question, scores in zip(questions, out, strict=True):
                words = fresh[question.top]
                lengths = np.sqrt(squares(words, self.etas, question.allowed)) if question.normalise else None
                for i, query in enumerate(question.queries):
                    found = shared_words(query, words).scores(len(rows))
                    scores[i, start : start + len(rows)] = _normalised(found, query, lengths)
        return out

    def _ends_of(self, scores: np.ndarray, k: int) -> list[np.ndarray]:
        """Rows at both ends of each test row's ranking, and what may tie with the last of them but for rounding."""
        out = []
        for row in scores:
            margin = 1e-9 * np.abs(row).max(initial=0.0)
            ordered = np.partition(row, (k - 1, len(row) - k))
            near = (row >= ordered[len(row) - k] - margin) | (row <= ordered[k - 1] + margin)
            zero = np.flatnonzero(row == 0.0)
            near[zero[k:]] = False  # ties at 0 go to the lower rows
            out.append(self.index.live[near])
        return out

    def bounds(self, question: Question, query: QueryWords) -> _Bounds:
        """Upper bounds of every row's score against a test row, from the stored lengths."""
        upper = np.zeros(self.index.manifest.n_rows)
        error = 0.0
        for store, tokens, vectors, eta in self._stores(question, query):
            lengths = eta * np.linalg.norm(vectors.astype(np.float64), axis=1)
            upper += store.weighted_norms(tokens, lengths)
            error = max(error, store.error(tokens))
        factors = None
        if question.normalise:
            own = np.sqrt(query.square())
            below = own * self._row_lengths(question)
            factors = ratio(1.0, below)
            upper *= factors
        upper[self.index.retired] = -1.0
        return _Bounds(upper, error, factors)

    def _stores(self, question: Question, query: QueryWords) -> list[tuple[WordStore, np.ndarray, np.ndarray, float]]:
        parts = zip(query.tokens, query.vectors, query.etas, strict=True)
        return [(self.index.words(question.top, c), *part) for c, part in enumerate(parts)]

    def _row_lengths(self, question: Question) -> np.ndarray:
        """sqrt(self x self) of every row over the method's words, ``(n,)`` float64."""
        key = (question.top, question.method.name)
        if key not in self._lengths:
            total = np.zeros(self.index.manifest.n_rows)
            everything = np.ones(self._n_tokens, bool)
            for c, eta in enumerate(self.etas):
                allowed = everything if question.allowed is None else question.allowed
                total += eta * self.index.words(question.top, c).squares(allowed)
            self._lengths[key] = np.sqrt(total)
        return self._lengths[key]

    def stored_scores(self, question: Question, query: QueryWords, rows: np.ndarray) -> np.ndarray:
        """Scores of rows from the stored vectors, ``(m,)``, not normalised; float32 products."""
        out = np.zeros(len(rows))
        number = np.full(self._n_tokens, -1, np.int32)  # of each token among the test row's
        for store, tokens, vectors, eta in self._stores(question, query):
            number[tokens] = np.arange(len(tokens))
            directions = vectors.astype(np.float32)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                starts, entries = store.entries(rows[start : start + _ROWS_AT_ONCE])
                mine = number[store.entry_tokens[entries]]
                hit = np.flatnonzero(mine >= 0)
                places = store.entry_places[entries[hit]]
                # numpy: for products this small torch's threads cost more than they bring
                codes = store.codes.take(places, axis=0).astype(np.float32)
                dots = np.einsum("ij,ij->i", codes, directions.take(mine[hit], axis=0)).astype(np.float64)
                dots *= store.scales[places]
                of_row = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[hit]
                found = np.bincount(of_row, dots, minlength=len(starts) - 1)
                out[start : start + _ROWS_AT_ONCE] += eta * found
            number[tokens] = -1
        return out

    def candidates(self, question: Question, k: int, exact: str) -> list[np.ndarray]:
        """Rows, ascending, among which both ends of each test row's ranking are; see :meth:`_candidates`."""
        first = [self._candidates(question, i, k, exact) for i in range(min(1, len(question.queries)))]
        rest = range(1, len(question.queries))  # in threads, now that what is made once has been made
        if not rest:
            return first
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return first + list(pool.map(lambda i: self._candidates(question, i, k, exact), rest))

    def _candidates(self, question: Question, i: int, k: int, exact: str) -> np.ndarray:
        """Rows, ascending, among which both ends of a test row's exact ranking are.

        With ``none`` the stored vectors' ranking is meant; else the models', which differs by their rounding.
        """
        query = question.queries[i]
        bounds = self.bounds(question, query)
        upper = bounds.upper
        share = _FLOAT32 + (bounds.error if exact != "none" else 0.0)
        scores = np.full(len(upper), np.nan)
        pending = upper > 0
        todo = np.flatnonzero(pending)
        n_next = FIRST_ROWS + 4 * k if self.prune else len(todo)
        needed = 0.0  # U of a row that could still matter
        while len(todo):
            now = todo
            if len(todo) > n_next:
                now = np.sort(todo[np.argpartition(-upper[todo], n_next - 1)[:n_next]])
            found = self.stored_scores(question, query, now)
            scores[now] = found if bounds.factors is None else found * bounds.factors[now]
            pending[now] = False
            done = np.flatnonzero(~np.isnan(scores))
            low, high = _kth(scores[done], share * upper[done], k)
            needed = max(0.0, min(low, -high))
            todo = np.flatnonzero(pending & (upper * (1 + share) >= needed))
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
        question: Question,
        listed: Sequence[np.ndarray],
        k: int,
        fresh: tuple[np.ndarray, list[WordRows]] | None,
        *,
        exact: bool,
    ) -> tuple[Ranking, Ranking]:
        """Both ends of the ranking among the rows listed for each test row.

        Args:
            question: Whose test rows.
            listed: Rows, ascending, for each test row.
            k: Results at each end.
            fresh: Row numbers, ascending, and their words from the models; None takes the stored ones.
            exact: What the result says of itself.
        """
        q = len(listed)
        rows, scores = np.empty((2, q, k), np.int64), np.empty((2, q, k))
        words: tuple[list[Words], list[Words]] = ([], [])
        for i, (query, mine) in enumerate(zip(question.queries, listed, strict=True)):
            if fresh is None:
                found = [self.index.words(question.top, c).take(mine) for c in range(len(self.etas))]
            else:
                at = np.searchsorted(fresh[0], mine)
                found = [w.take(at) for w in fresh[1]]
            shared = shared_words(query, found)
            lengths = np.sqrt(squares(found, self.etas, question.allowed)) if question.normalise else None
            all_scores = _normalised(shared.scores(len(mine)), query, lengths)
            for side in (0, 1):
                best, value = rank(all_scores[None], mine, k, largest=side == 0)
                rows[side, i], scores[side, i] = best[0], value[0]
                places = np.searchsorted(mine, best[0])
                words[side].append([_contributions(shared, place, query, lengths) for place in places])
        n_scored = np.array([len(mine) for mine in listed]) if exact else np.zeros(q, np.int64)
        return tuple(  # type: ignore[return-value]
            Ranking(rows[side], scores[side], exact, n_scored, words=words[side]) for side in (0, 1)
        )


def _few_rows(listed: Sequence[Sequence[np.ndarray]], n_queries: int) -> Iterator[tuple[int, int]]:
    """Stretches of test rows whose distinct candidates, over all methods, fit in memory together."""
    first, held = 0, np.empty(0, np.int64)
    for i in range(n_queries):
        more = np.unique(np.concatenate([held, *(rows[i] for rows in listed)]))
        if i > first and len(more) > RERANK_ROWS:
            yield first, i
            first, more = i, np.unique(np.concatenate([rows[i] for rows in listed]))
        held = more
    yield first, n_queries


def _normalised(scores: np.ndarray, query: QueryWords, lengths: np.ndarray | None) -> np.ndarray:
    """Scores over sqrt(self x self); 0 where a length is."""
    if lengths is None:
        return scores
    below = np.sqrt(query.square()) * lengths
    return ratio(scores, below)


def _contributions(
    shared: Shared, place: int, query: QueryWords, lengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    tokens, values = shared.of(int(place))
    return tokens, _normalised(values, query, None if lengths is None else np.full(len(values), lengths[place]))


def _kth(scores: np.ndarray, slack: np.ndarray, k: int) -> tuple[float, float]:
    """Scores that the k-th best and the k-th worst row reach for certain; 0 (rows that share no word) for fewer."""
    if len(scores) < k:
        return 0.0, 0.0
    low = np.partition(scores - slack, len(scores) - k)[len(scores) - k]
    high = np.partition(scores + slack, k - 1)[k - 1]
    return float(low), float(high)
