"""An index folder under change: what may be replaced, what an interrupted change left, how it is resumed.

The journal (``build.json``) names the change that is under way: files that are not in the manifest belong to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from forebear.errors import CorruptIndexError, MismatchError, OutputExistsError, StorageError
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX, write_bytes
from forebear.indexer.storage.choices import LATER_CHOICES
from forebear.indexer.storage.layout import (
    BASES_NAME,
    CLAIMS,
    EFFECTS_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    PART_RECORDS,
    curvature_name,
    gradient_folder,
)
from forebear.indexer.storage.manifest import IndexSpec, Manifest, canonical_json, kind_recorded, plain

SUBFOLDERS = (
    "rows", "columns", "features", "gradients", "sentence", "words", "tokens", "spans", "curvature", "refit", "ann",
    "retired", PART_RECORDS, CLAIMS,
)  # fmt: skip
_KEYS = {MANIFEST_NAME: b'"spec_digest"', JOURNAL_NAME: b'"checkpoint_sha256"'}


def check_target(folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds an index or a build, unless resumed or forced; other content is never removed."""
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file. Give a folder for the index.")
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    check_content(str(folder), partial(content_of, folder), names, resume=resume, force=force)


def check_content(
    place: str, read: Callable[[str], bytes], names: Iterable[str], *, resume: bool, force: bool
) -> tuple[bool, bool]:
    """The same of a place of any kind, by its files.

    Args:
        place: Its name, for messages.
        read: Gives the content of a file by its name; nothing where there is none.
        names: Of all that lies in it.
        resume: Whether what is there is gone on with.
        force: Whether an index or a build that is there is replaced.

    Returns:
        Whether it holds an index, and whether it holds a build.

    Raises:
        OutputExistsError: It is refused.
    """
    has_index, has_build = mentions(read, MANIFEST_NAME), mentions(read, JOURNAL_NAME)
    if has_index or has_build:
        if not (resume or force):
            content = "an index" if has_index else "an unfinished build"
            raise OutputExistsError(
                f"{place} holds {content}. Use --resume to go on with it, or --force to replace it."
            )
    elif any(not name.endswith(TEMPORARY_SUFFIX) and name != LOCK_NAME for name in names):
        raise OutputExistsError(f"{place} holds other files and no index: it is left alone. Give another --out.")
    return has_index, has_build


def mentions(read: Callable[[str], bytes], name: str) -> bool:
    """Whether a manifest or a journal has the key that forebear writes; other programs also have such files.

    The file is not parsed, so that a damaged one is recognised as well.
    """
    return _KEYS[name] in read(name)


def holds_index(place: str, read: Callable[[str], bytes]) -> bool:
    """Whether the place of a build holds its index already.

    Args:
        place: Its name, for messages.
        read: Gives the content of a file by its name; nothing where there is none.

    Raises:
        OutputExistsError: It holds another program's ``manifest.json``, where that of the index would be written.
    """
    content = read(MANIFEST_NAME)
    if content and _KEYS[MANIFEST_NAME] not in content:
        raise OutputExistsError(
            f"{place} holds a {MANIFEST_NAME} that is no index's: it is left alone. Move it away, or build in another "
            "place."
        )
    return bool(content)


def content_of(folder: Path, name: str) -> bytes:
    """The content of a file of a folder; nothing where there is none."""
    return (folder / name).read_bytes() if (folder / name).is_file() else b""


def clear(folder: Path) -> None:
    """Remove an index's own files but for the journal, the manifest first.

    Raises:
        StorageError: One of them cannot be removed.
    """
    try:
        for name in (MANIFEST_NAME, EFFECTS_NAME):
            (folder / name).unlink(missing_ok=True)
        for name in SUBFOLDERS:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise StorageError(
            f"cannot remove {error.filename or folder} of the index that is replaced: {error.strerror or error}. "
            "Make it writable and go on with the same command and --resume."
        ) from error


def tidy(folder: Path, manifest: Manifest) -> None:
    """Remove what the manifest does not list from the index's own subfolders, then the journal."""
    for sub in SUBFOLDERS:
        for path in sorted((folder / sub).rglob("*"), reverse=True):  # the content of a folder comes before the folder
            if path.is_dir():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in manifest.files:
                path.unlink()
        with suppress(OSError):
            (folder / sub).rmdir()
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        (folder / (name + TEMPORARY_SUFFIX)).unlink(missing_ok=True)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def later_choices(folder: Path, begun: dict[str, Any], checkpoints: list[str] | None) -> tuple[str, ...]:
    """Names of the choices that a resumed build may still change, because no stage has used them yet.

    Beyond the head, dampings decide what is fitted and sketched, so they may change until the first basis is written.
    """
    later = ("rep_refit", "ann", "dampings")
    if begun["curvature"] == "none" or not checkpoints:
        return later
    folders = [folder / gradient_folder(scope, checkpoints[-1]) for scope in begun["scopes"]]
    drawn = any((path / BASES_NAME).is_file() for path in folders)
    return later[:2] if drawn else (*later, "curvature", "white_bits", "whitening")


def comparable(spec: dict[str, Any], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """A spec as a dictionary, without the choices ``left_out``, and without the thread count.

    A resumed build takes the thread count from the journal.
    """
    return {key: value for key, value in spec.items() if key not in ("n_threads", *left_out)}


def same_or_refuse(begun: dict[str, Any], requested: dict[str, Any], folder: Path) -> None:
    """Refuse to resume with another choice, naming the first that differs with both values.

    Args:
        begun: Choices that the change was begun with.
        requested: Choices of this command.
        folder: The index, for the message.

    Raises:
        MismatchError: A requested choice differs from the one begun with.
    """
    for key, value in sorted(plain(requested).items()):
        begun_value = plain(begun.get(key))
        if begun_value != value:
            raise MismatchError(
                f"{folder} was begun with {key}={begun_value}; this command asks for {key}={value}. "
                "Resume with the same choices, or start over with --force."
            )


def read_journal(folder: Path) -> dict[str, Any] | None:
    """The journal of the change that is under way; None if there is none.

    Raises:
        CorruptIndexError: The journal is damaged.
    """
    path = folder / JOURNAL_NAME
    try:
        journal = json.loads(path.read_bytes())
        if not {"kind", "spec"} <= journal.keys():
            raise ValueError("it names no change")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptIndexError(f"{path} is damaged ({error}). Start over with --force.") from error
    return dict(journal)


def is_in_force(journal: dict[str, Any], manifest: Manifest) -> bool:
    """Whether the manifest of a journal's change was already written, so that only tidying up was interrupted."""
    if journal["kind"] == "build":
        return not journal.get("replaces")
    return bool(journal.get("onto") != manifest.digest())


def was_done(folder: Path, manifest: Manifest, change: dict[str, Any]) -> bool:
    """Whether this same change was interrupted after its manifest was written; its old files are removed then.

    Args:
        folder: The index.
        manifest: The one in force.
        change: The change's ``kind``, and the inputs that tell it from others, such as the rows of an append.
    """
    try:
        journal = read_journal(folder)
    except CorruptIndexError:  # reported when the change goes on, or discarded by --force
        return False
    if journal is None or not is_in_force(journal, manifest):
        return False
    try:
        check_change(folder, journal, change, goes_on=True)
    except (OutputExistsError, MismatchError):
        return False
    tidy(folder, manifest)
    return True


def unfinished(folder: Path, manifest: Manifest | None, *, discard: bool = False) -> dict[str, Any] | None:
    """The journal of the unfinished change, or None.

    A change whose manifest is in force but whose journal is still there is finished by tidying up first.

    Args:
        folder: The index.
        manifest: The one in force; None before the first one.
        discard: Whether the files of an unfinished change are removed as well.

    Raises:
        CorruptIndexError: The journal is damaged, and ``discard`` is not set.
    """
    try:
        journal = read_journal(folder)
    except CorruptIndexError:
        if not discard:
            raise
    if manifest is not None and (discard or (journal is not None and is_in_force(journal, manifest))):
        tidy(folder, manifest)
        return None
    return journal


def check_change(folder: Path, journal: dict[str, Any] | None, change: dict[str, Any], *, goes_on: bool) -> None:
    """Refuse a change while another is unfinished, or while the same change is unfinished and is not resumed.

    Args:
        folder: The index.
        journal: The journal of the unfinished change, or None.
        change: The new change's ``kind``, and the inputs that tell it from others.
        goes_on: Whether an unfinished change of the same kind may be resumed.

    Raises:
        OutputExistsError: Another change, or the same, is unfinished.
        MismatchError: It was begun with other rows.
    """
    if journal is None:
        return
    if journal["kind"] != change["kind"] or not goes_on:
        kind = journal["kind"]
        raise OutputExistsError(
            f"{folder} has an unfinished {kind}. Go on with it by the same command and --resume, or discard what it "
            "left with --force."
        )
    for key, value in change.items():
        if isinstance(value, dict):
            same_or_refuse(journal.get(key) or {}, value, folder)
        else:
            same_or_refuse({key: journal.get(key)}, {key: value}, folder)


def same_device_or_refuse(journal: dict[str, Any] | None, computed_on: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a change on another kind of device: some of its files would have other last digits.

    Args:
        journal: The journal of the unfinished change, or None.
        computed_on: Where this command computes.
        folder: The index, for the message.

    Raises:
        MismatchError: The change was begun on another kind of device.
    """
    begun, now = (kind_recorded(record) for record in ((journal or {}).get("computed_on"), computed_on))
    if journal is not None and begun != now:
        device = "with --device cpu" if begun == "cpu" else "on a device of that kind, by --device"
        raise MismatchError(
            f"{folder} was begun on {begun}; this command runs on {now}, whose numbers have other last digits. Go on "
            f"{device}, or start over with --force."
        )


def begin_change(
    folder: Path,
    manifest: Manifest,
    change: dict[str, Any],
    journal: dict[str, Any] | None,
    computed_on: dict[str, Any] | None = None,
) -> None:
    """Write the journal of a change to an index; a resumed change keeps the ``journal`` that it has.

    Args:
        folder: The index.
        manifest: The one in force.
        change: The change's ``kind``, and the inputs that tell it from others.
        journal: The journal of the change, where it is resumed.
        computed_on: Where models run; None: none do.
    """
    if journal is None:
        tidy(folder, manifest)
        where = {} if computed_on is None else {"computed_on": computed_on}
        _write_journal(folder, change | where | {"onto": manifest.digest()}, manifest.spec)


def begin_build(
    folder: Path,
    build: dict[str, Any],
    spec: IndexSpec,
    self_check: dict[str, Any],
    computed_on: dict[str, Any],
    *,
    replaces: bool,
) -> tuple[IndexSpec, dict[str, Any], dict[str, Any]]:
    """Write the journal of a build, or check that the journal in the folder is of the same build.

    Args:
        folder: The index.
        build: The build's ``kind``, and the inputs that tell it from others, without the spec.
        spec: The spec of the build.
        self_check: What was found before the build, whose last figures may differ when it is resumed.
        computed_on: Where models run.
        replaces: Whether the index or build in the folder is removed. The journal says so until it is removed, so that
            a build that is killed before that can be resumed.

    Returns:
        The spec of the build, with the thread count that it was begun with; and the ``self_check`` and ``computed_on``
        of its beginning.

    Raises:
        MismatchError: It was begun with other rows or choices, or on another kind of device.
    """
    journal = None if replaces else read_journal(folder)
    if journal is not None:
        check_change(folder, journal, build, goes_on=True)
        begun = LATER_CHOICES | journal["spec"]  # an earlier forebear named fewer choices
        later = later_choices(folder, begun, journal.get("checkpoints"))
        same_or_refuse(comparable(begun, later), comparable(asdict(spec), later), folder)
        same_device_or_refuse(journal, computed_on, folder)
        spec = replace(spec, n_threads=journal["spec"]["n_threads"])
        self_check = journal.get("self_check", self_check)
        computed_on = journal.get("computed_on", computed_on)
        for scope in () if spec.whitened else spec.sketched_scopes:
            (folder / curvature_name(scope)).unlink(missing_ok=True)
    # Keys in one order, whether a journal held them or not.
    self_check, computed_on = (json.loads(canonical_json(facts)) for facts in (self_check, computed_on))
    build = build | {"self_check": self_check, "computed_on": computed_on}
    if replaces or (journal is not None and journal.get("replaces")):
        _write_journal(folder, build | {"replaces": True}, spec)
        clear(folder)
    _write_journal(folder, build, spec)  # also of a resumed build, whose later choices may have changed
    return spec, self_check, computed_on


def add_to_journal(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to the journal of the change that is under way."""
    write_bytes(folder / JOURNAL_NAME, canonical_json((read_journal(folder) or {}) | facts))


def _write_journal(folder: Path, change: dict[str, Any], spec: IndexSpec) -> None:
    write_bytes(folder / JOURNAL_NAME, canonical_json(change | {"spec": asdict(spec)}))
