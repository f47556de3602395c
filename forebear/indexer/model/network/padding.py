"""The token that rows of a decoder are padded with: its pooling looks for the last piece that is another token."""

from __future__ import annotations

from typing import Any

from forebear.errors import ModelError
from forebear.indexer.model.network.probe import encoded_text


def settle_padding(model: Any, tokenizer: Any, name: str, max_length: int) -> str | None:
    """Make model and tokenizer agree on the padding token: the model's, else the tokenizer's, else one stands in.

    Args:
        model: A transformers sequence classifier whose head is pooled over word pieces; its configuration is changed.
        tokenizer: The model's tokenizer; it is changed, too.
        name: Name of the model, for messages.
        max_length: Longest input in word pieces.

    Returns:
        A line on a token that stands in; None where none has to.

    Raises:
        ModelError: No special token of the tokenizer can stand in: each is a part of an encoded text.
    """
    config = model.config.get_text_config()
    remark = None
    padding = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    if padding is None:
        added = set(encoded_text(tokenizer, max_length, name)["input_ids"])
        free = [i for i in (tokenizer.eos_token_id, *tokenizer.all_special_ids) if i is not None and i not in added]
        if not free:
            raise ModelError(
                f"{name} has no padding token, and none of its special tokens can stand in. Set one with "
                "tokenizer.pad_token = ... and model.config.pad_token_id = ..., and save both."
            )
        padding = free[0]
        remark = (
            f"{name} has no padding token; {tokenizer.convert_ids_to_tokens(padding)!r} stands in. Predictions do not "
            "depend on it."
        )
    config.pad_token_id = padding
    if tokenizer.pad_token_id != padding:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return remark
