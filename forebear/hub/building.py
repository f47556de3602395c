"""Builds at URLs: each step works in a folder of this machine, and sends at its end what it has finished.

    build.json, gradients/..., curvature/...    the fit, its journal sent last
    parts/3-of-8-<digest>/rows/00012.arrow      files of a part, in a folder that is named by what they hold
    parts/3-of-8.json                           its record, sent last
    manifest.json, rows/..., features/...       the index, its manifest sent last; then parts/ and build.json go

A step that is killed leaves its folder, in which the same command goes on, on the same machine; with a fit it is named
by that. One that is killed while it sends leaves files that nothing there speaks of, beside a build.json without a fit,
which says whose they are: what else lies at a URL is left alone.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from forebear.errors import ForebearError, InputError
from forebear.hub.remote import Remote, cache_of, fetch_folder, reached, state_folder
from forebear.indexer.building.sharing.part_files import (
    Fit,
    Part,
    fault_of,
    has_fit,
    is_finished,
    read_fit,
    read_parts,
    record_name,
)
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.journal import SUBFOLDERS, check_content, holds_index, mentions
from forebear.indexer.storage.layout import EFFECTS_NAME, JOURNAL_NAME, MANIFEST_NAME, PART_RECORDS
from forebear.indexer.storage.manifest import canonical_json, read_manifest

_DIGITS = 16


@contextmanager
def begin(url: str, *, resume: bool, force: bool, with_parts: bool) -> Iterator[Path]:
    """The folder in which a build or a fit is made that goes to a URL.

    Args:
        url: The URL.
        resume: Whether what is there is gone on with.
        force: Whether it is replaced.
        with_parts: Whether the parts that are there of the same fit are fetched, so that they are not written again.

    Raises:
        OutputExistsError: There is an index or a build already, and neither ``resume`` nor ``force``; or other files,
            which are left alone.
    """
    work = _work(url, "build")
    with reached(url) as remote:
        how = {"resume": resume, "force": force}
        has_index, has_build = check_content(url, partial(_content, remote), remote.names(), **how)
        if has_build:
            holds_index(url, partial(_content, remote))
        is_kept = has_index and not force
        if is_kept:
            work = fetch_folder(url)
        elif has_build and not force and has_fit(remote.read(JOURNAL_NAME)):
            work, fit = _fetch_fit(remote, "build")
            if with_parts and not is_finished(work):
                _fetch_parts(remote, work, fit)
    with _named(url, work):
        yield work
    if is_kept:
        return
    with reached(url) as remote:
        if force or not has_build:
            made = read_manifest(work) if is_finished(work) else read_fit(work).manifest
            remote.write(JOURNAL_NAME, canonical_json({"kind": "build", "spec": asdict(made.spec)}))
        if force and (has_index or has_build):
            remote.remove(MANIFEST_NAME, EFFECTS_NAME, *SUBFOLDERS)
        if is_finished(work):
            _send_index(remote, work, has_parts=has_build)
        else:
            remote.send(work, read_fit(work).manifest.files)
            remote.write(JOURNAL_NAME, (work / JOURNAL_NAME).read_bytes())
            shutil.rmtree(work)


@contextmanager
def write_part(url: str, *, part: str, force: bool) -> Iterator[Path]:
    """The folder in which a part is written whose fit lies at a URL, and which goes there.

    What is there of the part is fetched first, and what is damaged of it removed, so that it is written again.
    """
    step = part.replace("/", "-of-")
    with reached(url) as remote:
        if holds_index(url, partial(_content, remote)):
            work = _work(url, step)
            write_bytes(work / MANIFEST_NAME, remote.read(MANIFEST_NAME))  # says that there is nothing to write
        else:
            work, fit = _fetch_fit(remote, step)
            if not force and remote.has(record_name(part)):
                _fetch_written(remote, work, fit, part)
    with _named(url, work):
        yield work
    with reached(url) as remote:
        for found in () if is_finished(work) else _finished(work):
            remote.send(work, found.files, _place(found))
            remote.write(record_name(found.name), (work / record_name(found.name)).read_bytes())
    shutil.rmtree(work)


@contextmanager
def commit(url: str) -> Iterator[Path]:
    """The folder in which an index is made of parts at a URL, and which goes there; the parts are in their own."""
    with reached(url) as remote:
        if was_sent := holds_index(url, partial(_content, remote)):
            work = fetch_folder(url)
            if mentions(partial(_content, remote), JOURNAL_NAME):  # left by a commit that was killed at its very end
                remote.remove(PART_RECORDS, JOURNAL_NAME)
        else:
            work, _ = _fetch_fit(remote, "commit")
    with _named(url, work):
        yield work
    if not was_sent:
        with reached(url) as remote:
            _send_index(remote, work, has_parts=True)


def part_folders(url: str) -> list[Path]:
    """The finished parts at a URL, each in a folder of this machine, into which what is missing is fetched.

    A folder that was copied there by another tool holds its parts' files under their own names.

    Raises:
        InputError: The record of a part is damaged.
    """
    folders = []
    with records(url) as scratch, reached(url) as remote:
        for part in _finished(scratch):
            folders.append(cache_of(url) / _place(part))
            _fetch_files(remote, folders[-1], part)
            write_bytes(folders[-1] / record_name(part.name), (scratch / record_name(part.name)).read_bytes())
    return folders


@contextmanager
def records(url: str) -> Iterator[Path]:
    """A folder with what a build in parts at a URL says of itself: its journal, and the records of its parts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with reached(url) as remote:
            listed = [name for name in remote.sizes(PART_RECORDS) if "/" not in name and name.endswith(".json")]
            for name in (MANIFEST_NAME, JOURNAL_NAME, *(f"{PART_RECORDS}/{name}" for name in listed)):
                with suppress(FileNotFoundError):
                    write_bytes(folder / name, remote.read(name))
        with _named(url, folder):
            yield folder


def _work(url: str, step: str, fit: str = "") -> Path:
    return cache_of(url) / "work" / "-".join(part for part in (step, fit[:_DIGITS]) if part)


def _content(remote: Remote, name: str) -> bytes:
    try:
        return remote.read(name)
    except (FileNotFoundError, IsADirectoryError):
        return b""


@contextmanager
def _named(url: str, folder: Path) -> Iterator[None]:
    """Errors name the URL in place of a folder that stands for it, or of the cache."""
    try:
        yield
    except ForebearError as error:
        line = str(error.args[0])
        for here in (folder, cache_of(url)):
            line = line.replace(str(here), url)
        error.args = (line, *error.args[1:])
        raise


def _fetch_fit(remote: Remote, step: str) -> tuple[Path, Fit]:
    """Fetch the fit into the folder of a step, another for another fit: what was made of one is not sent over one."""
    try:
        journal = remote.read(JOURNAL_NAME)
    except FileNotFoundError:
        raise InputError(f"{remote.url}: no fit. Run `forebear index --fit` first, once, with this --out.") from None
    with tempfile.TemporaryDirectory() as scratch, _named(remote.url, Path(scratch)):
        write_bytes(Path(scratch) / JOURNAL_NAME, journal)
        fit = read_fit(Path(scratch))
    work = _work(remote.url, step, fit.digest)
    if not is_finished(work):
        _remove_faulty(work, fit.manifest.files)
        remote.fetch(work, fit.manifest.files)
        if not (work / JOURNAL_NAME).is_file():
            write_bytes(work / JOURNAL_NAME, journal)
    return work, fit


def _fetch_parts(remote: Remote, work: Path, fit: Fit) -> None:
    """Fetch what is whole of the finished parts of a fit."""
    with records(remote.url) as scratch:
        for part in _finished(scratch):
            if part.fit == fit.digest:
                _fetch_files(remote, work, part)
                _remove_faulty(work, part.files)


def _remove_faulty(folder: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Remove files of this machine that are not as recorded: one may have been mended there since it was fetched."""
    for name, facts in files.items():
        if fault_of(folder / name, facts) is not None:
            (folder / name).unlink(missing_ok=True)


def _fetch_written(remote: Remote, work: Path, fit: Fit, part: str) -> None:
    """Fetch what was written of a part before; what is damaged there is removed."""
    record = work / record_name(part)
    if not record.is_file():
        write_bytes(record, remote.read(record_name(part)))
    try:
        found = next(one for one in _finished(work) if one.name == part)
    except (InputError, StopIteration):
        record.unlink()  # damaged: the part is written again
        return
    if found.fit == fit.digest:
        place = _fetch_files(remote, work, found)
        damaged = [name for name, facts in found.files.items() if fault_of(work / name, facts) is not None]
        remote.remove(*(f"{place}/{name}" for name in damaged if place))


def _fetch_files(remote: Remote, folder: Path, part: Part) -> str:
    """Fetch the files of a part that are there; returns the folder there that holds them."""
    place = _place(part)
    _remove_faulty(folder, part.files)
    there = remote.sizes(place)
    if not there:
        place, there = "", remote.sizes("")
    remote.fetch(folder, {name: {"bytes": there[name]} for name in part.files if name in there}, place)
    return place


def _finished(folder: Path) -> list[Part]:
    return [part for part in read_parts(folder) if part.files]


def _place(part: Part) -> str:
    """The folder for the files of a part: another for other files."""
    digest = hashlib.sha256((part.folder / record_name(part.name)).read_bytes()).hexdigest()
    return record_name(part.name).removesuffix(".json") + f"-{digest[:_DIGITS]}"


def _send_index(remote: Remote, work: Path, *, has_parts: bool) -> None:
    """Send an index, whose folder becomes that of the cache; parts that are there of its build go."""
    manifest = (work / MANIFEST_NAME).read_bytes()
    remote.send(work, read_manifest(work).files)
    remote.write(MANIFEST_NAME, manifest)
    remote.remove(*((PART_RECORDS,) if has_parts else ()), JOURNAL_NAME)
    shutil.rmtree(cache_of(remote.url) / PART_RECORDS, ignore_errors=True)
    folder = state_folder(remote.url, manifest)
    if folder.exists():
        shutil.rmtree(work)
    else:
        work.replace(folder)
