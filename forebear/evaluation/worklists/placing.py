"""Items of a work list by the rows of the training file that they are of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from forebear.errors import InputError, MismatchError
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_source import RowSource


def of_file(work_list: WorkList, train: Path) -> tuple[WorkList, int]:
    """The items whose rows came from a file, and how many came from others.

    A list of one source is taken for the file's whatever it is called: its rows are checked.

    Raises:
        MismatchError: None came from the file, or the file may be any of several.
        InputError: Which row of the file an item is cannot be told.
    """
    sources = sorted({item.source for item in work_list if item.source is not None})
    if len(sources) < 2:
        return work_list, 0
    own = {name for name in sources if Path(name).resolve() == train.resolve()}
    own = own or {name for name in sources if Path(name).name == train.name}
    if not own:
        raise MismatchError(
            f"the list's rows came from {listed(sources)}, and none from {train.name}. Give one of these."
        )
    if len({Path(name).resolve() for name in own}) > 1:
        raise MismatchError(
            f"the list's rows came from {listed(sorted(own))}, and {train} may be each of these. Give the file by that "
            "name, or write its name into the list's column source."
        )
    mine = tuple(item for item in work_list if item.source is None or item.source in own)
    for item in mine:
        if item.source_row is None and item.digest is None and not item.texts:
            raise InputError(
                f"row {item.row} has neither texts nor a source_row, its number in {train} (from 0), and rows of the "
                "list came from several files. Fill in source_row."
            )
    return WorkList(mine), len(work_list) - len(mine)


def placed_rows(items: Collection[Item], source: RowSource, *, is_first: bool = True) -> dict[int, Item]:
    """The items by the row of the file, ascending.

    Args:
        items: The items, of this file alone.
        source: The file, read as the index read it.
        is_first: Whether it may be the first file of the index.

    Raises:
        MismatchError: The file has no such row, or which row an item is cannot be told.
        InputError: Two items are of one row.
    """
    start = _start([item for item in items if item.source_row is None], source, is_first=is_first)
    placed: dict[int, Item] = {}
    for item in items:
        row = _file_row(item, source, start)
        if row in placed:
            raise InputError(
                f"rows {placed[row].row} and {item.row} of the list are both row {row} (from 0) of {source.name}. "
                "Leave one of them."
            )
        placed[row] = item
    return dict(sorted(placed.items(), key=lambda pair: pair[0]))


def _start(items: Collection[Item], source: RowSource, *, is_first: bool) -> int:
    """The index's number of the file's first row: that at which all items without a ``source_row`` have their texts.

    Rows of the index that came from one file are consecutive, without those that were left out; only where some were,
    the column is empty. A file that may be the index's first, and has their texts at 0, is taken for the first.

    Raises:
        MismatchError: They have their texts at several numbers.
    """
    by_digest: dict[str, list[int]] = defaultdict(list)
    for item in items:
        if source.n_dropped and (item.digest is not None or item.texts):
            by_digest[item.digest or text_digest(listed_texts(item, source))].append(item.row)
    n_fitting: Counter[int] = Counter()
    for block in source.blocks() if by_digest else ():
        for row, texts in enumerate(zip(*block.texts, strict=True), block.start):
            n_fitting.update({number - row for number in by_digest.get(text_digest(texts), ())})
    n_items = sum(map(len, by_digest.values()))
    starts = sorted(start for start, n in n_fitting.items() if n == n_items and start >= (0 if is_first else 1))
    if len(starts) > 1 and starts[0]:
        raise MismatchError(
            f"row {min(item.row for item in items)} of the list has its texts in several rows of {source.name}, and no "
            "source_row. Fill in that column: the row's number in its file, from 0."
        )
    return starts[0] if starts else 0


def _file_row(item: Item, source: RowSource, start: int) -> int:
    """A number in the file as it stands; without one, that of the index counts the rows with a label."""
    row, n_rows = (
        (item.row - start, source.n_rows)
        if item.source_row is None
        else (item.source_row, source.n_rows + source.n_dropped)
    )
    if not 0 <= row < n_rows:
        raise MismatchError(
            f"row {item.row} of the list is row {row} (from 0) of its file, and {source.name} has {n_rows:,} "
            f"rows. Give the file that the index was built from.{unplaced(item, source)}"
        )
    return source.file_row(row) if item.source_row is None else row


def listed_texts(item: Item, source: RowSource) -> tuple[str, ...]:
    """An item's texts in the order of the file's columns, where they have the same names."""
    by_name = item.texts.keys() == set(source.text_columns)
    return tuple(item.texts[name] for name in source.text_columns) if by_name else tuple(item.texts.values())


def unplaced(item: Item, source: RowSource) -> str:
    """What to do about a row whose number in the file is not known, where it is that of the index by a guess."""
    if item.source_row is not None or not source.n_dropped:
        return ""
    return " If the index has several files, fill the list's column source_row: the row's number in its file, from 0."
