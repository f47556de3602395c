"""Changes to a finished index: rows appended, rows retired, search structures made again.

A change writes files of a new *generation* beside the old ones and replaces the manifest at the end, so that until then
the old index stays in force, also for processes that read it meanwhile. The journal (``build.json``) names the change
that the new files belong to. Run again, a killed change goes on; if its manifest is in force already, that is noticed,
and the change is not made twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forebear.errors import CorruptIndexError, InputError, MismatchError, OutputExistsError
from forebear.indexer.building.finish import finish
from forebear.indexer.building.options import Work
from forebear.indexer.building.shards import ShardWriter
from forebear.indexer.building.sharing.beginning import (
    as_begun,
    checkpoints_now,
    load_checked,
    segment_of,
    split_rows,
)
from forebear.indexer.building.sharing.segments import rows_for, write_segment
from forebear.indexer.index import Index
from forebear.indexer.model.device.arithmetic import computed_on
from forebear.indexer.rows.labels import label_map, refuse_other_form
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.user_columns import check_columns
from forebear.indexer.spans.finders import check_same_finder
from forebear.indexer.storage.choices import WorkKeywords
from forebear.indexer.storage.files import path_of
from forebear.indexer.storage.journal import begin_change, check_change, same_device_or_refuse, unfinished, was_done
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.storage.locks import exclusive
from forebear.indexer.storage.manifest import Segment, digest_of, read_manifest
from forebear.wording import worded

if TYPE_CHECKING:
    from typing_extensions import Unpack


def append_rows(
    folder: str | Path,
    source: RowSource,
    *,
    model: str | None = None,
    device: str = "auto",
    devices: Sequence[str | int] = (),
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Add rows to a finished index; they get the next row numbers.

    At the head, and for stored words, answers are then those of a build from scratch over all rows. Beyond the head
    bases, EK-FAC and calibration stay as they were fitted on the earlier rows: scores of ``if`` and ``rif`` there
    differ from those of a build, and recall was measured without the new rows. ``manifest.fit_age`` counts these;
    :func:`~forebear.indexer.building.refit.refit_index` fits again. The old index stays in force until the end.

    Args:
        folder: The index.
        source: Labelled rows with the same number of text columns.
        model: Path of the run, or of the last checkpoint, if it has moved.
        device: Device that models run on.
        devices: In place of ``device`` several, each with a process of its own, as of a build.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. With ``resume``, rows that the
            index has already are not added again. With ``force`` they are, and files of an interrupted change are
            removed.

    Raises:
        MismatchError: The models are not those of the index, or ``resume`` with other rows.
        OutputExistsError: The index has these rows already, or another change is unfinished.
        InUseError: Another process is writing there.
    """
    folder, work = path_of(folder), Work.of(work_keywords, device, devices)
    Index.open(folder)  # refuses a folder without an index before a lock file is made in it
    with exclusive(folder / LOCK_NAME, str(folder)):
        index = Index.open(folder)
        index.check_texts_held("appending rows")
        old = index.manifest
        if len(source.text_columns) != len(old.spec.text_columns):
            raise MismatchError(
                f"{source.name} has {len(source.text_columns)} text column(s), the index {len(old.spec.text_columns)} "
                f"({', '.join(old.spec.text_columns)}). Choose them by --text-columns."
            )
        lacking = check_columns(source, old.columns, str(folder))
        segment = segment_of(source, old.n_rows, old.columns)
        change = {"kind": "append", "segment": segment.rows}
        if was_done(folder, old, change):
            work.tell(f"the rows of {source.name} are in {folder} already: nothing is left to do.")
            return index
        journal = unfinished(folder, old, discard=work.force and not work.resume)
        existing = None if journal is not None else _segment_there(index, segment.rows_sha256)
        if existing is not None:
            rows = f"the rows of {source.name} are in {folder} already, as rows {existing.start} to "
            rows += f"{existing.start + existing.n_rows - 1}"
            if work.resume:
                hint = "nothing is added by --resume. To add them once more, give --force without it."
                work.tell(f"{rows}: " + (worded(hint) if work.force else "nothing is left to do."))
                return index
            if not work.force:
                raise OutputExistsError(
                    f"{rows}. Give --resume if that is what an interrupted append was about, or --force to add them "
                    "once more."
                )
        check_change(folder, journal, change, goes_on=work.resume)
        checkpoints = checkpoints_now(index, model)
        classifier = load_checked(checkpoints[-1], old.spec, work.device)
        where = computed_on(classifier.device, classifier.precision)
        same_device_or_refuse(journal, where, folder)
        check_same_finder(old.spec.spans, old.spec.spans_sha256, folder)
        refuse_other_form(source, old.row_format)
        labels = label_map(source, classifier.label_names, old.spec.label_mode, problem_type=old.spec.problem_type)
        work.warn(labels.warning)
        if lacking is not None:
            work.warn(lacking)
        if (warning := old.device_warning(where, f"the rows of {source.name} run")) is not None:
            work.warn(warning)
        begin_change(folder, old, change, journal, where)
        segment = replace(segment, computed_on=old.elsewhere(where))
        new_shards = split_rows(old.n_rows, source.n_rows, old.spec.shard_rows)
        manifest = replace(
            old, segments=(*old.segments, segment), shards=(*old.shards, *new_shards), generation=old.generation + 1
        )
        with as_begun(old.spec.n_threads, classifier.device):
            writer = ShardWriter(
                folder=folder, manifest=manifest, checkpoints=checkpoints,
                rows=rows_for(work, source, labels, old.spec.shard_rows), first_shard=len(old.shards), work=work,
            )  # fmt: skip
            write_segment(writer, {checkpoints[-1].name: classifier})
            return finish(folder, manifest, index.retired, work.progress)


def _segment_there(index: Index, rows_sha256: str) -> Segment | None:
    """The last segment with the same rows, if some of them are live: rows that were all retired may be added again."""
    for segment in reversed(index.manifest.segments):
        stop = segment.start + segment.n_rows
        if segment.rows_sha256 == rows_sha256 and ((index.live >= segment.start) & (index.live < stop)).any():
            return segment
    return None


def retire_rows(
    folder: str | Path,
    rows: Sequence[int],
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Take rows out of all answers; their numbers stay taken.

    Curvature of the head and search structures are made again without them; no model is needed. Fits beyond the
    head stay as they are, as after :func:`append_rows`. An interrupted retire of the same rows goes on by itself.

    Args:
        folder: The index.
        rows: Numbers of the rows to retire.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. With ``resume`` it is no error that
            all rows were retired before: nothing is done then.

    Raises:
        InputError: A row number is out of range or was retired before, or no row would be left.
        OutputExistsError: Another change is unfinished.
        InUseError: Another process is writing there.
    """
    folder, work = path_of(folder), Work.of(work_keywords)
    Index.open(folder)
    with exclusive(folder / LOCK_NAME, str(folder)):
        index = Index.open(folder)
        old = index.manifest
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        outside = wanted[(wanted < 0) | (wanted >= old.n_rows)]
        if len(outside):
            raise InputError(f"row {outside[0]} is not in {folder}, which has rows 0 to {old.n_rows - 1}.")
        change = {"kind": "retire", "rows": {"n_rows": len(wanted), "sha256": digest_of(wanted.tolist())}}
        was_done_before = was_done(folder, old, change)
        journal = unfinished(folder, old, discard=work.force)
        retired_before = np.intersect1d(wanted, index.retired)
        if was_done_before or (work.resume and len(retired_before) == len(wanted)):
            work.tell(f"these {len(wanted)} rows of {folder} were retired before: nothing is left to do.")
            return index
        if len(retired_before):
            raise InputError(f"row {retired_before[0]} of {folder} was retired before.")
        retired = np.union1d(wanted, index.retired)
        if len(retired) >= old.n_rows:
            raise InputError(f"retiring {len(wanted)} rows would leave none of {old.n_rows} in {folder}.")
        check_change(folder, journal, change, goes_on=True)
        begin_change(folder, old, change, journal)
        manifest = replace(old, n_retired=len(retired), generation=old.generation + 1)
        with as_begun(old.spec.n_threads):
            return finish(folder, manifest, retired, work.progress)


def rebuild_ann(
    folder: str | Path,
    ann: str | None,
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Make the search structures again from the Arrow files, with FAISS indexes if ``ann`` names a type.

    The files in ``ann/`` may be missing or damaged; everything else is checked. An interrupted rebuild goes on by
    itself.

    Args:
        folder: The index.
        ann: Factory string of FAISS indexes beside the scan tables; None: none.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. With ``resume``, undamaged structures
            of this type are left as they are.

    Raises:
        OutputExistsError: Another change is unfinished.
        InUseError: Another process is writing there.
    """
    folder, work = path_of(folder), Work.of(work_keywords)
    Index.open_without_derived(folder)
    with exclusive(folder / LOCK_NAME, str(folder)):
        old = Index.open_without_derived(folder)
        in_force = read_manifest(folder)
        change = {"kind": "rebuild", "ann": ann}
        done = was_done(folder, in_force, change)
        journal = unfinished(folder, in_force, discard=work.force)
        if (done or (work.resume and journal is None and in_force.spec.ann == ann)) and _has_whole_structures(folder):
            work.tell(f"the search structures of {folder} are whole and of this type: nothing is left to do.")
            return Index.open(folder)
        check_change(folder, journal, change, goes_on=True)
        begin_change(folder, in_force, change, journal)
        spec = replace(old.manifest.spec, ann=ann)
        manifest = replace(old.manifest, spec=spec, generation=old.manifest.generation + 1)
        with as_begun(spec.n_threads):
            return finish(folder, manifest, old.retired, work.progress)


def _has_whole_structures(folder: Path) -> bool:
    try:
        index = Index.open(folder)
        index.checked(*(facts["file"] for facts in index.manifest.derived.values()))
    except CorruptIndexError:
        return False
    return True
