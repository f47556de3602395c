"""The work lists of the explorer, which the server keeps: a file for each index, of one line a marked training row."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebear.errors import InputError, MismatchError
from forebear.evaluation.worklists.files import FILES, json_line, read_work_list
from forebear.evaluation.worklists.items import Item, is_column, item_of, record_of
from forebear.indexer.storage.atomic import write_bytes

MOST_ENTRIES = 100_000  # of one list
MOST_CHARACTERS = 20_000  # of a note
MOST_BYTES = 1 << 19  # of a row with its texts and all else


class WorkLists:
    """The lists by name of the index. Every change is on disk, whole, before it is answered."""

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Read the lists that are there.

        Args:
            folder: Of ``NAME.jsonl``; made at the first change. Where there is none yet and one index is served, the
                work list that an audit wrote into the folder is where the list begins.
            digests: Of the indexes, by name.

        Raises:
            InputError: A list cannot be read.
            MismatchError: The audit is of another index.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._lists = {name: self._read(folder / f"{name}.jsonl") for name in digests}
        (name, digest), *others = digests.items()
        if not others and not (folder / f"{name}.jsonl").exists():
            self._lists[name] = self._of_audit(folder, digest)

    def entries(self, name: str) -> list[Mapping[str, Any]]:
        """The marked rows of an index, by row number."""
        with self._lock:
            return [record_of(item) for _, item in sorted(self._lists[name].items())]

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Mark a row, or mark it otherwise.

        Raises:
            InputError: The record is none of a work list, or the list is full.
            StorageError: It cannot be written; it is then as it was.
        """
        if unknown := [column for column in record if not is_column(column)]:
            raise InputError(f"{unknown[0]!r} is no column of a work list.")
        if "decision" not in record or not isinstance(record["row"], int):
            raise InputError("expected a row number and a decision, which may be empty.")
        item = item_of(record)
        if len(item.note) > MOST_CHARACTERS:
            raise InputError(f"a note of {len(item.note):,} characters; expected at most {MOST_CHARACTERS:,}.")
        if (n_bytes := len(_line(item))) > MOST_BYTES:
            raise InputError(f"row {item.row} takes {n_bytes:,} bytes; expected at most {MOST_BYTES:,}.")
        with self._lock:
            changed = self._lists[name] | {item.row: item}
            if len(changed) > MOST_ENTRIES:
                raise InputError(f"the work list holds {MOST_ENTRIES:,} rows already. Take some off.")
            self._write(name, changed)

    def drop(self, name: str, row: int) -> None:
        """Take a row off the list.

        Raises:
            StorageError: It cannot be written; it is then as it was.
        """
        with self._lock:
            self._write(name, {number: item for number, item in self._lists[name].items() if number != row})

    def _write(self, name: str, items: dict[int, Item]) -> None:
        write_bytes(self._folder / f"{name}.jsonl", b"".join(_line(items[row]) for row in sorted(items)))
        self._lists[name] = items

    @staticmethod
    def _read(path: Path) -> dict[int, Item]:
        try:
            return {item.row: item for item in read_work_list(path)} if path.exists() else {}
        except InputError as error:
            raise InputError(f"{path} is no work list of the explorer ({error}) Name another folder.") from error

    @classmethod
    def _of_audit(cls, folder: Path, digest: str) -> dict[int, Item]:
        if not any((folder / name).is_file() for name in FILES):
            return {}
        audited = _audited(folder)
        if audited.get("index digest", digest) != digest:
            raise MismatchError(
                f"{folder} holds the work list of an audit of another index, {audited.get('index')}, or of this one "
                "before a change: its row numbers may be of other rows. Audit the index again, or name another folder."
            )
        return cls._read(folder)


def _audited(folder: Path) -> dict[str, Any]:
    """What the audit in a folder says of the index that it is of; empty where a work list lies there alone."""
    try:
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8"))["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _line(item: Item) -> bytes:
    return json_line(record_of(item)).encode("utf-8", "replace")
