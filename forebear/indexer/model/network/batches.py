"""One batch of a network: texts as word pieces, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from forebear.indexer.model.device.copies import send


def tokenize(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> list[dict[str, list[int]]]:
    """Encode rows of one or two texts without padding; see :func:`encode`."""
    columns = [list(column) for column in texts]
    if not columns[0]:
        return []
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
    keys = [key for key in encoded if key in tokenizer.model_input_names]
    return [{key: encoded[key][i] for key in keys} for i in range(len(columns[0]))]


def pad_batch(tokenizer: Any, rows: Sequence[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """One padded batch of tensors on ``device``.

    Padding goes to the right whatever the tokenizer's setting says: encoders with absolute positions give other
    numbers for rows that are shifted.
    """
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    padded = np.empty((len(rows[0]), len(rows), width), np.int64)
    for values, key in zip(padded, rows[0], strict=True):
        values[:] = fill.get(key, 0)
        for i, row in enumerate(rows):
            values[i, : len(row[key])] = row[key]
    return dict(zip(rows[0], send(padded, device).unbind(), strict=True))
