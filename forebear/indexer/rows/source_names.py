"""Opening a source by its name: a file by its ending, a folder of ``save_to_disk``, or a hub data set."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forebear.errors import DataError
from forebear.indexer.rows.file_formats import (
    Reader,
    csv_reader,
    dataset_reader,
    json_reader,
    listed,
    one_line,
    parquet_reader,
    reading,
)

FORMATS: dict[str, Callable[[str], Reader]] = {".parquet": parquet_reader, ".pq": parquet_reader}
for _packed in ("", ".gz", ".bz2"):
    FORMATS |= {f".{end}{_packed}": json_reader for end in ("jsonl", "ndjson", "json")}
    FORMATS[f".csv{_packed}"] = partial(csv_reader, delimiter=",")
    FORMATS[f".tsv{_packed}"] = partial(csv_reader, delimiter="\t")
FORMATS_TEXT = "a file named .parquet, .jsonl, .json, .csv or .tsv (the last four also .gz or .bz2)"


def open_reader(source: str) -> tuple[Reader, Path | None]:
    """Open the source of a name, and find the folder where a ``dataset.json`` may lie.

    Args:
        source: A path or a hub name, as in ``open_rows``.

    Returns:
        The reader, and the folder for ``read_beside``; None for a hub data set.

    Raises:
        DataError: There is no such source, or it cannot be read.
    """
    match = re.fullmatch(r"(.+?):(\w[\w.-]*(?:\[.*\])?)", source)
    head, split = match.groups() if match else (source, None)
    if source.strip() and _exists(source):
        head, split = source, None
    path = Path(head)
    if not source.strip() or not _exists(head):
        if (link := _dangling_link(head)) is not None:
            raise DataError(
                f"{head} is a link to {link}, which does not exist. Mend the link, or give the file itself."
            )
        if split is None or path.name.lower().endswith(tuple(FORMATS)) or head.startswith((".", "/", "~")):
            raise DataError(
                f"no such file or folder: {head or 'an empty name'}.{similar_names(head)} Expected {FORMATS_TEXT}, "
                f"a folder of save_to_disk, or a hub name with its split, as in glue/sst2:train."
            )
        return dataset_reader(source, _load_hub(head, split)), None
    if path.is_dir():
        return dataset_reader(source, _load_saved(path, split)), path
    if split is not None:
        raise DataError(f"{head} is a file and has no splits; leave out :{split}.")
    read = next((read for suffix, read in FORMATS.items() if head.lower().endswith(suffix)), None)
    if not path.is_file():
        raise DataError(
            f"{head} is no plain file but a pipe or a device; rows are read several times over. Save them to a file."
        )
    if read is None:
        raise DataError(f"{head} is no data file that forebear knows; expected {FORMATS_TEXT}.")
    if path.stat().st_size == 0:
        raise DataError(f"{head} is empty (0 bytes); expected at least one row of text.")
    return read(head), path.parent


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name too long, a null character
        return False


def similar_names(missing: str) -> str:
    """A sentence that suggests names in the folder of a missing path that are spelled like it; empty without any."""
    path = Path(missing).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    matches = difflib.get_close_matches(path.name, names, n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(str(path.parent / match) for match in matches)}?" if matches else ""


def _dangling_link(path: str) -> str | None:
    """The target of a link; None for a path that is no link."""
    try:
        return str(Path(path).readlink())
    except (OSError, ValueError):
        return None


def _load_saved(folder: Path, split: str | None) -> Any:
    import datasets

    if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        if (folder / "config.json").is_file():
            raise DataError(f"{folder} is a model folder (it holds config.json), no rows. Are two options swapped?")
        if (folder / "manifest.json").is_file():
            raise DataError(f"{folder} is an index (it holds manifest.json), no rows. Are two options swapped?")
        files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(tuple(FORMATS)))
        raise DataError(
            f"{folder} is no folder of datasets.save_to_disk; expected one, or a file. Data files in it: "
            f"{listed(files)}."
        )
    with reading(str(folder), "a saved data set"):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            problem = f"no split {split!r}" if split else "several splits"
            raise DataError(
                f"{folder} has {problem}; name one of {listed(loaded)}, as in {folder}:{next(iter(loaded), 'train')}."
            )
        return loaded[split]
    if split is not None:
        raise DataError(f"{folder} is a single data set and has no splits; leave out :{split}.")
    return loaded


def _load_hub(name: str, split: str) -> Any:
    """Load ``NAME``, ``OWNER/REPO`` else ``DATASET/CONFIG``, or ``OWNER/REPO/CONFIG`` from the hub."""
    import datasets

    parts = name.split("/")
    tries: list[tuple[str, str | None]] = [(name, None)]
    if len(parts) == 2:
        tries.append((parts[0], parts[1]))
    elif len(parts) == 3:
        tries = [(f"{parts[0]}/{parts[1]}", parts[2])]
    for repo, config in tries:
        is_last = (repo, config) == tries[-1]
        try:
            return datasets.load_dataset(repo, config, split=split)
        except Exception as error:  # whatever a data set's files or names bring up
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):
                reason = "the hub has no data set of that name; mend the name"
            elif isinstance(error, ConnectionError):
                reason = f"the hub cannot be reached ({one_line(error)}); HF_HUB_OFFLINE=1 uses cached copies"
                is_last |= not datasets.config.HF_HUB_OFFLINE  # the next try would only wait as long again
            else:
                reason, is_last = f"the hub's cannot be loaded: {one_line(error)}", True
            if is_last:
                raise DataError(f"there is no file or folder {name}:{split}, and {reason}.") from error
    raise AssertionError("no name was tried")


def read_beside(folder: Path | None) -> dict[str, list[str]]:
    """Read ``label_names`` and ``text_columns`` from a ``dataset.json``, where there is one.

    Raises:
        DataError: The file is damaged, or one of them is no list of strings.
    """
    path = folder / "dataset.json" if folder else None
    if path is None or not path.is_file():
        return {}
    with reading(str(path), "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    known = {key: content[key] for key in ("label_names", "text_columns") if key in content}
    for key, names in known.items():
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{path}: {key} is {json.dumps(names)}; expected a list of strings.")
    return known
