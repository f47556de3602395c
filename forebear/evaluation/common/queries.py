"""Test rows that an evaluation asks about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from forebear.errors import InputError, NonFiniteError
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.sampling import live_sample
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores
from forebear.retriever.searchers import QUERY_BLOCK_ROWS

MOST_VALUES = 50  # of a column whose values part test rows into groups


@dataclass(frozen=True, kw_only=True)
class QueryRows:
    """Rows that an evaluation asks about, in the order of their file.

    Attributes:
        source: Name of the file or source that they come from.
        rows: Row numbers in that source, ascending, ``(q,)``.
        texts: One list a text column, ``q`` texts each.
        labels: Class ids of the model, ``(q,)``; None where the source has none.
        table: The rows with all their columns, where spans may be given; None where they come from no file.
        left_out: Numbers of the sampled rows that hold no span that the model reads, where methods compare spans.
    """

    source: str
    rows: np.ndarray
    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    table: pa.Table | None = None
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> QueryRows:
        """The rows at some positions, ``(m,)``."""
        return replace(
            self,
            rows=self.rows[positions],
            texts=tuple([column[i] for i in positions] for column in self.texts),
            labels=None if self.labels is None else self.labels[positions],
            table=None if self.table is None else self.table.take(pa.array(positions)),
        )

    def by_value(self, column: str) -> dict[str, np.ndarray]:
        """The rows of each value of a column, as masks ``(q,)`` by the value as text, in the order of the rows.

        Raises:
            InputError: The rows have no such column, or it has more than :data:`MOST_VALUES` values.
        """
        names = [] if self.table is None else self.table.column_names
        if self.table is None or column not in names:
            raise InputError(f"--group-by {column}: {self.source} has no such column; it has {listed(names)}.")
        values = np.array([str(value) for value in self.table.column(column).to_pylist()])
        distinct = dict.fromkeys(values.tolist())
        if len(distinct) > MOST_VALUES:
            raise InputError(
                f"--group-by {column}: {len(distinct):,} values in {self.source}; expected at most {MOST_VALUES}."
            )
        return {value: values == value for value in distinct}

    def blocks(self, size: int = QUERY_BLOCK_ROWS) -> Iterator[QueryRows]:
        """All rows in blocks of ``size``, by default as many as the retriever answers together."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))


def sample_queries(
    retriever: Retriever, source: RowSource, n_queries: int, seed: int, *, need_labels: bool = False
) -> QueryRows:
    """A seeded sample of test rows, in the order of their file; all rows if ``n_queries`` is 0 or exceeds them.

    Raises:
        MismatchError: The source does not have the index's number of texts.
        DataError: Labels are needed and missing, or are not the model's.
        InputError: The number is negative.
    """
    if n_queries < 0:
        raise InputError(f"--queries {n_queries}: expected a number of test rows, or 0 for all of them.")
    retriever.check_texts(source)
    label_ids = retriever.query_labels(source, required=need_labels)
    chosen = live_sample(np.arange(source.n_rows), n_queries, seed)
    texts: tuple[list[str], ...] = tuple([] for _ in source.text_columns)
    labels: list[np.ndarray] = []
    tables: list[pa.Table] = []
    for block in source.blocks():
        positions = chosen[(chosen >= block.start) & (chosen < block.start + len(block))] - block.start
        for column, block_texts in zip(texts, block.texts, strict=True):
            column += [block_texts[i] for i in positions]
        if label_ids is not None and block.labels is not None:
            labels.append(label_ids(block.labels, block.start)[positions])
        tables.append(block.table.take(pa.array(positions)))
    return QueryRows(
        source=source.name, rows=chosen, texts=texts, labels=np.concatenate(labels) if labels else None,
        table=pa.concat_tables(tables) if tables else None,
    )  # fmt: skip


def refuse_methods(question: Question, is_refused: Callable[[Method], object], because: str) -> None:
    """Refuse methods that mean nothing for an evaluation.

    Args:
        question: Whose methods are looked at.
        is_refused: Whether a method is refused.
        because: What such a method does, a sentence whose subject is its name.

    Raises:
        InputError: A method is refused; the message names the first.
    """
    for method in question.methods:
        if is_refused(method):
            raise InputError(f"{method.name} {because} Leave it out of --method.")


def refuse_spans(question: Question) -> None:
    """Refuse methods that rank spans, for evaluations that count rows."""
    refuse_methods(question, lambda method: method.spans, "ranks spans, of which a row has several.")


def refuse_saliency(question: Question) -> None:
    """Refuse methods that are asked of a word's saliency, for evaluations of predictions."""
    refuse_methods(question, lambda method: method.saliency, "explains the saliency of a word, not a prediction.")


def score_queries(
    retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question, rows: np.ndarray | None = None
) -> Scores:
    """Exact scores of training rows (None: all live ones), ``(q, n)`` float64 by method name."""
    question = retriever.resolve(spec)
    joined = Scores.join(
        [retriever.score_block(part.texts, part.labels, question, rows=rows) for part in queries.blocks()]
    )
    bad = [name for name, scores in joined.items() if np.isnan(scores).any()]
    if bad:
        raise NonFiniteError(f"{bad[0]} gives NaN as a score. Check the model and the index (forebear verify).")
    return joined
