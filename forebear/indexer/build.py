"""Building an index: shards in one pass, curvature and search structures after it, the manifest last.

A build is a list of shard files with fixed names, each written whole or not at all, and a journal
(``build.json``) that says what they belong to. An interrupted build is resumed at its first missing shard.
Append and retire write files of a new *generation* beside the old ones and replace the manifest at the end,
so that until then the old index stays in force.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from forebear.errors import InputError, MismatchError, OutputExistsError
from forebear.indexer.calibrate import QUERIES_AT_ONCE, SAMPLE_ROWS, calibrate_scope, calibrate_spans
from forebear.indexer.data import RowSource
from forebear.indexer.finish import finish, tidy
from forebear.indexer.index import Index
from forebear.indexer.journal import (
    as_begun,
    begin,
    check_target,
    clear,
    comparable,
    journalled_segment,
    remove_unlisted,
    same_or_refuse,
)
from forebear.indexer.labels import label_map, names_of_classes
from forebear.indexer.manifest import JOURNAL_NAME, MANIFEST_NAME, Manifest, Segment, library_versions
from forebear.indexer.model import Classifier, load_classifier
from forebear.indexer.options import BuildOptions, Progress, counted, ignore_warning, no_progress
from forebear.indexer.preflight import check_feasible
from forebear.indexer.runs import CheckpointPath, moved_paths, path_from
from forebear.indexer.shards import ShardWriter, load_checked, split_rows
from forebear.indexer.spans import check_same_finder
from forebear.indexer.spec import make_spec


def build_index(
    source: RowSource,
    out: str | Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    warn: Callable[[str | None], None] = ignore_warning,
    progress: Progress = no_progress,
) -> Index:
    """Build an index of labelled rows under one or more checkpoints of a classifier.

    Args:
        source: The training rows, with labels.
        out: Folder to write; must not exist, unless ``resume`` or ``force``.
        checkpoints: In training order; the last one is the model that is explained.
        options: Everything else that changes stored numbers.
        resume: Go on with an interrupted build of the same spec and rows; the bytes are the same.
        force: Replace an index that is there.
        warn: Told what the user should know, such as labels taken as the model's own ids.
        progress: Told the stage, rows done and rows in all.

    Returns:
        The finished index, open.

    Raises:
        OutputExistsError: Something is there already.
        MismatchError: ``resume`` with other rows or choices, or checkpoints that do not belong together.
        NonFiniteError: NaN or infinity in weights or features; the row is named.
        StorageError: The disk is full. What was finished stays, for ``resume``.
    """
    options = options or BuildOptions()
    options.check()
    folder = Path(out)
    check_target(folder, resume=resume, force=force)
    classifier = load_classifier(
        checkpoints[-1].path,
        device=options.device,
        precision=options.precision,
        max_length=options.max_length,
    )
    check_feasible(classifier, options, len(source.text_columns))
    labels = label_map(source, classifier.label_names, options.label_mode)
    warn(labels.warning)
    classifier = replace(classifier, label_names=names_of_classes(classifier.label_names, source))
    spec, listed = make_spec(source, checkpoints, classifier, options)
    segment = Segment(source=source.name, rows_sha256=source.sha256(), start=0, n_rows=source.n_rows)
    if resume and (folder / MANIFEST_NAME).is_file():
        index = Index.open(folder)
        same_or_refuse(asdict(index.manifest.segments[0]), asdict(segment), folder)
        same_or_refuse(comparable(asdict(index.manifest.spec)), comparable(asdict(spec)), folder)
        tidy(folder, index.manifest)  # a kill between the manifest and the end leaves the journal
        return index
    if force and not resume:
        clear(folder)
    spec = begin(folder, {"kind": "build", "segment": asdict(segment), "checkpoints": [c.name for c in listed]}, spec)
    shards = split_rows(0, source.n_rows, spec.shard_rows)
    remembered = tuple(replace(c, path=path_from(folder, c.path)) for c in listed)
    manifest = Manifest(
        spec=spec,
        checkpoints=remembered,
        sentence_model=options.sentence_model if "sbert" in spec.stores else None,
        segments=(segment,),
        shards=shards,
        n_retired=0,
        generation=0,
        feature_dim=classifier.feature_dim,
        libraries=library_versions(),
    )
    with as_begun(spec.n_threads):
        ShardWriter(
            folder=folder,
            source=source,
            labels=labels,
            spec=spec,
            checkpoints=listed,
            shards=shards,
            first_shard=0,
            options=replace(options, max_length=spec.max_length),
            progress=progress,
            warn=warn,
        ).write(classifier)
        return finish(folder, manifest, np.empty(0, np.int64), progress, _calibration(classifier, options, progress))


def _calibration(
    classifier: Classifier, options: BuildOptions, progress: Progress
) -> Callable[[Index], dict[str, Any]] | None:
    """Calibrates every scope beyond the head; None where there is nothing to calibrate."""
    if len(options.scopes) == 1 or not options.calibration_queries:
        return None

    def calibrate(index: Index) -> dict[str, Any]:
        found = {}
        for scope in index.manifest.spec.sketched_scopes:
            by_spans = "spans" in options.stores
            n_sampled = min(SAMPLE_ROWS, index.manifest.n_live)
            if by_spans:
                n_sampled += 2 * min(SAMPLE_ROWS, len(index.live_spans))
            groups = -(-options.calibration_queries // QUERIES_AT_ONCE)
            on_rows = counted(progress, f"calibration {scope}", n_sampled * groups)
            found[scope] = calibrate_scope(
                index, classifier, scope, n_queries=options.calibration_queries, on_rows=on_rows
            )
            if by_spans:
                found[scope]["methods"] |= calibrate_spans(
                    index, classifier, scope, n_queries=options.calibration_queries, on_rows=on_rows
                )
        return found

    return calibrate


def append_rows(
    folder: str | Path,
    source: RowSource,
    *,
    model: str | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: Progress = no_progress,
) -> Index:
    """Add rows to a finished index; they get the next row numbers.

    Answers are those of a build from scratch over all rows. The old index stays in force until the end.

    Args:
        folder: The index.
        source: Labelled rows with the same number of text columns.
        model: Where the run, or the last checkpoint, is now, if it has moved.
        resume: Go on with an interrupted append of the same rows.
        force: Discard what an interrupted append left.
        device: Where the model runs.
        progress: Told the stage, rows done and rows in all.

    Raises:
        MismatchError: The models are not those of the index, or ``resume`` with other rows.
    """
    folder = Path(folder)
    index = Index.open(folder)
    old = index.manifest
    if _settled(folder, old) and not force and old.segments[-1].rows_sha256 == source.sha256():
        if resume:
            return index
        raise OutputExistsError(
            f"{source.name}: an append of these rows was interrupted when it was done; they are rows "
            f"{old.segments[-1].start} to {old.n_rows - 1} of {folder}. Give --force to add them a second time."
        )
    if len(source.text_columns) != len(old.spec.text_columns):
        raise MismatchError(
            f"{source.name} has {len(source.text_columns)} text column(s), the index {len(old.spec.text_columns)} "
            f"({', '.join(old.spec.text_columns)}). Choose them by --text-columns."
        )
    options = BuildOptions(
        stores=old.spec.stores,
        scopes=old.spec.scopes,
        sketch_dim=old.spec.sketch_dim or BuildOptions.sketch_dim,
        dampings=old.spec.dampings,
        sentence_model=old.sentence_model or "minilm",
        words_tops=old.spec.words_tops or BuildOptions.words_tops,
        spans=old.spec.spans or BuildOptions.spans,
        span_column=old.spec.span_column,
        precision=old.spec.precision,
        max_length=old.spec.max_length,
        label_mode=old.spec.label_mode,
        batch_tokens=old.spec.batch_tokens,
        shard_rows=old.spec.shard_rows,
        device=device,
    )
    paths = moved_paths(model, old.checkpoints, folder)
    moved = [replace(c, path=path) for c, path in zip(old.checkpoints, paths, strict=True)]
    classifier = load_checked(moved[-1], old.spec, options)
    check_same_finder(old.spec.spans, old.spec.spans_sha256, folder)
    labels = label_map(source, classifier.label_names, options.label_mode)
    segment = Segment(source=source.name, rows_sha256=source.sha256(), start=old.n_rows, n_rows=source.n_rows)
    if (folder / JOURNAL_NAME).is_file() and not resume and not force:
        raise OutputExistsError(
            f"{folder} has an unfinished append. Go on with --resume and the same rows, or discard it with --force."
        )
    if not resume:
        remove_unlisted(folder, old)
    begin(folder, {"kind": "append", "segment": asdict(segment), "onto": old.digest()}, old.spec)
    new = split_rows(old.n_rows, source.n_rows, old.spec.shard_rows)
    manifest = replace(
        old, segments=(*old.segments, segment), shards=(*old.shards, *new), generation=old.generation + 1
    )
    with as_begun(old.spec.n_threads):
        ShardWriter(
            folder=folder,
            source=source,
            labels=labels,
            spec=old.spec,
            checkpoints=tuple(moved),
            shards=new,
            first_shard=len(old.shards),
            options=options,
            progress=progress,
        ).write(classifier)
        return finish(folder, manifest, index.retired, progress)


def retire_rows(folder: str | Path, rows: Sequence[int], *, progress: Progress = no_progress) -> Index:
    """Take rows out of all answers; their numbers stay taken.

    Curvature and search structures are made again without them; no model is needed.

    Raises:
        InputError: A row number is out of range or was retired before, or no row would be left.
    """
    folder = Path(folder)
    index = Index.open(folder)
    old = index.manifest
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    outside = wanted[(wanted < 0) | (wanted >= old.n_rows)]
    if len(outside):
        raise InputError(f"row {outside[0]} is not in {folder}, which has rows 0 to {old.n_rows - 1}.")
    again = np.intersect1d(wanted, index.retired)
    if len(again):
        raise InputError(f"row {again[0]} of {folder} was retired before.")
    retired = np.union1d(wanted, index.retired)
    if len(retired) >= old.n_rows:
        raise InputError(f"retiring {len(wanted)} rows would leave none of {old.n_rows} in {folder}.")
    _refuse_unfinished(folder, old)
    remove_unlisted(folder, old)
    manifest = replace(old, n_retired=len(retired), generation=old.generation + 1)
    return finish(folder, manifest, retired, progress)


def rebuild_ann(folder: str | Path, ann: str | None, *, progress: Progress = no_progress) -> Index:
    """Make the search structures again from the Arrow files, with another FAISS type if ``ann`` names one.

    The files in ``ann/`` may be missing or damaged; everything else is checked.
    """
    folder = Path(folder)
    old = Index.open_without_derived(folder)
    _refuse_unfinished(folder, old.manifest)
    spec = replace(old.manifest.spec, ann=ann)
    manifest = replace(old.manifest, spec=spec, generation=old.manifest.generation + 1)
    return finish(folder, manifest, old.retired, progress)


def _settled(folder: Path, manifest: Manifest) -> bool:
    """Clear up after a change that was killed when its manifest was already in force; whether there was one."""
    segment = journalled_segment(folder)
    if segment is None or segment not in [asdict(s) for s in manifest.segments]:
        return False
    tidy(folder, manifest)
    return True


def _refuse_unfinished(folder: Path, manifest: Manifest) -> None:
    _settled(folder, manifest)
    if (folder / JOURNAL_NAME).is_file():
        raise InputError(
            f"{folder} has an unfinished append. Finish it first: --append with --resume, or --force to discard it."
        )
