"""What evaluations that compare methods without retraining share: queries, scores, rank correlations, matrices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import InputError, NonFiniteError
from forebear.evaluation.common.statistics import INTERVALS, mean_of
from forebear.evaluation.reports.report import Cell, Figure, Table, heat_map
from forebear.indexer.gradients.whole import live_sample
from forebear.indexer.rows.row_source import RowSource
from forebear.retriever.answers.scores import Scores
from forebear.retriever.coverage import fit_lines
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import QUERY_BLOCK_ROWS, Retriever


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Test rows that are asked about.

    Attributes:
        source: Where they come from.
        rows: Their numbers there, ascending, ``(q,)``.
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

    def take(self, at: np.ndarray) -> Queries:
        """Some of them, by position."""
        return replace(
            self,
            rows=self.rows[at],
            texts=tuple([column[i] for i in at] for column in self.texts),
            labels=None if self.labels is None else self.labels[at],
            table=None if self.table is None else self.table.take(pa.array(at)),
        )

    def blocks(self, size: int = QUERY_BLOCK_ROWS) -> Iterator[Queries]:
        """Some of them at a time, by default as many as the retriever answers together."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))


def sample_queries(
    retriever: Retriever, source: RowSource, n_queries: int, seed: int, *, need_labels: bool = False
) -> Queries:
    """A seeded sample of test rows, in their order; all of them for 0 or more than there are.

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
        at = chosen[(chosen >= block.start) & (chosen < block.start + len(block))] - block.start
        for column, found in zip(texts, block.texts, strict=True):
            column += [found[i] for i in at]
        if label_ids is not None and block.labels is not None:
            labels.append(label_ids(block.labels, block.start)[at])
        tables.append(block.table.take(pa.array(at)))
    return Queries(
        source=source.name, rows=chosen, texts=texts, labels=np.concatenate(labels) if labels else None,
        table=pa.concat_tables(tables) if tables else None,
    )  # fmt: skip


def score_queries(retriever: Retriever, queries: Queries, spec: QuerySpec, rows: np.ndarray | None = None) -> Scores:
    """Exact scores of training rows (None: all live ones), ``(q, n)`` float64 by method name."""
    retriever.check_stores(spec.check(), spec)
    found = Scores.join([retriever.score_block(part.texts, part.labels, spec, rows=rows) for part in queries.blocks()])
    bad = [name for name, scores in found.items() if np.isnan(scores).any()]
    if bad:
        raise NonFiniteError(f"{bad[0]} gives NaN as a score. Check the model and the index (forebear verify).")
    return found


def standardised_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks of each query's scores, ties sharing their mean rank, with mean 0 and population std 1.

    Args:
        scores: ``(q, n)``.

    Returns:
        ``(q, n)``; a query whose scores are all equal has no order, and gets NaN.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).mean(axis=1, keepdims=True))
    return np.asarray(np.divide(ranks, spread, out=np.full_like(ranks, np.nan), where=spread > 0))


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation of two methods' scores ``(q, n)``, for each query ``(q,)``; NaN where it is undefined."""
    products = (standardised_ranks(first) * standardised_ranks(second)).mean(axis=1)
    return np.asarray(np.clip(products, -1.0, 1.0))


def defined_mean(values: np.ndarray) -> float | None:
    """Mean of the values that are defined (not NaN); None if none is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else None


def interval_cells(values: np.ndarray, seed: int) -> list[Cell]:
    """Mean, its standard error and its 95% bootstrap interval over the defined values; None where there are none."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return [None, None, None, None]
    found = mean_of(kept, seed)
    return [found.mean, found.error, found.low, found.high]


INTERVAL_COLUMNS = ("mean", "±", "95% low", "95% high")


def listed_values(values: np.ndarray) -> Any:
    """An array as nested lists for ``result.json``, None where it is NaN."""
    if values.ndim == 0:
        return None if np.isnan(values) else values.item()
    return [listed_values(part) for part in values]


def matrix_of(values: np.ndarray) -> list[list[float | None]]:
    """Means over the queries of ``(q, m, m)``, where they are defined."""
    m = values.shape[1]
    return [[defined_mean(values[:, i, j]) for j in range(m)] for i in range(m)]


def matrix_table(title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], note: str) -> Table:
    """A method a line and a column."""
    return Table(title, ["method", *names], [[name, *row] for name, row in zip(names, matrix, strict=True)], note)


def pair_table(title: str, names: Sequence[str], values: np.ndarray, seed: int, note: str) -> Table:
    """Every pair of methods with the interval of its mean over the queries, from ``(q, m, m)``."""
    rows: list[list[Cell]] = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            mine = values[:, i, j]
            rows.append([first, names[j], *interval_cells(mine, seed), int(np.isnan(mine).sum())])
    return Table(title, ["first", "second", *INTERVAL_COLUMNS, "undefined"], rows, note)


def matrix_figure(
    title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], *, low: float, caption: str
) -> Figure:
    """A heat map of values from ``low`` to 1."""
    return Figure(title, heat_map(names, names, matrix, low=low, high=1.0), caption)


def provenance(
    retriever: Retriever,
    spec: QuerySpec,
    command: str,
    *,
    residuals: Mapping[str, float] | None = None,
    **facts: object,
) -> dict[str, str]:
    """What a report says of where its numbers come from; ``residuals`` of H^-1 by method, where a solver iterated."""
    return {
        "index": str(retriever.index.folder),
        "index digest": retriever.index.manifest.digest(),
        **fit_lines(retriever.index, spec),
        "question digest": retriever.settled(spec).digest(retriever.index),
        "scope": spec.scope,
        "target": spec.target,
        **{name.replace("_", " "): str(value) for name, value in facts.items()},
        **{f"H^-1 of {name}": f"relative residual {r:.1e}" for name, r in (residuals or {}).items()},
        "95% intervals": INTERVALS,
        "command": command,
    }


def question(retriever: Retriever, spec: QuerySpec, residuals: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The same for programs: the question with every choice, and what it means for each method."""
    facts = json.loads(retriever.metadata(spec)["forebear"])
    return {"spec": asdict(spec), **facts, **({"residuals": dict(residuals)} if residuals else {})}
