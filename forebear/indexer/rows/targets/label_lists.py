"""Lists of labels in one column: names, numbers of labels, or vectors of a 0 or 1 for each label; and which it holds.

Lists that hold nothing but 0 and 1 may be read in two ways: [0, 1] may be a vector, or the numbers of two labels. One
place decides it for a whole column, :func:`form_of`, and a run and an index remember what was decided. Rows that do not
fit what their column holds are refused, so that a broken row never changes what the others mean.
"""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.files.reader import Reader, reading
from forebear.indexer.rows.row_format import NUMBERS, VECTORS

Label = int | str
Found = dict[Label, float] | list[float] | int | None  # a row's target; or what it has instead of one
Read = Callable[[tuple[Any, ...]], Found]  # from a row's values
SIGNS = (";", "|", ",")  # what may part the labels in a cell of text
LARGEST_NUMBER = 1e18  # whose square float32 holds


class Unfit(Exception):
    """A value that is no target; the message says what it is, and what is expected."""


def holds_lists(reader: Reader, column: str) -> bool:
    """Whether a column holds lists, by its type or, of JSON, by its values."""
    kind = reader.schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list) or reader.kinds.get(column, {}).keys() - {"null"} == {"a list"}


def holds_text(reader: Reader, column: str) -> bool:
    """Whether a column holds text, or nothing; JSON lists, which are kept as text, are none."""
    kind = reader.schema.field(column).type
    return (is_text(kind) or pa.types.is_null(kind)) and not holds_lists(reader, column)


def tables_of(reader: Reader, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The tables of some columns, each with the number of its first row."""
    start = 0
    with reading(reader.name, "labelled text"):
        for table in reader.tables(0, list(columns)):
            yield start, table
            start += len(table)


def number_in(value: Any) -> float | None:
    """A cell as a number; None where it is null, blank or NaN.

    Raises:
        Unfit: It is no finite number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Unfit(f"{shown(value)}; expected a number.") from None
    if math.isnan(number):
        return None
    if not abs(number) <= LARGEST_NUMBER:
        raise Unfit(f"{shown(value)}; expected a number up to {LARGEST_NUMBER:g}, since losses are its squares.")
    return number


def share_in(value: float) -> float:
    """What a row has of a label: 0, 1, or a share between them.

    Raises:
        Unfit: It is none of these.
    """
    if not 0 <= value <= 1:
        raise Unfit(f"{value:g}; expected 0, 1, or a share between them, for each label.")
    return int(value) if value in (0, 1) else value


def in_order(target: dict[Any, float]) -> dict[Label, float]:
    """A row's labels without those that it has not, in one order, so that the same labels have the same digest."""
    return {label: target[label] for label in sorted(target, key=str) if target[label]}


def labels_in_lists(reader: Reader, column: str, form: str | None, n_labels: int | None) -> tuple[Read, int, str]:
    """How the lists of a column are read.

    Args:
        reader: The source.
        column: The column of lists.
        form: ``vectors`` or ``numbers``, where a run or an index remembers it; None: as the lists say.
        n_labels: How many labels there are, where it is known.

    Returns:
        What reads a row, the length of vectors (of other lists 0), and the form.

    Raises:
        DataError: The column holds no lists; or they may be both vectors and numbers of labels.
    """
    as_text = holds_text(reader, column)
    if not as_text and not holds_lists(reader, column):
        raise one_value(reader, column)
    sign = _sign_of_text(reader, column) if as_text else None

    def lists() -> Iterator[list[Any]]:
        for _, table in tables_of(reader, [column]):
            for value in table.column(0).to_pylist():
                try:
                    members = members_of(value, sign)
                except Unfit:  # refused with its row when it is decoded
                    continue
                if members is not None:
                    yield members

    found, width = form_of(f"{reader.name}: label column {column!r}", lists(), form, n_labels)

    def read(row: tuple[Any, ...]) -> Found:
        members = members_of(row[0], sign)
        if members is None:
            return None
        return _vector(members, width) if found == VECTORS else _labels(members)

    return read, width, found


def one_value(reader: Reader, column: str) -> DataError:
    """The error of a column that holds no lists."""
    return DataError(
        f"{reader.name}: label column {column!r} holds one value a row; expected lists of labels, or columns of 0 and "
        "1, each of the label of its name, by --label-column a,b,c. For one label a row leave --problem-type out."
    )


def form_of(where: str, lists: Iterable[list[Any]], form: str | None, n_labels: int | None) -> tuple[str, int]:
    """Whether lists are vectors, and of what length, or hold labels (``numbers``, names among them).

    A list that repeats a number, or has a share or true or false in it, can be a vector alone; one with a name, or with
    a number above 1, cannot be one. Where there are both, the kind with fewer rows is left to be refused by its row.
    Without either, lists are vectors where all are as long as there are labels.

    Args:
        where: The column, for messages.
        lists: The lists of all rows.
        form: What is remembered, which decides what lists of numbers are.
        n_labels: How many labels there are, where it is known.

    Raises:
        DataError: Nothing decides.
    """
    vectors, others = Counter[int](), Counter[int]()  # by length: lists that are vectors alone; that may be both
    n_named = n_above = n_empty = 0
    for members in lists:
        if not members:
            n_empty += 1
        elif not all(isinstance(member, (bool, int, float)) for member in members):
            n_named += 1
        elif not all(0 <= member <= 1 for member in members):
            n_above += 1
        elif len(set(members)) < len(members) or any(type(m) is bool or m not in (0, 1) for m in members):
            vectors[len(members)] += 1
        else:
            others[len(members)] += 1
    if not (vectors or others or n_above):
        return NUMBERS, 0
    common = max((vectors or others).items(), key=lambda item: item[1], default=(0, 0))[0]
    if form is not None:
        return form, (n_labels or common) if form == VECTORS else 0
    if vectors and vectors.total() >= n_named + n_above:
        return VECTORS, common
    if n_above or vectors or (n_named and not n_labels) or (n_labels and n_labels not in others):
        return NUMBERS, 0
    if not (n_empty or n_named) and others.keys() == {n_labels or 2}:
        return VECTORS, common
    raise DataError(
        f"{where} holds lists of 0 and 1 alone, which may be vectors (a 0 or 1 for each label) or numbers of labels; "
        'nothing decides. Write the labels by name (["a", "b"]), or a column of 0 and 1 for each (--label-column a,b).'
    )


def _vector(members: list[Any], width: int) -> dict[Label, float]:
    expected = f"expected a vector of {width} numbers, a 0, 1 or share for each label, as in other rows."
    if len(members) != width or not all(isinstance(member, (bool, int, float)) for member in members):
        raise Unfit(f"{shown(members)}; {expected}")
    if not all(0 <= member <= 1 for member in members):
        raise Unfit(f"{shown(members)}; {expected}")
    return in_order({label: share_in(value) for label, value in enumerate(members)})


def _labels(members: list[Any]) -> dict[Label, float]:
    labels = [_label(member) for member in members]
    repeated = [label for label, n in Counter(labels).items() if n > 1 and isinstance(label, int)]
    if repeated:
        raise Unfit(
            f"{shown(members)}, which repeats {repeated[0]}; the column is read as lists of numbers of labels, not as "
            'vectors of 0 and 1. Mend the row, or write the labels by name (["a", "b"]).'
        )
    return in_order(dict.fromkeys(labels, 1))


def members_of(value: Any, sign: str | None = None) -> list[Any] | None:
    """The members of a row's list, which a text holds as JSON or Python writes it, or parted by a sign; None: no list.

    Raises:
        Unfit: It cannot be read as a list.
    """
    if not isinstance(value, str):
        return None if value is None else list(value)
    text = value.strip()
    if not text:
        return None
    if text[0] != "[":
        return [part.strip() for part in (text.split(sign) if sign else [text]) if part.strip()]
    for parse in (json.loads, ast.literal_eval):
        try:
            members = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(members, list):
            return members
    raise Unfit(f'{shown(value)}; expected a list of labels, such as ["a", "b"].')


def _label(member: Any) -> Label:
    if isinstance(member, str) and member.strip():
        return member.strip()
    if isinstance(member, float) and member.is_integer() and member >= 0:
        return int(member)
    if isinstance(member, int) and not isinstance(member, bool) and member >= 0:
        return member
    raise Unfit(f"{shown(member)} in a list of labels; expected names, or numbers from 0.")


def _sign_of_text(reader: Reader, column: str) -> str | None:
    """What parts the labels in the cells of a text column; None where each cell is a list, or one label.

    Raises:
        DataError: More than one sign may be it.
    """
    found: set[str] = set()
    for _, table in tables_of(reader, [column]):
        for value in table.column(0).to_pylist():
            if isinstance(value, str) and not value.strip().startswith("["):
                found.update(sign for sign in SIGNS if sign in value)
    if len(found) > 1:
        raise DataError(
            f"{reader.name}: label column {column!r} holds {' and '.join(sorted(found))}, of which either may part the "
            'labels of a row. Write lists (["a", "b"]), or a column of 0 and 1 for each label (--label-column a,b).'
        )
    return found.pop() if found else None


def shown(value: Any) -> str:
    """A value for a message, its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
