"""Results of evaluations that are kept in the folder that they are of: an index, or a run.

The file is no part of what lies beside it: no digest covers it, so each result names what it was measured on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forebear.errors import StorageError
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.storage.locks import exclusive
from forebear.progress import tell_warning

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class KeptResults(Generic[T]):
    """A file of results of one evaluation.

    Attributes:
        name: Its name in the folder.
        version: Of its form.
        command: What writes it, with ``--keep``.
        make: Makes a result from its JSON.
        gives_way: Whether an earlier result gives way to a newer one.
    """

    name: str
    version: int
    command: str
    make: Callable[[dict[str, Any]], T]
    gives_way: Callable[[T, T], bool]

    def read(self, folder: Path) -> list[T]:
        """What is kept in a folder; nothing, with a warning, where the file is damaged."""
        path = folder / self.name
        if not path.is_file():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != self.version:
                tell_warning(f"{path} was written by another version of forebear: it is not shown.")
                return []
            return [self.make(one) for one in content["results"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            tell_warning(f"{path} is damaged ({error}): it is not shown. Write it again by {self.command} with --keep.")
            return []

    def check(self, folder: Path) -> None:
        """Refuse to keep a result in a folder that cannot be written; before the work.

        Raises:
            StorageError: As said.
        """
        if not os.access(folder, os.W_OK):
            raise StorageError(f"--keep: {folder} cannot be written. Make it writable, or leave the option out.")

    def keep(self, folder: Path, results: Sequence[T]) -> None:
        """Keep results in a folder, in place of those that give way to them.

        Raises:
            InUseError: Another process changes the folder.
            StorageError: The file cannot be written.
        """
        with exclusive(folder / LOCK_NAME, str(folder)):
            earlier = [one for one in self.read(folder) if not any(self.gives_way(one, new) for new in results)]
            content = {"version": self.version, "results": [asdict(one) for one in [*earlier, *results]]}
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            write_bytes(folder / self.name, text.encode() + b"\n")
