"""The pass over the training rows: every shard file of every checkpoint, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.errors import InputError, MismatchError
from forebear.indexer.data import RowBlock, RowSource
from forebear.indexer.forward import residual_and_loss, run_forward
from forebear.indexer.labels import LabelMap
from forebear.indexer.manifest import Checkpoint, IndexSpec
from forebear.indexer.model import Classifier, load_classifier
from forebear.indexer.options import BuildOptions, Progress
from forebear.indexer.sentence import load_sentence_encoder
from forebear.indexer.store import write_columns


def split_rows(start: int, n_rows: int, shard_rows: int) -> tuple[tuple[int, int], ...]:
    """Row ranges of the shards of a segment."""
    stop = start + n_rows
    return tuple((i, min(i + shard_rows, stop)) for i in range(start, stop, shard_rows))


def load_checked(checkpoint: Checkpoint, spec: IndexSpec, options: BuildOptions) -> Classifier:
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


def write_shards(
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
            classifier = classifier or load_checked(checkpoint, spec, replace(options, max_length=spec.max_length))
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
                f"{encoder.name} is not the sentence model of the index: sha256 {encoder.sha256[:12]}, expected "
                f"{(spec.sentence_sha256 or '')[:12]}."
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
