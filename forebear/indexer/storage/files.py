"""An index folder as checked files: every file is compared with the manifest before its first use."""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from forebear.display import facts_table
from forebear.errors import CorruptIndexError, InputError, is_out_of_memory
from forebear.indexer.rows.source_names import similar_names
from forebear.indexer.storage.arrow import MEND, RowMatrix, column, file_sha256, read_batches
from forebear.indexer.storage.layout import JOURNAL_NAME, MANIFEST_NAME
from forebear.indexer.storage.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from typing_extensions import Self


HUB = "hf://"  # how addresses of published indexes begin


def url_of(folder: str | Path) -> str | None:
    """The address of an index elsewhere; None of a folder of this machine."""
    scheme, separator, _ = str(folder).partition("://")
    return str(folder) if separator and scheme != "file" and not Path(folder).exists() else None


def path_of(folder: str | Path) -> Path:
    """A folder of this machine, which may be named by ``file://``.

    Raises:
        InputError: It is the address of an index elsewhere, which is asked, not changed.
    """
    if (url := url_of(folder)) is not None:
        raise InputError(
            f"{url}: an index elsewhere is asked, not changed. Change the folder that it was copied from, and copy it "
            "there again."
        )
    return Path(str(folder).removeprefix("file://"))


def local_folder(folder: str | Path) -> Path:
    """An index folder; of the address of an index elsewhere its copy in a cache, see :meth:`IndexFiles.open`."""
    if url_of(folder) is None:
        return path_of(folder)
    # Named, not imported: what fetches indexes is written in terms of this package.
    if str(folder).startswith(HUB):
        fetched: Path = importlib.import_module("forebear.hub.transfer").fetch(folder)
    else:
        fetched = importlib.import_module("forebear.hub.remote").fetch_folder(folder)
    return fetched


class IndexFiles:
    """The files of an index folder, open for reading.

    Every file is checked against the manifest before its first use: its size when the index is opened, its sha256
    when it is mapped. Nothing is ever written.

    Attributes:
        folder: The index folder.
        manifest: The manifest that is in force.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, check: bool = True) -> None:
        self.folder = folder
        self.manifest = manifest
        self._check = check
        self._checked: set[str] = set()
        self._cache: dict[Any, Any] = {}

    def _facts(self) -> dict[str, object]:
        """The facts that ``repr`` and a notebook show of the index, by name."""
        spec = self.manifest.spec
        return {
            "rows": f"{self.manifest.n_live:,}"
            + (f" ({self.manifest.n_retired:,} more are retired)" if self.manifest.n_retired else ""),
            "text columns": ", ".join(spec.text_columns),
            **({"other columns": ", ".join(self.manifest.columns)} if self.manifest.columns else {}),
            "classes": ", ".join(spec.label_names),
            "checkpoints": ", ".join(c.name for c in self.manifest.checkpoints),
            "stores": ", ".join(spec.stores),
            "scopes": ", ".join(spec.scopes),
        }

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {str(self.folder)!r}: {facts}>"

    def _repr_html_(self) -> str:
        return facts_table(f"{type(self).__name__} {self.folder}", self._facts())

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = True) -> Self:
        """Open an index: a folder, or one that was published, by its address ``hf://user/name`` or ``...@revision``.

        So is one at a URL that ``fsspec`` has a driver for, such as ``s3://bucket/index``. What is missing of it in the
        hub's cache, or in that of the environment variable ``FOREBEAR_CACHE`` (default ``~/.cache/forebear``), is
        downloaded.

        Args:
            folder: Written by ``forebear index``; or the address.
            check: Hash files before use. Off saves a read of each file, and trusts the disk.

        Raises:
            InputError: No index there, or a build that was interrupted.
            CorruptIndexError: The manifest or a file is missing, truncated or altered.
        """
        folder = local_folder(folder)
        if not (folder / MANIFEST_NAME).is_file():
            if not folder.exists():
                meant = similar_names(str(folder))
                raise InputError(f"no such folder: {folder}.{meant} Expected an index; `forebear index` builds one.")
            if (folder / JOURNAL_NAME).is_file():
                raise InputError(
                    f"{folder} is an unfinished build. Run the same `forebear index` again with --resume; one that was "
                    "begun by --fit ends with --commit, when all parts are there."
                )
            raise InputError(f"{folder} is no index (no {MANIFEST_NAME} in it). Build one with `forebear index`.")
        manifest = read_manifest(folder)
        for name, facts in manifest.files.items():
            _check_size(folder, name, facts["bytes"])
        return cls(folder, manifest, check=check)

    @classmethod
    def open_without_derived(cls, folder: str | Path) -> Self:
        """Open an index whose ``ann/`` files may be missing or damaged; they are left out of its manifest."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        derived = {facts["file"] for facts in manifest.derived.values()}
        kept = {name: facts for name, facts in manifest.files.items() if name not in derived}
        for name, facts in kept.items():
            _check_size(folder, name, facts["bytes"])
        return cls(folder, replace(manifest, derived={}).with_files(kept))

    def checked(self, *names: str) -> list[Path]:
        """Paths of listed files, hashed first if they have not been yet.

        Raises:
            CorruptIndexError: A file is not listed, or its bytes have changed.
        """
        for name in names:
            if name not in self.manifest.files:
                raise CorruptIndexError(f"{self.folder / name} is not listed in the manifest. {MEND}")
        unchecked = [name for name in names if name not in self._checked] if self._check else []
        try:
            with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
                digests = list(pool.map(lambda name: file_sha256(self.folder / name), unchecked))
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise CorruptIndexError(
                f"{error.filename} cannot be read ({error.strerror}). If the index was changed since it was opened, "
                f"open it again. {MEND}"
            ) from error
        for name, digest in zip(unchecked, digests, strict=True):
            if digest != self.manifest.files[name]["sha256"]:
                raise CorruptIndexError(f"{self.folder / name} was altered: its sha256 is not the manifest's. {MEND}")
        self._checked.update(unchecked)
        return [self.folder / name for name in names]

    def trust(self, earlier: IndexFiles) -> None:
        """Hash no file again that was hashed when the index was opened before, and that is listed as it was then."""
        listed, before = self.manifest.files, earlier.manifest.files
        self._checked |= {name for name in earlier._checked if name in listed and listed[name] == before[name]}

    @property
    def fit_folder(self) -> Path:
        """Folder of all files that depend on fits beyond the head (bases, EK-FAC, sketches); a refit has its own."""
        return self.folder / self.manifest.fitted_name("")

    def _shards(self, kind: str) -> list[pa.RecordBatch]:
        """The record batch of each shard of ``rows``, ``features/<checkpoint>`` or ``sentence``."""
        if kind not in self._cache:
            paths = self.checked(*(f"{kind}/{i:05d}.arrow" for i in range(len(self.manifest.shards))))
            self._cache[kind] = [read_batches(path)[0] for path in paths]
        return list(self._cache[kind])

    def _matrix(self, kind: str, name: str) -> RowMatrix:
        return RowMatrix([column(batch, name) for batch in self._shards(kind)])


def _check_size(folder: Path, name: str, size_bytes: int) -> None:
    """Refuse a listed file that is missing or has another size."""
    try:
        n_bytes = (folder / name).stat().st_size
    except OSError as error:
        raise CorruptIndexError(f"{folder / name} is missing. {MEND}") from error
    if n_bytes != size_bytes:
        raise CorruptIndexError(
            f"{folder / name} has {n_bytes} bytes, the manifest says {size_bytes}: it was truncated or altered. {MEND}"
        )
