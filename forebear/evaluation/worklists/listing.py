"""Rows of an index as a work list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forebear.errors import NonFiniteError
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.evaluation.worklists.lines import lines_of
from forebear.indexer.index import Index
from forebear.indexer.storage.stored_rows import StoredRows


def list_rows(
    index: Index,
    rows: npt.ArrayLike,
    reasons: Sequence[str],
    *,
    suggested: Sequence[str | None] | None = None,
    evidence: Mapping[str, npt.ArrayLike] | None = None,
    contradicting: Sequence[npt.ArrayLike] | None = None,
    probabilities: npt.ArrayLike | None = None,
    notes: Sequence[str] | None = None,
) -> WorkList:
    """A work list of some rows, with the texts, the label and the place in its file that the index knows of each.

    Args:
        index: The index.
        rows: Row numbers, ``(m,)``, in the order in which they should be looked at.
        reasons: Why each is listed, a sentence each.
        suggested: Another label for each, as ``index.loss.texts`` writes it; None: for none.
        evidence: Figures by name, ``(m,)`` each; NaN where a row has none.
        contradicting: Rows that contradict each.
        probabilities: That each label is wrong, ``(m,)``, where that was measured; NaN for a row without.
        notes: A note on each.

    Raises:
        NonFiniteError: A figure is infinite.
    """
    numbers = np.asarray(rows, dtype=np.int64).reshape(-1)
    texts = {} if index.manifest.without_texts else {n: c.to_pylist() for n, c in index.texts(numbers).items()}
    given = index.label_texts(numbers)
    figures = {name: np.asarray(values, np.float64) for name, values in (evidence or {}).items()}
    if infinite := [name for name, values in figures.items() if np.isinf(values).any()]:
        raise NonFiniteError(f"evidence {infinite[0]!r} is infinite; expected numbers.")
    chances = np.full(len(numbers), np.nan) if probabilities is None else np.asarray(probabilities, np.float64)
    items = []
    for i, row in enumerate(numbers.tolist()):
        own = {name: values[i] for name, values in texts.items()}
        source, source_row = source_of(index, row)
        items.append(
            Item(
                row=row,
                texts=own,
                given=given[i],
                suggested=None if suggested is None else suggested[i],
                evidence={name: float(values[i]) for name, values in figures.items() if not np.isnan(values[i])},
                contradicting=() if contradicting is None else tuple(np.asarray(contradicting[i], np.int64).tolist()),
                probability=None if np.isnan(chances[i]) else float(chances[i]),
                reason=reasons[i],
                note="" if notes is None else notes[i],
                source=source,
                source_row=source_row,
                digest=text_digest(own.values()) if own else None,
            )
        )
    return WorkList(tuple(_with_lines(index, items)))


def _with_lines(index: Index, items: list[Item]) -> list[Item]:
    """The items with their lines, where the training files lie where the index was built from them."""
    lines: dict[tuple[str, int], int] = {}
    for segment in index.manifest.segments:
        digests = {
            item.source_row: item.digest
            for item in items
            if item.source_row is not None
            and item.digest is not None
            and segment.start <= item.row < segment.start + segment.n_rows
        }
        found = lines_of(Path(segment.source), digests, index.manifest.spec.text_columns, segment.row_format)
        lines |= {(segment.source, row): line for row, line in found.items()}
    return [
        replace(item, line=lines.get((item.source or "", -1 if item.source_row is None else item.source_row)))
        for item in items
    ]


def source_of(index: StoredRows, row: int) -> tuple[str, int | None]:
    """The file that a training row came from, and its number there, from 0; None where rows of it were left out."""
    segment = next(s for s in index.manifest.segments if s.start <= row < s.start + s.n_rows)
    return segment.source, None if segment.n_left_out else row - segment.start
