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
from forebear.indexer.rows.user_code import load_function
from forebear.indexer.spans.text import Finder, Span, covering, place_of_term, split_text
from forebear.indexer.storage.arrow import file_sha256

FOUND = ("clauses", "sentences", "words")
ASPECT = "aspect"
GIVEN = ("columns", "clause-of")
READER = "reader"


@lru_cache
def span_finder(how: str, column: int = 0) -> Finder:
    """What finds the spans of a row.

    Args:
        how: ``clauses``, ``sentences`` or ``words`` of a text column; ``aspect``: of pairs, the clause of the first
            text that holds the second one; ``columns:FROM,TO``, names of columns that hold their ends, one number or a
            list; ``clause-of:FROM,TO``, the clause that holds such a span;
            ``reader:MODEL``: of pairs, what a question-answering model finds the first text to say of the second one;
            ``FILE.py:function``, called with the row as a dictionary, which returns (start, end) pairs.
        column: The text column, by number.

    Raises:
        InputError: It is none of these, or the function is not there.
    """
    kind, _, rest = how.partition(":")
    if how in FOUND:
        return lambda texts, _row, _name: [Span(column, a, b) for a, b in split_text(texts[column], how)]
    if how == ASPECT:
        return _aspect
    if kind in GIVEN and len(names := [name.strip() for name in rest.split(",")]) == 2:
        return _given(names[0], names[1], column, whole_clause=kind == "clause-of")
    if kind == READER and rest:
        from forebear.indexer.spans.aspect_reader import reader_finder

        return reader_finder(rest)
    if kind.endswith(".py") and rest.isidentifier():
        return _by_function(how, column)
    raise InputError(
        f"--spans {how!r}: expected {', '.join(FOUND)}, {ASPECT}, columns:FROM,TO, clause-of:FROM,TO, "
        f"{READER}:MODEL or FILE.py:function."
    )


def finder_sha256(how: str) -> str | None:
    """Digest of the user's file or of the reader's weights that find spans; None where neither does.

    Raises:
        InputError: The file or its function is not there.
        ModelError: The reader is not.
    """
    kind, _, rest = how.partition(":")
    if kind == READER:
        from forebear.indexer.spans.aspect_reader import load_reader

        return weights_sha256(load_reader(rest).model)
    if not kind.endswith(".py"):
        return None
    span_finder(how)
    return file_sha256(Path(kind))


def check_same_finder(how: str | None, sha256: str | None, index: Path) -> None:
    """Refuse a function or reader that is not the one that found an index's spans.

    Raises:
        MismatchError: It has changed since.
    """
    if how is not None and sha256 is not None and (found := finder_sha256(how)) != sha256:
        raise MismatchError(
            f"--spans {how} has changed since {index} was built: sha256 {(found or '')[:12]}, then {sha256[:12]}. "
            "Bring back what it was, or build the index again."
        )


def _aspect(texts: Sequence[str], _row: dict[str, Any], _name: str) -> list[Span]:
    if len(texts) != 2:
        raise InputError("--spans aspect is of pairs: the clause of the first text that holds the second one.")
    found = place_of_term(texts[0], texts[1].strip())
    return [] if found is None else [Span(0, *covering(split_text(texts[0], "clauses"), *found))]


def _given(first: str, last: str, column: int, *, whole_clause: bool) -> Finder:
    def find(texts: Sequence[str], row: dict[str, Any], called: str) -> list[Span]:
        for name in (first, last):
            if name not in row:
                raise InputError(f"--spans: the rows have no column {name!r}; they have {', '.join(row)}.")
        starts, ends = (_numbers(row[name], name, called) for name in (first, last))
        if len(starts) != len(ends):
            raise DataError(f"{called}: {len(starts)} starts in {first!r}, {len(ends)} ends in {last!r}.")
        spans = [checked_span(texts, column, a, b, called) for a, b in zip(starts, ends, strict=True)]
        if not whole_clause:
            return list(dict.fromkeys(spans))
        clauses = split_text(texts[column], "clauses")
        return list(dict.fromkeys(Span(column, *covering(clauses, s.start, s.end)) for s in spans))

    return find


def _numbers(value: Any, name: str, called: str) -> list[int]:
    """One number or a list of them; files may have numbers and lists as text, and whole numbers as 3.0.

    Raises:
        DataError: Something else stands there.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    found = list(value) if isinstance(value, list) else [value]
    whole = [_whole_number(one) for one in found]
    if None in whole:
        what = "nothing" if value in (None, "") else repr(value)
        raise DataError(
            f"{called}: {what} stands in column {name!r}; expected a number of characters or a list of them, [] for no "
            "span."
        )
    return [one for one in whole if one is not None]


def _whole_number(value: Any) -> int | None:
    """As an integer; None if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return int(value) if value == value and value == value // 1 else None


def _by_function(given: str, column: int) -> Finder:
    function = load_function(given, "--spans")

    def find(texts: Sequence[str], row: dict[str, Any], called: str) -> list[Span]:
        try:
            ends = [(a, b) for a, b in function(row)]
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(
                f"--spans {given} failed on {called} ({type(error).__name__}: {error}); it must return "
                "(start, end) pairs."
            ) from error
        for found in ends:
            if any(_whole_number(one) is None for one in found):
                raise InputError(f"--spans {given}: {called} gets {found}; expected whole numbers of characters.")
        return list(dict.fromkeys(checked_span(texts, column, int(a), int(b), called) for a, b in ends))

    return find


def checked_span(texts: Sequence[str], column: int, start: int, end: int, called: str) -> Span:
    """A span that lies in its text and is not empty.

    Raises:
        DataError: It does not, or is; the row is named.
    """
    length = len(texts[column])
    if not 0 <= start < end <= length:
        raise DataError(
            f"{called}: span {start} to {end} is not in its text of {length} characters; expected 0 <= start < end <= "
            f"{length}."
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
        rows: Their numbers, for messages.
        kind: What they are: ``test row`` or ``training row``.
    """
    columns = {} if table is None else {name: table.column(name).to_pylist() for name in table.column_names}
    return [
        find([t[i] for t in texts], {name: values[i] for name, values in columns.items()}, f"{kind} {row}")
        for i, row in enumerate(rows)
    ]
