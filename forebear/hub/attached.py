"""An index that was published without texts, made whole again by whoever has its training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import ForebearError, InputError, MismatchError
from forebear.hub.published import copy_files, make_new, write_effects
from forebear.indexer.building.finish import describe_file
from forebear.indexer.building.sharing.beginning import checkpoints_now, load_checked
from forebear.indexer.building.sharing.shard_rows import targets_of
from forebear.indexer.gradients.earlier_rows import DIGEST, shard_file
from forebear.indexer.index import Index
from forebear.indexer.model.encoding import encode, read_digests
from forebear.indexer.rows.labels import label_map
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.rows.row_source import RowBlock, RowSource
from forebear.indexer.rows.targets.label_column import DROP_MARKED
from forebear.indexer.rows.user_columns import ALL, choose_columns, columns_sha256, stored_columns
from forebear.indexer.storage.arrow import column, read_batches, write_columns
from forebear.indexer.storage.files import path_of, url_of
from forebear.indexer.storage.layout import COLUMNS
from forebear.indexer.storage.manifest import Segment
from forebear.progress import tell_warning


def attach_texts(
    index: Index,
    rows: Any,
    out: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    keep_columns: Sequence[str] = (ALL,),
    **reading: Any,
) -> Index:
    """Write the folder of a published index with the texts of its rows in it.

    The rows must be those of the index to the last byte of texts and labels: their sha256 is compared with the one that
    each segment has kept. Columns beside the texts come back where theirs fits, too.

    Args:
        index: The index, without texts.
        rows: Its training rows, in their order; of an index that was appended to all of them. As ``open_rows`` takes
            them, or a RowSource.
        out: Folder to write; must not exist.
        model: Path of the run, or of the last checkpoint, if it is not where the index says; loaded only to find the
            first row that differs.
        device: Device for it.
        keep_columns: Names of the columns beside the texts, as the index was built with.
        **reading: How they are read, as ``open_rows`` takes it; default: as the index remembers it.

    Returns:
        The whole index.

    Raises:
        InputError: The index has its texts; or ``out`` is a URL.
        MismatchError: The rows are others; the first that differs is named.
        OutputExistsError: The folder exists.
        CorruptIndexError: A file of the index was altered.
    """
    if url_of(out) is not None:
        raise InputError(f"{out}: texts are put back in a folder of this machine. Name one, and copy it there.")
    manifest, folder = index.manifest, path_of(out)
    if not manifest.without_texts:
        raise InputError(f"{index.folder} has the texts of its rows: there is nothing to attach.")
    source = rows if isinstance(rows, RowSource) else _open(index, rows, reading)
    _check_rows(index, source, model, device)
    columns = _columns(index, source, keep_columns)
    make_new(folder)
    blocks = _blocks(index, source)
    files = copy_files(index, list(manifest.files), folder, partial(_write_rows, folder, blocks, columns))
    for shard in range(len(manifest.shards)) if columns else ():
        files[f"{COLUMNS}/{shard_file(shard)}"] = describe_file(folder, f"{COLUMNS}/{shard_file(shard)}")
    whole = replace(manifest, without_texts=False, columns=columns).with_files(files)
    whole.write(folder)
    write_effects(index, whole, folder)
    return Index.open(folder)


def _open(index: Index, rows: Any, reading: dict[str, Any]) -> RowSource:
    manifest = index.manifest
    as_built: dict[str, Any] = {
        "like": manifest.row_format,
        "classes": manifest.spec.label_names,
        "unlabelled": DROP_MARKED,
    }
    return open_rows(rows, **as_built | reading, need_labels=True)


def _check_rows(index: Index, source: RowSource, model: str | None, device: str) -> None:
    """Refuse rows that are not those of the index."""
    manifest = index.manifest
    n_texts = len(manifest.spec.text_columns)
    if source.n_rows != manifest.n_rows or len(source.text_columns) != n_texts:
        raise MismatchError(
            f"{source.name} has {source.n_rows:,} rows of {len(source.text_columns)} text column(s), {index.folder} "
            f"has {manifest.n_rows:,} of {n_texts}. Give all its training rows by --train, in their order."
        )
    for segment in manifest.segments:
        if source.sha256(segment.start, segment.start + segment.n_rows) != segment.rows_sha256:
            raise MismatchError(_first_difference(index, source, segment, model, device))


def _first_difference(index: Index, source: RowSource, segment: Segment, model: str | None, device: str) -> str:
    """Which row of a segment is another one, by its label and by the digest of what the model reads of it."""
    spec = index.manifest.spec
    where = f"{source.name} holds other rows than those of {index.folder}"
    try:
        classifier = load_checked(checkpoints_now(index, model)[-1], spec, device)
        labels = label_map(source, spec.label_names, spec.label_mode, problem_type=spec.problem_type)
    except ForebearError as error:
        return f"{where}: their sha256 is another. Which row is the first to differ needs the model ({error})"
    for shard, block in _blocks(index, source):
        stored = read_batches(*index.checked(f"rows/{shard_file(shard)}"))[0]
        differs = _rows_differ(column(stored, "label"), targets_of(block, labels))
        if DIGEST in stored.schema.names:
            differs |= _rows_differ(column(stored, DIGEST), read_digests(encode(classifier, block.texts)))
        if differs.any():
            row = block.start + int(np.argmax(differs))
            return f"{where}: row {source.file_row(row)} (from 0) is the first that differs. Give the rows by --train."
    return (
        f"{where}: rows {segment.start} to {segment.start + segment.n_rows - 1} read the same for the model, but not "
        "to the last byte (spaces, capitals, what it cuts off, or how labels are written). Give the file itself."
    )


def _rows_differ(stored: np.ndarray, found: np.ndarray) -> np.ndarray:
    return np.asarray((stored != found).reshape(len(stored), -1).any(axis=1))


def _columns(index: Index, source: RowSource, names: Sequence[str]) -> dict[str, str]:
    """The columns beside the texts, if they are those that the index was built with."""
    manifest = index.manifest
    if all(segment.user_columns_sha256 is None for segment in manifest.segments):
        return {}
    columns = choose_columns(source, names)
    if [columns_sha256(source, columns)] == [segment.user_columns_sha256 for segment in manifest.segments]:
        return columns
    tell_warning(
        f"{source.name}: its columns beside texts and labels are not those that the index was built with, and are left "
        "out. Name those by --keep-columns."
    )
    return {}


def _blocks(index: Index, source: RowSource) -> Iterator[tuple[int, RowBlock]]:
    """The rows of each shard, with its number."""
    manifest = index.manifest
    shards = iter(enumerate(manifest.shards))
    for segment in manifest.segments:
        stop = segment.start + segment.n_rows
        for block in source.blocks(manifest.spec.shard_rows, segment.start):
            shard, (first, last) = next(shards)
            texts = tuple(texts[: last - first] for texts in block.texts)
            labels = None if block.labels is None else block.labels[: last - first]
            yield shard, RowBlock(first, texts, labels, block.table.slice(0, last - first))
            if last == stop and stop < source.n_rows:
                break


def _write_rows(
    folder: Path, blocks: Iterator[tuple[int, RowBlock]], columns: dict[str, str], path: Path, copy: Path
) -> None:
    """Write a file of ``rows/`` with the texts of the next block in it, and the columns beside them."""
    _, block = next(blocks)
    batch = read_batches(path)[0]
    texts = {f"text_{i}": values for i, values in enumerate(block.texts)}
    held = {name: batch.column(name) for name in batch.schema.names}
    text_type = next(batch.column(name).type for name in texts)
    write_columns(copy, held | {name: pa.array(v, text_type) for name, v in texts.items()}, batch.schema.metadata)
    if columns:
        write_columns(folder / COLUMNS / path.name, stored_columns(block.table, columns))
