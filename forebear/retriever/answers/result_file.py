"""Result tables written as they come, to Parquet or JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from forebear.errors import InputError, OutputExistsError
from forebear.indexer.storage.atomic import atomic_file
from forebear.indexer.storage.locks import claimed, exclusive

_LINES = 1024  # results turned into JSON at once


@contextmanager
def result_writer(path: Path, metadata: dict[str, str], *, force: bool) -> Iterator[Callable[[pa.Table], None]]:
    """Write result tables one after another; the file appears complete, or not at all.

    ``.parquet`` keeps provenance in the schema's metadata, and a text once for each table it is in; ``.jsonl`` gets
    provenance in a file ``NAME.meta.json`` beside it.

    Raises:
        OutputExistsError: The file exists, and ``force`` is not given.
        InUseError: Another process is writing the file.
        InputError: The name has another suffix.
    """
    check_output(path, force=force)
    with exclusive(path.with_name(path.name + ".lock"), str(path)), _whole(path, force=force) as handle:
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

            def write_lines(table: pa.Table) -> None:
                for batch in table.to_batches(max_chunksize=_LINES):
                    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in batch.to_pylist())
                    handle.write("".join(f"{line}\n" for line in lines).encode())

            yield write_lines
            handle.flush()  # a full disk is found before anything is replaced
            content = json.dumps(json.loads(metadata["forebear"]), indent=1, allow_nan=False)
            # Old results are deleted before the new provenance gets its name, and new results get theirs after it: a
            # process that is killed in between leaves no results beside provenance of other results.
            with atomic_file(path.with_name(path.name + ".meta.json")) as facts:
                facts.write(content.encode() + b"\n")
                facts.flush()
                path.unlink(missing_ok=True)


@contextmanager
def _whole(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Open the file under its lock, after a second check: the lock's last holder may have written it."""
    check_output(path, force=force)
    with atomic_file(path) as handle:
        yield handle


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output of an unknown kind, or one that exists; before any work is done."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"--out {path}: expected a name ending in .parquet or .jsonl.", of="retrieve")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder. Give a file name.", of="retrieve")
    if path.exists() and not force:
        lock = path.with_name(path.name + ".lock")
        if lock.exists():  # left by a process that was killed after writing: claiming removes it
            with claimed(lock):
                pass
        raise OutputExistsError(f"{path} exists. Give another --out, or --force to replace it.", of="retrieve")
