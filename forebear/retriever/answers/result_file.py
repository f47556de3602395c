"""Result tables written as they come, to Parquet, JSON Lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forebear.errors import InputError, OutputExistsError
from forebear.indexer.storage.atomic import atomic_file
from forebear.indexer.storage.locks import claimed, exclusive

ENDINGS = (".parquet", ".jsonl", ".csv")
_LINES = 1024  # results turned into text at once


@contextmanager
def result_writer(path: Path, metadata: dict[str, str], *, force: bool) -> Iterator[Callable[[pa.Table], None]]:
    """:func:`table_writer` under the lock of :func:`claimed_output`, for results that are written as they come."""
    with claimed_output(path, force=force), table_writer(path, metadata) as write:
        yield write


@contextmanager
def claimed_output(path: Path, *, force: bool) -> Iterator[None]:
    """Hold the lock of an output file.

    Raises:
        OutputExistsError: The file exists, and ``force`` is not given.
        InUseError: Another process is writing the file.
        InputError: The name has another suffix.
    """
    check_output(path, force=force)
    with exclusive(lock_of(path), str(path)):
        check_output(path, force=force)  # the lock's last holder may have written it
        yield


@contextmanager
def table_writer(path: Path, metadata: dict[str, str]) -> Iterator[Callable[[pa.Table], None]]:
    """Write result tables one after another; the file appears complete, or not at all.

    ``.parquet`` keeps provenance in the schema's metadata, and a text once for each table it is in; ``.jsonl`` and
    ``.csv`` get provenance in a file ``NAME.meta.json`` beside them. CSV has lists as JSON, and nothing for null.
    """
    with atomic_file(path) as handle:
        if path.suffix == ".parquet":
            writer: pq.ParquetWriter | None = None

            def write(table: pa.Table) -> None:
                nonlocal writer
                table = table.replace_schema_metadata(metadata)
                writer = writer or pq.ParquetWriter(handle, table.schema, compression="zstd")
                writer.write_table(table)

            try:
                yield write
            finally:
                if writer is not None:
                    writer.close()
        else:
            yield _row_writer(handle, is_csv=path.suffix == ".csv")
            handle.flush()  # a full disk is found before anything is replaced
            content = json.dumps(json.loads(metadata["forebear"]), indent=1, allow_nan=False)
            # Old results are deleted before the new provenance gets its name, and new results get theirs after it: a
            # process that is killed in between leaves no results beside provenance of other results.
            with atomic_file(path.with_name(path.name + ".meta.json")) as facts:
                facts.write(content.encode() + b"\n")
                facts.flush()
                path.unlink(missing_ok=True)


def _row_writer(handle: IO[bytes], *, is_csv: bool) -> Callable[[pa.Table], None]:
    """A function that writes a table's rows as lines of JSON or CSV, the latter below one header."""
    has_header = False

    def write(table: pa.Table) -> None:
        nonlocal has_header
        text = io.StringIO(newline="")
        lines = csv.writer(text, lineterminator="\n")
        if is_csv and not has_header:
            lines.writerow(table.column_names)
            has_header = True
        for batch in table.to_batches(max_chunksize=_LINES):
            for row in batch.to_pylist():
                if is_csv:
                    lines.writerow(map(_in_csv, row.values()))
                else:
                    text.write(f"{_json(row)}\n")
            handle.write(text.getvalue().encode())
            text.seek(0)
            text.truncate()

    return write


def _in_csv(value: Any) -> Any:
    """A value as a cell of CSV: lists as JSON, dates and times as in ISO 8601."""
    if isinstance(value, list | dict):
        return _json(value)
    return value.isoformat() if isinstance(value, date | time) else value


def _json(value: Any) -> str:
    """A value as JSON; dates and times as in ISO 8601, an infinite number of a user's column as text."""
    if isinstance(value, dict):
        value = {key: str(one) if one in (np.inf, -np.inf) else one for key, one in value.items()}
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=lambda one: one.isoformat())


def lock_of(path: Path) -> Path:
    """The lock file of an output file."""
    return path.with_name(path.name + ".lock")


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output of an unknown kind, or one that exists; before any work is done."""
    if path.suffix not in ENDINGS:
        raise InputError(f"--out {path}: expected a name ending in .parquet, .jsonl or .csv.", of="retrieve")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder. Give a file name.", of="retrieve")
    if path.exists() and not force:
        lock = lock_of(path)
        if lock.exists():  # left by a process that was killed after writing: claiming removes it
            with claimed(lock):
                pass
        raise OutputExistsError(f"{path} exists. Give another --out, or --force to replace it.", of="retrieve")
