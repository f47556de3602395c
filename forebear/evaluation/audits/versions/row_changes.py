"""Which training rows of an index are new, or labelled otherwise, beside an earlier index; rows are matched by content.

Texts are compared exactly, all text columns together; labels by their names, since two versions may number them
otherwise. Equal rows are matched one by one, in row order: of three copies beside one in the earlier index, the last
two are copies that the earlier index does not have.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from forebear.errors import InputError, MismatchError
from forebear.evaluation.worklists.items import text_digest
from forebear.indexer.index import Index

SAME, RELABELLED, COPY, NEW = "same", "relabelled", "copy", "new"
KINDS: Final = (SAME, RELABELLED, COPY, NEW)
NO_ROW = -1
_BLOCK_ROWS = 8192
_Row = tuple[str, str]  # digest of the texts, and label


@dataclass(frozen=True, kw_only=True)
class RowChanges:
    """The live rows of an index beside those of an earlier one.

    Attributes:
        rows: Live rows of the index, ``(n,)``.
        kinds: What each is, by its number in :data:`KINDS`, ``(n,)``.
        before: The row of the earlier index that each was matched with, ``(n,)``; -1 where there is none.
        dropped: Live rows of the earlier index that were matched with none, ascending.
    """

    rows: np.ndarray
    kinds: np.ndarray
    before: np.ndarray
    dropped: np.ndarray

    def of_kind(self, kind: str) -> np.ndarray:
        """Whether each row is of a kind, ``(n,)`` bool."""
        return np.asarray(self.kinds == KINDS.index(kind))

    @property
    def changed(self) -> np.ndarray:
        """Whether each row is other than in the earlier index, ``(n,)`` bool."""
        return ~self.of_kind(SAME)

    @property
    def of_changed(self) -> RowChanges:
        """The same of the changed rows alone."""
        own = self.changed
        return replace(self, rows=self.rows[own], kinds=self.kinds[own], before=self.before[own])


def check_versions(index: Index, before: Index) -> None:
    """Refuse two indexes that are no versions of one another.

    Raises:
        InputError: Both are the same index.
        MismatchError: They have other text columns, or other labels.
    """
    if index.manifest.digest() == before.manifest.digest():
        raise InputError(
            f"{before.folder} is the same index as {index.folder}. Name the index of the version before (--before)."
        )
    new, old = index.manifest.spec, before.manifest.spec
    columns = [tuple(one.text_columns) for one in (new, old)]
    if len(columns[0]) != len(columns[1]) or (columns[0] != columns[1] and set(columns[0]) == set(columns[1])):
        raise MismatchError(
            f"{before.folder} has the text columns {', '.join(columns[1])}; expected those of {index.folder}, "
            f"{', '.join(columns[0])}, in the same order."
        )
    if set(new.label_names) != set(old.label_names):
        raise MismatchError(
            f"{before.folder} has the labels {', '.join(old.label_names)}; expected those of {index.folder}: "
            f"{', '.join(new.label_names)}."
        )
    for one in (index, before):
        one.check_texts_held("audit regressions matches rows by their texts")


def row_changes(index: Index, before: Index) -> RowChanges:
    """Match the live rows of an index with those of an earlier one.

    Equal texts and labels are matched first, then equal texts whose label changed.
    """
    unmatched: dict[str, dict[str, deque[int]]] = defaultdict(dict)
    for row, (digest, label) in _contents(before):
        unmatched[digest].setdefault(label, deque()).append(row)
    rows, contents = index.live, [content for _, content in _contents(index)]
    matched = np.full(len(rows), NO_ROW, np.int64)
    kinds = np.full(len(rows), KINDS.index(NEW), np.int8)
    for i, (digest, label) in enumerate(contents):
        if digest in unmatched and (same := unmatched[digest].get(label)):
            matched[i], kinds[i] = same.popleft(), KINDS.index(SAME)
    for i in np.flatnonzero(matched == NO_ROW).tolist():
        digest, _ = contents[i]
        if digest not in unmatched:
            continue
        left = [of_label for of_label in unmatched[digest].values() if of_label]
        kinds[i] = KINDS.index(COPY)
        if left:
            first = min(left, key=lambda of_label: of_label[0])
            matched[i], kinds[i] = first.popleft(), KINDS.index(RELABELLED)
    dropped = np.setdiff1d(before.live, matched)
    return RowChanges(rows=rows, kinds=kinds, before=matched, dropped=dropped)


def _contents(index: Index) -> Iterator[tuple[int, _Row]]:
    """Digest of the texts and label of each live row, with its number."""
    live = index.live
    for start in range(0, len(live), _BLOCK_ROWS):
        rows = live[start : start + _BLOCK_ROWS]
        digests = map(text_digest, zip(*index.text_lists(rows), strict=True))
        yield from zip(rows.tolist(), zip(digests, index.label_texts(rows), strict=True), strict=True)
