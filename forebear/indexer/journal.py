"""An index folder under change: what may be replaced, what an interrupted change left, how it is resumed.

The journal (``build.json``) says what the files that are not in the manifest yet belong to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from forebear.errors import CorruptIndexError, MismatchError, OutputExistsError
from forebear.indexer.gradient_stage import BASES_NAME, curvature_name
from forebear.indexer.manifest import JOURNAL_NAME, MANIFEST_NAME, IndexSpec, Manifest, canonical_json
from forebear.indexer.sketch import gradient_folder
from forebear.indexer.store import TEMPORARY_SUFFIX, write_bytes

SUBFOLDERS = ("rows", "features", "gradients", "sentence", "words", "tokens", "spans", "curvature", "ann", "retired")


def check_target(folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse to overwrite; a folder that is no index is never cleared, not even by force."""
    has_index = _mentions(folder / MANIFEST_NAME, b'"spec_digest"')
    unfinished = _mentions(folder / JOURNAL_NAME, b'"checkpoint_sha256"')
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file. Give a folder for the index.")
    if has_index or unfinished:
        if not (resume or force):
            what = "an index" if has_index else "an unfinished build"
            raise OutputExistsError(f"{folder} holds {what}. Use --resume to go on with it, or --force to replace it.")
    elif folder.is_dir() and any(path.suffix != TEMPORARY_SUFFIX for path in folder.iterdir()):
        raise OutputExistsError(f"{folder} holds other files and no index: it is left alone. Give another --out.")


def _mentions(path: Path, key: bytes) -> bool:
    """Whether a file is ours, be it damaged: others have a manifest.json too."""
    return path.is_file() and key in path.read_bytes()


def clear(folder: Path) -> None:
    """Remove an index's own files."""
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        (folder / name).unlink(missing_ok=True)
    for name in SUBFOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Remove files in the index's own subfolders that the manifest does not list, and the journal."""
    for sub in SUBFOLDERS:
        for path in sorted((folder / sub).rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in manifest.files:
                path.unlink()
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def later_choices(folder: Path, begun: dict[str, Any], checkpoints: list[str] | None) -> tuple[str, ...]:
    """Choices of stages that an interrupted build has not come to yet, which it may change when it is resumed.

    Beyond the head dampings decide what is fitted and sketched: they may change until the first basis is drawn.
    """
    later = ("rep_refit", "ann", "dampings")
    if begun["curvature"] == "none" or not checkpoints:
        return later
    folders = [folder / gradient_folder(scope, checkpoints[-1]) for scope in begun["scopes"]]
    drawn = any((path / BASES_NAME).is_file() for path in folders)
    return later[:2] if drawn else (*later, "curvature", "white_bits")


def comparable(spec: dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """A spec without the thread count, which a resumed build takes over from the journal, and without ``but``."""
    return {key: value for key, value in spec.items() if key not in ("n_threads", *but)}


@contextmanager
def as_begun(n_threads: int) -> Iterator[None]:
    """Run with the thread count that the change was begun with: last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_or_refuse(found: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Refuse to resume with another choice, naming the first that differs with both values."""
    for key, value in json.loads(canonical_json(asked)).items():
        before = json.loads(canonical_json(found)).get(key)
        if before != value:
            raise MismatchError(
                f"{folder} was begun with {key}={before}; this command asks for {key}={value}. "
                "Resume with the same choices, or start over with --force."
            )


def journalled_segment(folder: Path) -> dict[str, Any] | None:
    """The rows that an interrupted change was about; None without a readable journal."""
    try:
        found = json.loads((folder / JOURNAL_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    segment = found.get("segment") if isinstance(found, dict) else None
    return segment if isinstance(segment, dict) else None


def begin(folder: Path, change: dict[str, Any], spec: IndexSpec) -> IndexSpec:
    """Write the journal of a change, or check that the one there is the same; returns the spec to go on with."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        write_bytes(path, canonical_json(change | {"spec": asdict(spec)}))
        return spec
    try:
        found = json.loads(path.read_bytes())
        begun = found.pop("spec")
    except (ValueError, KeyError) as error:
        raise CorruptIndexError(f"{path} is damaged ({error}). Start over with --force.") from error
    for key in ("kind", "checkpoints"):
        same_or_refuse({key: found.get(key)}, {key: change.get(key)}, folder)
    same_or_refuse(found["segment"], change["segment"], folder)
    later = later_choices(folder, begun, found.get("checkpoints"))
    same_or_refuse(comparable(begun, later), comparable(asdict(spec), later), folder)
    spec = replace(spec, n_threads=begun["n_threads"])
    if not spec.whitened:
        for scope in spec.sketched_scopes:
            (folder / curvature_name(scope)).unlink(missing_ok=True)
    write_bytes(path, canonical_json(found | {"spec": asdict(spec)}))
    return spec
