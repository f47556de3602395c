"""Training rows as passages of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import numpy.typing as npt

from forebear.evaluation.reports.report import Cell, Passage
from forebear.retriever.retriever import Retriever

NO_LABEL = -1


def row_passages(
    retriever: Retriever,
    rows: npt.ArrayLike,
    headings: Sequence[str],
    *,
    facts: Sequence[Mapping[str, Cell]] | None = None,
    highlighted: Sequence[Set[str]] | None = None,
    notes: Sequence[str] | None = None,
) -> list[Passage]:
    """Training rows with their texts, labels, predictions and losses.

    Args:
        retriever: Over the index.
        rows: Row numbers, ``(m,)``.
        headings: One for each row, such as ``neighbour · row 12``.
        facts: Further facts of each row, shown between its prediction and its loss.
        highlighted: Words to mark in each row's texts.
        notes: A remark on each row.
    """
    index, names = retriever.index, retriever.label_names
    numbers = np.asarray(rows, dtype=np.int64)
    columns = {name: column.to_pylist() for name, column in index.texts(numbers).items()}
    passages = []
    for i, row in enumerate(numbers.tolist()):
        shown: dict[str, Cell] = {"label": names[index.labels[row]], "prediction": names[index.predictions[row]]}
        passages.append(
            Passage(
                headings[i],
                {name: texts[i] for name, texts in columns.items()},
                highlighted[i] if highlighted else frozenset(),
                {**shown, **(facts[i] if facts else {}), "loss": float(index.losses[row])},
                notes[i] if notes else "",
            )
        )
    return passages


def rank_headings(rows: npt.ArrayLike, scores: npt.ArrayLike) -> list[str]:
    """Headings of rows in the order of their scores, such as ``rank 1 · row 12 · score 0.42``."""
    pairs = zip(np.asarray(rows).tolist(), np.asarray(scores).tolist(), strict=True)
    return [f"rank {rank} · row {row} · score {score:.4g}" for rank, (row, score) in enumerate(pairs, start=1)]
