"""Which span of which training row: IF+, IF++, TracIn+, TracIn++, TracInF (Span paper), influence on saliency (Joint).

What a span adds to a row's gradient is g - g', g' being the gradient with the span masked. It has factors like any
other gradient (both rows' tokens side by side), so the dot of a query's vector with it comes from the same pass.
Rows are proposed as for ``if`` and ``gd``; all spans of these rows are then scored exactly.

Influence on saliency asks with -d s / d theta of a word's saliency instead of a loss gradient. What a word of a row
that it finds contributes is a span with [UNK] for a mask.

Sign: larger = proponent. The paper prints the opposite sign for the methods with ++; here a span's influence on itself
is a squared length, so positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from forebear.errors import InputError
from forebear.indexer.curvature import class_basis
from forebear.indexer.estimate import propose
from forebear.indexer.forward import residual_and_loss, run_forward
from forebear.indexer.index import Index
from forebear.indexer.model import Classifier, Encoded, Texts
from forebear.indexer.spans import Finder, Span, find_spans, mask_spans, span_finder
from forebear.retriever.gradients import Asked, GradientSearch
from forebear.retriever.methods import METHODS, Method
from forebear.retriever.queries import Asked as AskedModels
from forebear.retriever.saliency_gradients import saliency_gradients, salient_words
from forebear.retriever.scoring import Query, Term
from forebear.retriever.search import Ranking, RowFactors, search_scan


@dataclass(frozen=True)
class SpanRows:
    """Spans of training rows, as what :class:`GradientSearch` scores: g - g' each.

    Attributes:
        rows: Training row of each, ``(m,)``.
        spans: The spans, by row and then by place.
        encoded: Rows and their masked versions.
        gold: Labels of the rows, ``(m,)`` int64.
    """

    rows: np.ndarray
    spans: list[Span]
    encoded: Encoded
    gold: np.ndarray

    def texts(self, at: np.ndarray) -> Texts:
        """See :class:`~forebear.retriever.gradients.Rows`."""
        return self.encoded.take(at)

    def labels(self, at: np.ndarray) -> np.ndarray:
        """See :class:`~forebear.retriever.gradients.Rows`."""
        return np.asarray(self.gold[at])


def span_rows(
    index: Index, classifier: Classifier, rows: np.ndarray, find: Finder, *, unknown: bool = False
) -> SpanRows:
    """All spans of some training rows (ascending); ``unknown``: masked by [UNK]."""
    texts = index.text_lists(rows)
    table = pa.table(dict(zip(index.manifest.spec.text_columns, texts, strict=True)))
    found = find_spans(find, texts, table, rows.tolist(), "training row")
    owners, spans, encoded = _masked(classifier, texts, found, unknown=unknown)
    of = rows[owners]
    return SpanRows(of, spans, encoded, index.labels[of].astype(np.int64))


def _masked(
    classifier: Classifier, texts: Sequence[Sequence[str]], found: list[list[Span]], *, unknown: bool = False
) -> tuple[np.ndarray, list[Span], Encoded]:
    """The spans that the model reads, by row and then by place: positions of their rows, spans, masked versions."""
    owners = np.repeat(np.arange(len(found)), [len(spans) for spans in found])
    spans = [span for of_row in found for span in sorted(of_row)]
    entries = [[column[i] for i in owners.tolist()] for column in texts]
    encoded, kept = mask_spans(classifier, entries, spans, unknown=unknown)
    return owners[kept], [span for span, is_read in zip(spans, kept, strict=True) if is_read], encoded


def query_spans(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    table: pa.Table | None,
    targets: np.ndarray,
    logits: np.ndarray,
    find: Finder,
    first_row: int = 0,
) -> tuple[list[Span], Encoded]:
    """The span of each test row that matters most: whose masking raises the target's loss most.

    Args:
        classifier: The model.
        texts: Test rows, one list a text column.
        table: The same rows with all their columns.
        targets: Class whose loss is explained, ``(q,)``.
        logits: Of the rows as they are, ``(q, c)``.
        find: Finds the spans of a row.
        first_row: Number of the first row, for messages.

    Returns:
        One span a row; the rows and their masked versions.

    Raises:
        InputError: A row has no span, or none that the model reads.
    """
    found = find_spans(find, texts, table, range(first_row, first_row + len(texts[0])), "test row")
    owners, spans, encoded = _masked(classifier, texts, found)
    missing = np.setdiff1d(np.arange(len(found)), owners)
    if len(missing):
        raise InputError(
            f"test row {first_row + missing[0]} has no span that the model reads. Find spans otherwise (--spans), or "
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

    def __init__(self, search: GradientSearch, find: Finder, find_in_queries: Finder) -> None:
        """Prepare.

        Args:
            search: Of the scope and curvature that the question asks for.
            find: Finds the spans of a training row, from its texts.
            find_in_queries: Finds those of a test row.
        """
        self._search, self._find, self._find_in_queries = search, find, find_in_queries

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
        first_row: int = 0,
    ) -> dict[str, tuple[Ranking, Ranking]]:
        """Both ends of each method's ranking, (proponents, opponents).

        Args:
            methods: With spans or variants, or of saliency.
            texts: Test rows, one list a text column.
            table: The same rows with all their columns.
            asked: What the models say of them.
            k: Results at each end.
            full: Score every row, instead of candidates.
            n_candidates: Rows at each end that are proposed, by method name.
            word: Whose saliency is meant; None: that of the most salient word of each test row.
            first_row: Number of the first test row, for messages.

        Raises:
            InputError: A test row has no span, or the candidates have fewer than ``k`` spans.
        """
        search = self._search
        plain = Asked([list(column) for column in texts], asked.targets)
        own: list[Span] | None = None
        different = plain
        if any(m.spans == "both" for m in methods):
            own, encoded = query_spans(
                search.models.classifier(), texts, table, asked.targets, asked.forward.logits, self._find_in_queries,
                first_row,
            )  # fmt: skip
            different = Asked(encoded, asked.targets)
        salient: list[Span] | None = None
        of_saliency = plain
        if any(m.saliency for m in methods):
            salient = salient_words(search.models.classifier(), texts, asked.targets, word, first_row)
            vectors = saliency_gradients(
                search.models.classifier(), search.blocks, texts, asked.targets, salient, first_row
            )
            of_saliency = Asked(plain.texts, asked.targets, vectors)
        out = {}
        for method in methods:
            if method.saliency:
                mine, owned = of_saliency, salient
            else:
                mine, owned = (different, own) if method.spans == "both" else (plain, None)
            live = search.index.live
            if full:
                rows = np.broadcast_to(live, (len(asked.targets), len(live)))
            else:
                rows = self._propose(method, mine, min(len(live), n_candidates[method.name]))
            if method.saliency and method.spans:  # the words of the rows that saliency-if finds
                found = self._rank(METHODS["saliency-if"], mine, rows, min(k, len(live)), owned)
                rows = np.concatenate([end.rows for end in found], axis=1)
            out[method.name] = self._rank(method, mine, rows, k, owned)
        return out

    def _propose(self, method: Method, asked: Asked, width: int) -> np.ndarray:
        """Training rows whose whole gradients score highest and lowest, ``(q, 2 width)``, each once or twice."""
        search = self._search
        base = METHODS["if" if method.query == "preconditioned" else "gd"]
        if search.scope != "head":
            how = search.index.proposal(search.scope, base.name, cosine=False)
            ends = propose(search.parts([base], asked)[base.name], search.index.live, width, how)
            return np.concatenate([rows for rows, _ in ends], axis=1)
        g = search.gradients_of(search.last, asked)
        if method.query == "preconditioned":
            g = search.solutions_of(asked)[0]
        (whole,) = g.values()
        reduced = np.einsum("ac,qch->qah", class_basis(whole.shape[1]), whole.double().cpu().numpy())
        index = search.index
        query = Query(base, (Term(1.0, None, matrix=reduced),), np.ones(len(reduced)))
        factors = RowFactors((index.features(),), (index.residuals(),), index.live)
        ends_at_head = search_scan(query, index.scan_table("head"), factors, width, rerank=False)
        return np.concatenate([end.rows for end in ends_at_head], axis=1)

    def _rank(
        self, method: Method, asked: Asked, rows: np.ndarray, k: int, own: list[Span] | None
    ) -> tuple[Ranking, Ranking]:
        search = self._search
        distinct = np.unique(rows)
        if method.spans is None:
            numbers, owners, spans = distinct, distinct, None
        else:
            find = span_finder("words") if method.saliency else self._find
            entries = span_rows(search.index, search.models.classifier(), distinct, find, unknown=method.saliency)
            numbers, owners, spans = np.arange(len(entries.rows)), entries.rows, entries.spans
            search = search.over(entries)
        if not len(numbers):
            raise InputError(f"{method.name}: the candidate rows have no span. Find spans otherwise (--spans).")
        scores, residuals = search.score([method], asked, {method.name: numbers})
        q = len(asked.targets)
        ends: list[Ranking] = []
        for largest in (True, False):
            found_rows, found_scores = np.empty((q, k), np.int64), np.empty((q, k))
            found_spans: list[list[Span]] = []
            n_scored = np.zeros(q, np.int64)
            for i in range(q):
                at = np.flatnonzero(np.isin(owners, rows[i]))
                if len(at) < k:
                    raise InputError(
                        f"{method.name}: the candidate rows have {len(at)} span(s), --top asks for {k}. Give a smaller "
                        "--top, or more --candidates."
                    )
                values = scores[method.name][i, at]
                order = at[np.lexsort((at, -values if largest else values))[:k]]
                found_rows[i], found_scores[i] = owners[order], scores[method.name][i, order]
                found_spans.append([] if spans is None else [spans[j] for j in order])
                n_scored[i] = len(at)
            ends.append(
                Ranking(
                    found_rows, found_scores, True, n_scored, residual=residuals.get(method.name),
                    spans=None if spans is None else found_spans, query_spans=own,
                )
            )  # fmt: skip
        return ends[0], ends[1]
