"""Opening a source by its name: files by their endings, a folder of ``save_to_disk``, or a hub data set."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forebear.errors import DataError, InputError, is_out_of_memory
from forebear.indexer.rows.files.file_formats import csv_reader, dataset_reader, json_reader, parquet_reader
from forebear.indexer.rows.files.many_files import files_of_folder, joined_reader, matching_files
from forebear.indexer.rows.files.reader import Reader, listed, one_line, reading
from forebear.indexer.rows.files.text_file import is_utf8, open_text
from forebear.indexer.rows.row_format import RowFormat, delimiter_of, encoding_of

PACKED = ("", ".gz", ".bz2")
PARQUET = (".parquet", ".pq")
JSON, CSV, TSV = (
    tuple(f".{end}{packed}" for end in ends for packed in PACKED)
    for ends in (("jsonl", "ndjson", "json"), ("csv",), ("tsv",))
)
FORMATS = (*PARQUET, *JSON, *CSV, *TSV)
FORMATS_TEXT = "a file named .parquet, .jsonl, .json, .csv or .tsv (the last four also .gz or .bz2)"
SOURCES_TEXT = f"{FORMATS_TEXT}, a folder or pattern of such files, a folder of save_to_disk"
TEXT_FILE = "a text file: name what parts its values by --delimiter, or end its name in .csv or .tsv"
# What to do with files that hold rows in a format that is not read here, by their endings.
WAYS_OUT = {
    (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"): "a spreadsheet: save its sheet as CSV (UTF-8)",
    (".pkl", ".pickle", ".joblib"): "pickled Python, which may run code: load it and write it by to_parquet or to_csv",
    (".feather", ".arrow", ".ipc"): "an Arrow file: save its rows as Parquet, by pandas.read_feather and to_parquet",
    (".zip", ".xz", ".zst", ".7z", ".tar", ".tgz"): "packed: unpack it (.gz and .bz2 are read as they are)",
    (".db", ".sqlite", ".sqlite3", ".h5", ".hdf5", ".orc", ".avro", ".npy", ".npz", ".sav", ".dta", ".rds"): (
        "a format that pandas or its own program reads: save its rows as Parquet or CSV"
    ),
    (".txt", ".dat", ".data", ".tab"): TEXT_FILE,
}


@dataclass(frozen=True, kw_only=True)
class TextChoices:
    """How text files are read, as the user says (``delimiter``, ``encoding``), else as is remembered (``like``)."""

    delimiter: str | None = None
    encoding: str | None = None
    like: RowFormat = field(default_factory=RowFormat)

    def refuse(self, name: str) -> None:
        """Refuse choices for a source that is no text file.

        Raises:
            InputError: The user made one.
        """
        for option, value in (("--delimiter", self.delimiter), ("--encoding", self.encoding)):
            if value is not None:
                raise InputError(f"{option} is for text files; {name} is none. Leave it out.")

    def encoding_of(self, name: str) -> str | None:
        """The encoding of a text file; None: UTF-8."""
        if self.encoding is not None:
            return encoding_of(self.encoding)
        return None if self.like.encoding is None or is_utf8(name) else self.like.encoding

    def is_remembered(self, name: str) -> bool:
        """Whether the first line of a text file holds the delimiter that is remembered."""
        if self.like.delimiter is None:
            return False
        with reading(name, "text"), open_text(name, self.encoding_of(name)) as file:
            return self.like.delimiter.encode() in file.readline(1 << 16)

    def delimiter_of(self, name: str, default: str, encoding: str | None) -> str:
        """What parts the values of a text file: as given, as remembered if the header holds it, else the default."""
        if self.delimiter is not None:
            return delimiter_of(self.delimiter)
        if self.like.delimiter is None:
            return default
        with reading(name, "text"), open_text(name, encoding) as file:
            header = file.readline(1 << 16)
        signs = [sign for sign in (self.like.delimiter, default) if sign.encode() in header]
        return signs[0] if signs else default


def open_reader(source: str, choices: TextChoices) -> tuple[Reader, Path | None]:
    """Open the source of a name, and find the folder where a ``dataset.json`` may lie.

    Args:
        source: A path, a pattern or a hub name, as in ``open_rows``.
        choices: Delimiter and encoding of text files.

    Returns:
        The reader, and the folder for ``read_beside``; None for a hub data set.

    Raises:
        DataError: There is no such source, or it cannot be read.
    """
    match = re.fullmatch(r"(.+?):(\w[\w.-]*(?:\[.*\])?)", source)
    head, split = match.groups() if match else (source, None)
    if source.strip() and exists(source):
        head, split = source, None
    path = Path(head)
    if not source.strip() or not exists(head):
        if files := matching_files(source):
            return _open_files(source, files, choices), files[0].parent
        _refuse_missing(head, split)
        assert split is not None
        choices.refuse(source)
        return dataset_reader(source, _load_hub(head, split)), None
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            choices.refuse(head)
            return dataset_reader(source, _load_saved(path, split)), path
        _refuse_other_folders(path)
        return _open_files(source, files_of_folder(path, FORMATS, split), choices), path
    if split is not None:
        raise DataError(f"{head} is a file and has no splits; leave out :{split}.")
    return _open_file(head, choices), path.parent


def _refuse_missing(head: str, split: str | None) -> None:
    """Refuse a name that is no path, unless it may be a hub name with its split."""
    if (link := _dangling_link(head)) is not None:
        raise DataError(f"{head} is a link to {link}, which does not exist. Mend the link, or give the file itself.")
    is_pattern = matching_files(head) is not None
    if split is None or is_pattern or Path(head).name.lower().endswith(FORMATS) or head.startswith((".", "/", "~")):
        missing = f"no file matches {head}" if is_pattern else f"no such file or folder: {head or 'an empty name'}"
        raise DataError(
            f"{missing}.{similar_names(head)} Expected {SOURCES_TEXT}, or a hub name with its split, as in "
            "glue/sst2:train."
        )


def _open_files(name: str, files: list[Path], choices: TextChoices) -> Reader:
    kinds = {next((k for k in (PARQUET, JSON, CSV, TSV) if file.name.lower().endswith(k)), None) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{name}: files of several formats, {listed(file.name for file in files)}; expected one.")
    readers = [_open_file(str(file), choices) for file in files]
    return replace(readers[0], name=name) if len(readers) == 1 else joined_reader(name, readers)


def _open_file(name: str, choices: TextChoices) -> Reader:
    """Open one file by its ending."""
    path, ending = Path(name), name.lower()
    if not path.is_file():
        raise DataError(
            f"{name} is no plain file but a pipe or a device; rows are read several times over. Save them to a file."
        )
    way_out = next((way for endings, way in WAYS_OUT.items() if ending.endswith(endings)), None)
    is_said_to_be_text = choices.delimiter is not None and way_out in (None, TEXT_FILE)
    is_said_to_be_text |= way_out == TEXT_FILE and choices.is_remembered(name)
    if not ending.endswith(FORMATS) and not is_said_to_be_text:
        known = f"{name} is {way_out}" if way_out else f"{name} is no data file that forebear knows"
        raise DataError(f"{known}; expected {FORMATS_TEXT}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty (0 bytes); expected at least one row of text.")
    if ending.endswith(PARQUET):
        choices.refuse(name)
        return parquet_reader(name)
    encoding = choices.encoding_of(name)
    if ending.endswith(JSON):
        if choices.delimiter is not None:
            raise InputError(f"--delimiter is for CSV and TSV; {name} is JSON. Leave it out.")
        return json_reader(name, encoding)
    is_tsv = ending.endswith(TSV)
    delimiter = choices.delimiter_of(name, "\t" if is_tsv else ",", encoding)
    return csv_reader(name, delimiter, quoted=not is_tsv, encoding=encoding)


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name."""
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


def _refuse_other_folders(folder: Path) -> None:
    """Refuse a model folder or an index in place of rows."""
    for file, what in (("config.json", "a model folder"), ("manifest.json", "an index"), ("run.json", "a run")):
        if (folder / file).is_file():
            raise DataError(f"{folder} is {what} (it holds {file}), no rows. Are two options swapped?")


def _load_saved(folder: Path, split: str | None) -> Any:
    import datasets

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
            if is_out_of_memory(error):
                raise
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):
                reason = "the hub has no data set of that name; mend the name"
            elif isinstance(error, ConnectionError):
                reason = f"the hub cannot be reached ({one_line(error)}); HF_HUB_OFFLINE=1 uses cached copies"
                is_last |= not datasets.config.HF_HUB_OFFLINE  # the next try would only wait as long again
            else:
                reason, is_last = f"the hub's cannot be loaded: {one_line(error)}", True
            may_be_path = isinstance(error, (datasets.exceptions.DatasetNotFoundError, ConnectionError))
            if is_last and may_be_path and (similar_names(name) or ("/" in name and Path(name).parent.is_dir())):
                raise DataError(
                    f"no such file or folder: {name}.{similar_names(name)} Expected {SOURCES_TEXT}."
                ) from error
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
