"""Rows of a JSON file: one object a line, or one array of objects; none of them longer than ``LONGEST_ROW``."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import date, datetime
from typing import Any

from forebear.errors import DataError
from forebear.indexer.rows.files.text_file import open_text

LONGEST_ROW = 16 << 20  # bytes of a line, characters of an element
READ_CHARACTERS = 1 << 20
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
EXPECTED = "expected JSON Lines, one object a line, or one array of objects"
SHORTEN = "Break it up, or cut its text: a model reads the beginning."
JSON_KINDS = {type(None): "null", bool: "true/false", float: "a number", list: "a list", dict: "an object"}
DATE, TIMESTAMP, UTC_TIMESTAMP = "a date", "a timestamp", "a timestamp with a time zone"  # of rows in memory alone
SCALAR_KINDS = frozenset(
    {"null", "true/false", "a number", "a name", "an integer", "a long integer", DATE, TIMESTAMP, UTC_TIMESTAMP}
)

PairsHook = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def json_kind(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    if isinstance(value, str):
        return "a name"
    if type(value) is int:
        return "an integer" if -(2**63) <= value < 2**63 else "a long integer"
    if isinstance(value, datetime):
        return TIMESTAMP if value.tzinfo is None else UTC_TIMESTAMP
    if isinstance(value, date):
        return DATE
    return JSON_KINDS.get(type(value), f"a value of type {type(value).__name__}")


def json_rows(
    name: str, hook: PairsHook | None = None, encoding: str | None = None
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Stream a file's objects.

    Args:
        name: The file.
        hook: As ``object_pairs_hook`` of ``json``.
        encoding: The file's encoding; None: UTF-8.

    Yields:
        Where the object is ("line 3", "element 3 (from 1)"), the object, and about how many bytes it takes.

    Raises:
        DataError: The file is broken, or holds anything but objects; the line says where.
    """
    with open_text(name, encoding) as file:
        is_array = file.peek(64).lstrip().startswith(b"[")
        rows = _array_elements(name, file, hook) if is_array else _lines(name, file, hook)
        for where, row, n_bytes in rows:
            if not isinstance(row, dict):
                raise DataError(f"{name}: {where} holds {json_kind(row)}; {EXPECTED}. Mend it.")
            yield where, row, n_bytes


def _lines(name: str, file: io.BufferedReader, hook: PairsHook | None) -> Iterator[tuple[str, Any, int]]:
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise DataError(f"{name}: line {number} is longer than {LONGEST_ROW >> 20} MiB; {EXPECTED}. {SHORTEN}")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), object_pairs_hook=hook)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}: line {number} cannot be read as JSON ({_reason(error)}); {EXPECTED}. Mend that line."
            ) from error
        yield f"line {number}", row, len(line)


def _array_elements(name: str, file: io.BufferedReader, hook: PairsHook | None) -> Iterator[tuple[str, Any, int]]:
    """Decode an array element by element, with at most twice the longest element in memory."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    decoder = json.JSONDecoder(object_pairs_hook=hook)
    buffer, place, number = text.read(READ_CHARACTERS), 0, 0
    place = buffer.index("[") + 1
    expects_comma = False

    def read_more() -> bool:
        nonlocal buffer, place
        part = text.read(max(READ_CHARACTERS, len(buffer) - place))  # twice as much each time: never quadratic
        buffer, place = buffer[place:] + part, 0
        return bool(part)

    def broken(reason: str) -> DataError:
        return DataError(f"{name}: its array is broken after {number} elements ({reason}); {EXPECTED}. Mend it.")

    while True:
        match = WHITE_SPACE.match(buffer, place)
        assert match is not None
        place = match.end()
        if place == len(buffer):
            if read_more():
                continue
            raise broken("it ends before its bracket is closed")
        if buffer[place] == "]" and (expects_comma or not number):
            if buffer[place + 1 :].strip() or text.read(READ_CHARACTERS).strip():
                raise broken("something follows its closing bracket")
            return
        if expects_comma:
            if buffer[place] != ",":
                raise broken("a comma is missing")
            place, expects_comma = place + 1, False
            continue
        try:
            row, end = decoder.raw_decode(buffer, place)
        except json.JSONDecodeError as error:
            if len(buffer) - place <= LONGEST_ROW and read_more():
                continue
            if len(buffer) - place > LONGEST_ROW:
                size = f"{LONGEST_ROW >> 20} MiB"
                raise DataError(
                    f"{name}: element {number + 1} (from 1) is longer than {size}, or broken ({_reason(error)}); "
                    f"{EXPECTED}. {SHORTEN}"
                ) from error
            raise broken(_reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise broken(_reason(error)) from error
        number, expects_comma = number + 1, True
        yield f"element {number} (from 1)", row, end - place
        place = end


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
