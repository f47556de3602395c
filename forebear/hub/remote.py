"""Folders in object stores and on other machines, by ``fsspec``: ``s3://``, ``gs://``, ``sftp://`` and others."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebear.errors import InputError, first_line, is_out_of_memory
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX, write_bytes
from forebear.indexer.storage.journal import mentions
from forebear.indexer.storage.layout import EFFECTS_NAME, MANIFEST_NAME
from forebear.indexer.storage.manifest import read_manifest

CACHE = "FOREBEAR_CACHE"  # environment variable: where fetched indexes are kept
_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class Remote:
    """A folder at a URL.

    Attributes:
        url: The URL.
        filesystem: Of fsspec.
        path: The folder there.
    """

    url: str
    filesystem: Any
    path: str

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self.filesystem.exists(f"{self.path}/{name}"))

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: There is none.
        """
        content: bytes = self.filesystem.cat_file(f"{self.path}/{name}")
        return content

    def names(self) -> list[str]:
        """Of all that lies in the folder, and not within others; of a file that is no folder its own."""
        try:
            found = self.filesystem.ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        paths = (
            facts["name"].rstrip("/")
            for facts in found
            if facts["name"].strip("/") != self.path.strip("/") or facts["size"]
        )  # some stores list the folder itself, as an empty file
        return [path.rpartition("/")[2] for path in paths]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of all files in a folder and those within it, by name relative to it."""
        prefix = f"{self.path}/{folder}".rstrip("/")
        try:
            found = self.filesystem.find(prefix, detail=True)
        except FileNotFoundError:
            return {}
        return {name[name.index(prefix) + len(prefix) + 1 :]: facts["size"] for name, facts in found.items()}

    def fetch(self, folder: Path, files: Mapping[str, Mapping[str, Any]], place: str = "") -> None:
        """Copy the files that a folder of this machine lacks, or has in other sizes; each appears whole.

        Args:
            folder: The folder here.
            files: Their ``bytes``, by name.
            place: The folder there that holds them, within this one.
        """

        def fetch(name: str) -> None:
            target = folder / name
            if target.is_file() and target.stat().st_size == files[name]["bytes"]:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
            os.close(descriptor)
            try:
                self.filesystem.get_file(self._name(place, name), partial)
                Path(partial).replace(target)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(fetch, files))

    def send(self, folder: Path, names: Iterable[str], place: str = "") -> None:
        """Copy files of a folder of this machine there; those that a place of its own has in the same size stay.

        Args:
            folder: The folder here.
            names: Of the files.
            place: The folder for them, within this one, whose name says what they hold; empty: this one.
        """
        there = self.sizes(place) if place else {}

        def send(name: str) -> None:
            if there.get(name) != (folder / name).stat().st_size:
                target = self._name(place, name)
                self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.filesystem.put_file(str(folder / name), target)

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(send, names))

    def write(self, name: str, content: bytes) -> None:
        """Write a file that says that others are whole: it appears whole, also where files are written in place."""
        target = self._name("", name)
        self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.filesystem.pipe_file(target + TEMPORARY_SUFFIX, content)
        self.filesystem.mv(target + TEMPORARY_SUFFIX, target)

    def remove(self, *names: str) -> None:
        """Remove files, or folders with all that is in them, in this order."""
        for name in names:
            with suppress(FileNotFoundError):
                self.filesystem.rm(self._name("", name), recursive=True)

    def _name(self, place: str, name: str) -> str:
        return "/".join(part for part in (self.path, place, name) if part)


def fetch_folder(url: str) -> Path:
    """The folder of an index at a URL, in the cache, into which what is missing there is copied.

    Each state of an index has a folder of its own, named by its manifest: whoever reads one while another is fetched
    goes on with it. The manifest is written last, so that a folder without one is known to be incomplete. What
    ``evaluate effects --keep`` has left beside the index is no part of its state, and fetched each time.

    Raises:
        InputError: There is no index, no access to it, or no driver for this kind of URL.
    """
    with reached(url) as remote:
        content = remote.read(MANIFEST_NAME)
        if not mentions(lambda _: content, MANIFEST_NAME):
            raise InputError(f"{url} is no index: the {MANIFEST_NAME} there is another program's, or damaged.")
        folder = state_folder(url, content)
        with suppress(FileNotFoundError):
            write_bytes(folder / EFFECTS_NAME, remote.read(EFFECTS_NAME))
        if (folder / MANIFEST_NAME).is_file():
            return folder
        with tempfile.TemporaryDirectory() as scratch:
            write_bytes(Path(scratch) / MANIFEST_NAME, content)
            files = read_manifest(Path(scratch)).files
        remote.fetch(folder, files)
        write_bytes(folder / MANIFEST_NAME, content)
    return folder


def state_folder(url: str, manifest: bytes) -> Path:
    """The folder of the cache for the index at a URL in the state that a manifest is of."""
    return cache_of(url) / hashlib.sha256(manifest).hexdigest()[:16]


def cache_of(url: str) -> Path:
    """The folder of the cache for all that is fetched from a URL, or to be sent there."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache = Path(os.environ.get(CACHE) or Path(home) / "forebear")
    return cache / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextmanager
def reached(url: str) -> Iterator[Remote]:
    """The folder at a URL; what its driver raises, as one line."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: {sentence_of(error)} Expected a folder, hf://user/name, or a URL of fsspec."
        ) from error
    try:
        filesystem.invalidate_cache()
        yield Remote(url, filesystem, path.rstrip("/"))
    except FileNotFoundError as error:
        raise InputError(f"{url} is no index: there is no {sentence_of(error)}") from error
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or type(error).__module__.startswith("forebear."):
            raise
        raise InputError(f"{url} cannot be reached: {sentence_of(error)} Check the address and your access.") from error


def sentence_of(error: Exception) -> str:
    """The first line of what a client raised, as a sentence."""
    return first_line(error).removesuffix(".") + "."
