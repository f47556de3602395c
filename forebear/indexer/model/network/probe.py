"""Facts about a model that are found by running it on a text: its head, and whether padding changes its predictions.

A table of architectures would cover some model families; a run covers any, and its errors name the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from forebear.errors import ModelError, is_out_of_memory
from forebear.indexer.model.device.memory import not_enough
from forebear.indexer.model.network.batches import pad_batch, tokenize
from forebear.indexer.model.network.head import watched_head

TEXT = "This film tells a good story, and the actor in it is not bad."
SHORT_TEXT = "Good"
PIECES = 16  # most word pieces of the text
TOLERANCE = 1e-4  # of the largest number: float32 rounding stays below 1e-6, padding that matters is above 1e-3

Encoding = dict[str, list[int]]


def encoded_text(tokenizer: Any, max_length: int, name: str, text: str = TEXT) -> Encoding:
    """A text as the tokenizer of a model encodes it.

    Raises:
        ModelError: The tokenizer takes no plain text, or makes no word pieces of it.
    """
    try:
        (row,) = tokenize(tokenizer, [[text]], min(PIECES, max_length))
    except Exception as error:  # tokenizers of tables or pictures raise what they like
        raise ModelError(f"{name}: {type(tokenizer).__name__} does not encode a text ({_reason(error)}).") from error
    if not row["input_ids"]:
        raise ModelError(f"{name}: {type(tokenizer).__name__} makes no word pieces of {text!r}.")
    return row


def find_head(model: Any, tokenizer: Any, name: str, max_length: int = PIECES) -> tuple[str, bool]:
    """The linear layer whose output is the logits, or is pooled over word pieces to the logits.

    Args:
        model: A transformers sequence classifier in ``eval()`` mode.
        tokenizer: The model's tokenizer.
        name: Name of the model, for messages.
        max_length: Longest input in word pieces.

    Returns:
        Its dotted name, and whether its output is pooled.

    Raises:
        ModelError: The model does not run on a text, or its logits are not the output of exactly one linear layer.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _args, out, key=key: outputs.setdefault(key, []).append(out))
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    row = encoded_text(tokenizer, max_length, name)
    batch = pad_batch(tokenizer, [row], next(model.parameters()).device)
    try:
        logits = _run(model, batch, name).logits
    finally:
        for hook in hooks:
            hook.remove()
    used_once = {key: found[0] for key, found in outputs.items() if len(found) == 1}
    heads = [key for key, out in used_once.items() if out is logits and out.dim() == 2 and len(out) == 1]
    is_pooled = not heads
    if is_pooled:
        at_pieces = (1, len(row["input_ids"]), model.config.num_labels)
        heads = [
            key for key, out in used_once.items() if out.shape == at_pieces and _is_pooled(model, key, batch, name)
        ]
    if len(heads) == 1:
        return heads[0], is_pooled
    raise ModelError(
        f"{name} ({type(model).__name__}): its logits are not the output of one linear layer on one vector a row, nor "
        "a weighted sum of such outputs over word pieces. forebear needs such a head (BERT, RoBERTa, DeBERTa, GPT-2, "
        "Llama, BART, ... have it)."
    )


def _is_pooled(model: Any, key: str, batch: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether the logits are the output of a linear layer at a weighted sum of its inputs."""
    head = model.get_submodule(key)
    try:
        with torch.no_grad(), watched_head(head) as use:
            logits = _run(model, batch, name).logits
            found = head(use.feature(logits))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False  # the logits do not depend on it
    return bool((found - logits).abs().max() <= TOLERANCE * logits.abs().max())


def features_of(model: Any, head_name: str, name: str) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """The feature of each row of a batch, ``(b, h)``, as a function of the batch."""

    def run(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), watched_head(model.get_submodule(head_name)) as use:
            return use.feature(_run(model, batch, name).logits).detach()

    return run


def run_copies(
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    tokenizer: Any,
    max_length: int,
    device: torch.device,
    name: str,
) -> Callable[[int], torch.Tensor]:
    """:func:`features_of` a batch of so many copies of one text; arguments as of :func:`padding_matters`."""
    row = encoded_text(tokenizer, max_length, name)
    return lambda n_rows: run(pad_batch(tokenizer, [row] * n_rows, device))


def padding_matters(
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    tokenizer: Any,
    max_length: int,
    device: torch.device,
    name: str,
) -> bool:
    """Whether a short row gets other numbers when a longer row is in its batch, so that it is padded.

    Convolutions (ConvBERT), Fourier transforms (FNet) and some approximations of attention read the padding.

    Args:
        run: The numbers that are compared, ``(b, ...)``, from a batch.
        tokenizer: The model's tokenizer.
        max_length: Longest input in word pieces.
        device: Device of the model.
        name: Name of the model, for messages.

    Raises:
        ModelError: A row gets other numbers also beside an equal row, or in a second run.
    """
    row, long = (encoded_text(tokenizer, max_length, name, text) for text in (SHORT_TEXT, TEXT))
    alone = run(pad_batch(tokenizer, [row], device))[0]

    def differs(rows: list[Encoding]) -> bool:
        beside = run(pad_batch(tokenizer, rows, device))[0]
        beside = beside[tuple(slice(n) for n in alone.shape)]
        return bool((beside - alone).abs().max() > TOLERANCE * alone.abs().max())

    if differs([row, row]):
        raise ModelError(
            f"{name}: a row's predictions change with the other rows of its batch, or from run to run, so they "
            "cannot be attributed. Give another model."
        )
    return differs([row, long])


def _run(model: nn.Module, batch: Mapping[str, torch.Tensor], name: str) -> Any:
    """One forward pass.

    Raises:
        NotEnoughMemoryError: The model does not fit in memory while it runs.
        ModelError: The model raises anything else.
    """
    try:
        with torch.no_grad():
            return model(**batch)
    except Exception as error:  # a model may raise anything: a missing picture, an unknown language, a wrong shape
        n_pieces = batch["input_ids"].shape[1]
        if is_out_of_memory(error):
            subject = f"{name}: a text of {n_pieces} word pieces"
            raise not_enough(subject, batch["input_ids"].device, "Give a smaller model") from error
        raise ModelError(
            f"{name} ({type(model).__name__}) does not run on a text of {n_pieces} word pieces ({_reason(error)}), so "
            "it is not supported."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an exception, without its full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
