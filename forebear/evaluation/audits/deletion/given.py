"""Training rows that somebody names: by their numbers, as a work list, or by what they hold.

Rows that are to go are often known by an id or by their texts, not by the number that an index gave them. A work list
may have been written for an older index: where its texts and labels are not those of the rows that it numbers, these
decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import InputError
from forebear.evaluation.worklists.files import READ, read_work_list
from forebear.evaluation.worklists.items import Item, WorkList
from forebear.indexer.index import Index
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.source_names import TextChoices, open_reader

GivenRows: TypeAlias = str | Path | WorkList | Sequence[int] | np.ndarray
LEAVES = ("remove", "quarantine")  # decisions by which a row goes
SHOWN_MISSING = 5
HERE = "audit deletion"  # the command whose options are named in messages


@dataclass(frozen=True, kw_only=True)
class Named:
    """Live rows of an index that were named.

    Attributes:
        rows: Their numbers, ascending, each once, ``(n,)``.
        missing: What was named and is not in the index, or is retired, as people read it.
        how: How the rows were found, such as ``by their texts``.
    """

    rows: np.ndarray
    missing: tuple[str, ...]
    how: str


def named_rows(index: Index, given: GivenRows) -> Named:
    """Find the rows that somebody names.

    Args:
        index: The index.
        given: Row numbers; a work list; or a file or folder: a work list or any table with a column ``row``; else a
            table with all text columns of the index, or with columns that the index keeps, whose values all agree;
            or a text file of numbers and ranges such as 230-240.

    Raises:
        InputError: Nothing that was named is a live row of the index, or the file names no rows.
        DataError: The file cannot be read.
    """
    if isinstance(given, WorkList):
        named = _of_work_list(index, given)
    elif isinstance(given, str | Path):
        named = _of_file(index, Path(given))
    else:
        named = _of_numbers(index, np.asarray(given).reshape(-1), "by their numbers")
    if not len(named.rows):
        what = f"none of the {len(named.missing):,} that are named" if named.missing else "no row is named, and none"
        raise InputError(f"--rows: {what} is a live row of {index.folder}. {_asked(index)}", of=HERE)
    return named


def _asked(index: Index) -> str:
    kept = f", or columns it keeps ({listed(index.manifest.columns)})" if index.manifest.columns else ""
    texts = listed(index.manifest.spec.text_columns)
    return f"Expected row numbers, a table with a column row, one with the texts ({texts}){kept}."


def _of_numbers(index: Index, numbers: np.ndarray, how: str) -> Named:
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise InputError(f"--rows: {numbers[0]!r} is no row number. {_asked(index)}", of=HERE)
    distinct = np.unique(numbers.astype(np.int64))
    live = np.isin(distinct, index.live)
    return Named(rows=distinct[live], missing=tuple(f"row {row}" for row in distinct[~live]), how=how)


def _of_file(index: Index, path: Path) -> Named:
    if path.is_dir():
        return _of_work_list(index, read_work_list(path))
    if path.is_file() and not path.name.lower().endswith((*READ, ".gz", ".bz2")):
        return _of_numbers(index, np.array(list(_numbers_in(path)), np.int64), f"by the numbers in {path.name}")
    reader, _ = open_reader(str(path), TextChoices(like=index.manifest.row_format))
    names = reader.schema.names
    if "row" in names:
        return _of_work_list(index, read_work_list(path))
    texts = index.manifest.spec.text_columns
    columns = list(texts) if set(texts) <= set(names) else [name for name in index.manifest.columns if name in names]
    if not columns:
        raise InputError(f"--rows {path}: it has the columns {listed(names)}. {_asked(index)}", of=HERE)
    table = pa.concat_tables(reader.tables(0, columns)).select(columns)
    if columns == list(texts):
        index.check_texts_held("finding rows by their texts")
        return _of_values(table, index.texts, index.live, "by their texts")
    return _of_values(table, lambda rows: dict(_columns(index, rows, columns)), index.live, f"by {listed(columns)}")


def _columns(index: Index, rows: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    columns = index.columns(rows)
    return ((name, columns.column(name)) for name in names)


def _numbers_in(path: Path) -> Iterator[int]:
    """``17`` and ``230-240``, parted by white space or commas."""
    for part in path.read_text(encoding="utf-8", errors="replace").replace(",", " ").split():
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise InputError(
                f"--rows {path}: {part!r} is no row number; expected numbers such as 17 or 230-240.", of=HERE
            )
        yield from range(int(first), int(last or first) + 1)


def _of_work_list(index: Index, work_list: WorkList) -> Named:
    """Rows of a work list: those that were decided to go, or all while nothing is decided.

    An item's row is that of its number where texts and label are the item's. Else the list is of another index: then
    texts and label find the row, but none that the list numbers and that stays. Where of equal items one goes and
    another stays, they cannot tell the rows apart, and none is found.
    """
    decided = any(item.decision for item in work_list)
    items = [item for item in work_list if not decided or item.decision in LEAVES]
    how = "by a work list" + (f", {len(items):,} of {len(work_list):,} decided to go" if decided else "")
    going = {item.row for item in items}
    stay = [item for item in work_list if decided and item.decision not in LEAVES]
    if twice := sorted(item.row for item in stay if item.decision and item.row in going):
        raise InputError(f"--rows: row {twice[0]} is decided both to go and to stay. Leave one of the two.", of=HERE)
    stay = [item for item in stay if item.row not in going]
    live = set(index.live.tolist())
    held = _contents(index, np.array(sorted(row for row in going if row < index.manifest.n_rows), np.int64))
    rows: set[int] = set()
    lost = []
    for item in items:
        said = _said(index, item)
        if item.row in held and _alike(said, held[item.row]):
            rows.update({item.row} & live)  # a retired row is gone already: no other row is it
        elif said[0] is not None:
            lost.append(item)
    moved = _moved(index, lost, stay)
    missing = [item for item in items if item.row not in rows and not moved.get(item.row)]
    how += f"; {len(moved):,} of them by their texts" if moved else ""
    return Named(
        rows=np.array(sorted(rows.union(*moved.values())), np.int64),
        missing=tuple(dict.fromkeys(": ".join([f"row {item.row}", *item.texts.values()]) for item in missing)),
        how=how,
    )


# Texts and label of a row or an item; None: not known.
_Content: TypeAlias = tuple[tuple[str, ...] | None, str | None]


def _said(index: Index, item: Item) -> _Content:
    """What an item says of its row; a label that is none of the index's names says nothing."""
    names = index.manifest.spec.text_columns
    has_texts = not index.manifest.without_texts and set(names) <= set(item.texts)
    texts = tuple(item.texts[name] for name in names) if has_texts else None
    return texts, item.given if item.given in index.manifest.spec.label_names else None


def _contents(index: Index, rows: np.ndarray) -> dict[int, _Content]:
    labels = index.label_texts(rows)
    if index.manifest.without_texts:
        return {row: (None, label) for row, label in zip(rows.tolist(), labels, strict=True)}
    texts = zip(*(column.to_pylist() for column in index.texts(rows).values()), strict=True)
    return dict(zip(rows.tolist(), zip(texts, labels, strict=True), strict=True))


def _alike(one: _Content, other: _Content) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _moved(index: Index, items: Sequence[Item], stay: Sequence[Item]) -> dict[int, set[int]]:
    """Live rows with the texts and the label of items, by the number that the item has; those that are found."""
    if not items:
        return {}
    names = index.manifest.spec.text_columns
    table = pa.table({name: pa.array([item.texts[name] for item in items], pa.large_string()) for name in names})
    near = _of_values(table, index.texts, index.live, "").rows
    near = np.setdiff1d(near, [item.row for item in stay])
    held = _contents(index, near)
    by_texts: dict[Any, set[int]] = {}
    for row, content in held.items():
        by_texts.setdefault(content[0], set()).add(row)
    staying: dict[Any, list[_Content]] = {}
    for other in stay:
        content = _said(index, other)
        staying.setdefault(content[0], []).append(content)
    found: dict[int, set[int]] = {}
    for item in items:
        said = _said(index, item)
        if not any(_alike(said, content) for content in staying.get(said[0], ())):
            rows = {row for row in by_texts.get(said[0], ()) if _alike(said, held[row])}
            found |= {item.row: rows | found.get(item.row, set())} if rows else {}
    return found


def _of_values(table: pa.Table, stored: Callable[[np.ndarray], Any], live: np.ndarray, how: str) -> Named:
    """Live rows whose values are those of a line of a table, in all its columns; every row that is alike is found."""
    wanted = set(zip(*(_plain(column) for column in table.columns), strict=True))
    held = list(stored(live).values())
    first = _text(held[0])
    near = live[pc.is_in(first, pc.unique(_text(table.column(0)))).to_numpy(zero_copy_only=False)]
    found = list(zip(*(_plain(column) for column in stored(near).values()), strict=True))
    rows = near[np.array([values in wanted for values in found], bool)]
    missing = sorted(wanted.difference(found), key=str)
    return Named(rows=rows, missing=tuple(" | ".join(map(str, values)) for values in missing), how=how)


def _plain(column: Any) -> list[str | None]:
    return list(_text(column).to_pylist())


def _text(column: Any) -> pa.Array:
    """A column as text, by which an id is found whether a file has it as a number or, as CSV has it, in characters."""
    if isinstance(column, pa.ChunkedArray):
        column = column.unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no chunk
        column = pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string())
