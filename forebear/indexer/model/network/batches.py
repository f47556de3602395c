"""One batch of a network: texts as word pieces, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
    batch = {}
    for key in rows[0]:
        padded = torch.full((len(rows), width), fill.get(key, 0), dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : len(row[key])] = torch.tensor(row[key], dtype=torch.long)
        batch[key] = padded.to(device)
    return batch
