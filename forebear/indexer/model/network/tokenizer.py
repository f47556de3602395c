"""A classifier's tokenizer: is it the model's own, how long may a row be, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from forebear.errors import InputError, ModelError
from forebear.indexer.model.network.layers import word_embeddings

LENGTH_WITHOUT_LIMIT = 512  # where neither model nor tokenizer has a limit; --max-length may be longer
SHORTEST = 4
_NO_LIMIT = 10**9  # transformers writes a tokenizer without a limit as 1e30


def check_vocabulary(tokenizer: Any, model: Any, name: str) -> None:
    """Refuse a tokenizer that cannot be the model's.

    For a folder without tokenizer files transformers makes up a tokenizer of special tokens alone: every word
    becomes the unknown token, and the model's predictions mean nothing.

    Raises:
        ModelError: The vocabulary holds no words, or more of them than the model has embeddings.
    """
    if not getattr(tokenizer, "vocab_files_names", None):
        return  # characters or bytes: such a tokenizer has no files
    special = set(tokenizer.all_special_ids)
    ordinary = {piece: i for piece, i in tokenizer.get_vocab().items() if i not in special and piece.strip("▁ ")}
    if not ordinary:
        raise ModelError(
            f"{name} holds no vocabulary: its tokenizer ({type(tokenizer).__name__}) knows {len(special)} special "
            "tokens and no word, so every word would be unknown. Put the model's tokenizer files (tokenizer.json, or "
            "vocab.txt or the like) into the model folder, by tokenizer.save_pretrained."
        )
    embeddings = word_embeddings(model)
    last = max(ordinary.values())
    if embeddings is not None and last >= embeddings.num_embeddings:
        raise ModelError(
            f"{name}: the tokenizer numbers word pieces up to {last}, the model has {embeddings.num_embeddings} word "
            "embeddings, so the tokenizer belongs to another model. Save the model's own tokenizer into its folder."
        )


def input_limit(model: Any, tokenizer: Any, max_length: int | None, name: str) -> int:
    """The longest row in word pieces: the given length, else the limit of model and tokenizer.

    Without a limit in either (relative positions, for example) the default is 512, and any length may be given that
    fits in memory.

    Raises:
        InputError: Model or tokenizer take fewer than ``max_length``, or it is below 4.
    """
    known = []
    if tokenizer.model_max_length and 0 < tokenizer.model_max_length < _NO_LIMIT:
        known.append(int(tokenizer.model_max_length))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions > 0:  # XLNet says -1: it has no limit
        known.append(int(positions) - _first_position(model))
    if max_length is None:
        return min(known, default=LENGTH_WITHOUT_LIMIT)
    if max_length < SHORTEST or max_length > min(known, default=max_length):
        takes = f"{SHORTEST} to {min(known)} word pieces" if known else f"{SHORTEST} word pieces or more"
        raise InputError(f"--max-length {max_length} is out of range: {name} takes {takes}.")
    return max_length


def _first_position(model: nn.Module) -> int:
    """The position that the first word piece gets: RoBERTa and its kin count from the padding's number plus 1."""
    for key, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if key.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the tokenizer's rules and inputs; truncation and padding, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    inputs = [sorted(tokenizer.model_input_names), tokenizer.truncation_side, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([rules, inputs], sort_keys=True, allow_nan=False).encode()).hexdigest()
