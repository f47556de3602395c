"""The folder of an index as it is published: without the texts of its rows unless they are asked for, with a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from forebear.errors import InputError, OutputExistsError, first_line
from forebear.hub.card import card_of
from forebear.indexer.building.finish import describe_file
from forebear.indexer.index import Index
from forebear.indexer.storage.arrow import read_batches, write_table
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.layout import CARD_NAME, COLUMNS, EFFECTS_NAME
from forebear.indexer.storage.manifest import Checkpoint, Manifest
from forebear.progress import tell_warning

_TEXT_STORES = {"words": "word gradients (the pieces of the texts)", "spans": "spans (places in the texts)"}


def write_published(index: Index, folder: Path, *, with_texts: bool = False, model: str | None = None) -> Manifest:
    """Write the folder that is published of an index.

    Without texts the rows keep their labels, predictions and losses, and the 128-bit digests by which equal rows are
    known; the texts are empty, and columns kept beside them are left out. The names of local models and training
    files are cut to their last part in any case: the rest tells how the disk of whoever publishes is laid out. What
    ``forebear evaluate effects --keep`` has left beside the index goes along.

    Args:
        index: The index; every file is hashed before it is copied.
        folder: To write; must not exist.
        with_texts: Whether texts and the columns beside them are published.
        model: Where readers find the last checkpoint: a hub name. None: as the index names it.

    Returns:
        The manifest of the folder.

    Raises:
        InputError: Texts are to be left out, and the index holds stores that are made of texts.
        OutputExistsError: The folder exists.
        CorruptIndexError: A file of the index was altered.
    """
    _check_stores(index, with_texts)
    make_new(folder)
    names = [name for name in index.manifest.files if with_texts or not name.startswith(f"{COLUMNS}/")]
    files = copy_files(index, names, folder, None if with_texts else _write_without_texts)
    manifest = _published_manifest(index, with_texts, model).with_files(files)
    manifest.write(folder)
    write_effects(index, manifest, folder)
    write_bytes(folder / CARD_NAME, card_of(manifest).encode())
    return manifest


def make_new(folder: Path) -> None:
    """Make a folder.

    Raises:
        OutputExistsError: It exists.
    """
    if folder.exists():
        raise OutputExistsError(f"{folder} exists. Name a new folder.")
    folder.mkdir(parents=True)


def copy_files(
    index: Index, names: Sequence[str], folder: Path, write_rows: Callable[[Path, Path], None] | None
) -> dict[str, dict[str, Any]]:
    """Copy files of an index, each of which is hashed before.

    Args:
        index: The index.
        names: Its files.
        folder: To copy into; by links, where they are possible.
        write_rows: Writes each file of ``rows/`` in place of a copy, in ascending order: from its path, to another.

    Returns:
        sha256 and size of each copy, by name.

    Raises:
        CorruptIndexError: A file was altered.
    """
    files = {}
    for name, path in zip(names, index.checked(*names), strict=True):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if write_rows is not None and name.startswith("rows/"):
            write_rows(path, copy)
            files[name] = describe_file(folder, name)
        else:
            _link(path, copy)
            files[name] = index.manifest.files[name]
    return files


def write_effects(index: Index, manifest: Manifest, folder: Path) -> None:
    """Write what ``evaluate effects --keep`` remembers; results of this index become those of its copy."""
    path = index.folder / EFFECTS_NAME
    if not path.is_file():
        return
    digests = {index.manifest.digest(): manifest.digest()}
    try:
        content = json.loads(path.read_bytes())
        for one in content["results"]:
            one["index_digest"] = digests.get(one["index_digest"], one["index_digest"])
            n_rows, _, source = one["test_rows"].partition(" of ")
            one["test_rows"] = f"{n_rows} of {PurePath(source).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        tell_warning(f"{path} is damaged ({first_line(error)}): it is not copied.")
        return
    write_bytes(folder / EFFECTS_NAME, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def _check_stores(index: Index, with_texts: bool) -> None:
    if index.manifest.without_texts and with_texts:
        raise InputError(f"{index.folder} was published without texts: there are none for --with-texts.")
    for store, words in _TEXT_STORES.items():
        if store in index.manifest.spec.stores and not with_texts:
            raise InputError(
                f"{index.folder} holds {words}. Give --with-texts to publish them and the texts, or build an index "
                f"without --store {store} to publish."
            )


def _published_manifest(index: Index, with_texts: bool, model: str | None) -> Manifest:
    manifest = index.manifest
    checkpoints = tuple(_of_published(c, index.folder) for c in manifest.checkpoints)
    if model is not None:
        checkpoints = (*checkpoints[:-1], replace(checkpoints[-1], path=model))
    segments = tuple(replace(s, source=PurePath(s.source).name) for s in manifest.segments)
    sentence = manifest.sentence_model
    return replace(
        manifest,
        checkpoints=checkpoints,
        segments=segments,
        sentence_model=None if sentence is None else _public_name(sentence, index.folder),
        columns=manifest.columns if with_texts else {},
        without_texts=not with_texts,
    )


def _of_published(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    return replace(checkpoint, path=_public_name(checkpoint.path, folder))


def _public_name(path: str, folder: Path) -> str:
    """A hub name as it is; of a local folder, given relative to the index or not, the last part alone."""
    is_local = PurePath(path).is_absolute() or path.startswith(".") or (folder / path).exists() or Path(path).exists()
    return PurePath(path).name if is_local or path.count("/") > 1 else path


def _write_without_texts(path: Path, copy: Path) -> None:
    batches = [_without_texts(batch) for batch in read_batches(path)]
    write_table(copy, batches, batches[0].schema)


def _without_texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    def emptied(name: str) -> pa.Array:
        values = batch.column(name)
        return pa.array([""], values.type).take(pa.array([0] * len(batch))) if name.startswith("text_") else values

    names: Sequence[str] = batch.schema.names
    return pa.RecordBatch.from_arrays([emptied(name) for name in names], schema=batch.schema)


def _link(path: Path, copy: Path) -> None:
    """The same bytes under another name; a copy where the file system has no links."""
    try:
        os.link(path.resolve(), copy)
    except OSError:
        shutil.copyfile(path, copy)
