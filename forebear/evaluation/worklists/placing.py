"""Items of a work list by the rows of the training file that they are of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from forebear.errors import InputError, MismatchError
from forebear.evaluation.worklists.items import Item, WorkList
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


def placed_rows(items: Iterable[Item], source: RowSource) -> dict[int, Item]:
    """The items by the row of the file, ascending.

    Raises:
        MismatchError: The file has no such row.
        InputError: Two items are of one row.
    """
    placed: dict[int, Item] = {}
    for item in items:
        row = _file_row(item, source)
        if row in placed:
            raise InputError(
                f"rows {placed[row].row} and {item.row} of the list are both row {row} (from 0) of {source.name}. "
                "Leave one of them."
            )
        placed[row] = item
    return dict(sorted(placed.items(), key=lambda pair: pair[0]))


def _file_row(item: Item, source: RowSource) -> int:
    """A number in the file as it stands; without one, that of the index counts the rows with a label."""
    row, n_rows = (
        (item.row, source.n_rows) if item.source_row is None else (item.source_row, source.n_rows + source.n_dropped)
    )
    if row >= n_rows:
        raise MismatchError(
            f"row {item.row} of the list is row {row} (from 0) of its file, and {source.name} has {n_rows:,} "
            f"rows. Give the file that the index was built from.{unplaced(item, source)}"
        )
    return source.file_row(row) if item.source_row is None else row


def unplaced(item: Item, source: RowSource) -> str:
    """What to do about a row whose number in the file is not known, where it is that of the index by a guess."""
    if item.source_row is not None or not source.n_dropped:
        return ""
    return " If the index has several files, fill the list's column source_row: the row's number in its file, from 0."
