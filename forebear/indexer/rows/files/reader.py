"""What a reader of any source is, and what all readers share: limits, messages, a name for what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from forebear.errors import DataError, is_out_of_memory

CHUNK_ROWS = 4096
CHUNK_BYTES = 16 << 20  # also the longest row that a CSV file may have
MAX_COLUMNS = 10_000
SHOWN_NAMES = 30
READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, TypeError, OverflowError, RecursionError)

Kinds = dict[str, dict[str, int]]  # by column: each kind of value in it, and the first row of that kind


@contextmanager
def reading(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the source."""
    try:
        yield
    except READ_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{name} cannot be read as {expected}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line of some 300 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def listed(names: Iterable[str]) -> str:
    """Names for a message, ``none`` where there are none; of many, the first."""
    known = list(names)
    more = f" and {len(known) - SHOWN_NAMES:,} more" if len(known) > SHOWN_NAMES else ""
    return (", ".join(known[:SHOWN_NAMES]) or "none") + more


@dataclass
class Reader:
    """Streams a source's rows as tables of any size.

    Attributes:
        name: What the user gave.
        schema: Every column.
        n_rows: Number of rows; None where that takes a pass.
        tables: Given a row number and some columns (None: all), the tables from that row on.
        typed: False for CSV, where a label's kind shows in its characters.
        kinds: For JSON values, the first row of each kind in a column; else empty.
        delimiter: The character that parts the values of a CSV or TSV file; None for other sources.
        encoding: Encoding of a text file, where one was given; None: UTF-8, or no text file.
        hint: What else may be wrong where the columns are not as expected; a sentence after a space, or empty.
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    tables: Callable[[int, list[str] | None], Iterator[pa.Table]]
    typed: bool = True
    kinds: Kinds = field(default_factory=dict)
    delimiter: str | None = None
    encoding: str | None = None
    hint: str = ""


def from_row(start: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The batches as tables, without their first ``start`` rows."""
    for batch in batches:
        if start < batch.num_rows:
            yield pa.Table.from_batches([batch.slice(start)])
        start = max(0, start - batch.num_rows)


def check_width(name: str, n_columns: int) -> None:
    """Refuse a source with more columns than any table of texts has.

    Raises:
        DataError: It has more than ``MAX_COLUMNS``.
    """
    if n_columns > MAX_COLUMNS:
        raise DataError(
            f"{name} has {n_columns:,} columns or more; expected at most {MAX_COLUMNS:,}. Has every row its own "
            "keys, or a line break lost? Else save the columns of texts and labels alone."
        )
