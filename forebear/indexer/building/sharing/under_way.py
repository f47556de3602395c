"""A build in parts that goes on: what its folder holds, what is missing, and what is to be done next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebear.indexer.building.sharing.part_files import (
    Fit,
    Part,
    differences,
    is_finished,
    part_with,
    read_fit,
    read_parts,
)
from forebear.indexer.building.sharing.places import place_of
from forebear.indexer.storage.files import HUB
from forebear.indexer.storage.journal import read_journal
from forebear.indexer.storage.layout import JOURNAL_NAME


@dataclass(frozen=True, kw_only=True)
class PartUnderWay:
    """A part of which the folder has a record.

    Attributes:
        part: Such as ``3/8``.
        rows: Number of its first row, and one past the last; None of another fit, whose rows are not known here.
        is_finished: Whether all its files are written and recorded.
        of_this_fit: Whether it was written with this fit; others are refused when the parts are committed.
        differing: What computed it, where that is not what computed the fit; one a machine.
    """

    part: str
    rows: tuple[int, int] | None
    is_finished: bool
    of_this_fit: bool
    differing: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class BuildUnderWay:
    """A folder that ``--fit`` has written, or a copy of it, which is no index yet.

    Attributes:
        folder: The folder.
        fit: Digest of the fit.
        n_rows: Rows of the build.
        n_shards: Files of rows, of which parts consist.
        text_columns: Columns of text.
        label_names: Names of the classes.
        scopes: Scopes of gradients.
        stores: What is stored of each row.
        fitted_by: What computed the fit: processor, devices, libraries, source.
        parts: Parts with a record here.
        n_missing: Rows that are in no finished part here.
        next: What to do next.
    """

    folder: str
    fit: str
    n_rows: int
    n_shards: int
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    scopes: tuple[str, ...]
    stores: tuple[str, ...]
    fitted_by: dict[str, Any]
    parts: tuple[PartUnderWay, ...]
    n_missing: int
    next: str


def find_build(place: str) -> BuildUnderWay | None:
    """The build in parts that goes on in a folder or at a URL; None where there is none, or an index.

    Raises:
        InputError: The record of a part is damaged.
        CorruptIndexError: The journal is damaged.
    """
    if place.startswith(HUB):
        return None
    with place_of("records", place) as folder:
        return _build_in(folder, place)


def _build_in(folder: Path, place: str) -> BuildUnderWay | None:
    if is_finished(folder) or not (folder / JOURNAL_NAME).is_file() or "fit" not in (read_journal(folder) or {}):
        return None
    fit, parts = read_fit(folder), read_parts(folder)
    manifest, spec = fit.manifest, fit.manifest.spec
    there = {shard for part in parts if part.files and part.fit == fit.digest for shard in range(*part.shards)}
    missing = [] if fit.is_gathered else [shard for shard in range(len(manifest.shards)) if shard not in there]
    return BuildUnderWay(
        folder=place,
        fit=fit.digest,
        n_rows=manifest.n_rows,
        n_shards=len(manifest.shards),
        text_columns=spec.text_columns,
        label_names=spec.label_names,
        scopes=tuple(spec.scopes),
        stores=tuple(spec.stores),
        fitted_by=fit.made_by,
        parts=tuple(_under_way(fit, part) for part in parts),
        n_missing=sum(stop - start for start, stop in (manifest.shards[shard] for shard in missing)),
        next=_next_step(place, fit, parts, missing),
    )


def _under_way(fit: Fit, part: Part) -> PartUnderWay:
    (first, stop), of_this_fit = part.shards, part.fit == fit.digest
    return PartUnderWay(
        part=part.name,
        rows=(fit.manifest.shards[first][0], fit.manifest.shards[stop - 1][1]) if of_this_fit else None,
        is_finished=bool(part.files),
        of_this_fit=of_this_fit,
        differing=tuple(found for maker in part.makers if (found := differences(maker, fit.made_by))),
    )


def _next_step(place: str, fit: Fit, parts: Sequence[Part], missing: list[int]) -> str:
    commit = f"forebear index --out {place} --commit"
    if not missing:
        return commit
    which = part_with(fit, missing[0], [part for part in parts if part.files])
    step = f"forebear index --out {place} --train ROWS --shard {which}"
    return f"{step}, here or in a copy of the folder; when all parts are written: {commit}, with copies by --from"
