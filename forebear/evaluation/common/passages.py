"""Training rows as passages of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from forebear.evaluation.reports.report import Cell, Passage
from forebear.indexer.index import Index
from forebear.retriever.answers.results import user_columns
from forebear.retriever.retriever import Retriever

NO_LABEL = -1


def row_columns(index: Index, rows: npt.ArrayLike) -> dict[str, list[Cell]]:
    """The user's columns of training rows as cells of a table, by ``column: NAME``; dates and times as text."""
    return {f"column: {name}": cells for name, cells in _cells(index, rows).items()}


def row_cells(index: Index, rows: np.ndarray) -> dict[str, list[Cell]]:
    """The same, and the texts of the rows by ``text: NAME``."""
    return row_columns(index, rows) | {f"text: {name}": of.to_pylist() for name, of in index.texts(rows).items()}


def _cells(index: Index, rows: npt.ArrayLike) -> dict[str, list[Cell]]:
    """The same by the names that results give them."""
    names, table = user_columns(index), index.columns(rows)
    return {names[name]: [_cell(value) for value in table.column(name).to_pylist()] for name in table.column_names}


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def row_passages(
    retriever: Retriever,
    rows: npt.ArrayLike,
    headings: Sequence[str],
    *,
    facts: Sequence[Mapping[str, Cell]] | None = None,
    highlighted: Sequence[Set[str]] | None = None,
    notes: Sequence[str] | None = None,
) -> list[Passage]:
    """Training rows with their texts, labels, predictions, losses, and what the user's columns say of them.

    Args:
        retriever: Over the index.
        rows: Row numbers, ``(m,)``.
        headings: One for each row, such as ``neighbour · row 12``.
        facts: Further facts of each row, shown between its prediction and its loss.
        highlighted: Words to mark in each row's texts.
        notes: A remark on each row.
    """
    index = retriever.index
    numbers = np.asarray(rows, dtype=np.int64)
    columns = {name: column.to_pylist() for name, column in index.texts(numbers).items()}
    others = _cells(index, numbers)
    labels, predictions = index.label_texts(numbers), index.prediction_texts(numbers)
    passages = []
    for i, row in enumerate(numbers.tolist()):
        shown: dict[str, Cell] = {"label": labels[i], "prediction": predictions[i]}
        passages.append(
            Passage(
                headings[i],
                {name: texts[i] for name, texts in columns.items()},
                highlighted[i] if highlighted else frozenset(),
                {
                    **shown,
                    **(facts[i] if facts else {}),
                    "loss": float(index.losses[row]),
                    **{name: cells[i] for name, cells in others.items() if cells[i] is not None},
                },
                notes[i] if notes else "",
            )
        )
    return passages


def rank_headings(rows: npt.ArrayLike, scores: npt.ArrayLike) -> list[str]:
    """Headings of rows in the order of their scores, such as ``rank 1 · row 12 · score 0.42``."""
    pairs = zip(np.asarray(rows).tolist(), np.asarray(scores).tolist(), strict=True)
    return [f"rank {rank} · row {row} · score {score:.4g}" for rank, (row, score) in enumerate(pairs, start=1)]
