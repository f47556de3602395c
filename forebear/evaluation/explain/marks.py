"""Marks in texts: which stretches of a text a list of values belongs to, how strong each is, what is written beside it.

Every mark reads without colour: its strength is a level from 0 to 3, and its sign or its number stands beside it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from forebear.errors import NonFiniteError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode_with_places

Span = tuple[int, int, int]  # first character, one past the last, key of the value that belongs there
_LEVELS = (0.03, 0.2, 0.5)  # shares of the strongest from which a mark is light, medium, strong


@dataclass(frozen=True)
class Piece:
    """A stretch of a text.

    Attributes:
        text: As it stands there.
        value: What belongs to it; None where nothing is marked.
        level: 0 (next to nothing) to 3 (strong), beside the strongest of the same row.
        note: What is written beside it: its number, its sign, or nothing.
        read: Whether the model reads it; False where truncation cuts it off.
        asked: Whether it is the word or span of the query that is asked about.
    """

    text: str
    value: float | None = None
    level: int = 0
    note: str = ""
    read: bool = True
    asked: bool = False


@dataclass(frozen=True)
class MarkedText:
    """A text column by name, and its text cut into pieces."""

    name: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Word:
    """A line of a list of words.

    Attributes:
        text: The word, or a token's vocabulary string.
        value: What belongs to it.
        number: The value as it is written, like the others of its list.
        level: See :class:`Piece`.
        share: |value| beside the strongest of the list, 0 to 1.
        where: The text column that holds it, if that matters.
    """

    text: str
    value: float
    number: str
    level: int
    share: float
    where: str = ""


@dataclass(frozen=True)
class Places:
    """Where the word pieces of one row stand in its texts.

    Attributes:
        pieces: For each text column the places of its tokens, keyed by token id; added tokens have none.
        read: For each text column, first character and one past the last that the model reads.
    """

    pieces: tuple[tuple[Span, ...], ...]
    read: tuple[tuple[int, int], ...]


def locate(classifier: Classifier, texts: Sequence[Sequence[str]]) -> list[Places]:
    """Places of the word pieces of rows of text, truncated as the model truncates them.

    Args:
        classifier: Whose tokenizer, a fast one, and limit are used.
        texts: One list a text column, ``(columns, n)``.
    """
    _, encoded = encode_with_places(classifier, texts)
    out = []
    for row, ids in enumerate(encoded["input_ids"]):
        pieces: list[list[Span]] = [[] for _ in texts]
        for column, token, (start, end) in zip(
            encoded.sequence_ids(row), ids, encoded["offset_mapping"][row], strict=True
        ):
            if column is not None and start < end:
                pieces[column].append((start, end, token))
        full = len(ids) >= classifier.max_length
        read = (_extent(spans) if full else (0, len(texts[column][row])) for column, spans in enumerate(pieces))
        out.append(Places(tuple(map(tuple, pieces)), tuple(read)))
    return out


def _extent(spans: Sequence[Span]) -> tuple[int, int]:
    return (min(s for s, _, _ in spans), max(e for _, e, _ in spans)) if spans else (0, 0)


def mark(
    text: str,
    spans: Sequence[Span],
    values: Mapping[int, float],
    read: tuple[int, int],
    notes: Mapping[int, str] | None = None,
) -> tuple[Piece, ...]:
    """Cut a text into marked and unmarked pieces, which join to the text.

    Byte-level pieces may share a character, which then gets the sum of their values; white space at the ends of a span
    is not marked.

    Args:
        text: The text.
        spans: Where values belong; those whose key has no value are left out.
        values: By key.
        read: The stretch of the text that the model reads.
        notes: Numbers to write, by key; elsewhere the sign is written.
    """
    notes = notes or {}
    trimmed = [_trim(text, span) for span in spans if span[2] in values]
    held = [span for span in trimmed if span[0] < span[1]]
    edges = sorted({0, len(text), *read, *(s for s, _, _ in held), *(e for _, e, _ in held)})
    keys: list[set[int]] = [set() for _ in edges]
    for start, end, key in held:
        for i in range(bisect_left(edges, start), bisect_left(edges, end)):
            keys[i].add(key)
    largest = max(map(abs, values.values()), default=0.0)
    out = []
    for (start, end), here in zip(pairwise(edges), keys, strict=False):
        stretch = text[start:end]
        if here:
            value = sum(values[key] for key in here)
            level = level_of(value, largest)
            note = notes.get(min(here), "") if len(here) == 1 else ""
            out.append(Piece(stretch, value, level, note or (_sign(value) if level else "")))
        else:
            out.append(Piece(stretch, read=read[0] <= start < read[1] or not stretch.strip()))
    return tuple(out)


def point_at(text: str, start: int, end: int, read: tuple[int, int]) -> tuple[Piece, ...]:
    """A text with one stretch pointed at: the word or span that is asked about."""
    edges = sorted({0, len(text), start, end, *read})
    return tuple(
        Piece(text[a:b], read=read[0] <= a < read[1] or not text[a:b].strip(), asked=start <= a < end)
        for a, b in pairwise(edges)
    )


def _trim(text: str, span: Span) -> Span:
    start, end, key = span
    stretch = text[start:end]
    start += len(stretch) - len(stretch.lstrip())
    return start, max(start, start + len(stretch.strip())), key


def level_of(value: float, largest: float) -> int:
    """How strong a value is beside the largest, 0 to 3."""
    return sum(abs(value) >= share * largest for share in _LEVELS) if value and largest else 0


def _share(value: float, largest: float) -> float:
    return abs(value) / largest if largest else 0.0


def _sign(value: float) -> str:
    return "+" if value > 0 else "-"


def list_words(
    texts: Sequence[str], values: Sequence[float], wheres: Sequence[str] = ()
) -> tuple[tuple[Word, ...], str]:
    """Words with their values, strongest first, and the sum as it is written.

    Ties keep their order. All numbers are written alike, so that they can be compared and added by eye.
    """
    wheres = wheres or [""] * len(texts)
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    total = math.fsum(values)
    *numbers, written = write_alike([*(values[i] for i in order), total])
    largest = abs(values[order[0]]) if order else 0.0
    words = (
        Word(texts[i], values[i], number, level_of(values[i], largest), _share(values[i], largest), wheres[i])
        for i, number in zip(order, numbers, strict=True)
    )
    return tuple(words), written


def shorten(words: Sequence[Word], most: int) -> tuple[Word, ...]:
    """The first of a list of words, the rest summed up in one line."""
    if len(words) <= most:
        return tuple(words)
    rest = math.fsum(word.value for word in words[most - 1 :])
    number = write_alike([*(word.value for word in words), rest])[-1]
    largest = abs(words[0].value)
    summed = Word(f"{len(words) - most + 1} more", rest, number, level_of(rest, largest), _share(rest, largest))
    return (*words[: most - 1], summed)


def write_alike(values: Sequence[float], digits: int = 4) -> list[str]:
    """Signed numbers with the decimals, or the power of ten, that show ``digits`` figures of the largest of them.

    Raises:
        NonFiniteError: One is NaN or infinite.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"a value to be shown is {next(v for v in values if not math.isfinite(v))}.")
    largest = max(map(abs, values), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    if -4 <= power <= 5:
        return [_plain_zero(f"{value:+.{max(0, digits - 1 - power)}f}") for value in values]
    return [_plain_zero(f"{value / 10.0**power:+.{digits - 1}f}") + f"e{power:+03d}" for value in values]


def _plain_zero(number: str) -> str:
    """Without a sign before a number that is written as zero."""
    return number if number.strip("+-0.") else number.lstrip("+-")
