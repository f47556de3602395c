"""Which columns of a source hold the texts and the labels: as the user says, as is remembered, else by usual names.

Names match whatever their case and the white space around them: the second column of ``text, label`` is ``label``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.files.reader import Reader, listed
from forebear.indexer.rows.row_format import RowFormat
from forebear.wording import worded

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
SINGLES = (  # by rank: of one rank only one may be there
    ("text", "sentence"),
    (
        "review", "review_text", "comment", "comment_text", "tweet", "tweet_text", "content", "document", "body",
        "message", "utterance", "headline", "post",
    ),
)  # fmt: skip
LABELS = (  # by rank, likewise
    ("label",),
    ("labels",),
    ("gold_label",),
    ("class", "target", "category", "sentiment", "toxic", "toxicity", "intent", "emotion", "topic", "spam"),
)
PLAIN = (*PAIRS, ("text",), ("sentence",), ("label",))  # names that nobody mistakes: that they were taken is no news
Origin = tuple[str, str]  # what was taken without being named by the user, and why


def find_text_columns(
    reader: Reader, wanted: Sequence[str] | None, recorded: Sequence[str] | None, like: RowFormat
) -> tuple[tuple[str, ...], str | None]:
    """One or two columns that hold text, in order of encoding.

    Args:
        reader: The source.
        wanted: Names that the user gave, or None.
        recorded: Names in the ``dataset.json`` beside the file, or None.
        like: Remembered names, which are taken where the source has them all.

    Returns:
        The columns, and why they were taken; None if the user named them, or their names are plain.

    Raises:
        DataError: There is no such column, more than one choice, or one that holds no strings.
    """
    columns = reader.schema.names
    origin: str | None = None
    remembered = [column for name in like.text_columns if (column := _only_match(reader, name)) is not None]
    if wanted is not None:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        texts = [_named(reader, column, "--text-columns") for column in chosen]
        if len(texts) not in (1, 2) or len(set(texts)) < len(texts):
            raise DataError(f"--text-columns names {listed(chosen)}; expected one or two different columns.")
    elif remembered and len(remembered) == len(like.text_columns):
        texts, origin = remembered, f"as in {like.owner}"
    elif recorded and set(recorded) <= set(columns):
        texts, origin = list(recorded), "named by dataset.json"
    else:
        ranks = (PAIRS, *(tuple((name,) for name in rank) for rank in SINGLES))
        found = _by_usual_name(columns)
        fits = next((f for rank in ranks if (f := [names for names in rank if found.keys() >= set(names)])), [])
        if len(fits) != 1:
            several = listed(" and ".join(found[name][0] for name in names) for names in fits)
            problem = f"several columns that may be the text ({several})" if fits else "no text column known by name"
            raise DataError(
                f"{reader.name} has {problem}; its columns are {listed(columns)}. Name one, or two for a "
                f"pair, with --text-columns.{reader.hint if len(columns) == 1 else ''}"
            )
        texts, origin = [_only_of(reader, found[name], "--text-columns") for name in fits[0]], "found by name"
    for column in texts:
        kind = reader.schema.field(column).type
        other = {k: row for k, row in reader.kinds.get(column, {}).items() if k not in ("null", "a name")}
        if other or not (is_text(kind) or pa.types.is_null(kind)):
            held = f"{next(iter(other))} in row {min(other.values())} (from 0)" if other else str(kind)
            raise DataError(
                f"{reader.name}: text column {column!r} holds {held}; expected strings. "
                f"Mend it, or name another with --text-columns."
            )
    return tuple(texts), None if tuple(texts) in PLAIN else origin


def find_label_columns(
    reader: Reader, wanted: str | Sequence[str] | None, texts: tuple[str, ...], like: RowFormat, *, need_labels: bool
) -> tuple[tuple[str, ...], str | None]:
    """The column of labels, and why it was taken: None if the user named it, or its name is plain.

    There is no column where none is named, remembered or known by name, or where several may be it; the reason then
    names these. Several columns are taken only where they are named, or remembered.

    Raises:
        DataError: There is no such column, or it is a text column too; several may be it, and labels are needed.
    """
    if wanted is not None:
        columns = tuple(_named(reader, name, "--label-column") for name in _parted(reader, wanted))
        if both := [column for column in columns if column in texts]:
            raise DataError(f"{reader.name}: column {both[0]!r} is named both as text and as label; name two columns.")
        if len(set(columns)) < len(columns):
            raise DataError(f"{reader.name}: --label-column {listed(columns)} names a column twice; name each once.")
        return columns, None
    if like.label_column is not None:
        remembered = [_only_match(reader, name) for name in _parted(reader, like.label_column)]
        columns = tuple(column for column in remembered if column is not None and column not in texts)
        if len(columns) == len(remembered):
            return columns, None if columns in PLAIN else f"as in {like.owner}"
    found = _by_usual_name(column for column in reader.schema.names if column not in texts)
    fits = next((f for rank in LABELS if (f := [name for name in rank if name in found])), [])
    if not fits:
        return (), None
    candidates = [column for name in fits for column in found[name]]
    if len(fits) == 1:
        column = _only_of(reader, candidates, "--label-column")
        return (column,), None if (column,) in PLAIN else "found by name"
    if need_labels:
        raise DataError(
            f"{reader.name} has several columns that may be the labels: {listed(candidates)}. Name one with "
            "--label-column."
        )
    return (), worded(f"{listed(candidates)} may be it: name one with --label-column")


def _parted(reader: Reader, wanted: str | Sequence[str]) -> list[str]:
    """The names in ``a,b,c``, unless one column has this name."""
    if not isinstance(wanted, str):
        return list(wanted)
    if "," not in wanted or _only_match(reader, wanted) is not None:
        return [wanted]
    return [name.strip() for name in wanted.split(",") if name.strip()]


def said(name: str, taken: Sequence[Origin]) -> str | None:
    """One line on what was taken of a source without being named, such as ``a.csv: label column toxic (found ...)``.

    Args:
        name: The source.
        taken: What was taken, and why; neighbours with the same reason share it.
    """
    parts = [f"{', '.join(what for what, _ in group)} ({why})" for why, group in groupby(taken, key=lambda one: one[1])]
    return f"{name}: {', '.join(parts)}" if parts else None


def _folded(column: str) -> str:
    return column.strip().lower()


def _by_usual_name(columns: Iterable[str]) -> dict[str, list[str]]:
    """Columns by name in lower case, with "_" for white space and hyphens: ``Comment Text`` as ``comment_text``."""
    found: dict[str, list[str]] = {}
    for column in columns:
        found.setdefault(re.sub(r"[\s-]+", "_", _folded(column)), []).append(column)
    return found


def _only_of(reader: Reader, columns: Sequence[str], option: str) -> str:
    """The one column of a usual name.

    Raises:
        DataError: Several columns have it, but for case, hyphens and blanks.
    """
    if len(columns) > 1:
        raise DataError(f"{reader.name} has the columns {listed(columns)}, nearly alike; name one with {option}.")
    return columns[0]


def _only_match(reader: Reader, wanted: str) -> str | None:
    """The column of this name, else the only one of it but for case and white space around it; None without."""
    columns = reader.schema.names
    matches = [column for column in columns if column == wanted] or [
        column for column in columns if _folded(column) == _folded(wanted)
    ]
    return str(matches[0]) if len(matches) == 1 else None


def _named(reader: Reader, wanted: str, option: str) -> str:
    """Find a column by its exact name, else ignoring case and white space around it."""
    column = _only_match(reader, wanted)
    if column is None:
        columns = reader.schema.names
        alike = any(_folded(name) == _folded(wanted) for name in columns)
        problem = f"more than one column {wanted!r} but for case" if alike else f"no column {wanted!r}"
        hint = reader.hint if len(columns) == 1 else ""
        raise DataError(
            f"{reader.name} has {problem}; its columns are {listed(columns)}. Name one with {option}.{hint}"
        )
    return column
