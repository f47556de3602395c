"""Which tokens are start and end, which are frequent words, and how a token is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np


def boundary_tokens(tokenizer: Any) -> np.ndarray:
    """Ids of the start and end tokens ([CLS], [SEP]; <s>, </s>): those that frame every input."""
    framed = tokenizer("", "")["input_ids"] + tokenizer("")["input_ids"]
    return np.unique(np.array(framed, dtype=np.int64))


def frequent_tokens(tokenizer: Any) -> np.ndarray:
    """Ids of whole words in scikit-learn's English stop list, in any case, and of punctuation."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    special = set(tokenizer.all_special_ids)
    found = []
    for piece, number in tokenizer.get_vocab().items():
        text = piece.removeprefix("##").removeprefix("Ġ").removeprefix("▁")
        if not text.isascii():  # of a byte-level vocabulary, bytes
            text = tokenizer.decode([number], clean_up_tokenization_spaces=False).removeprefix("##").strip()
        if number in special or not text or "\ufffd" in text:
            continue
        whole = not piece.startswith("##")  # of byte-level tokens within a word nothing can be told
        if (whole and text.casefold() in ENGLISH_STOP_WORDS) or all(map(_is_punctuation, text)):
            found.append(number)
    return np.array(sorted(found), dtype=np.int64)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text; one that is no whole text (a byte of a character) as its vocabulary entry."""
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    out = []
    for number, piece in zip(ids, pieces, strict=True):
        text = tokenizer.decode([int(number)], clean_up_tokenization_spaces=False)
        out.append(piece if not text or "\ufffd" in text else text)
    return out


def token_mask(size: int, ids: np.ndarray, *, keep: bool) -> np.ndarray:
    """Mask by token id ``(size,)``: these alone, or all but these."""
    mask = np.full(size, not keep)
    mask[ids] = keep
    return mask
