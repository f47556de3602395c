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


def place_of_term(text: str, term: str) -> tuple[int, int] | None:
    """Characters of a term's first occurrence in any case, as whole words if it occurs so; None without one."""
    wanted = re.escape(term)
    if not wanted:
        return None
    found = re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) or re.search(wanted, text, re.IGNORECASE)
    return None if found is None else found.span()
