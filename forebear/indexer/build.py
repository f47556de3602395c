"""Building an index: shards in one pass, curvature and search structures after it, the manifest last.

A build is a list of shard files with fixed names, each written whole or not at all, and a journal
(``build.json``) that says what they belong to. An interrupted build is resumed at its first missing shard.
Append and retire write files of a new *generation* beside the old ones and replace the manifest at the end,
so that until then the old index stays in force.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from forebear.errors import CorruptIndexError, InputError, MismatchError, OutputExistsError
from forebear.indexer.ann import import_faiss
from forebear.indexer.curvature import absolute_damping
from forebear.indexer.data import RowBlock, RowSource
from forebear.indexer.finish import finish
from forebear.indexer.forward import DEFAULT_BATCH_TOKENS, residual_and_loss, run_forward
from forebear.indexer.index import Index
from forebear.indexer.labels import LabelMap, label_map
from forebear.indexer.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    Checkpoint,
    IndexSpec,
    Manifest,
    Segment,
    canonical_json,
)
from forebear.indexer.model import Classifier, load_classifier
from forebear.indexer.runs import CheckpointPath
from forebear.indexer.sentence import load_sentence_encoder
from forebear.indexer.store import write_bytes, write_columns

STORES = ("features", "sbert")
SUBFOLDERS = ("rows", "features", "sentence", "curvature", "ann", "retired")
DEFAULT_SHARD_ROWS = 4096

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Say nothing."""


def _ignore(_message: str | None) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Choices of ``forebear index`` that change stored numbers; see :class:`IndexSpec` for the rest."""

    stores: tuple[str, ...] = ("features",)
    sentence_model: str = "minilm"
    dampings: tuple[str, ...] = ("0.1x",)  # empty: no curvature
    rep_refit: bool = False
    ann: str | None = None
    seed: int = 0
    precision: str = "fp32"
    max_length: int | None = None
    label_mode: str | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    shard_rows: int = DEFAULT_SHARD_ROWS
    device: str = "auto"

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        unknown = sorted(set(self.stores) - set(STORES))
        if unknown or "features" not in self.stores:
            raise InputError(f"--store {','.join(self.stores)}: expected features, or features,sbert.")
        for given in self.dampings:
            absolute_damping(given, 1.0)
        if self.batch_tokens < 1 or self.shard_rows < 1:
            raise InputError("--batch-tokens and --shard-rows must be at least 1.")
        import_faiss()


def build_index(
    source: RowSource,
    out: str | Path,
    checkpoints: Sequence[CheckpointPath],
    options: BuildOptions | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    warn: Callable[[str | None], None] = _ignore,
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
    _check_target(folder, resume=resume, force=force)
    classifier = load_classifier(
        checkpoints[-1].path,
        device=options.device,
        precision=options.precision,
        max_length=options.max_length,
    )
    labels = label_map(source, classifier.label_names, options.label_mode)
    warn(labels.warning)
    spec, listed = _make_spec(source, checkpoints, classifier, options)
    segment = Segment(source=source.name, rows_sha256=source.sha256(), start=0, n_rows=source.n_rows)
    if resume and (folder / MANIFEST_NAME).is_file():
        index = Index.open(folder)
        _same_or_refuse(_comparable(asdict(index.manifest.spec)), _comparable(asdict(spec)), folder)
        return index
    if force and not resume:
        _clear(folder)
    spec = _journal(folder, {"kind": "build", "segment": asdict(segment)}, spec)
    shards = _split(0, source.n_rows, spec.shard_rows)
    _write_shards(folder, source, labels, spec, listed, shards, 0, options, classifier, progress)
    manifest = Manifest(
        spec=spec,
        checkpoints=listed,
        sentence_model=options.sentence_model if "sbert" in spec.stores else None,
        segments=(segment,),
        shards=shards,
        n_retired=0,
        generation=0,
        feature_dim=classifier.feature_dim,
        libraries=library_versions(),
    )
    return finish(folder, manifest, np.empty(0, np.int64), progress)


def append_rows(
    folder: str | Path,
    source: RowSource,
    *,
    checkpoints: Sequence[str] | None = None,
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
        checkpoints: Where the models are now, if they have moved; one path each.
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
    if len(source.text_columns) != len(old.spec.text_columns):
        raise MismatchError(
            f"{source.name} has {len(source.text_columns)} text column(s), the index {len(old.spec.text_columns)} "
            f"({', '.join(old.spec.text_columns)}). Choose them by --text-columns."
        )
    paths = list(checkpoints) if checkpoints else [c.path for c in old.checkpoints]
    if len(paths) != len(old.checkpoints):
        raise MismatchError(f"{len(paths)} checkpoint(s) given, the index has {len(old.checkpoints)}.")
    options = BuildOptions(
        stores=old.spec.stores,
        sentence_model=old.sentence_model or "minilm",
        precision=old.spec.precision,
        max_length=old.spec.max_length,
        label_mode=old.spec.label_mode,
        batch_tokens=old.spec.batch_tokens,
        shard_rows=old.spec.shard_rows,
        device=device,
    )
    moved = [replace(c, path=path) for c, path in zip(old.checkpoints, paths, strict=True)]
    classifier = _load_checked(moved[-1], old.spec, options)
    labels = label_map(source, classifier.label_names, options.label_mode)
    segment = Segment(source=source.name, rows_sha256=source.sha256(), start=old.n_rows, n_rows=source.n_rows)
    if (folder / JOURNAL_NAME).is_file() and not resume and not force:
        raise OutputExistsError(
            f"{folder} has an unfinished append. Go on with --resume and the same rows, or discard it with --force."
        )
    if not resume:
        remove_unlisted(folder, old)
    _journal(folder, {"kind": "append", "segment": asdict(segment), "onto": old.digest()}, old.spec)
    new = _split(old.n_rows, source.n_rows, old.spec.shard_rows)
    _write_shards(folder, source, labels, old.spec, tuple(moved), new, len(old.shards), options, classifier, progress)
    manifest = replace(
        old, segments=(*old.segments, segment), shards=(*old.shards, *new), generation=old.generation + 1
    )
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
    _refuse_unfinished(folder)
    remove_unlisted(folder, old)
    manifest = replace(old, n_retired=len(retired), generation=old.generation + 1)
    return finish(folder, manifest, retired, progress)


def rebuild_ann(folder: str | Path, ann: str | None, *, progress: Progress = no_progress) -> Index:
    """Make the search structures again from the Arrow files, with another FAISS type if ``ann`` names one.

    The files in ``ann/`` may be missing or damaged; everything else is checked.
    """
    folder = Path(folder)
    old = Index.open_without_derived(folder)
    _refuse_unfinished(folder)
    spec = replace(old.manifest.spec, ann=ann)
    manifest = replace(old.manifest, spec=spec, generation=old.manifest.generation + 1)
    return finish(folder, manifest, old.retired, progress)


def _refuse_unfinished(folder: Path) -> None:
    if (folder / JOURNAL_NAME).is_file():
        raise InputError(
            f"{folder} has an unfinished append. Finish it first: --append with --resume, or --force to discard it."
        )


def library_versions() -> dict[str, str]:
    """Versions of what computes the numbers."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("forebear", "torch", "transformers", "pyarrow", "numpy", "scipy", "faiss-cpu", "faiss-gpu")
    return {name: found for name in names if (found := find(name))}


def _check_target(folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse to overwrite; a folder that is no index is never cleared, not even by force."""
    has_index = (folder / MANIFEST_NAME).is_file()
    unfinished = (folder / JOURNAL_NAME).is_file()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file. Give a folder for the index.")
    if has_index or unfinished:
        if not (resume or force):
            what = "an index" if has_index else "an unfinished build"
            raise OutputExistsError(f"{folder} holds {what}. Use --resume to go on with it, or --force to replace it.")
    elif folder.is_dir() and any(folder.iterdir()):
        raise OutputExistsError(f"{folder} holds other files and no index: it is left alone. Give another --out.")


def _clear(folder: Path) -> None:
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


def _make_spec(
    source: RowSource, checkpoints: Sequence[CheckpointPath], last: Classifier, options: BuildOptions
) -> tuple[IndexSpec, tuple[Checkpoint, ...]]:
    """The spec of a build; loads every checkpoint once to fingerprint it and see that they belong together."""
    names = [c.name for c in checkpoints]
    if len(set(names)) != len(names):
        raise InputError(f"checkpoints {', '.join(names)}: each may be given once.")
    listed = []
    for checkpoint in checkpoints:
        model = last if checkpoint is checkpoints[-1] else load_classifier(checkpoint.path, device="cpu")
        found = (model.feature_dim, model.label_names, model.tokenizer_sha256)
        if found != (last.feature_dim, last.label_names, last.tokenizer_sha256):
            raise MismatchError(
                f"checkpoint {checkpoint.path} has {model.feature_dim} features, labels {list(model.label_names)} and "
                f"tokenizer {model.tokenizer_sha256[:8]}; the last one has {last.feature_dim}, "
                f"{list(last.label_names)}, {last.tokenizer_sha256[:8]}. Checkpoints must come from one run."
            )
        listed.append(
            Checkpoint(name=checkpoint.name, path=str(checkpoint.path), eta=checkpoint.eta, sha256=model.sha256)
        )
    sentence = load_sentence_encoder(options.sentence_model, device="cpu").sha256 if "sbert" in options.stores else None
    spec = IndexSpec(
        checkpoint_sha256=tuple(c.sha256 for c in listed),
        etas=tuple(c.eta for c in listed),
        tokenizer_sha256=last.tokenizer_sha256,
        label_names=last.label_names,
        label_mode=options.label_mode,
        text_columns=source.text_columns,
        max_length=last.max_length,
        precision=options.precision,
        stores=options.stores,
        sentence_sha256=sentence,
        dampings=options.dampings,
        rep_refit=options.rep_refit,
        ann=options.ann,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
        shard_rows=options.shard_rows,
        n_threads=torch.get_num_threads(),
    )
    return spec, tuple(listed)


def _comparable(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without the thread count, which a resumed build takes over from the journal."""
    return {key: value for key, value in spec.items() if key != "n_threads"}


def _same_or_refuse(found: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    for key, value in json.loads(canonical_json(asked)).items():
        before = json.loads(canonical_json(found)).get(key)
        if before != value:
            raise MismatchError(
                f"{folder} was begun with {key}={before}; this command asks for {key}={value}. "
                "Resume with the same choices, or start over with --force."
            )


def _journal(folder: Path, change: dict[str, Any], spec: IndexSpec) -> IndexSpec:
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
    _same_or_refuse(found["segment"] | {"kind": found["kind"]}, change["segment"] | {"kind": change["kind"]}, folder)
    _same_or_refuse(_comparable(begun), _comparable(asdict(spec)), folder)
    torch.set_num_threads(begun["n_threads"])
    return replace(spec, n_threads=begun["n_threads"])


def _split(start: int, n_rows: int, shard_rows: int) -> tuple[tuple[int, int], ...]:
    """Row ranges of the shards of a segment."""
    stop = start + n_rows
    return tuple((i, min(i + shard_rows, stop)) for i in range(start, stop, shard_rows))


def _load_checked(checkpoint: Checkpoint, spec: IndexSpec, options: BuildOptions) -> Classifier:
    """A checkpoint of an index, refused if it is not the one that was indexed."""
    classifier = load_classifier(
        checkpoint.path, device=options.device, precision=options.precision, max_length=options.max_length
    )
    check_same_model(classifier, checkpoint.sha256, spec.tokenizer_sha256)
    return classifier


def check_same_model(classifier: Classifier, sha256: str, tokenizer_sha256: str) -> None:
    """Refuse a model or tokenizer that is not the index's.

    Raises:
        MismatchError: With both fingerprints.
    """
    for what, found, wanted in (
        ("model", classifier.sha256, sha256),
        ("tokenizer", classifier.tokenizer_sha256, tokenizer_sha256),
    ):
        if found != wanted:
            raise MismatchError(
                f"{classifier.name}: {what} sha256 {found[:12]} is not the one of the index, {wanted[:12]}. Scores "
                "across them mean nothing. Give the model that was indexed (--model), or build an index of this one."
            )


def _write_shards(
    folder: Path,
    source: RowSource,
    labels: LabelMap,
    spec: IndexSpec,
    checkpoints: tuple[Checkpoint, ...],
    shards: tuple[tuple[int, int], ...],
    first_shard: int,
    options: BuildOptions,
    last: Classifier,
    progress: Progress,
) -> None:
    """Write every missing shard file of every checkpoint, and of the sentence embeddings."""

    def stage(name: str, kind: str, write: Callable[[Path, RowBlock, int, Callable[[int], None]], None]) -> None:
        paths = [folder / kind / f"{first_shard + i:05d}.arrow" for i in range(len(shards))]
        done = 0
        progress(name, 0, source.n_rows)

        def on_rows(n: int) -> None:
            nonlocal done
            done += n
            progress(name, done, source.n_rows)

        first = next((i for i, path in enumerate(paths) if not path.is_file()), len(paths))
        if first == len(paths):
            progress(name, source.n_rows, source.n_rows)
            return
        on_rows(shards[first][0] - shards[0][0])
        blocks = source.blocks(spec.shard_rows, start=shards[first][0] - shards[0][0])
        for path, (row, _), block in zip(paths[first:], shards[first:], blocks, strict=True):
            if path.is_file():
                on_rows(len(block))
            else:
                write(path, block, row, on_rows)

    for checkpoint in checkpoints:
        is_last = checkpoint is checkpoints[-1]
        kind = f"features/{checkpoint.name}"
        classifier: Classifier | None = last if is_last else None

        def write_features(
            path: Path,
            block: RowBlock,
            row: int,
            on_rows: Callable[[int], None],
            checkpoint: Checkpoint = checkpoint,
        ) -> None:
            nonlocal classifier
            classifier = classifier or _load_checked(checkpoint, spec, replace(options, max_length=spec.max_length))
            forward = run_forward(
                classifier, block.texts, batch_tokens=spec.batch_tokens, first_row=row, on_rows=on_rows
            )
            gold = _labels_of(block, labels)
            residuals, losses = residual_and_loss(forward.logits, gold)
            if checkpoint is checkpoints[-1]:
                columns: dict[str, pa.Array | np.ndarray] = {"row": np.arange(row, row + len(block))}
                columns |= {f"text_{i}": pa.array(texts, pa.string()) for i, texts in enumerate(block.texts)}
                columns |= {
                    "label": gold.astype(np.int32),
                    "prediction": forward.predictions.astype(np.int32),
                }
                columns |= {
                    "probabilities": forward.probabilities.astype(np.float32),
                    "loss": losses.astype(np.float32),
                }
                write_columns(folder / "rows" / path.name, columns)
            write_columns(path, {"feature": forward.features, "residual": residuals.astype(np.float32)})

        stage(f"features {checkpoint.name}", kind, write_features)
    if "sbert" in spec.stores:
        encoder = load_sentence_encoder(options.sentence_model, device=options.device)
        if encoder.sha256 != spec.sentence_sha256:
            raise MismatchError(
                f"{encoder.name} is not the sentence model of the index ({(spec.sentence_sha256 or '')[:12]})."
            )

        def write_sentences(path: Path, block: RowBlock, row: int, on_rows: Callable[[int], None]) -> None:
            write_columns(
                path,
                {"embedding": encoder.embed(block.texts, batch_tokens=spec.batch_tokens, on_rows=on_rows)},
            )

        stage("sentence embeddings", "sentence", write_sentences)


def _labels_of(block: RowBlock, labels: LabelMap) -> np.ndarray:
    if block.labels is None:
        raise InputError("the training rows have no labels. Name their column by --label-column.")
    return labels(block.labels, block.start)
