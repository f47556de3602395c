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
TABLE_TEXT_BYTES = 1 << 27  # bytes of the texts that one table holds, unless a single text is longer
ANSWER_BYTES = 1 << 26  # bytes that the rankings of the test rows of one block may take
RESULT_COLUMNS = frozenset(
    [
        *("query", "query_label", "query_prediction", "target", "method", "side", "rank", "row", "score", "exact"),
        *("label", "prediction", "residual", "iterations", "proven", "rows_scored"),
        *("word_ids", "words", "contributions"),
        *("span", "span_column", "span_start", "span_end"),
        *("query_span_column", "query_span_start", "query_span_end", "spans_cut", "hub_share"),
        *("effect", "effect_probability", "effect_together", "effect_probability_together"),
    ]
)  # of all tables of results, besides the texts
_RESULT_BYTES, _SPAN_BYTES, _WORDS_BYTES = 32, 128, 1024  # for each result: row, score, effects; span; words


@dataclass(frozen=True)
class Answers:
    """Answers to a block of ``q`` test rows.

    Attributes:
        start: Row number of the first test row in its file.
        labels: Gold targets, or None: of one label a row class ids ``(q,)``, else numbers ``(q, c)``, as are the next.
        predictions: What the model says.
        targets: Whose loss was explained. In the answer of an aggregate, labels, predictions and targets are those that
            all its test rows share, else -1 (of numbers, NaN).
        rankings: (proponents, opponents) by method name.
    """

    start: int
    labels: np.ndarray | None
    predictions: np.ndarray
    targets: np.ndarray
    rankings: dict[str, tuple[Ranking, Ranking]]


def queries_together(methods: Sequence[Method], top: int) -> int:
    """Number of test rows whose rankings fit in memory together; at least one."""
    sizes = [
        _RESULT_BYTES + (_SPAN_BYTES if m.spans else 0) + (_WORDS_BYTES if m.representation == "words" else 0)
        for m in methods
    ]
    return max(1, ANSWER_BYTES // (len(SIDES) * top * sum(sizes)))


def text_columns(index: Index) -> list[str]:
    """Names that the training rows' texts have in a table of results: ``row_NAME`` where a result has a ``NAME``."""
    return [f"row_{name}" if name in RESULT_COLUMNS else name for name in index.manifest.spec.text_columns]


def user_columns(index: Index) -> dict[str, str]:
    """Names that the other columns of training rows have in a table of results, by their names in the training file.

    ``row_NAME`` where a result or a text has a ``NAME`` already.
    """
    taken, names = {*RESULT_COLUMNS, *text_columns(index)}, dict[str, str]()
    for name in index.manifest.columns:
        shown = name
        while shown in taken:
            shown = f"row_{shown}"
        taken.add(shown)
        names[name] = shown
    return names


def answer_tables(index: Index, answers: Answers, tokenizer: Any) -> Iterator[pa.Table]:
    """Tables of results with the columns that ``docs/answers.md`` lists, by query, method, side and rank.

    No table grows with the number of queries, methods or results: each holds a range of the results, and every text
    of these once.

    Args:
        index: The index that gave the answers.
        answers: Answers to a block of test rows.
        tokenizer: The model's tokenizer, which turns ids of shared words into text.
    """
    first = next(iter(answers.rankings.values()))[0]
    shape = (len(answers.predictions), len(answers.rankings), len(SIDES), first.rows.shape[1])
    n_results, start = int(np.prod(shape)), 0
    while start < n_results:
        stop = min(start + TABLE_RESULTS, n_results)
        results = _Results(answers, *np.unravel_index(np.arange(start, stop), shape))
        while stop - start > 1 and _text_bytes(index, results.rows) > TABLE_TEXT_BYTES:
            stop = start + (stop - start) // 2
            results = _Results(answers, *np.unravel_index(np.arange(start, stop), shape))
        yield _table(index, results, tokenizer)
        start = stop


def _text_bytes(index: Index, rows: np.ndarray) -> int:
    """Bytes of the texts and other strings of some rows, each row counted once."""
    distinct = np.unique(rows)
    return int(index.row_texts.sizes[distinct].sum() + index.row_columns.sizes[distinct].sum())


@dataclass(frozen=True)
class _Results:
    """A range of ``n`` results: position of each one's query, method and side, and its rank from 0, ``(n,)`` each."""

    answers: Answers
    query: np.ndarray
    method: np.ndarray
    side: np.ndarray
    rank: np.ndarray

    @cached_property
    def rankings(self) -> list[tuple[Ranking, np.ndarray]]:
        """Each ranking that holds results of the range, with the positions of these results."""
        ends = [end for pair in self.answers.rankings.values() for end in pair]
        number = len(SIDES) * self.method + self.side
        return [(ends[i], np.flatnonzero(number == i)) for i in np.unique(number)]

    def numbers(self, value: Callable[[Ranking, np.ndarray, np.ndarray], Any], kind: Any) -> np.ndarray:
        """``value(ranking, query, rank)`` of each result, as an array of type ``kind``, ``(n,)``."""
        out = np.empty(len(self.query), kind)
        for ranking, positions in self.rankings:
            out[positions] = value(ranking, self.query[positions], self.rank[positions])
        return out

    def objects(self, value: Callable[[Ranking, int, int], Any]) -> list[Any]:
        """``value(ranking, query, rank)`` of each result, as a list of objects."""
        out: list[Any] = [None] * len(self.query)
        for ranking, positions in self.rankings:
            for position, i, j in zip(
                positions.tolist(), self.query[positions].tolist(), self.rank[positions].tolist(), strict=True
            ):
                out[position] = value(ranking, i, j)
        return out

    def any_has(self, name: str) -> bool:
        """Whether any ranking has the attribute ``name``; all tables of the answer then have its column."""
        return any(getattr(end, name) is not None for pair in self.answers.rankings.values() for end in pair)

    @cached_property
    def rows(self) -> np.ndarray:
        """Training row of each result, ``(n,)``."""
        return self.numbers(lambda ranking, query, rank: ranking.rows[query, rank], np.int64)


def _table(index: Index, results: _Results, tokenizer: Any) -> pa.Table:
    answers, rows = results.answers, results.rows
    columns: dict[str, pa.Array] = {
        "query": pa.array(answers.start + results.query),
        "query_label": pa.nulls(len(rows), pa.string())
        if answers.labels is None
        else target_texts(index, answers.labels, results.query),
        "query_prediction": target_texts(index, answers.predictions, results.query),
        "target": target_texts(index, answers.targets, results.query),
        "method": _named(list(answers.rankings), results.method),
        "side": _named(SIDES, results.side),
        "rank": pa.array((results.rank + 1).astype(np.int32)),
        "row": pa.array(rows),
        "score": pa.array(results.numbers(lambda ranking, query, rank: ranking.scores[query, rank], np.float64)),
        **_effect_columns(results),
        "exact": pa.array(results.numbers(lambda ranking, _query, _rank: ranking.exact, bool)),
        "label": target_texts(index, index.labels, rows),
        "prediction": target_texts(index, index.predictions, rows),
    }
    texts = index.texts(rows)
    columns |= _search_columns(results)
    if results.any_has("spans"):
        columns |= _span_columns(results, list(texts.values()))
    if results.any_has("words"):
        columns |= _word_columns(results, tokenizer)
    columns |= dict(zip(text_columns(index), texts.values(), strict=True))
    others = index.row_columns.columns(rows)
    return pa.table(columns | {shown: others[name] for name, shown in user_columns(index).items()})


def target_texts(index: Index, targets: np.ndarray, positions: np.ndarray) -> pa.Array:
    """The targets at some positions as people read them; null where there is none."""
    names = index.manifest.spec.label_names
    if targets.ndim == 1:
        return _named(names, targets[positions])
    distinct, places = np.unique(positions, return_inverse=True)
    texts = index.loss.texts(targets[distinct].astype(np.float64), names)
    return pa.array(texts, pa.string()).take(pa.array(places))


def _named(names: Sequence[str], ids: np.ndarray) -> pa.Array:
    """Names by number; null where the number is below 0."""
    return pa.array(names, pa.string()).take(pa.array(ids, mask=ids < 0))


def _effect_columns(results: _Results) -> dict[str, pa.Array]:
    """Effects, where a method of the answer estimates them; null for the methods that do not."""

    columns: dict[str, np.ndarray] = {}

    def add(column: str, name: str, place: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Any]]) -> None:
        def values(ranking: Ranking, query: np.ndarray, rank: np.ndarray) -> Any:
            found = getattr(ranking, name)
            return np.nan if found is None else found[place(query, rank)]

        if results.any_has(name):
            columns[column] = results.numbers(values, np.float64)

    add("effect", "effects", lambda query, rank: (query, rank))
    add("effect_probability", "effect_probabilities", lambda query, rank: (query, rank))
    add("effect_together", "effects_together", lambda query, _rank: (query, 0))
    add("effect_probability_together", "effects_together", lambda query, _rank: (query, 1))
    return {name: pa.array(values, from_pandas=True) for name, values in columns.items()}


def _search_columns(results: _Results) -> dict[str, pa.Array]:
    """What a solver that iterated says; ``proven`` and ``rows_scored`` where proofs were asked for."""
    columns = {}

    def of_solver(name: str) -> np.ndarray:
        def values(ranking: Ranking, query: np.ndarray, _rank: np.ndarray) -> Any:
            return np.nan if ranking.convergence is None else getattr(ranking.convergence, name)[query]

        return results.numbers(values, np.float64)

    if results.any_has("convergence"):
        columns["residual"] = pa.array(of_solver("residual"), from_pandas=True)
        columns["iterations"] = pa.array(of_solver("iterations"), from_pandas=True).cast(pa.int64())
    if results.any_has("proven"):
        values = results.numbers(lambda r, query, _: True if r.proven is None else r.proven[query], bool)
        columns["proven"] = pa.array(values)
        columns["rows_scored"] = pa.array(results.numbers(lambda r, query, _: r.n_scored[query], np.int64))
    return columns


def _span_columns(results: _Results, texts: Sequence[pa.DictionaryArray]) -> dict[str, pa.Array]:
    """Span of each result and of its test row (text column, start, end), and the text of the result's span.

    They are null where a result has no span. ``spans_cut`` counts the spans of the searched rows that were left out
    because the model does not read them: they lie beyond its longest input, or hold nothing but white space.
    """
    spans = results.objects(lambda r, i, j: None if r.spans is None else r.spans[i][j])
    query_spans = results.objects(lambda r, i, _: None if r.query_spans is None else r.query_spans[i])
    n_cut = results.objects(lambda r, i, _: None if r.n_cut is None else int(r.n_cut[i]))
    columns = [(column.indices.to_pylist(), column.dictionary.to_pylist()) for column in texts]
    span_texts: list[str | None] = []
    for position, span in enumerate(spans):
        if span is None:
            span_texts.append(None)
            continue
        indices, distinct = columns[span.column]
        span_texts.append(distinct[indices[position]][span.start : span.end])
    out = {"span": pa.array(span_texts, pa.large_string()).dictionary_encode()}
    for prefix, listed in (("span", spans), ("query_span", query_spans)):
        for part in ("column", "start", "end"):
            values = [None if span is None else getattr(span, part) for span in listed]
            out[f"{prefix}_{part}"] = pa.array(values, pa.int32())
    out["spans_cut"] = pa.array(n_cut, pa.int64())
    return out


def _word_columns(results: _Results, tokenizer: Any) -> dict[str, pa.Array]:
    """Shared words of each result and what each contributes to the score; null where scores are no sums of words."""
    words = results.objects(lambda r, i, j: None if r.words is None else r.words[i][j])
    starts = pa.array(offsets(np.array([0 if pair is None else len(pair[0]) for pair in words])).astype(np.int32))
    missing = pa.array([pair is None for pair in words])
    shared = [pair for pair in words if pair is not None]
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
