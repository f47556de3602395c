"""The start of a training: a pretrained model, its head kept or new, and the layers that stay fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from forebear.errors import DataError, InputError, ModelError
from forebear.indexer.losses.kinds import problem_type_of_config
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_tokenizer, make_classifier, resolve_model_name
from forebear.indexer.model.network.layers import encoder_layers
from forebear.indexer.model.network.pretrained import load_pretrained
from forebear.indexer.model.network.probe import find_head
from forebear.indexer.model.network.tokenizer import input_limit
from forebear.indexer.rows.labels import classes_for
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.rows.row_source import RowSource

DEFAULT_MAX_LENGTH = 128


def load_start(
    source: RowSource,
    model_name: str,
    *,
    label_mode: str | None,
    max_length: int | None,
    precision: str,
    seed: int,
    device: torch.device,
) -> tuple[Classifier, str]:
    """The classifier before its first step, and whether its head is ``kept`` or ``new``.

    A head stored with the source's label names, for the same problem type, is kept, in its own order of classes; any
    other is new.

    Args:
        source: Training rows; their labels are the classes.
        model_name: A model folder, a hub name, or ``minilm``.
        label_mode: ``binary-nli`` merges neutral and contradiction.
        max_length: Longest input in word pieces; default 128, or the model's limit if that is shorter.
        precision: ``bf16`` or ``fp32``.
        seed: Random seed of a new head.
        device: Device of the training.

    Raises:
        DataError: There are fewer than two classes.
        ModelError: The model is no pretrained text classifier or encoder with a linear head.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    classes = classes_for(source, label_mode)
    kind = source.problem_type
    if len(classes) < 2 and kind == SINGLE_LABEL:
        raise DataError(f"{source.name} has one class, {classes[0]}; a classifier needs two or more.")
    path = resolve_model_name(model_name)
    config = load_pretrained(AutoConfig, path)
    stored = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    same_names = sorted(map(str.casefold, stored)) == sorted(map(str.casefold, classes))
    has_names = same_names and problem_type_of_config(config) == kind
    names = stored if has_names else classes
    torch.manual_seed(seed)
    model, info = load_pretrained(
        AutoModelForSequenceClassification,
        path,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=kind,
    )
    _refuse_random_encoder(model, info["missing_keys"], path)
    tokenizer = load_tokenizer(path, model)
    limit = input_limit(model, tokenizer, max_length, path)
    head_name, _ = find_head(model.eval(), tokenizer, path, limit)
    head = model.get_submodule(head_name)
    is_kept = has_names and not info["missing_keys"] and not info["mismatched_keys"]
    if not is_kept:
        _reset_head(head, seed, getattr(config, "initializer_range", 0.02))
    limit = limit if max_length is not None else min(DEFAULT_MAX_LENGTH, limit)
    classifier = make_classifier(model, tokenizer, name=path, device=device, precision=precision, max_length=limit)
    return classifier, "kept" if is_kept else "new"


def _refuse_random_encoder(model: Any, missing: Sequence[str], name: str) -> None:
    """Refuse a model without stored weights for its encoder; a pooler may start at random weights."""
    prefix = f"{model.base_model_prefix}."
    encoder = sorted(key for key in missing if key.startswith(prefix) and "pooler" not in key)
    if encoder:
        raise ModelError(
            f"{name} stores no weights for {', '.join(encoder[:3])}{' ...' if len(encoder) > 3 else ''}: training "
            "would start from a random encoder. Give a pretrained model folder or hub name."
        )


def _reset_head(head: Any, seed: int, std: float) -> None:
    """A new head: normal weights and no bias, from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.empty(head.weight.shape).normal_(0.0, std, generator=generator))
        if head.bias is not None:
            head.bias.zero_()


def freeze_below(model: Any, k: int, name: str = "the model") -> None:
    """Fix every parameter of the base model but encoder layers ``>= k`` and the pooler; the head stays free.

    Args:
        model: A transformers sequence classifier.
        k: First layer that is trained, 0 to the number of layers (which trains pooler and head only).
        name: Name of the model, for messages.

    Raises:
        ModelError: The model has no list of encoder layers, or its layers share their weights.
        InputError: ``k`` is out of range.
    """
    prefix, n_layers = encoder_layers(model, name)
    expected = getattr(model.config, "num_hidden_layers", n_layers)
    if n_layers != expected:
        raise ModelError(
            f"{name} ({type(model).__name__}) runs {expected} layers with the weights of {n_layers} (shared): some of "
            "them cannot be frozen alone. Leave --freeze-below out."
        )
    if not 0 <= k <= n_layers:
        raise InputError(f"--freeze-below {k}: {name} has {n_layers} encoder layers; expected 0 to {n_layers}.")
    free = tuple(f"{prefix}.{i}." for i in range(k, n_layers))
    base = f"{model.base_model_prefix}."
    for key, parameter in model.named_parameters():
        if not key.startswith(base):
            continue
        parameter.requires_grad_(key.startswith(free) or "pooler" in key.split("."))
