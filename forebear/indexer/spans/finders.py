"""Spans: stretches of a row's text, found or given, and the row with a span masked.

Spans are in characters of one text column, half open like Python slices. A word piece belongs to a span if they share a
character; masked, it becomes the tokenizer's mask token and keeps its position (Span paper, x(-ij)).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import DataError, InputError, MismatchError, ModelError
from forebear.indexer.model.classifier import Classifier, weights_sha256
from forebear.indexer.model.encoding import Encoded, MaskedRows, encode_with_places
from forebear.indexer.rows.user_code import load_function
from forebear.indexer.storage.arrow import file_sha256

FOUND = ("clauses", "sentences", "words")
ASPECT = "aspect"
GIVEN = ("columns", "clause-of")
READER = "reader"
# A boundary is punctuation before white space or the end (not that of 3.5 or www.x.org), but for some abbreviations.
_ABBREVIATED = "".join(rf"(?<!\b{a})" for a in (r"e\.g", r"i\.e", "mr", "mrs", "ms", "dr", "st", "vs"))
_CLOSING = r"[\"'”’)\]]*(?=\s|$)"
_SENTENCE_END = re.compile(rf"{_ABBREVIATED}[.!?…]+{_CLOSING}|[。！？]+|<br\s*/?>|\n\n+", re.IGNORECASE)
_CLAUSE_END = re.compile(
    rf"{_ABBREVIATED}[.!?…,;:]+{_CLOSING}|[。！？，；：、]+|\s[-–—]+\s|[–—()\[\]]|--|<br\s*/?>|\n+"
    r"|(?<=\s)(?=(?:but|although|though|while|whereas|however|yet|because|except)\s)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\S+")
_ENCODED_ROWS = 512  # rows whose word pieces are held together with their places in the text


@dataclass(frozen=True, order=True)
class Span:
    """Characters ``start`` to ``end`` of text column ``column``."""

    column: int
    start: int
    end: int


def split_text(text: str, how: str) -> list[tuple[int, int]]:
    """Clauses, sentences or words of a text, in order, without white space and closing punctuation at their ends.

    Clauses end at punctuation and before a conjunction that contrasts or gives a reason (but, although, because, ...).
    What holds no letter and no digit is left out.
    """
    if how == "words":
        pieces = [match.span() for match in _WORD.finditer(text)]
    else:
        boundary = {"clauses": _CLAUSE_END, "sentences": _SENTENCE_END}[how]
        cuts = [0, *(edge for match in boundary.finditer(text) for edge in match.span()), len(text)]
        pieces = list(zip(cuts[::2], cuts[1::2], strict=True))
    return [found for start, end in pieces if (found := trimmed(text, start, end)) is not None]


def trimmed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Without white space and brackets or quotes at the ends; None without a letter or digit."""
    while start < end and unicodedata.category(text[start])[0] in "PSZC" and text[start] not in "$£€#@":
        start += 1
    while start < end and unicodedata.category(text[end - 1])[0] in "PSZC" and text[end - 1] not in "%$£€":
        end -= 1
    return (start, end) if any(c.isalnum() for c in text[start:end]) else None


def covering(pieces: Iterable[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """From the first to the last of the pieces that share a character with a stretch; without any, the stretch."""
    touched = [(a, b) for a, b in pieces if a < end and start < b]
    return (min(a for a, _ in touched), max(b for _, b in touched)) if touched else (start, end)


# Texts of a row, all its columns, and what it is called in messages.
Finder = Callable[[Sequence[str], "dict[str, Any]", str], list[Span]]


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


def place_of_term(text: str, term: str) -> tuple[int, int] | None:
    """Characters of a term's first occurrence in any case, as whole words if it occurs so; None without one."""
    wanted = re.escape(term)
    if not wanted:
        return None
    found = re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) or re.search(wanted, text, re.IGNORECASE)
    return None if found is None else found.span()


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


def pieces_of(places: Any, row: int, span: Span) -> list[bool]:
    """Which word pieces of a row a span takes: from the first to the last that share a character with it.

    Args:
        places: From :func:`~forebear.indexer.model.encoding.encode_with_places`.
        row: Its position there.
        span: Of that row.
    """
    columns = places.sequence_ids(row)
    inside = [
        column == span.column and a < span.end and span.start < b and a < b
        for column, (a, b) in zip(columns, places["offset_mapping"][row], strict=True)
    ]
    if any(inside):  # those between that stand for white space included
        first, last = inside.index(True), len(inside) - inside[::-1].index(True)
        inside[first:last] = [column == span.column for column in columns[first:last]]
    return inside


def mask_spans(
    classifier: Classifier, texts: Sequence[Sequence[str]], spans: Sequence[Span], *, unknown: bool = False
) -> tuple[Encoded, np.ndarray]:
    """Rows beside the same rows with a span masked.

    Args:
        classifier: Whose tokenizer and limit are used.
        texts: One list a text column, an entry a span. Equal entries are encoded once.
        spans: One an entry.
        unknown: Use the unknown token ([UNK]) instead of the mask token.

    Returns:
        The rows and, as ``minus``, their masked versions, for the entries whose span the model reads; and which these
        are, ``(m,)`` bool: one that truncation cuts away altogether, or of white space alone, has nothing to mask.

    Raises:
        ModelError: The tokenizer has no such token, or does not know where word pieces stand.
    """
    kind = "unknown" if unknown else "mask"
    mask = classifier.tokenizer.unk_token_id if unknown else classifier.tokenizer.mask_token_id
    if mask is None:
        raise ModelError(f"{classifier.name}: its tokenizer has no {kind} token, so no span can be masked.")
    if not spans:
        return Encoded([], []), np.zeros(0, bool)
    entries: dict[tuple[str, ...], list[int]] = {}
    for i, entry in enumerate(zip(*texts, strict=True)):
        entries.setdefault(entry, []).append(i)
    rows: list[dict[str, list[int]]] = [{}] * len(spans)
    pieces = [np.empty(0, np.int32)] * len(spans)
    distinct = list(entries)
    for start in range(0, len(distinct), _ENCODED_ROWS):
        some = distinct[start : start + _ENCODED_ROWS]
        encoded, places = encode_with_places(classifier, list(zip(*some, strict=True)))
        for n, entry in enumerate(some):
            for i in entries[entry]:
                rows[i] = encoded[n]
                pieces[i] = np.flatnonzero(pieces_of(places, n, spans[i])).astype(np.int32)
    kept = np.array([len(mine) > 0 for mine in pieces])
    at = np.flatnonzero(kept).tolist()
    whole = [rows[i] for i in at]
    return Encoded(whole, MaskedRows(whole, [pieces[i] for i in at], mask)), kept


@dataclass(frozen=True)
class MaskedSpans:
    """Spans of rows, by row and then by place, as the model sees them.

    Attributes:
        owners: Position of each span's row, ``(m,)``.
        spans: The spans that the model reads, one each.
        encoded: Their rows and, as ``minus``, the rows with the span masked.
        cut: Positions of the rows of spans that the model does not read (cut away altogether by truncation, or white
            space alone); these are left out of the others.
    """

    owners: np.ndarray
    spans: list[Span]
    encoded: Encoded
    cut: np.ndarray


def mask_found(
    classifier: Classifier, texts: Sequence[Sequence[str]], found: Sequence[list[Span]], *, unknown: bool = False
) -> MaskedSpans:
    """Every span of every row masked.

    Args:
        classifier: See :func:`mask_spans`, also for ``unknown``.
        texts: One list a text column.
        found: Spans of each row.
        unknown: See there.
    """
    owners = np.repeat(np.arange(len(found)), [len(spans) for spans in found])
    spans = [span for of_row in found for span in sorted(of_row)]
    entries = [[column[i] for i in owners.tolist()] for column in texts]
    encoded, read = mask_spans(classifier, entries, spans, unknown=unknown)
    kept = [span for span, is_read in zip(spans, read, strict=True) if is_read]
    return MaskedSpans(owners[read], kept, replace(encoded, owners=owners[read]), owners[~read])
