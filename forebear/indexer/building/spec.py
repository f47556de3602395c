"""The spec of a new index: its checkpoints are fingerprinted, and refused if they come from different runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from forebear.errors import InputError, MismatchError
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.gradients.self_check import CheckedGradients, check_gradients, worst_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.loading import Fingerprint, load_classifier, stored_fingerprint
from forebear.indexer.rows.labels import names_of_classes
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.finders import finder_sha256
from forebear.indexer.storage.journal import read_journal
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec, read_manifest
from forebear.indexer.training.model_choice import CheckpointPath

CHECKED_AMONG = 256  # first rows, of which a few are compared with autograd


def make_spec(
    source: RowSource,
    checkpoints: Sequence[CheckpointPath],
    last: Classifier,
    options: BuildOptions,
    sentence_sha256: str | None,
) -> tuple[IndexSpec, tuple[Checkpoint, ...], dict[str, Classifier], CheckedGradients]:
    """The spec of a build; fingerprints every checkpoint, and checks that all come from one run.

    Args:
        source: The training rows.
        checkpoints: The checkpoints, of which the last is the model that is explained.
        last: The last one, loaded.
        options: The choices of the index.
        sentence_sha256: Digest of the sentence encoder, where sentence embeddings are stored.

    Returns:
        The spec; the checkpoints; and the models in memory, by checkpoint name: the last one, and the first one if its
        fingerprint could only be had by loading it. So at most two models are in memory, and the pass, which begins
        with the first checkpoint, need not load that again. And what the check of gradients found.
    """
    names = [c.name for c in checkpoints]
    if len(set(names)) != len(names):
        raise InputError(f"checkpoints {', '.join(names)}: each may be given once.")
    loaded = {names[-1]: last}
    rows = encode(last, next(source.blocks(CHECKED_AMONG)).texts)
    check = partial(
        check_gradients, scopes=options.scopes, rows=rows, with_bias=options.with_bias, words="words" in options.stores
    )
    checks = [check(last)]
    records = [_listed(checkpoints[-1], last.sha256)]
    for checkpoint in reversed(checkpoints[:-1]):
        loaded = {names[-1]: last}  # lets go of the model loaded before, ahead of loading the next
        model: Classifier | Fingerprint | None = stored_fingerprint(checkpoint.path, last)
        if model is None:
            model = load_classifier(
                checkpoint.path, device=options.device, precision=options.precision, max_length=options.max_length
            )
        label_names = names_of_classes(model.label_names, source)
        parts = (model.feature_dim, label_names, model.tokenizer_sha256)
        if isinstance(model, Classifier) and model.loss.problem_type != last.loss.problem_type:
            raise MismatchError(
                f"checkpoint {checkpoint.path} has the problem_type {model.loss.problem_type}, the last one "
                f"{last.loss.problem_type}. Checkpoints must come from one run."
            )
        if parts != (last.feature_dim, last.label_names, last.tokenizer_sha256):
            raise MismatchError(
                f"checkpoint {checkpoint.path} has {model.feature_dim} features, labels {list(label_names)} and "
                f"tokenizer {model.tokenizer_sha256[:8]}; the last one has {last.feature_dim}, "
                f"{list(last.label_names)}, {last.tokenizer_sha256[:8]}. Checkpoints must come from one run."
            )
        if isinstance(model, Classifier):
            model = replace(model, loss=last.loss)
            checks.append(check(model))
            if model.max_length == last.max_length:
                loaded[checkpoint.name] = replace(model, label_names=label_names)
        records.insert(0, _listed(checkpoint, model.sha256))
    spans = "spans" in options.stores
    if spans and not 0 <= options.span_column < len(source.text_columns):
        raise InputError(
            f"span column {options.span_column}: {source.name} has text columns {', '.join(source.text_columns)}."
        )
    settled = options.settled() | {"max_length": last.max_length}
    spec = IndexSpec(
        **settled,
        checkpoint_sha256=tuple(c.sha256 for c in records),
        etas=tuple(c.eta for c in records),
        tokenizer_sha256=last.tokenizer_sha256,
        label_names=last.label_names,
        problem_type=last.loss.problem_type,
        text_columns=source.text_columns,
        spans_sha256=finder_sha256(settled["spans"]) if spans else None,
        sentence_sha256=sentence_sha256,
        n_threads=torch.get_num_threads(),
    )
    return spec, tuple(records), loaded, worst_of(checks)


def settled_batch_tokens(options: BuildOptions, classifier: Classifier, folder: Path, *, resume: bool) -> int:
    """Word pieces of a batch: the number given, else what suits the device; a resumed build goes on as it was begun."""
    if options.batch_tokens != "auto":
        return options.batch_tokens
    if resume and (journal := read_journal(folder)) is not None:
        return int(journal["spec"]["batch_tokens"])
    if resume and (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder).spec.batch_tokens
    return classifier.batch_tokens()


def _listed(checkpoint: CheckpointPath, sha256: str) -> Checkpoint:
    return Checkpoint(name=checkpoint.name, path=str(checkpoint.path), eta=checkpoint.eta, sha256=sha256)
