"""Several data files as one source: those of a folder, or those that match a pattern, in natural order.

Natural order reads digits as numbers: ``part-2`` comes before ``part-10``. The rows, and so their digest, do not depend
on how they are divided into files, nor on where the files lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.files.file_formats import json_type
from forebear.indexer.rows.files.reader import Kinds, Reader, from_row, listed

SPLITS = ("train", "test", "validation", "valid", "val", "dev")
NO_ROWS = ("dataset.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # describe rows, hold none


def natural_order(path: Path) -> list[Any]:
    """A sort key that reads digits in a file's name as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name.lower())]


def matching_files(pattern: str) -> list[Path] | None:
    """The files that match a pattern such as ``data/train-*.parquet``; None where the name is no pattern."""
    if not has_magic(pattern):
        return None
    paths = map(Path, glob(pattern))  # noqa: PTH207  # Path.glob takes no absolute patterns
    return sorted((path for path in paths if path.is_file()), key=natural_order)


def files_of_folder(folder: Path, endings: Sequence[str], split: str | None) -> list[Path]:
    """The data files of a folder, or those whose names begin with a split's.

    Raises:
        DataError: There are none, they are of several formats, or they are those of several splits.
    """
    every = sorted(
        (p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(tuple(endings)) and _holds_rows(p)),
        key=natural_order,
    )
    splits = {path: match[0] for path in every if (match := re.match("|".join(SPLITS), path.name.lower()))}
    files = [path for path in every if split is None or re.match(rf"{re.escape(split)}(?![a-z])", path.name, re.I)]
    if not files:
        held = f"; data files in it: {listed(path.name for path in every)}" if every else ""
        wanted = "no data files" if split is None else f"no data files whose names begin with {split!r}"
        folders = [path.name for path in folder.iterdir() if path.is_dir()] if not every else []
        inside = f" Are they in {folder / folders[0]}?" if len(folders) == 1 else ""
        raise DataError(
            f"{folder} holds {wanted}{held}; expected files of rows in one format, or a folder of save_to_disk.{inside}"
        )
    if split is None and len(names := sorted(set(splits.values()))) > 1:
        raise DataError(
            f"{folder} holds files of several splits: {listed(path.name for path in files)}. Name one of "
            f"{listed(names)}, as in {folder}:{names[0]}, or give a pattern such as '{folder}/{names[0]}*'."
        )
    return files


def _holds_rows(path: Path) -> bool:
    return path.name not in NO_ROWS and not path.name.endswith(".meta.json") and path.name[0] not in "._"


def joined_reader(name: str, readers: Sequence[Reader]) -> Reader:
    """Several files, one after another, as one source.

    Raises:
        DataError: A file has other columns, or a column another type that does not fit.
    """
    first = readers[0]
    for reader in readers[1:]:
        differing = sorted(set(first.schema.names) ^ set(reader.schema.names))
        if differing and not first.kinds:  # objects of JSON files may leave keys out
            raise DataError(
                f"{name}: {reader.name} has the columns {listed(reader.schema.names)}, {first.name} has "
                f"{listed(first.schema.names)}; expected the same in every file.{reader.hint}"
            )
    kinds = _joined_kinds(readers)
    schema = _joined_schema(name, readers, kinds)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns], schema.metadata)
        for reader in readers:
            if reader.n_rows is not None and start >= reader.n_rows:
                start -= reader.n_rows
                continue
            held = [column for column in wanted.names if column in reader.schema.names] or reader.schema.names[:1]
            for table in reader.tables(0, held):
                for batch in from_row(start, table.to_batches()):
                    yield _cast(batch, wanted)
                start = max(0, start - len(table))

    counts = [reader.n_rows for reader in readers]
    n_rows = None if None in counts else sum(count for count in counts if count is not None)
    return Reader(
        name, schema, n_rows, tables, typed=first.typed, kinds=kinds,
        delimiter=first.delimiter, encoding=first.encoding, hint=first.hint,
    )  # fmt: skip


def _joined_kinds(readers: Sequence[Reader]) -> Kinds:
    """The first row of each kind of JSON value by column, rows numbered over all files."""
    kinds: Kinds = {}
    start = 0
    for reader in readers:
        for column, of_column in reader.kinds.items():
            known = kinds.setdefault(column, {"null": 0} if start else {})
            for kind, row in of_column.items():
                known.setdefault(kind, start + row)
        for column in kinds.keys() - reader.kinds.keys():
            kinds[column].setdefault("null", start)
        start += reader.n_rows or 0
    return kinds


def _joined_schema(name: str, readers: Sequence[Reader], kinds: Kinds) -> pa.Schema:
    if kinds:
        return pa.schema([(column, json_type(found.keys() - {"null"})) for column, found in kinds.items()])
    first = readers[0].schema
    for reader in readers[1:]:
        ordered = pa.schema([reader.schema.field(column) for column in first.names])
        try:
            first = pa.unify_schemas([first, ordered], promote_options="permissive").with_metadata(first.metadata)
        except pa.ArrowException as error:
            raise DataError(
                f"{name}: {reader.name} has columns of other types than {readers[0].name} "
                f"({' '.join(str(error).split())}); expected the same in every file."
            ) from error
        mine, other = ((schema.metadata or {}).get(b"huggingface") for schema in (first, reader.schema))
        if mine != other and None not in (mine, other):
            raise DataError(
                f"{name}: {reader.name} states other features (such as label names) than {readers[0].name}; expected "
                "the same in every file."
            )
    return first


def _cast(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    columns = [
        table.column(kind.name).cast(kind.type)
        if kind.name in table.column_names
        else pa.chunked_array([pa.nulls(len(table), kind.type)])
        for kind in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)
