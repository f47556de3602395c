"""The files of a part of an index: a run of shards that was written apart, with a record of what it holds.

A record, ``parts/<I>-of-<N>.json``, has the digest of the fit that the shards are written with, and what computes
them. When all are written, it is written again, with the sha256 of each file: the part is finished.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import forebear
from forebear.errors import CorruptIndexError, InputError, MismatchError
from forebear.indexer.building.finish import describe_file, fit_files, shard_kinds
from forebear.indexer.gradients.earlier_rows import shard_file
from forebear.indexer.storage.arrow import file_sha256, read_batches
from forebear.indexer.storage.atomic import atomic_file, write_bytes
from forebear.indexer.storage.journal import read_journal
from forebear.indexer.storage.layout import JOURNAL_NAME, MANIFEST_NAME, PART_RECORDS, word_shards_folder, words_folder
from forebear.indexer.storage.manifest import Manifest, canonical_json, digest_of, library_versions, manifest_of
from forebear.progress import Progress

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Fit:
    """What all parts of an index share: its choices and rows, and the files that were fitted to them.

    Attributes:
        folder: The index.
        manifest: The manifest of the build, which lists the fitted files alone.
        made_by: What computed the fit, see :func:`made_by`.
        is_gathered: Whether the parts were found whole: what is left is to finish the index.
        differing: Of parts that something else computed than the fit: which, and what.
    """

    folder: Path
    manifest: Manifest
    made_by: dict[str, Any]
    is_gathered: bool
    differing: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> str:
        """Names the fit; it covers the sha256 of every fitted file."""
        return self.manifest.digest()

    def check_files(self) -> None:
        """Refuse fitted files that were altered, or copied in part.

        Raises:
            InputError: One of them.
        """
        for name, facts in self.manifest.files.items():
            if (fault := fault_of(self.folder / name, facts)) is not None:
                raise InputError(f"{fault} Copy the folder again from where --fit was run, or run --fit again.")


def read_fit(folder: Path) -> Fit:
    """The fit of a folder that --fit has written.

    Raises:
        InputError: There is none.
    """
    journal = read_journal(folder)
    if journal is None or "fit" not in journal:
        found = "no fit" if journal is None else "an unfinished build, whose fit is not finished"
        if journal is None and not folder.is_dir():
            found = "no such folder"
        raise InputError(f"{folder}: {found}. Run `forebear index --fit` first, once, and copy its folder.")
    try:
        manifest = manifest_of(json.loads(journal["fit"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptIndexError(
            f"{folder / JOURNAL_NAME} was written by another version of forebear ({error}). Start over with --force."
        ) from error
    return Fit(
        folder, manifest, journal["made_by"], journal.get("gathered") is not None, tuple(journal.get("gathered") or ())
    )


def has_fit(journal: bytes) -> bool:
    """Whether the journal of a build says that its fit is whole; a damaged one may."""
    return b'"fit":' in journal


def is_finished(folder: Path) -> bool:
    """Whether a folder holds an index rather than a build that goes on."""
    return (folder / MANIFEST_NAME).is_file()


def fitted(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a build with the fitted files listed, all of which are written."""
    return manifest.with_files({name: describe_file(folder, name) for name in fit_files(manifest)})


def made_by(computed_on: dict[str, Any]) -> dict[str, Any]:
    """What last digits depend on besides the choices: devices, processor, libraries, and this package's source."""
    return {
        "computed_on": computed_on,
        "processor": _processor(),
        "libraries": library_versions(),
        "code": _code_sha256(),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What ``one`` has otherwise than ``other``, of two results of :func:`made_by`."""
    return {name: value for name, value in one.items() if value != other.get(name)}


@cache
def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {capability}"


@cache
def _code_sha256() -> str:
    package = Path(forebear.__file__).parent
    files = {path.relative_to(package).as_posix(): file_sha256(path) for path in package.rglob("*.py")}
    return digest_of(files)[:16]


@dataclass(frozen=True)
class Part:
    """A part, finished if its record lists files.

    Attributes:
        folder: The folder that holds it.
        name: Such as ``3/8``.
        fit: Digest of its fit.
        shards: Numbers of its shards, from the first up to one past the last.
        files: sha256 and bytes of its files, by path; none before it is finished.
        makers: What computed it, see :func:`made_by`; several where another machine went on after a kill.
    """

    folder: Path
    name: str
    fit: str
    shards: tuple[int, int]
    files: dict[str, dict[str, Any]]
    makers: list[dict[str, Any]]

    def files_of(self, shard: int) -> dict[str, dict[str, Any]]:
        """The files of one of its shards."""
        return {name: facts for name, facts in self.files.items() if name.endswith("/" + shard_file(shard))}

    def write(self) -> None:
        """Write its record."""
        content = {name: getattr(self, name) for name in ("name", "fit", "shards", "files", "makers")}
        write_bytes(self.folder / record_name(self.name), canonical_json(content | {"digest": digest_of(content)}))


def record_name(part: str) -> str:
    """The file of the record of a part, such as ``3/8``."""
    return f"{PART_RECORDS}/{part.replace('/', '-of-')}.json"


def read_parts(folder: Path) -> list[Part]:
    """The parts in a folder that have records.

    Raises:
        InputError: A record is damaged.
    """
    return [_read_part(folder, path) for path in sorted((folder / PART_RECORDS).glob("*.json"))]


def _read_part(folder: Path, path: Path) -> Part:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("digest") != digest_of(content):
            raise ValueError("its digest does not match")
        return Part(folder, **content | {"shards": tuple(content["shards"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Copy it again, or remove it and run --shard for that part again."
        ) from error


def files_of_shards(manifest: Manifest, shards: Iterable[int]) -> list[str]:
    """Paths of all files that the pass writes for some shards."""
    word_shards = [
        word_shards_folder(words_folder(checkpoint.name, top))
        for checkpoint in manifest.checkpoints
        for top in manifest.spec.words_tops
    ]
    return [f"{kind}/{shard_file(shard)}" for kind in (*shard_kinds(manifest), *word_shards) for shard in shards]


def remove_damaged(folder: Path, manifest: Manifest, shards: Sequence[int], record: Part | None) -> list[int]:
    """Remove the files of shards of which one is damaged, so that they are written again.

    Args:
        folder: The index.
        manifest: The manifest of the build.
        shards: The shards of a part.
        record: Its record; where it is not finished, files are looked at for being whole alone.

    Returns:
        The shards that were removed.
    """
    damaged = []
    for shard in shards:
        paths = [folder / name for name in files_of_shards(manifest, [shard])]
        if record is None or not record.files:
            is_damaged = any(path.is_file() and not _is_whole(path) for path in paths)
        else:
            is_damaged = any(fault_of(folder / name, facts) for name, facts in record.files_of(shard).items())
        if is_damaged:
            damaged.append(shard)
            for path in paths:
                path.unlink(missing_ok=True)
    return damaged


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_batches(path))
    except CorruptIndexError:
        return False


def fault_of(path: Path, facts: dict[str, Any]) -> str | None:
    """What is wrong with a file, by its recorded size and sha256; None where it is whole."""
    try:
        n_bytes = path.stat().st_size
    except OSError:
        return f"{path} is missing."
    if n_bytes != facts["bytes"]:
        return f"{path} has {n_bytes} bytes, its record says {facts['bytes']}: it was cut or altered."
    return None if file_sha256(path) == facts["sha256"] else f"{path} was altered: its sha256 is not the recorded one."


def gather(fit: Fit, others: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
    """Check that all parts are there, belong to the fit and are whole; copy what lies in other folders.

    Args:
        fit: The fit; its folder may hold parts itself.
        others: Other folders with parts.
        progress: Called with the stage.

    Returns:
        Of parts that something else computed than the fit, which they are and what.

    Raises:
        InputError: A part is missing, unfinished or damaged; nothing has been changed then.
        MismatchError: A part is one of another fit, or there twice with other numbers.
    """
    n_shards = len(fit.manifest.shards)
    chosen = _choose(fit, others)
    missing = [shard for shard in range(n_shards) if shard not in chosen]
    if missing:
        raise InputError(_what_is_missing(fit, missing, list(chosen.values())))
    for done, (shard, part) in enumerate(sorted(chosen.items())):
        progress("parts", done, n_shards)
        for name, facts in part.files_of(shard).items():
            if part.folder != fit.folder and fault_of(fit.folder / name, facts) is None:
                continue  # copied before
            if (fault := fault_of(part.folder / name, facts)) is not None:
                raise InputError(
                    f"{fault} Copy part {part.name} again, or run --shard {part.name} in its folder again, which mends "
                    "it."
                )
    of_others = {part.name: part for part in chosen.values() if part.folder != fit.folder}
    for part in of_others.values():
        for shard in range(*part.shards):
            for name, facts in part.files_of(shard).items():
                if chosen[shard] is part and fault_of(fit.folder / name, facts) is not None:
                    _copy(part.folder / name, fit.folder / name, facts)
    progress("parts", n_shards, n_shards)
    parts = {part.name: part for _, part in sorted(chosen.items())}
    found = ((part, differences(maker, fit.made_by)) for part in parts.values() for maker in part.makers)
    return [{"part": part.name, "shards": list(part.shards)} | other for part, other in found if other]


def _choose(fit: Fit, others: Sequence[Path]) -> dict[int, Part]:
    """A part for each shard that some folder has."""
    chosen: dict[int, Part] = {}
    for folder in (fit.folder, *others):
        if not folder.is_dir():
            raise InputError(f"--from {folder}: no such folder.")
        parts = [part for part in read_parts(folder) if part.files]
        if not parts and folder != fit.folder:
            raise InputError(f"--from {folder}: no finished part is there. A part is finished when --shard has ended.")
        for part in parts:
            if part.fit != fit.digest:
                raise MismatchError(
                    f"{folder / record_name(part.name)}: part {part.name} was written with fit {part.fit[:12]}, "
                    f"{fit.folder} has fit {fit.digest[:12]}: other rows, choices or models. Write the part again in a "
                    "copy of this folder, or leave it out."
                )
            for shard in range(*part.shards):
                before = chosen.setdefault(shard, part)
                if before.files_of(shard) != part.files_of(shard):
                    start, stop = fit.manifest.shards[shard]
                    raise MismatchError(
                        f"rows {start} to {stop - 1} are in two parts with other numbers: part {before.name} in "
                        f"{before.folder}, part {part.name} in {folder}. Leave one of the folders out, or remove the "
                        f"record of one, such as {folder / record_name(part.name)}."
                    )
    return chosen


def _what_is_missing(fit: Fit, missing: list[int], parts: list[Part]) -> str:
    start, stop = fit.manifest.shards[missing[0]][0], fit.manifest.shards[missing[0]][1]
    for shard in missing[1:]:
        if fit.manifest.shards[shard][0] == stop:
            stop = fit.manifest.shards[shard][1]
    which = part_with(fit, missing[0], parts)
    n_rows = sum(stop - start for start, stop in (fit.manifest.shards[shard] for shard in missing))
    return (
        f"{fit.folder}: {n_rows:,} of {fit.manifest.n_rows:,} rows are in no finished part, the first of them rows "
        f"{start} to {stop - 1}. Run --shard {which} for them (again, if it was killed), or name the folder that has "
        "them by --from."
    )


def part_with(fit: Fit, shard: int, parts: Sequence[Part]) -> str:
    """The part with a shard, if rows are divided as for the parts that are there; ``I/N`` where there are none."""
    if not parts:
        return "I/N"
    n_parts = int(parts[0].name.split("/")[1])
    of_shard = (i for i, shards in enumerate(all_parts(len(fit.manifest.shards), n_parts), 1) if shard in shards)
    return f"{next(of_shard)}/{n_parts}"


def all_parts(n_shards: int, n_parts: int) -> Iterator[range]:
    """The shards of each of ``n_parts`` parts, as equal in number as can be; some are empty where parts are many."""
    cuts = [i * n_shards // n_parts for i in range(n_parts + 1)]
    return map(range, cuts[:-1], cuts[1:])


def _copy(source: Path, target: Path, facts: dict[str, Any]) -> None:
    """Copy a file, which appears under its name only if it is the recorded one."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, atomic_file(target) as written:
        while chunk := read.read(_CHUNK_BYTES):
            digest.update(chunk)
            written.write(chunk)
        if digest.hexdigest() != facts["sha256"]:
            raise InputError(f"{source} changed while it was copied. Run the same command again.")
