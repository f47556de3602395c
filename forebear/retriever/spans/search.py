"""Which span of which training row: IF+, IF++, TracIn+, TracIn++, TracInF (Span paper), influence on saliency (Joint).

What a span adds to a row's gradient is g - g', g' being the gradient with the span masked. It has factors like any
other gradient (both rows' tokens side by side), so the dot of a query's vector with it comes from the same pass.
Where the index stores spans, these are searched: at the head exactly, from stored factors; beyond it by sketches, with
the model's scores for the candidates. Elsewhere rows are proposed as for ``if`` and ``gd``, and all their spans scored.

Influence on saliency (``saliency-if``) replaces the query's loss gradient by -d s / d theta, s being the saliency of a
word of the test row. ``saliency-if-token`` scores the words of the rows that it finds, as spans that [UNK] masks.

Sign: larger = proponent. The paper prints the opposite sign for the methods with ++; here a span's influence on itself
is a squared length, so positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from typing_extensions import override

from forebear.errors import InputError
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.spans.text import Span
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.head.stored import search_query
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import METHODS, Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.recall import deep_recall, n_candidates, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends, Ranking
from forebear.retriever.saliency.gradients import salient_gradients
from forebear.retriever.scores import Scores
from forebear.retriever.spans.rows import SpanRows, gradient_queries, span_rows, stored_span_rows
from forebear.retriever.spans.stored import head_query, stored_ends

WORD_ROWS = 10  # rows at each end of saliency-if whose words are scored for saliency-if-token


class SpanSearcher(Searcher):
    """Spans of training rows, influence on saliency, and sums over variants: only the model scores them."""

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        return SpanSearch(question, self.models).search(batch)

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        """Scores of rows, which only ``tracin-f`` of these methods has; see :attr:`Method.scores_rows`."""
        search = GradientSearch.kept(self.models, question.spec.scope, question.curvature)
        wanted = {method.name: rows for method in question.methods}
        return Scores(search.score(question.methods, Queries(batch.texts, batch.targets), wanted)[0])

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        spec = question.spec
        facts: dict[str, Any] = {}
        if method.saliency:  # its spans are words, whatever --spans says
            facts = {"word": spec.word}
        elif method.spans:
            facts = {
                "spans": spec.spans, "query_spans": question.query_spans, "span_column": spec.span_column,
                "stored_spans": question.spans_are_stored,
            }  # fmt: skip
        all_stored = question.spans_are_stored if method.ranks_spans else method.saliency and not method.spans
        if spec.exact == "full" or (all_stored and question.scope_of(method) == "head" and not method.variants):
            return facts | {"recall": 1.0, "candidates": None}
        n = n_candidates(question, method)
        return facts | with_note(deep_recall(question, method, n)) | {"candidates": n}


class SpanSearch:
    """Answers one question about spans, saliency or variants."""

    def __init__(self, question: Question, models: Models) -> None:
        """Set up without loading a model."""
        self._question, self._stored = question, question.spans_are_stored
        self._search = GradientSearch.kept(models, question.spec.scope, question.curvature)

    def search(self, batch: Batch) -> dict[str, Ends]:
        """Both ends of each method's ranking.

        Raises:
            InputError: A test row has no span, or the candidates have fewer than ``top`` spans.
        """
        question, search = self._question, self._search
        spec, methods = question.spec, question.methods
        classifier, numbers = search.models.classifier(), batch.numbers
        k = spec.top if all(m.spans for m in methods) else question.top
        by_row, by_span, query_spans = gradient_queries(question, classifier, batch)
        salient: list[Span] | None = None
        by_saliency = by_row
        if any(m.saliency for m in methods):
            parameters, columns, targets = search.gradients.parameters, batch.columns, batch.targets
            salient, vectors = salient_gradients(classifier, parameters, columns, targets, spec.word, numbers)
            by_saliency = Queries(by_row.texts, batch.targets, vectors)
        out = {}
        for method in methods:
            if method.saliency:
                queries, method_spans = by_saliency, salient
            else:
                queries, method_spans = (by_span, query_spans) if method.spans == "both" else (by_row, None)
            out[method.name] = self._search_method(method, queries, k, method_spans)
        return out

    def _search_method(self, method: Method, queries: Queries, k: int, query_spans: list[Span] | None) -> Ends:
        """Both ends of one method's ranking; ``query_spans`` holds the span of each test row, where one is compared."""
        search = self._search
        by_entries = self._stored and method.ranks_spans
        live = search.index.live_spans if by_entries else search.index.live
        width = min(len(live), n_candidates(self._question, method))
        if self._question.spec.exact == "full":
            proposed = np.broadcast_to(live, (len(queries), len(live)))
        elif by_entries and search.scope == "head" and not method.variants:
            return self._rank_stored(method, queries, k, query_spans)
        elif method.saliency and not method.spans and search.scope == "head":
            return self._rank_rows_at_head(method, queries, k, query_spans)
        elif method.saliency and method.spans:  # the words of the rows that saliency-if finds
            proposed = self._rows_of_saliency(queries, min(WORD_ROWS, len(live)), width, query_spans)
        else:
            proposed = self._propose(method, queries, width, by_entries=by_entries)
        return self._rank(method, queries, proposed, k, query_spans, by_entries=by_entries)

    def _propose(self, method: Method, queries: Queries, width: int, *, by_entries: bool) -> np.ndarray:
        """Candidates ``(q, 2 width)``: rows whose whole gradients score highest and lowest.

        With ``by_entries``, entries of the span store instead. A candidate of both ends appears twice.
        """
        search = self._search
        base = METHODS["if" if method.query == "preconditioned" else "gd"]
        if search.scope != "head":
            as_calibrated = replace(base, name=method.name) if by_entries else base
            ends = search.candidates.propose([as_calibrated], queries, {as_calibrated.name: width}, spans=by_entries)
            return np.concatenate([end.rows for end in ends[as_calibrated.name]], axis=1)
        if by_entries:
            return np.concatenate([entries for entries, _ in stored_ends(search, method, queries, width)], axis=1)
        query = head_query(search, method, queries)
        ends_at_head = search_query(search.models, query.method, query, width, exact="none")
        return np.concatenate([end.rows for end in ends_at_head], axis=1)

    def _rank(
        self,
        method: Method,
        queries: Queries,
        numbers: np.ndarray,
        k: int,
        query_spans: list[Span] | None,
        *,
        by_entries: bool = False,
    ) -> Ends:
        """Rank candidates ``(q, m)`` by the model: rows, all spans of rows, or entries of the span store."""
        search = self._search
        distinct = np.unique(numbers)
        entries: SpanRows | None = None
        if method.spans is not None:
            classifier = search.models.classifier()
            if by_entries:
                entries = stored_span_rows(search.index, classifier, distinct)
            else:
                device = classifier.device
                find = span_finder("words") if method.saliency else self._question.row_finder(device)
                entries = span_rows(search.index, classifier, distinct, find, unknown=method.saliency)
            search = search.over(entries)
        # For each query, what the search scores: positions among the entries of spans, or row numbers.
        positions = [np.unique(candidates) for candidates in numbers]
        if by_entries:
            positions = [np.searchsorted(distinct, candidates) for candidates in positions]
        elif entries is not None:
            positions = [np.flatnonzero(np.isin(entries.rows, rows)) for rows in positions]
        n_cut = None if entries is None else np.array([np.isin(entries.cut, rows).sum() for rows in numbers])
        if by_entries:
            n_cut = np.full(len(positions), search.index.spans().n_cut)
        fewest, most = min(map(len, positions)), max(map(len, positions))
        _refuse_too_few(method, fewest, k)
        padded = np.stack([np.pad(listed, (0, most - len(listed)), mode="edge") for listed in positions])
        scores, convergences = search.score([method], queries, {method.name: padded})
        ends: list[Ranking] = []
        for largest in (True, False):
            best, best_scores = np.empty((len(positions), k), np.int64), np.empty((len(positions), k))
            for i, listed in enumerate(positions):
                values = scores[method.name][i, : len(listed)]
                order = np.lexsort((listed, -values if largest else values))[:k]
                best[i], best_scores[i] = listed[order], values[order]
            ends.append(
                Ranking(
                    best if entries is None else entries.rows[best], best_scores, True,
                    np.array([len(listed) for listed in positions]), convergence=convergences[method.name],
                    spans=None if entries is None else [[entries.spans[j] for j in query_best] for query_best in best],
                    query_spans=query_spans, n_cut=n_cut,
                )
            )  # fmt: skip
        return ends[0], ends[1]

    def _rows_of_saliency(self, queries: Queries, k: int, width: int, query_spans: list[Span] | None) -> np.ndarray:
        """The rows at both ends of ``saliency-if``, ``(q, 2 k)``."""
        method = METHODS["saliency-if"]
        if self._search.scope == "head":
            ends = self._rank_rows_at_head(method, queries, k, query_spans)
        else:
            ends = self._rank(method, queries, self._propose(method, queries, width, by_entries=False), k, query_spans)
        return np.concatenate([end.rows for end in ends], axis=1)

    def _rank_rows_at_head(self, method: Method, queries: Queries, k: int, query_spans: list[Span] | None) -> Ends:
        """Rank all rows at the head from stored factors, without the model; proven, as for other methods there."""
        search = self._search
        convergence = search.gradients.solutions(queries)[1] if method.query == "preconditioned" else None
        query = head_query(search, method, queries)
        first, last = search_query(search.models, query.method, query, k, exact="rerank")
        return replace(first, convergence=convergence, query_spans=query_spans), replace(
            last, convergence=convergence, query_spans=query_spans
        )

    def _rank_stored(self, method: Method, queries: Queries, k: int, query_spans: list[Span] | None) -> Ends:
        """Rank all stored spans at the head, without the model."""
        search, store = self._search, self._search.index.spans()
        n_live = len(search.index.live_spans)
        _refuse_too_few(method, n_live, k)
        convergence = search.gradients.solutions(queries)[1] if method.query == "preconditioned" else None
        ends = [
            Ranking(
                store.rows[entries], scores, True, np.full(len(entries), n_live), convergence=convergence,
                spans=[store.spans(query_entries) for query_entries in entries], query_spans=query_spans,
                n_cut=np.full(len(entries), store.n_cut),
            )
            for entries, scores in stored_ends(search, method, queries, k)
        ]  # fmt: skip
        return ends[0], ends[1]


def _refuse_too_few(method: Method, n_found: int, k: int) -> None:
    if not n_found:
        raise InputError(f"{method.name}: the candidate rows have no span. Find spans otherwise (--spans).")
    if n_found < k:
        raise InputError(
            f"{method.name}: the candidate rows have {n_found} span(s), --top asks for {k}. Give a smaller --top, or "
            "more --candidates."
        )


def word_influence(
    search: GradientSearch, texts: Sequence[Sequence[str]], target: int | np.ndarray, word: str | None, rows: np.ndarray
) -> tuple[Span, SpanRows, np.ndarray]:
    """``saliency-if-token`` of every word of some training rows, for one test row.

    Args:
        search: The search over the scope and curvature that the question asks for.
        texts: The test row, one list a text column.
        target: Whose support counts: a class, or the numbers of all outputs, ``(c,)``.
        word: The word of the test row whose saliency is explained; None: its most salient word.
        rows: Training rows, ascending.

    Returns:
        The test row's word; the words of the rows; their scores, ``(m,)`` float64.
    """
    classifier, targets = search.models.classifier(), np.asarray(target)[None]
    salient, vectors = salient_gradients(classifier, search.gradients.parameters, texts, targets, word)
    entries = span_rows(search.index, classifier, rows, span_finder("words"), unknown=True)
    if not len(entries.rows):
        return salient[0], entries, np.zeros(0)
    method = METHODS["saliency-if-token"]
    queries = Queries(texts, targets, vectors)
    scores, _ = search.over(entries).score([method], queries, {method.name: np.arange(len(entries.rows))})
    return salient[0], entries, scores[method.name][0]
