"""Marks in texts: the stretches of a text that carry values, their strength, and the note beside each.

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

Span = tuple[int, int, int]  # first character, one past the last, key of its value
_LEVELS = (0.03, 0.2, 0.5)  # shares of the strongest from which a mark is light, medium, strong


@dataclass(frozen=True)
class Piece:
    """A stretch of a text.

    Attributes:
        text: The characters of the stretch.
        value: Value of the stretch; None where it is not marked.
        level: Strength from 0 (next to nothing) to 3 (strong), relative to the strongest mark of the same row.
        note: Text written beside the stretch: its number, its sign, or nothing.
        read: Whether the model reads the stretch; False where truncation cuts it off.
        asked: Whether the stretch is the word or span of the query that is asked about.
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
        value: Value of the word.
        number: The value as it is written, with as many digits as the others of its list.
        level: See :class:`Piece`.
        share: |value| over the largest |value| of the list, 0 to 1.
        where: Name of the text column that holds the word; empty where there is one column.
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
        classifier: The model; its tokenizer (a fast one) and its maximal length are used.
        texts: Texts of the rows, one list a text column, ``(columns, n)``.
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
        spans: Stretches that carry values, each with a key; a span whose key has no value is left out.
        values: Values by key.
        read: First character, and one past the last, that the model reads.
        notes: Numbers to write beside a mark, by key; beside other marks the sign is written.
    """
    notes = notes or {}
    trimmed = [_trim(text, span) for span in spans if span[2] in values]
    nonempty = [span for span in trimmed if span[0] < span[1]]
    edges = sorted({0, len(text), *read, *(s for s, _, _ in nonempty), *(e for _, e, _ in nonempty)})
    keys: list[set[int]] = [set() for _ in edges]
    for start, end, key in nonempty:
        for i in range(bisect_left(edges, start), bisect_left(edges, end)):
            keys[i].add(key)
    largest = max(map(abs, values.values()), default=0.0)
    out = []
    for (start, end), stretch_keys in zip(pairwise(edges), keys, strict=False):
        stretch = text[start:end]
        if stretch_keys:
            value = sum(values[key] for key in stretch_keys)
            level = level_of(value, largest)
            note = notes.get(min(stretch_keys), "") if len(stretch_keys) == 1 else ""
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
    """Strength of a value relative to the largest, 0 to 3."""
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
        NonFiniteError: A value is NaN or infinite.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"a value to be shown is {next(v for v in values if not math.isfinite(v))}.")
    largest = max(map(abs, values), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    if -4 <= power <= 5:
        return [_plain_zero(f"{value:+.{max(0, digits - 1 - power)}f}") for value in values]
    return [_plain_zero(f"{value / 10.0**power:+.{digits - 1}f}") + f"e{power:+03d}" for value in values]


def _plain_zero(number: str) -> str:
    """A number, without its sign where it is written as zero: ``0.00`` for ``-0.00``."""
    return number if number.strip("+-0.") else number.lstrip("+-")
