"""Spans: stretches of a row's text, found or given, and the row with a span masked.

Spans are in characters of one text column, half open like Python slices. A word piece belongs to a span if they share a
character; masked, it becomes the tokenizer's mask token and keeps its position (Span paper, x(-ij)).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import DataError, InputError, MismatchError
from forebear.indexer.model.loading import weights_sha256
from forebear.indexer.spans.text import Finder, Span, covering, place_of_term, split_text
from forebear.indexer.spans.user_code import load_function
from forebear.indexer.storage.arrow import file_sha256

FOUND = ("clauses", "sentences", "words")
ASPECT = "aspect"
GIVEN = ("columns", "clause-of")
READER = "reader"


@lru_cache
def span_finder(finder: str, column: int = 0, device: str = "auto") -> Finder:
    """The function that finds the spans of a row.

    Args:
        finder: A value of ``--spans``. ``clauses``, ``sentences`` or ``words``: these pieces of a text column.
            ``aspect``: in pairs, the clause of the first text that holds the second one. ``columns:FROM,TO``: names of
            the columns that hold starts and ends, one number or a list. ``clause-of:FROM,TO``: the clause that holds
            such a span. ``reader:MODEL``: in pairs, what a question-answering model finds the first text to say of the
            second one. ``FILE.py:function``: a function that is called with the row as a dictionary, and returns
            (start, end) pairs.
        column: The text column, by number.
        device: Device that a question-answering model runs on.

    Raises:
        InputError: ``finder`` is none of these, or the file has no such function.
    """
    kind, _, rest = finder.partition(":")
    if finder in FOUND:
        return lambda texts, _row, _name: [Span(column, a, b) for a, b in split_text(texts[column], finder)]
    if finder == ASPECT:
        return _aspect
    if kind in GIVEN and len(names := [name.strip() for name in rest.split(",")]) == 2:
        return _given(names[0], names[1], column, whole_clause=kind == "clause-of")
    if kind == READER and rest:
        from forebear.indexer.spans.aspect_reader import reader_finder

        return reader_finder(rest, device)
    if kind.endswith(".py") and rest.isidentifier():
        return _by_function(finder, column)
    raise InputError(
        f"--spans {finder!r}: expected {', '.join(FOUND)}, {ASPECT}, columns:FROM,TO, clause-of:FROM,TO, "
        f"{READER}:MODEL or FILE.py:function."
    )


def finder_sha256(finder: str) -> str | None:
    """Digest of the user's file or of the reader's weights that find spans; None for finders without either.

    Raises:
        InputError: The file or its function is missing.
        ModelError: The reader cannot be loaded.
    """
    kind, _, rest = finder.partition(":")
    if kind == READER:
        from forebear.indexer.spans.aspect_reader import load_reader

        return weights_sha256(load_reader(rest, "cpu").model)
    if not kind.endswith(".py"):
        return None
    span_finder(finder)
    return file_sha256(Path(kind))


def check_same_finder(finder: str | None, sha256: str | None, index: Path) -> None:
    """Refuse a function or reader that has changed since it found the spans of an index.

    Raises:
        MismatchError: The digest of the file or of the weights is another.
    """
    if finder is not None and sha256 is not None and (found := finder_sha256(finder)) != sha256:
        raise MismatchError(
            f"--spans {finder} has changed since {index} was built: sha256 {(found or '')[:12]}, then {sha256[:12]}. "
            "Bring back what it was, or build the index again."
        )


def _aspect(texts: Sequence[str], _row: dict[str, Any], _name: str) -> list[Span]:
    if len(texts) != 2:
        raise InputError("--spans aspect is of pairs: the clause of the first text that holds the second one.")
    place = place_of_term(texts[0], texts[1].strip())
    return [] if place is None else [Span(0, *covering(split_text(texts[0], "clauses"), *place))]


def _given(first: str, last: str, column: int, *, whole_clause: bool) -> Finder:
    def find(texts: Sequence[str], row: dict[str, Any], row_name: str) -> list[Span]:
        for name in (first, last):
            if name not in row:
                raise InputError(f"--spans: the rows have no column {name!r}; they have {', '.join(row)}.")
        starts, ends = (_numbers(row[name], name, row_name) for name in (first, last))
        if len(starts) != len(ends):
            raise DataError(f"{row_name}: {len(starts)} starts in {first!r}, {len(ends)} ends in {last!r}.")
        spans = [checked_span(texts, column, a, b, row_name) for a, b in zip(starts, ends, strict=True)]
        if not whole_clause:
            return list(dict.fromkeys(spans))
        clauses = split_text(texts[column], "clauses")
        return list(dict.fromkeys(Span(column, *covering(clauses, s.start, s.end)) for s in spans))

    return find


def _numbers(value: Any, name: str, row_name: str) -> list[int]:
    """The numbers in a cell: one, or a list; files may have numbers and lists as text, and whole numbers as 3.0.

    Raises:
        DataError: The cell has something else; the row and column are named.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    values = list(value) if isinstance(value, list) else [value]
    whole = [_whole_number(number) for number in values]
    if None in whole:
        content = "nothing" if value in (None, "") else repr(value)
        raise DataError(
            f"{row_name}: {content} stands in column {name!r}; expected a number of characters or a list of them, [] "
            "for no span."
        )
    return [number for number in whole if number is not None]


def _whole_number(value: Any) -> int | None:
    """A value as an integer; None if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return int(value) if value == value and value == value // 1 else None


def _by_function(finder: str, column: int) -> Finder:
    function = load_function(finder, "--spans")

    def find(texts: Sequence[str], row: dict[str, Any], row_name: str) -> list[Span]:
        try:
            ends = [(a, b) for a, b in function(row)]
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(
                f"--spans {finder} failed on {row_name} ({type(error).__name__}: {error}); it must return "
                "(start, end) pairs."
            ) from error
        for pair in ends:
            if any(_whole_number(end) is None for end in pair):
                raise InputError(f"--spans {finder}: {row_name} gets {pair}; expected whole numbers of characters.")
        return list(dict.fromkeys(checked_span(texts, column, int(a), int(b), row_name) for a, b in ends))

    return find


def checked_span(texts: Sequence[str], column: int, start: int, end: int, row_name: str) -> Span:
    """A span, checked to lie in its text and not to be empty.

    Raises:
        DataError: The span is outside its text, or empty; the row is named.
    """
    length = len(texts[column])
    if not 0 <= start < end <= length:
        raise DataError(
            f"{row_name}: span {start} to {end} is not in its text of {length} characters; expected 0 <= start < end "
            f"<= {length}."
        )
    return Span(column, start, end)


def find_spans(
    find: Finder, texts: Sequence[Sequence[str]], table: pa.Table | None, rows: Sequence[int], kind: str
) -> list[list[Span]]:
    """Spans of each row of a block.

    Args:
        find: From :func:`span_finder`.
        texts: One list a text column.
        table: The rows with all their columns.
        rows: Row numbers, for messages.
        kind: What the rows are called in messages: ``test row`` or ``training row``.
    """
    columns = {} if table is None else {name: table.column(name).to_pylist() for name in table.column_names}
    return [
        find(
            [column_texts[i] for column_texts in texts],
            {name: values[i] for name, values in columns.items()},
            f"{kind} {row}",
        )
        for i, row in enumerate(rows)
    ]
