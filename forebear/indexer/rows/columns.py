"""Which columns of a source hold the texts and the labels: as the user says, else by their names.

Names match whatever their case and the white space around them: the second column of ``text, label`` is ``label``.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.file_formats import Reader, listed

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
SINGLES = (("text", "sentence"), ("review", "content", "document", "comment", "tweet"))  # by rank
LABELS = ("label", "labels", "gold_label", "class", "target", "category")  # by rank


def find_text_columns(reader: Reader, wanted: Sequence[str] | None, recorded: Sequence[str] | None) -> tuple[str, ...]:
    """One or two columns that hold text, in order of encoding.

    Args:
        reader: The source.
        wanted: Names that the user gave, or None.
        recorded: Names in the ``dataset.json`` beside the file, or None.

    Raises:
        DataError: There is no such column, more than one choice, or one that holds no strings.
    """
    columns = reader.schema.names
    if wanted is not None:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        texts = [_named(reader, column, "--text-columns") for column in chosen]
        if len(texts) not in (1, 2) or len(set(texts)) < len(texts):
            raise DataError(f"--text-columns names {listed(chosen)}; expected one or two different columns.")
    elif recorded and set(recorded) <= set(columns):
        texts = list(recorded)
    else:
        ranks = (PAIRS, *(tuple((name,) for name in rank) for rank in SINGLES))
        folded = {_folded(column) for column in columns}
        fits = next((f for rank in ranks if (f := [names for names in rank if folded >= set(names)])), [])
        if len(fits) != 1:
            problem = "has no text column known by name" if not fits else "has several columns that may be the text"
            raise DataError(
                f"{reader.name} {problem}; its columns are {listed(columns)}. Name one, or two for a "
                f"pair, with --text-columns.{_delimiter_hint(reader)}"
            )
        texts = [_named(reader, column, "--text-columns") for column in fits[0]]
    for column in texts:
        kind = reader.schema.field(column).type
        other = {k: row for k, row in reader.kinds.get(column, {}).items() if k not in ("null", "a name")}
        if other or not (is_text(kind) or pa.types.is_null(kind)):
            held = f"{next(iter(other))} in row {min(other.values())} (from 0)" if other else str(kind)
            raise DataError(
                f"{reader.name}: text column {column!r} holds {held}; expected strings. "
                f"Mend it, or name another with --text-columns."
            )
    return tuple(texts)


def find_label_column(reader: Reader, wanted: str | None, texts: tuple[str, ...]) -> str | None:
    """The column of labels; None where none is named and none is known by name.

    Raises:
        DataError: There is no such column, or it is a text column too.
    """
    if wanted is None:
        folded = {_folded(column) for column in reader.schema.names if column not in texts}
        wanted = next((name for name in LABELS if name in folded), None)
        if wanted is None:
            return None
    column = _named(reader, wanted, "--label-column")
    if column in texts:
        raise DataError(f"{reader.name}: column {column!r} is named both as text and as label; name two columns.")
    return column


def _folded(column: str) -> str:
    return column.strip().lower()


def _named(reader: Reader, wanted: str, option: str) -> str:
    """Find a column by its exact name, else ignoring case and white space around it."""
    columns = reader.schema.names
    matches = [column for column in columns if column == wanted] or [
        column for column in columns if _folded(column) == _folded(wanted)
    ]
    if len(matches) != 1:
        problem = f"more than one column {wanted!r} but for case" if matches else f"no column {wanted!r}"
        raise DataError(f"{reader.name} has {problem}; its columns are {listed(columns)}. Name one with {option}.")
    return str(matches[0])


def _delimiter_hint(reader: Reader) -> str:
    """A hint if the whole header of a CSV or TSV file is one column: another character may separate its values."""
    names = reader.schema.names
    if reader.typed or len(names) != 1:
        return ""
    signs = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
    separator = next((text for sign, text in signs.items() if sign in names[0]), None)
    if separator is None:
        return ""
    return f" Are its values separated by {separator}? A .csv file takes commas, a .tsv file tabs."
