"""Answers as tables: one row a result, a bounded number of results at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.indexer.index import Index
from forebear.indexer.storage.ragged import offsets
from forebear.retriever.question.methods import Method
from forebear.retriever.ranking import Ranking
from forebear.retriever.words.vocabulary import token_texts

SIDES = ("proponent", "opponent")
TABLE_RESULTS = 1 << 17  # results of one table, at most
TABLE_TEXT_BYTES = 1 << 27  # of the texts that one table holds, unless a single one is longer
ANSWER_BYTES = 1 << 26  # what the rankings of the test rows that are asked together may take
_RESULT_BYTES, _SPAN_BYTES, _WORDS_BYTES = 16, 128, 1024  # of a result in a ranking: row and score; its span; its words


@dataclass(frozen=True)
class Answers:
    """Answers to a block of ``q`` test rows.

    Attributes:
        start: Row number of the first of them in the test file.
        labels: Gold class ids ``(q,)``, or None.
        predictions: Predicted class ids, ``(q,)``.
        targets: Class ids whose loss was explained, ``(q,)``. Of an aggregate, labels, predictions and targets are
            those that all its test rows share, else -1.
        found: (proponents, opponents) by method name.
    """

    start: int
    labels: np.ndarray | None
    predictions: np.ndarray
    targets: np.ndarray
    found: dict[str, tuple[Ranking, Ranking]]


def queries_together(methods: Sequence[Method], top: int) -> int:
    """Test rows whose rankings fit in memory together; at least one."""
    sizes = [
        _RESULT_BYTES + (_SPAN_BYTES if m.spans else 0) + (_WORDS_BYTES if m.representation == "words" else 0)
        for m in methods
    ]
    return max(1, ANSWER_BYTES // (len(SIDES) * top * sum(sizes)))


def answer_tables(index: Index, answers: Answers, tokenizer: Any) -> Iterator[pa.Table]:
    """The columns of DESIGN.md's section 5, ordered by query, method, side and rank.

    No table grows with the number of queries, methods or results: each holds a stretch of them, and a text once.

    Args:
        index: That was asked.
        answers: To its questions.
        tokenizer: Names the shared words.
    """
    first = next(iter(answers.found.values()))[0]
    shape = (len(answers.predictions), len(answers.found), len(SIDES), first.rows.shape[1])
    n_results, start = int(np.prod(shape)), 0
    while start < n_results:
        stop = min(start + TABLE_RESULTS, n_results)
        some = _Results(answers, *np.unravel_index(np.arange(start, stop), shape))
        while stop - start > 1 and index.row_texts.sizes[np.unique(some.rows)].sum() > TABLE_TEXT_BYTES:
            stop = start + (stop - start) // 2
            some = _Results(answers, *np.unravel_index(np.arange(start, stop), shape))
        yield _table(index, some, tokenizer)
        start = stop


@dataclass(frozen=True)
class _Results:
    """Some results, ``(n,)``: query, method and side of each by position, and its rank from 0."""

    answers: Answers
    query: np.ndarray
    method: np.ndarray
    side: np.ndarray
    rank: np.ndarray

    @cached_property
    def rankings(self) -> list[tuple[Ranking, np.ndarray]]:
        """Each ranking that results stand in, and which of the results these are."""
        ends = [end for pair in self.answers.found.values() for end in pair]
        number = len(SIDES) * self.method + self.side
        return [(ends[i], np.flatnonzero(number == i)) for i in np.unique(number)]

    def numbers(self, value: Callable[[Ranking, np.ndarray, np.ndarray], Any], kind: Any) -> np.ndarray:
        """A number of each result, from its ranking, query and rank."""
        out = np.empty(len(self.query), kind)
        for ranking, at in self.rankings:
            out[at] = value(ranking, self.query[at], self.rank[at])
        return out

    def objects(self, value: Callable[[Ranking, int, int], Any]) -> list[Any]:
        """The same of anything."""
        out: list[Any] = [None] * len(self.query)
        for ranking, at in self.rankings:
            for n, i, j in zip(at.tolist(), self.query[at].tolist(), self.rank[at].tolist(), strict=True):
                out[n] = value(ranking, i, j)
        return out

    def some_have(self, name: str) -> bool:
        """Whether any ranking of the question has this part; then all its tables have the column."""
        return any(getattr(end, name) is not None for pair in self.answers.found.values() for end in pair)

    @cached_property
    def rows(self) -> np.ndarray:
        """Training row of each."""
        return self.numbers(lambda ranking, query, rank: ranking.rows[query, rank], np.int64)


def _table(index: Index, some: _Results, tokenizer: Any) -> pa.Table:
    answers, rows, names = some.answers, some.rows, index.manifest.spec.label_names
    columns: dict[str, pa.Array] = {
        "query": pa.array(answers.start + some.query),
        "query_label": pa.nulls(len(rows), pa.string())
        if answers.labels is None
        else _named(names, answers.labels[some.query]),
        "query_prediction": _named(names, answers.predictions[some.query]),
        "target": _named(names, answers.targets[some.query]),
        "method": _named(list(answers.found), some.method),
        "side": _named(SIDES, some.side),
        "rank": pa.array((some.rank + 1).astype(np.int32)),
        "row": pa.array(rows),
        "score": pa.array(some.numbers(lambda ranking, query, rank: ranking.scores[query, rank], np.float64)),
        "exact": pa.array(some.numbers(lambda ranking, _query, _rank: ranking.exact, bool)),
        "label": _named(names, index.labels[rows]),
        "prediction": _named(names, index.predictions[rows]),
    }
    texts = index.texts(rows)
    columns |= _search_columns(some)
    if some.some_have("spans"):
        columns |= _span_columns(some, list(texts.values()))
    if some.some_have("words"):
        columns |= _word_columns(some, tokenizer)
    for name, values in texts.items():
        columns[name if name not in columns else f"row_{name}"] = values
    return pa.table(columns)


def _named(names: Sequence[str], ids: np.ndarray) -> pa.Array:
    """Names by number; null where the number is below 0."""
    return pa.array(names, pa.string()).take(pa.array(ids, mask=ids < 0))


def _search_columns(some: _Results) -> dict[str, pa.Array]:
    """``residual`` where a solver iterated; ``proven`` and ``rows_scored`` where proofs were asked for."""
    columns = {}
    if some.some_have("residual"):
        found = some.numbers(lambda r, query, _: np.nan if r.residual is None else r.residual[query], np.float64)
        columns["residual"] = pa.array(found, from_pandas=True)
    if some.some_have("proven"):
        found = some.numbers(lambda r, query, _: True if r.proven is None else r.proven[query], bool)
        columns["proven"] = pa.array(found)
        columns["rows_scored"] = pa.array(some.numbers(lambda r, query, _: r.n_scored[query], np.int64))
    return columns


def _span_columns(some: _Results, texts: Sequence[pa.DictionaryArray]) -> dict[str, pa.Array]:
    """Span of each result and of its test row: text column and ends, and the text of the former; null where none is.

    ``spans_cut``: how many spans of what was searched the model does not read (they lie beyond its longest input, or
    hold nothing but white space), and were left out.
    """
    spans = some.objects(lambda r, i, j: None if r.spans is None else r.spans[i][j])
    own = some.objects(lambda r, i, _: None if r.query_spans is None else r.query_spans[i])
    cut = some.objects(lambda r, i, _: None if r.n_cut is None else int(r.n_cut[i]))
    held = [(column.indices.to_pylist(), column.dictionary.to_pylist()) for column in texts]
    found: list[str | None] = []
    for n, span in enumerate(spans):
        if span is None:
            found.append(None)
            continue
        indices, distinct = held[span.column]
        found.append(distinct[indices[n]][span.start : span.end])
    out = {"span": pa.array(found, pa.large_string()).dictionary_encode()}
    for prefix, listed in (("span", spans), ("query_span", own)):
        for part in ("column", "start", "end"):
            values = [None if span is None else getattr(span, part) for span in listed]
            out[f"{prefix}_{part}"] = pa.array(values, pa.int32())
    out["spans_cut"] = pa.array(cut, pa.int64())
    return out


def _word_columns(some: _Results, tokenizer: Any) -> dict[str, pa.Array]:
    """Shared words of each result and what each contributes to the score; null where scores are no sums of words."""
    found = some.objects(lambda r, i, j: None if r.words is None else r.words[i][j])
    starts = pa.array(offsets(np.array([0 if one is None else len(one[0]) for one in found])).astype(np.int32))
    missing = pa.array([one is None for one in found])
    shared = [one for one in found if one is not None]
    ids = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in shared)]).astype(np.int32)
    contributions = np.concatenate([np.empty(0), *(values for _, values in shared)])
    distinct, places = np.unique(ids, return_inverse=True)
    names = pa.array(token_texts(tokenizer, distinct.tolist()), pa.string())
    return {
        name: pa.ListArray.from_arrays(starts, values, mask=missing)
        for name, values in (
            ("word_ids", pa.array(ids)),
            ("words", names.take(pa.array(places))),
            ("contributions", pa.array(contributions)),
        )
    }
