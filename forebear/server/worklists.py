"""The work lists of the explorer, which the server keeps: a file for each index, of one line a marked training row."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forebear.errors import InputError
from forebear.indexer.storage.atomic import write_bytes

Entry = Mapping[str, Any]
MOST_ENTRIES = 100_000  # of one list


class WorkLists:
    """The lists by name of the index. Every change is on disk, whole, before it is answered."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Read the lists that are there.

        Args:
            folder: Of ``NAME.jsonl``; made at the first change.
            names: Of the indexes.

        Raises:
            InputError: A list cannot be read.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._lists = {name: self._read(folder / f"{name}.jsonl") for name in names}

    def entries(self, name: str) -> list[Entry]:
        """The marked rows of an index, by row number."""
        with self._lock:
            return [entry for _, entry in sorted(self._lists[name].items())]

    def put(self, name: str, entry: Entry) -> None:
        """Mark a row, or mark it otherwise.

        Raises:
            InputError: The list is full.
            StorageError: It cannot be written; it is then as it was.
        """
        with self._lock:
            changed = self._lists[name] | {entry["row"]: entry}
            if len(changed) > MOST_ENTRIES:
                raise InputError(f"the work list holds {MOST_ENTRIES:,} rows already. Take some off.")
            self._write(name, changed)

    def drop(self, name: str, row: int) -> None:
        """Take a row off the list.

        Raises:
            StorageError: It cannot be written; it is then as it was.
        """
        with self._lock:
            self._write(name, {number: entry for number, entry in self._lists[name].items() if number != row})

    def _write(self, name: str, entries: dict[int, Entry]) -> None:
        lines = [json.dumps(entries[row], ensure_ascii=False, allow_nan=False) for row in sorted(entries)]
        content = "".join(f"{line}\n" for line in lines)
        write_bytes(self._folder / f"{name}.jsonl", content.encode("utf-8", "replace"))
        self._lists[name] = entries

    @staticmethod
    def _read(path: Path) -> dict[int, Entry]:
        try:
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            entries = [json.loads(line) for line in lines if line]
            return {int(entry["row"]): entry for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no work list of the explorer ({error}). Name another folder.") from error
