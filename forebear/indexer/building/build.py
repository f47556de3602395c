"""Building an index: shards in one pass, curvature and search structures after it, the manifest last.

A build is a list of shard files with fixed names, each written whole or not at all, and a journal (``build.json``)
that names the rows and choices of the build. An interrupted build is resumed at its first missing shard. Later changes
of an index are in :mod:`~forebear.indexer.building.change` (rows added and retired) and
:mod:`~forebear.indexer.building.refit` (fits made again).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebear.errors import InputError, MismatchError
from forebear.indexer.building.change import append_rows, rebuild_ann, retire_rows
from forebear.indexer.building.finish import finish_build
from forebear.indexer.building.options import BuildOptions, Work
from forebear.indexer.building.preflight import check_feasible
from forebear.indexer.building.refit import refit_index
from forebear.indexer.building.shards import ShardWriter
from forebear.indexer.building.sharing.beginning import as_begun, segment_of, split_rows
from forebear.indexer.building.sharing.claims import refuse_parts_under_way
from forebear.indexer.building.sharing.part_files import fitted, made_by
from forebear.indexer.building.sharing.parts import build_part, commit_parts
from forebear.indexer.building.sharing.places import place_of
from forebear.indexer.building.sharing.segments import rows_for, write_segment
from forebear.indexer.building.spec import make_spec, settled_batch_tokens
from forebear.indexer.index import Index
from forebear.indexer.losses.choices import weights_of_classes
from forebear.indexer.losses.kinds import check_one_label, loss_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.indexer.rows.labels import label_map, names_of_classes
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.user_columns import choose_columns
from forebear.indexer.storage.choices import BuildKeywords, WorkKeywords
from forebear.indexer.storage.files import url_of
from forebear.indexer.storage.journal import (
    add_to_journal,
    begin_build,
    check_target,
    comparable,
    read_journal,
    same_or_refuse,
    unfinished,
)
from forebear.indexer.storage.layout import LOCK_NAME, MANIFEST_NAME
from forebear.indexer.storage.locks import check_free, exclusive
from forebear.indexer.storage.manifest import Manifest, library_versions
from forebear.indexer.training.in_memory import saved_beside
from forebear.indexer.training.model_choice import CheckpointPath, ColumnKeywords, ModelChoice, choose_model, path_from
from forebear.progress import python_warning

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "BuildOptions",
    "append_rows",
    "build_index",
    "build_part",
    "commit_parts",
    "fit_index",
    "rebuild_ann",
    "refit_index",
    "retire_rows",
]

_GoOn = Callable[[ShardWriter, dict[str, Classifier], SentenceEncoder | None], Index | None]
_Build = Callable[..., Index | None]


def build_index(
    source: RowSource,
    out: str | Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions | None = None,
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Build an index of labelled rows under one or more checkpoints of a classifier.

    Args:
        source: The training rows, with labels.
        out: Folder to write; must not exist, unless ``resume`` or ``force``. Or a URL of ``fsspec``, to which the
            index is sent at the end.
        checkpoints: In training order; the last one is the model that is explained.
        options: All other choices that change stored numbers.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. A resumed build of the same spec and rows has the same
            bytes; ``force`` replaces an index in the folder.

    Returns:
        The finished index, open.

    Raises:
        OutputExistsError: The folder holds an index, a build or other files already.
        InUseError: Another process is writing there.
        MismatchError: ``resume`` with other rows or choices, or checkpoints that do not belong together.
        NonFiniteError: NaN or infinity in weights or features; the row is named.
        StorageError: The disk is full. What was finished stays, for ``resume``.
    """
    begun = _begin(source, out, checkpoints, options, work_keywords, _write_all)
    assert begun is not None
    return begun


def fit_index(
    source: RowSource,
    out: str | Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions | None = None,
    **work_keywords: Unpack[WorkKeywords],
) -> Index | None:
    """Begin a build whose shards are written in parts, on any number of machines: fit what all of them share.

    The folder then holds the build's choices and, beyond the head, bases, reductions and EK-FAC, which are fitted on a
    sample of all rows. :func:`~forebear.indexer.building.sharing.parts.build_part` writes shards there or in a copy of
    the folder, :func:`~forebear.indexer.building.sharing.parts.commit_parts` makes the index.

    Args:
        source: All training rows, with labels.
        out: Folder to write, as of :func:`build_index`.
        checkpoints: As of :func:`build_index`.
        options: As of :func:`build_index`.
        **work_keywords: As of :func:`build_index`.

    Returns:
        None; with ``resume`` the index, where the folder holds that of these rows and choices already.

    Raises:
        ForebearError: As :func:`build_index`.
    """
    return _begin(source, out, checkpoints, options, work_keywords, _fit)


def _begin(
    source: RowSource,
    out: str | Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions | None,
    work_keywords: WorkKeywords,
    go_on: _GoOn,
) -> Index | None:
    """Begin a build, or resume it, and go on with it; an index that is there already is returned."""
    options = options or BuildOptions()
    options.check()
    work = Work.of(work_keywords, options.device, options.devices)
    options = replace(options, device=work.device, devices=())
    how = {"resume": work.resume, "force": work.force}
    is_elsewhere = url_of(out) is not None
    if is_elsewhere:  # no path is kept relative to it
        checkpoints = [
            replace(c, path=str(Path(c.path).resolve())) if Path(c.path).exists() else c for c in checkpoints
        ]
    with place_of("begin", out, **how, with_parts=go_on is _write_all) as folder:
        check_free(folder / LOCK_NAME, str(folder))
        check_target(folder, **how)
        with exclusive(folder / LOCK_NAME, str(folder)):
            check_target(folder, **how)
            refuse_parts_under_way(folder)
            built = _build(source, folder, checkpoints, options, work.naming(out, folder), go_on)
    return Index.open(out) if is_elsewhere and built is not None else built


def build_from_model(
    model: Any,
    rows: Any,
    out: str | Path,
    labels: Sequence[Any] | None = None,
    *,
    checkpoints: Sequence[str] = (),
    etas: Sequence[float] = (),
    columns: ColumnKeywords | None = None,
    tokenizer: Any = None,
    build: _Build = build_index,
    **choices: Unpack[BuildKeywords],
) -> Index | None:
    """See :meth:`~forebear.indexer.index.Index.build`; ``columns`` are its keywords that name columns of the rows.

    ``build`` is what is done of it: :func:`build_index` or :func:`fit_index`.
    """
    if tokenizer is not None or not isinstance(model, (str, Path, ModelChoice, type(None))):
        if url_of(out) is not None:
            raise InputError(
                f"{out}: a model in memory is saved beside its index, and this is no folder. Save the model "
                "(save_pretrained), and give its folder."
            )
        how = {"resume": choices.get("resume", False), "force": choices.get("force", False)}
        check_target(Path(out), **how)
        model = saved_beside(Path(out), model, tokenizer, **how)
    if not isinstance(model, ModelChoice):
        model = choose_model(None if model is None else str(model), checkpoints, etas)
    elif checkpoints or etas:
        raise InputError("checkpoints or etas are given beside a model that choose_model has chosen. Give them to it.")
    warn = choices.setdefault("warn", python_warning)
    warn(model.remark)
    source = model.open_rows(rows, labels, **(columns or {}))
    if source is not rows:
        for remark in source.remarks():
            warn(remark)
    warn(model.data_remark(source))
    work_keywords: Any = {name: value for name, value in choices.items() if name in WorkKeywords.__annotations__}
    options_given = {name: _tuple_of(value) for name, value in choices.items() if name not in work_keywords}
    if unknown := sorted(set(options_given) - {field.name for field in fields(BuildOptions)}):
        raise TypeError(f"Index.build() got an unexpected keyword argument {unknown[0]!r}")
    run: dict[str, Any] = {"max_length": model.max_length, "label_mode": model.label_mode, **model.loss_choices}
    options = BuildOptions(**run | options_given)
    return build(source, out, model.checkpoints, options, **work_keywords)


def _tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _build(
    source: RowSource,
    folder: Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions,
    work: Work,
    go_on: _GoOn,
) -> Index | None:
    classifier = load_classifier(
        checkpoints[-1].path,
        device=options.device,
        precision=options.precision,
        max_length=options.max_length,
    )
    options = replace(options, batch_tokens=settled_batch_tokens(options, classifier, folder, resume=work.resume))
    for remark in classifier.remarks:
        work.warn(remark)
    check_one_label(classifier.loss.problem_type, options.class_weights, options.label_smoothing)
    check_feasible(classifier, options, len(source.text_columns))
    columns = choose_columns(source, options.keep_columns)
    problem_type = classifier.loss.problem_type
    labels = label_map(source, classifier.label_names, options.label_mode, problem_type=problem_type)
    work.warn(labels.warning)
    names = names_of_classes(classifier.label_names, source)
    weights = weights_of_classes(options.class_weights, names, labels.n_rows_by_class(len(names)), source.name)
    options = replace(options, class_weights=weights)
    classifier = replace(classifier, label_names=names, loss=loss_of(problem_type, weights, options.label_smoothing))
    encoder = None
    if "sbert" in options.stores:
        encoder = load_sentence_encoder(options.sentence_model, device=options.device)
    spec, listed, loaded, checked = make_spec(
        source, checkpoints, classifier, options, None if encoder is None else encoder.sha256
    )
    segment = segment_of(source, 0, columns)
    replaces = work.force and not work.resume and any(path.name != LOCK_NAME for path in folder.iterdir())
    journal = None if replaces else read_journal(folder)
    if work.resume and (folder / MANIFEST_NAME).is_file() and not (journal is not None and journal.get("replaces")):
        index = Index.open(folder)
        try:
            kept = {"keep_columns": list(index.manifest.columns)}
            same_or_refuse(
                index.manifest.segments[0].rows | kept, segment.rows | {"keep_columns": list(columns)}, folder
            )
            same_or_refuse(comparable(asdict(index.manifest.spec)), comparable(asdict(spec)), folder)
            if (calibrated := index.manifest.calibration_queries) is not None:
                same_or_refuse({"calibrate": calibrated}, {"calibrate": options.calibration_queries}, folder)
            # an index that was changed since it was built is the one that --force is to replace
            replaces = work.force and index.manifest.generation > 0
        except MismatchError:
            if not work.force:
                raise
            replaces = True
        if not replaces:
            unfinished(folder, index.manifest)  # removes the journal of a build killed after its manifest was written
            work.tell(f"{folder} was built from these rows before: nothing is left to do.")
            return index
    rows_of_build = segment.rows | {"keep_columns": list(columns) or None}
    build = {"kind": "build", "segment": rows_of_build, "checkpoints": [c.name for c in listed]}
    where = computed_on(classifier.device, classifier.precision)
    spec, self_check, where = begin_build(folder, build, spec, asdict(checked.rounded), where, replaces=replaces)
    n_queries = options.calibration_queries if spec.sketched_scopes else None
    manifest = Manifest(
        spec=spec,
        checkpoints=tuple(replace(c, path=path_from(folder, c.path)) for c in listed),
        sentence_model=options.sentence_model if "sbert" in spec.stores else None,
        segments=(segment,),
        shards=split_rows(0, source.n_rows, spec.shard_rows),
        n_retired=0,
        generation=0,
        feature_dim=classifier.feature_dim,
        self_check=self_check,
        computed_on=where,
        columns=columns,
        calibration_queries=n_queries,
        libraries=library_versions(),
    )
    with as_begun(spec.n_threads, classifier.device):
        writer = ShardWriter(
            folder=folder, manifest=manifest, checkpoints=listed, rows=rows_for(work, source, labels, spec.shard_rows),
            first_shard=0, work=work,
        )  # fmt: skip
        return go_on(writer, loaded, encoder)


def _write_all(writer: ShardWriter, loaded: dict[str, Classifier], encoder: SentenceEncoder | None) -> Index:
    """Write all shards, and make the index."""
    write_segment(writer, loaded, encoder)
    last = loaded[writer.checkpoints[-1].name]
    return finish_build(writer.folder, writer.manifest, last, writer.work.progress)


def _fit(writer: ShardWriter, loaded: dict[str, Classifier], _encoder: SentenceEncoder | None) -> None:
    """Fit what shards share, and say in the journal that it is whole."""
    writer.fit(loaded)
    fit = fitted(writer.folder, writer.manifest)
    # As text: the journal sorts keys, the index has them in their order.
    as_written = json.dumps(fit.to_dict(), allow_nan=False)
    add_to_journal(writer.folder, {"fit": as_written, "made_by": made_by(fit.computed_on)})
