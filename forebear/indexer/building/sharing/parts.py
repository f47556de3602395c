"""An index built in parts: runs of shards, written by anybody who has the fit, anywhere, in any order.

A build is three steps. What sees all rows is fitted once, first (``fit_index``). Then shards are written, each from its
own rows and the fit alone. At the end (:func:`commit_parts`), equal rows get equal numbers, words are merged, and
curvature of the head, search structures and calibration follow from the shards. A build by one process does the same
three steps, so the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebear.errors import InputError, InUseError, MismatchError
from forebear.indexer.building.finish import describe_file, finish_build
from forebear.indexer.building.options import Work
from forebear.indexer.building.shards import ShardWriter
from forebear.indexer.building.sharing.beginning import as_begun, checkpoints_now, load_checked, segment_of
from forebear.indexer.building.sharing.claims import Claims, part_lock, refuse_parts_under_way
from forebear.indexer.building.sharing.equal_rows import EqualRows
from forebear.indexer.building.sharing.part_files import (
    Fit,
    Part,
    all_parts,
    differences,
    files_of_shards,
    gather,
    is_finished,
    made_by,
    read_fit,
    read_parts,
    remove_damaged,
)
from forebear.indexer.building.sharing.places import part_folders, place_of
from forebear.indexer.building.sharing.segments import rows_for, write_shards
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.rows.labels import label_map, refuse_other_form
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.user_columns import check_columns
from forebear.indexer.spans.finders import check_same_finder
from forebear.indexer.storage.choices import WorkKeywords
from forebear.indexer.storage.files import url_of
from forebear.indexer.storage.journal import add_to_journal, content_of, holds_index, unfinished
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.storage.locks import check_free, exclusive
from forebear.indexer.storage.manifest import read_manifest

if TYPE_CHECKING:
    from typing_extensions import Unpack


def build_part(
    out: str | Path,
    source: RowSource,
    part: str,
    *,
    model: str | None = None,
    device: str = "auto",
    devices: Sequence[str | int] = (),
    **work_keywords: Unpack[WorkKeywords],
) -> range:
    """Write a part of the shards of an index that ``fit_index`` has begun.

    Parts may be written at the same time, in one folder that machines share or in copies of it. Killed, the same call
    goes on; called again, it checks what it wrote, and writes again what was damaged since.

    Args:
        out: The folder that ``fit_index`` wrote, or a copy of it; or the URL to which it was sent.
        source: All training rows of the index, of which a part is read.
        part: ``3/8``: the third of eight.
        model: Path of the run, or of the last checkpoint, if it has moved.
        device: Device that models run on.
        devices: In place of ``device`` several, each with a process of its own, as of a build.
        **work_keywords: ``warn``, ``tell`` and ``progress``, see :class:`~forebear.indexer.building.options.Work`.
            With ``force``, what is written of the part is written again.

    Returns:
        Numbers of the part's rows; none where there are more parts than shards.

    Raises:
        InputError: There is no such part, or no fit, or its files were damaged.
        MismatchError: The rows or the models are not those of the fit.
        InUseError: Another process writes this part, or commits the index.
    """
    work = Work.of(work_keywords, device, devices)
    numbers = part_of(part)
    with place_of("write_part", out, part=part, force=work.force) as folder:
        return _build_part(folder, source, part, *numbers, model, work.naming(out, folder))


def _build_part(
    folder: Path, source: RowSource, part: str, number: int, n_parts: int, model: str | None, work: Work
) -> range:
    if holds_index(str(folder), partial(content_of, folder)):
        work.tell(f"{folder} is an index already: nothing is left to do.")
        return range(0)
    fit = read_fit(folder)
    shards = list(all_parts(len(fit.manifest.shards), n_parts))[number - 1]
    rows = [fit.manifest.shards[shard] for shard in shards]
    if not rows:
        work.tell(
            f"part {part} has no rows: {folder} has {len(fit.manifest.shards)} files of rows (--shard-rows), so no "
            "more parts than that have any."
        )
        return range(0)
    with exclusive(part_lock(folder, part), f"part {part} of {folder}"):
        check_free(folder / LOCK_NAME, str(folder))
        fit = read_fit(folder)
        if fit.is_gathered:
            work.tell(f"the parts of {folder} are all there and were checked: --commit goes on.")
        else:
            _write_part(fit, source, part, shards, model, work)
    return range(rows[0][0], rows[-1][1])


def part_of(part: str) -> tuple[int, int]:
    """``3/8`` as numbers.

    Raises:
        InputError: It is no part.
    """
    first, _, last = part.partition("/")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise InputError(f"--shard {part}: expected I/N, part I of N with I from 1 to N, such as 3/8.")
    return int(first), int(last)


def _write_part(fit: Fit, source: RowSource, part: str, shards: range, model: str | None, work: Work) -> None:
    folder, manifest = fit.folder, fit.manifest
    record = next((found for found in read_parts(folder) if found.name == part and found.fit == fit.digest), None)
    if work.force:
        for name in files_of_shards(manifest, shards):
            (folder / name).unlink(missing_ok=True)
    elif damaged := remove_damaged(folder, manifest, shards, record):
        spans = ", ".join(f"{start} to {stop - 1}" for start, stop in (manifest.shards[shard] for shard in damaged))
        work.warn(f"{folder}: files of rows {spans} were cut or altered since they were written; they are made again")
    elif record is not None and record.files:
        work.tell(f"part {part} of {folder} is written and whole: nothing is left to do.")
        return
    fit.check_files()
    checkpoints = checkpoints_now(Index(folder, manifest, check=False), model)
    last = load_checked(checkpoints[-1], manifest.spec, work.device)
    _check_rows(fit, source, last, work)
    maker = made_by(computed_on(last.device, last.precision))
    _warn_of_differences(fit, maker, f"part {part}", work)
    before = [] if record is None or work.force else [one for one in record.makers if one != maker]
    begun = Part(folder, part, fit.digest, (shards.start, shards.stop), {}, [*before, maker])
    begun.write()
    labels = label_map(source, last.label_names, manifest.spec.label_mode, problem_type=manifest.spec.problem_type)
    with as_begun(manifest.spec.n_threads, last.device):
        writer = ShardWriter(
            folder=folder, manifest=replace(manifest, files={}), checkpoints=checkpoints,
            rows=rows_for(work, source, labels, manifest.spec.shard_rows), first_shard=0, work=work,
            claims=Claims(folder), part=shards,
        )  # fmt: skip
        write_shards(writer, {checkpoints[-1].name: last})
    if not all(map(writer.is_written, writer.stages().values())):
        raise InUseError(f"rows of part {part} of {folder} are being written as rows of another part. Run it again.")
    files = {name: describe_file(folder, name) for name in files_of_shards(manifest, shards)}
    if read_fit(folder).digest != fit.digest:
        raise MismatchError(f"{folder} was fitted anew while part {part} was written. Run it again with --force.")
    replace(begun, files=files).write()


def _check_rows(fit: Fit, source: RowSource, last: Classifier, work: Work) -> None:
    """Refuse rows that are not those of the fit, which passes over all of them."""
    manifest = fit.manifest
    (expected,) = manifest.segments
    check_same_finder(manifest.spec.spans, manifest.spec.spans_sha256, fit.folder)
    refuse_other_form(source, manifest.row_format)
    if (lacking := check_columns(source, manifest.columns, str(fit.folder))) is not None:
        work.warn(lacking)
    found = segment_of(source, 0, manifest.columns)
    if len(source.text_columns) != len(manifest.spec.text_columns) or found.rows != expected.rows:
        raise MismatchError(
            f"{source.name} has {found.n_rows:,} rows (sha256 {found.rows_sha256[:12]}), {fit.folder} was fitted to "
            f"{expected.n_rows:,} (sha256 {expected.rows_sha256[:12]}), with columns "
            f"{', '.join(manifest.columns) or 'of texts and labels alone'}. Give all rows of the build by --train, "
            "unchanged."
        )
    if last.label_names != manifest.spec.label_names:
        raise MismatchError(f"the model has labels {list(last.label_names)}, {fit.folder} others.")


def _warn_of_differences(fit: Fit, maker: dict[str, Any], what: str, work: Work) -> None:
    if others := differences(maker, fit.made_by):
        said = "; ".join(_difference(name, value, fit.made_by.get(name)) for name, value in others.items())
        work.warn(
            f"{what} is not computed by what computed the fit of {fit.folder} ({said}): numbers may differ from those "
            "of a build on one machine in their last digits. The index records it."
        )


def _difference(name: str, here: Any, there: Any) -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        return ", ".join(
            _difference(key, value, there.get(key)) for key, value in here.items() if value != there.get(key)
        )
    return f"{name} {str(here)[:60]}, not {str(there)[:60]}"


def commit_parts(
    out: str | Path,
    parts: Sequence[str | Path] = (),
    *,
    model: str | None = None,
    device: str = "auto",
    devices: Sequence[str | int] = (),
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Make the index of parts that :func:`build_part` has written.

    Every file is compared with the record of its part first. Killed, the same call goes on. What a build by one process
    computes of all rows is computed here: curvature of the head, search structures, merged words, calibration.

    Args:
        out: The folder that ``fit_index`` wrote, or a copy of it, which may hold parts; or the URL to which both were
            sent, and then the index is.
        parts: Other copies, whose parts are copied from there; or URLs.
        model: Path of the run, or of the last checkpoint, if it has moved.
        device: Device that models run on.
        devices: In place of ``device`` several, of which the first is used.
        **work_keywords: ``warn``, ``tell`` and ``progress``, see :class:`~forebear.indexer.building.options.Work`.

    Raises:
        InputError: A part is missing, unfinished or damaged, or there is no fit.
        MismatchError: A part is of another fit, or two parts disagree; or the models are not those of the fit.
        InUseError: A part is being written, or another process commits the index.
    """
    work = Work.of(work_keywords, device, devices)
    is_elsewhere = url_of(out) is not None
    with place_of("commit", out) as folder:
        built = _commit(folder, [out] if is_elsewhere else [], parts, model, work.naming(out, folder))
    return Index.open(out) if is_elsewhere else built


def _commit(
    folder: Path, own: Sequence[str | Path], parts: Sequence[str | Path], model: str | None, work: Work
) -> Index:
    """The index of a folder's parts, of those at the URL that it stands for (``own``), and of others."""
    if not holds_index(str(folder), partial(content_of, folder)):
        read_fit(folder)  # refuses a folder without one before a lock file is made in it
    with exclusive(folder / LOCK_NAME, str(folder)):
        if is_finished(folder):
            unfinished(folder, read_manifest(folder))  # removes what was left by a commit killed at its very end
            work.tell(f"{folder} is an index already: nothing is left to do.")
            return Index.open(folder)
        refuse_parts_under_way(folder)
        fit = read_fit(folder)
        fit.check_files()
        differing = list(fit.differing)
        if not fit.is_gathered:
            others = [found for place in own for found in part_folders(place)]
            for place in parts:
                if not (found_there := part_folders(place)):
                    raise InputError(f"--from {place}: no finished part is there. A part is when --shard has ended.")
                others += [found for found in found_there if found.resolve() != folder.resolve()]
            differing = gather(fit, others, work.progress)
            add_to_journal(folder, {"gathered": differing})
        manifest = replace(fit.manifest, files={})
        checkpoints = checkpoints_now(Index(folder, manifest, check=False), model)
        last = load_checked(checkpoints[-1], manifest.spec, work.device)
        maker = made_by(computed_on(last.device, last.precision))
        _warn_of_differences(fit, maker, "the end of the build", work)
        if others_here := differences(maker, fit.made_by):
            differing.append({"part": "commit"} | others_here)
        with as_begun(manifest.spec.n_threads, last.device):
            EqualRows(
                folder=folder, manifest=manifest, first_shard=0, checkpoints=checkpoints,
                classifier_at=lambda c: last if c is checkpoints[-1] else load_checked(c, manifest.spec, work.device),
                encoder=lambda: load_sentence_encoder(str(manifest.sentence_model), device=work.device),
                progress=work.progress,
            ).overwrite()  # fmt: skip
            return finish_build(folder, replace(manifest, parts=tuple(differing)), last, work.progress)
