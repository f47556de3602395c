"""The spec of a new index: its checkpoints fingerprinted and seen to belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from forebear.errors import InputError, MismatchError
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.gradients.scope_probe import check_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.rows.labels import names_of_classes
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.finders import finder_sha256
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec
from forebear.indexer.training.run import CheckpointPath


def make_spec(
    source: RowSource, checkpoints: Sequence[CheckpointPath], last: Classifier, options: BuildOptions
) -> tuple[IndexSpec, tuple[Checkpoint, ...]]:
    """The spec of a build; loads every checkpoint once to fingerprint it and see that they belong together."""
    names = [c.name for c in checkpoints]
    if len(set(names)) != len(names):
        raise InputError(f"checkpoints {', '.join(names)}: each may be given once.")
    listed = []
    for checkpoint in checkpoints:
        model = last if checkpoint is checkpoints[-1] else load_classifier(checkpoint.path, device="cpu")
        model = replace(model, label_names=names_of_classes(model.label_names, source))
        found = (model.feature_dim, model.label_names, model.tokenizer_sha256)
        if found != (last.feature_dim, last.label_names, last.tokenizer_sha256):
            raise MismatchError(
                f"checkpoint {checkpoint.path} has {model.feature_dim} features, labels {list(model.label_names)} and "
                f"tokenizer {model.tokenizer_sha256[:8]}; the last one has {last.feature_dim}, "
                f"{list(last.label_names)}, {last.tokenizer_sha256[:8]}. Checkpoints must come from one run."
            )
        check_gradients(model, options.scopes, with_bias=options.with_bias, words="words" in options.stores)
        listed.append(
            Checkpoint(name=checkpoint.name, path=str(checkpoint.path), eta=checkpoint.eta, sha256=model.sha256)
        )
    sentence = load_sentence_encoder(options.sentence_model, device="cpu").sha256 if "sbert" in options.stores else None
    deep = len(options.scopes) > 1
    words, spans = "words" in options.stores, "spans" in options.stores
    if spans and not 0 <= options.span_column < len(source.text_columns):
        raise InputError(
            f"span column {options.span_column}: {source.name} has text columns {', '.join(source.text_columns)}."
        )
    white = deep and options.curvature == "ekfac" and bool(options.dampings)
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
        scopes=options.scopes,
        sketch_dim=options.sketch_dim if deep else 0,
        sketch_bits=options.sketch_bits if deep else 0,
        white_bits=options.white_bits if white else 0,
        sketch_basis=options.sketch_basis if deep else "mixed",
        with_bias=options.with_bias and deep,
        curvature="ekfac" if white else "none",
        words_tops=tuple(sorted(options.words_tops)) if words else (),
        words_precision=options.words_precision if words else "fp16",
        spans=options.spans if spans else None,
        span_column=options.span_column if spans else 0,
        spans_sha256=finder_sha256(options.spans) if spans else None,
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
