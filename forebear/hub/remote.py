"""Indexes in object stores and on other machines, by ``fsspec``: ``s3://``, ``gs://``, ``sftp://`` and others."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forebear.errors import InputError, first_line, is_out_of_memory
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.indexer.storage.manifest import read_manifest

CACHE = "FOREBEAR_CACHE"  # environment variable: where fetched indexes are kept
_FILES_AT_ONCE = 8


def fetch_folder(url: str) -> Path:
    """The folder of an index at a URL, in the cache, into which what is missing there is copied.

    Each state of an index has a folder of its own, named by its manifest: whoever reads one while another is fetched
    goes on with it. The manifest is written last, so that a folder without one is known to be incomplete.

    Raises:
        InputError: There is no index, no access to it, or no driver for this kind of URL.
    """
    with _readable(url) as (filesystem, path):
        content = filesystem.cat_file(f"{path}/{MANIFEST_NAME}")
        folder = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / hashlib.sha256(content).hexdigest()[:16]
        if (folder / MANIFEST_NAME).is_file():
            return folder
        with tempfile.TemporaryDirectory() as scratch:
            write_bytes(Path(scratch) / MANIFEST_NAME, content)
            files = read_manifest(Path(scratch)).files

        def fetch(name: str) -> None:
            target = folder / name
            if target.is_file() and target.stat().st_size == files[name]["bytes"]:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
            os.close(descriptor)
            try:
                filesystem.get_file(f"{path}/{name}", partial)
                Path(partial).replace(target)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(fetch, files))
        write_bytes(folder / MANIFEST_NAME, content)
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(CACHE) or Path(home) / "forebear")


@contextmanager
def _readable(url: str) -> Iterator[tuple[Any, str]]:
    """The file system and the path of a URL; what its driver raises, as one line."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: {sentence_of(error)} Expected a folder, hf://user/name, or a URL of fsspec."
        ) from error
    try:
        yield filesystem, path
    except FileNotFoundError as error:
        raise InputError(f"{url} is no index: there is no {sentence_of(error)}") from error
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or type(error).__module__.startswith("forebear."):
            raise
        raise InputError(f"{url} cannot be read: {sentence_of(error)} Check the address and your access.") from error


def sentence_of(error: Exception) -> str:
    """The first line of what a client raised, as a sentence."""
    return first_line(error).removesuffix(".") + "."
