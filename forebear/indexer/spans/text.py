"""Stretches of a text: a span, and a text cut into clauses, sentences or words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, order=True)
class Span:
    """Characters ``start`` to ``end`` of text column ``column``."""

    column: int
    start: int
    end: int


def split_text(text: str, unit: str) -> list[tuple[int, int]]:
    """Clauses, sentences or words of a text, in order, without white space and closing punctuation at their ends.

    Clauses end at punctuation and before a conjunction that contrasts or gives a reason (but, although, because, ...).
    Pieces without a letter or a digit are left out.

    Args:
        text: The text.
        unit: ``clauses``, ``sentences`` or ``words``.

    Returns:
        Start and end of each piece, in characters.
    """
    if unit == "words":
        pieces = [match.span() for match in _WORD.finditer(text)]
    else:
        boundary = {"clauses": _CLAUSE_END, "sentences": _SENTENCE_END}[unit]
        cuts = [0, *(edge for match in boundary.finditer(text) for edge in match.span()), len(text)]
        pieces = list(zip(cuts[::2], cuts[1::2], strict=True))
    return [stretch for start, end in pieces if (stretch := trimmed(text, start, end)) is not None]


def trimmed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A stretch without white space, brackets or quotes at its ends; None if it has no letter and no digit."""
    while start < end and unicodedata.category(text[start])[0] in "PSZC" and text[start] not in "$£€#@":
        start += 1
    while start < end and unicodedata.category(text[end - 1])[0] in "PSZC" and text[end - 1] not in "%$£€":
        end -= 1
    return (start, end) if any(c.isalnum() for c in text[start:end]) else None


def covering(pieces: Iterable[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Start of the first and end of the last piece that overlaps a stretch; the stretch itself if no piece does."""
    touched = [(a, b) for a, b in pieces if a < end and start < b]
    return (min(a for a, _ in touched), max(b for _, b in touched)) if touched else (start, end)


# Finds the spans of a row, from its texts, all its columns by name, and its name in messages such as "test row 3".
Finder = Callable[[Sequence[str], "dict[str, Any]", str], list[Span]]


def place_of_term(text: str, term: str) -> tuple[int, int] | None:
    """Start and end of a term's first occurrence, in any case, as whole words where there is such; None without one."""
    pattern = re.escape(term)
    if not pattern:
        return None
    match = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) or re.search(pattern, text, re.IGNORECASE)
    return None if match is None else match.span()
