"""Which span of which training row: IF+, IF++, TracIn+, TracIn++, TracInF (Span paper), influence on saliency (Joint).

What a span adds to a row's gradient is g - g', g' being the gradient with the span masked. It has factors like any
other gradient (both rows' tokens side by side), so the dot of a query's vector with it comes from the same pass.
Where the index stores spans, these are searched: at the head exactly, from stored factors; beyond it by sketches, with
the model's scores for the candidates. Elsewhere rows are proposed as for ``if`` and ``gd``, and all their spans scored.

Influence on saliency asks with -d s / d theta of a word's saliency instead of a loss gradient. What a word of a row
that it finds contributes is a span with [UNK] for a mask.

Sign: larger = proponent. The paper prints the opposite sign for the methods with ++; here a span's influence on itself
is a squared length, so positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts
from forebear.indexer.model.forward import residual_and_loss, run_forward
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_found, mask_spans
from forebear.indexer.spans.text import Finder, Span
from forebear.retriever.deep.query_gradients import Asked
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.head.stored import search_query
from forebear.retriever.question.asked import Asked as AskedModels
from forebear.retriever.question.methods import METHODS, Method
from forebear.retriever.ranking import Ranking
from forebear.retriever.saliency.gradients import saliency_gradients, salient_words
from forebear.retriever.spans.stored import head_query, stored_ends

WORD_ROWS = 10  # rows at each end of saliency-if whose words are scored for saliency-if-token


@dataclass(frozen=True)
class SpanRows:
    """Spans of training rows, as what :class:`GradientSearch` scores: g - g' each.

    Attributes:
        rows: Training row of each, ``(m,)``.
        spans: The spans, by row and then by place.
        encoded: Rows and their masked versions.
        gold: Labels of the rows, ``(m,)`` int64.
        cut: Training row of each span that the model does not read, which is left out, ``(n,)``.
    """

    rows: np.ndarray
    spans: list[Span]
    encoded: Encoded
    gold: np.ndarray
    cut: np.ndarray

    def texts(self, at: np.ndarray) -> Texts:
        """See :class:`~forebear.retriever.deep.search.Rows`."""
        return self.encoded.take(at)

    def labels(self, at: np.ndarray) -> np.ndarray:
        """See :class:`~forebear.retriever.deep.search.Rows`."""
        return np.asarray(self.gold[at])


def span_rows(
    index: Index, classifier: Classifier, rows: np.ndarray, find: Finder, *, unknown: bool = False
) -> SpanRows:
    """All spans of some training rows (ascending); ``unknown``: masked by [UNK]."""
    texts = index.text_lists(rows)
    table = pa.table(dict(zip(index.manifest.spec.text_columns, texts, strict=True)))
    found = mask_found(
        classifier, texts, find_spans(find, texts, table, rows.tolist(), "training row"), unknown=unknown
    )
    of = rows[found.owners]
    return SpanRows(of, found.spans, found.encoded, index.labels[of].astype(np.int64), rows[found.cut])


def stored_span_rows(index: Index, classifier: Classifier, entries: np.ndarray) -> SpanRows:
    """Some entries of the index's span store."""
    store = index.spans()
    rows, spans = store.rows[entries], store.spans(entries)
    encoded, read = mask_spans(classifier, index.text_lists(rows), spans)
    assert read.all()
    labels = index.labels[rows].astype(np.int64)
    return SpanRows(rows, spans, replace(encoded, owners=rows), labels, np.empty(0, np.int64))


def query_spans(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    table: pa.Table | None,
    targets: np.ndarray,
    logits: np.ndarray,
    find: Finder,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Span], Encoded]:
    """The span of each test row that matters most: whose masking raises the target's loss most.

    Args:
        classifier: The model.
        texts: Test rows, one list a text column.
        table: The same rows with all their columns.
        targets: Class whose loss is explained, ``(q,)``.
        logits: Of the rows as they are, ``(q, c)``.
        find: Finds the spans of a row.
        numbers: Of the rows, for messages; None: from 0.

    Returns:
        One span a row; the rows and their masked versions.

    Raises:
        InputError: A row has no span, or none that the model reads.
    """
    numbers = range(len(texts[0])) if numbers is None else numbers
    found = find_spans(find, texts, table, numbers, "test row")
    read = mask_found(classifier, texts, found)
    owners, spans, encoded = read.owners, read.spans, read.encoded
    missing = np.setdiff1d(np.arange(len(found)), owners)
    if len(missing):
        raise InputError(
            f"test row {numbers[missing[0]]} has no span that the model reads. Find spans otherwise (--spans), or "
            "leave the row out."
        )
    assert encoded.minus is not None
    _, whole = residual_and_loss(logits, targets)
    _, masked = residual_and_loss(run_forward(classifier, Encoded(encoded.minus)).logits, targets[owners])
    importance = masked - whole[owners]
    best = np.lexsort((np.arange(len(owners)), -importance, owners))
    first = best[np.unique(owners[best], return_index=True)[1]]
    return [spans[i] for i in first], encoded.take(first)


class SpanSearch:
    """Ranks spans of training rows, or rows summed over variants of the model."""

    def __init__(self, search: GradientSearch, find: Finder, find_in_queries: Finder, *, stored: bool) -> None:
        """Prepare.

        Args:
            search: Of the scope and curvature that the question asks for.
            find: Finds the spans of a training row, from its texts.
            find_in_queries: Finds those of a test row.
            stored: Whether the index's store of spans holds what ``find`` finds.
        """
        self._search, self._find, self._find_in_queries, self._stored = search, find, find_in_queries, stored

    def search(
        self,
        methods: Sequence[Method],
        texts: Sequence[Sequence[str]],
        table: pa.Table | None,
        asked: AskedModels,
        k: int,
        *,
        full: bool,
        n_candidates: dict[str, int],
        word: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> dict[str, tuple[Ranking, Ranking]]:
        """Both ends of each method's ranking, (proponents, opponents).

        Args:
            methods: With spans or variants, or of saliency.
            texts: Test rows, one list a text column.
            table: The same rows with all their columns.
            asked: What the models say of them.
            k: Results at each end.
            full: Score every row by the model, instead of candidates.
            n_candidates: Rows at each end that are proposed, by method name; spans, where they are stored.
            word: Whose saliency is meant; None: that of the most salient word of each test row.
            numbers: Of the test rows, for messages; None: from 0.

        Raises:
            InputError: A test row has no span, or the candidates have fewer than ``k`` spans.
        """
        search, index = self._search, self._search.index
        plain = Asked([list(column) for column in texts], asked.targets)
        own: list[Span] | None = None
        different = plain
        if any(m.spans == "both" for m in methods):
            own, encoded = query_spans(
                search.models.classifier(), texts, table, asked.targets, asked.forward.logits, self._find_in_queries,
                numbers,
            )  # fmt: skip
            different = Asked(encoded, asked.targets)
        salient: list[Span] | None = None
        of_saliency = plain
        if any(m.saliency for m in methods):
            salient = salient_words(search.models.classifier(), texts, asked.targets, word, numbers)
            vectors = saliency_gradients(
                search.models.classifier(), search.queries.parameters, texts, asked.targets, salient, numbers
            )
            of_saliency = Asked(plain.texts, asked.targets, vectors)
        out = {}
        for method in methods:
            if method.saliency:
                mine, owned = of_saliency, salient
            else:
                mine, owned = (different, own) if method.spans == "both" else (plain, None)
            by_entries = self._stored and method.ranks_spans
            live = index.live_spans if by_entries else index.live
            width = min(len(live), n_candidates[method.name])
            if full:
                proposed = np.broadcast_to(live, (len(asked.targets), len(live)))
            elif by_entries and search.scope == "head" and not method.variants:
                out[method.name] = self._rank_stored(method, mine, k, owned)
                continue
            elif method.saliency and not method.spans and search.scope == "head":
                out[method.name] = self._rank_rows_at_head(method, mine, k, owned)
                continue
            elif method.saliency and method.spans:  # the words of the rows that saliency-if finds
                proposed = self._rows_of_saliency(mine, min(WORD_ROWS, len(live)), width, owned)
            else:
                proposed = self._propose(method, mine, width, by_entries=by_entries)
            out[method.name] = self._rank(method, mine, proposed, k, owned, by_entries=by_entries)
        return out

    def _propose(self, method: Method, asked: Asked, width: int, *, by_entries: bool) -> np.ndarray:
        """Candidates, ``(q, 2 width)``, each once or twice: rows whose whole gradients score highest and lowest.

        Entries of the span store, if ``by_entries``.
        """
        search = self._search
        base = METHODS["if" if method.query == "preconditioned" else "gd"]
        if search.scope != "head":
            as_calibrated = replace(base, name=method.name) if by_entries else base
            ends = search.candidates.propose([as_calibrated], asked, {as_calibrated.name: width}, spans=by_entries)
            return np.concatenate(ends[as_calibrated.name], axis=1)
        if by_entries:
            return np.concatenate([entries for entries, _ in stored_ends(search, method, asked, width)], axis=1)
        query = head_query(search, method, asked)
        ends_at_head = search_query(search.index, query.method, query, width, exact="none")
        return np.concatenate([end.rows for end in ends_at_head], axis=1)

    def _rank(
        self,
        method: Method,
        asked: Asked,
        numbers: np.ndarray,
        k: int,
        own: list[Span] | None,
        *,
        by_entries: bool = False,
    ) -> tuple[Ranking, Ranking]:
        """Rank candidates ``(q, m)`` by the model: rows, all spans of rows, or entries of the span store."""
        search = self._search
        distinct = np.unique(numbers)
        entries: SpanRows | None = None
        if method.spans is not None:
            classifier = search.models.classifier()
            if by_entries:
                entries = stored_span_rows(search.index, classifier, distinct)
            else:
                find = span_finder("words") if method.saliency else self._find
                entries = span_rows(search.index, classifier, distinct, find, unknown=method.saliency)
            search = search.over(entries)
        # What is scored for each query: positions among the entries, or row numbers.
        listed = [np.unique(mine) for mine in numbers]
        if by_entries:
            listed = [np.searchsorted(distinct, mine) for mine in listed]
        elif entries is not None:
            listed = [np.flatnonzero(np.isin(entries.rows, mine)) for mine in listed]
        n_cut = None if entries is None else np.array([np.isin(entries.cut, mine).sum() for mine in numbers])
        if by_entries:
            n_cut = np.full(len(listed), search.index.spans().n_cut)
        fewest, most = min(map(len, listed)), max(map(len, listed))
        _refuse_too_few(method, fewest, k)
        padded = np.stack([np.pad(mine, (0, most - len(mine)), mode="edge") for mine in listed])
        scores, residuals = search.score([method], asked, {method.name: padded})
        ends: list[Ranking] = []
        for largest in (True, False):
            found, found_scores = np.empty((len(listed), k), np.int64), np.empty((len(listed), k))
            for i, mine in enumerate(listed):
                values = scores[method.name][i, : len(mine)]
                order = np.lexsort((mine, -values if largest else values))[:k]
                found[i], found_scores[i] = mine[order], values[order]
            ends.append(
                Ranking(
                    found if entries is None else entries.rows[found], found_scores, True,
                    np.array([len(mine) for mine in listed]), residual=residuals.get(method.name),
                    spans=None if entries is None else [[entries.spans[j] for j in mine] for mine in found],
                    query_spans=own, n_cut=n_cut,
                )
            )  # fmt: skip
        return ends[0], ends[1]

    def _rows_of_saliency(self, asked: Asked, k: int, width: int, own: list[Span] | None) -> np.ndarray:
        """The rows at both ends of ``saliency-if``, ``(q, 2 k)``."""
        method = METHODS["saliency-if"]
        if self._search.scope == "head":
            found = self._rank_rows_at_head(method, asked, k, own)
        else:
            found = self._rank(method, asked, self._propose(method, asked, width, by_entries=False), k, own)
        return np.concatenate([end.rows for end in found], axis=1)

    def _rank_rows_at_head(
        self, method: Method, asked: Asked, k: int, own: list[Span] | None
    ) -> tuple[Ranking, Ranking]:
        """Rank all rows at the head from stored factors, without the model; proven, as for other methods there."""
        search = self._search
        residual = search.queries.solutions(asked)[1] if method.query == "preconditioned" else None
        query = head_query(search, method, asked)
        first, last = search_query(search.index, query.method, query, k, exact="rerank")
        return replace(first, residual=residual, query_spans=own), replace(last, residual=residual, query_spans=own)

    def _rank_stored(self, method: Method, asked: Asked, k: int, own: list[Span] | None) -> tuple[Ranking, Ranking]:
        """Rank all stored spans at the head, without the model."""
        search, store = self._search, self._search.index.spans()
        n_live = len(search.index.live_spans)
        _refuse_too_few(method, n_live, k)
        residual = search.queries.solutions(asked)[1] if method.query == "preconditioned" else None
        ends = [
            Ranking(
                store.rows[entries], scores, True, np.full(len(entries), n_live), residual=residual,
                spans=[store.spans(mine) for mine in entries], query_spans=own,
                n_cut=np.full(len(entries), store.n_cut),
            )
            for entries, scores in stored_ends(search, method, asked, k)
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
    search: GradientSearch, texts: Sequence[Sequence[str]], target: int, word: str | None, rows: np.ndarray
) -> tuple[Span, SpanRows, np.ndarray]:
    """``saliency-if-token`` of every word of some training rows, for one test row.

    Args:
        search: Of the scope and curvature that the question asks for.
        texts: The test row, one list a text column.
        target: Class whose probability counts.
        word: Whose saliency is meant; None: that of its most salient word.
        rows: Training rows, ascending.

    Returns:
        The test row's word; the words of the rows; their scores, ``(m,)`` float64.
    """
    classifier, targets = search.models.classifier(), np.array([target])
    salient = salient_words(classifier, texts, targets, word)
    vectors = saliency_gradients(classifier, search.queries.parameters, texts, targets, salient)
    entries = span_rows(search.index, classifier, rows, span_finder("words"), unknown=True)
    if not len(entries.rows):
        return salient[0], entries, np.zeros(0)
    method = METHODS["saliency-if-token"]
    asked = Asked(texts, targets, vectors)
    scores, _ = search.over(entries).score([method], asked, {method.name: np.arange(len(entries.rows))})
    return salient[0], entries, scores[method.name][0]
