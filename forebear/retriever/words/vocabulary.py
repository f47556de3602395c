"""Which tokens are start and end tokens, which are frequent words, and how a token is shown."""

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
    frequent = []
    for piece, number in tokenizer.get_vocab().items():
        text = piece.removeprefix("##").removeprefix("Ġ").removeprefix("▁")
        if not text.isascii():  # an entry of a byte-level vocabulary, which stands for bytes
            text = tokenizer.decode([number], clean_up_tokenization_spaces=False).removeprefix("##").strip()
        if number in special or not text or "\ufffd" in text:
            continue
        whole = not piece.startswith(
            "##"
        )  # a byte-level token inside a word is not marked as such, and counts as whole
        if (whole and text.casefold() in ENGLISH_STOP_WORDS) or all(map(_is_punctuation, text)):
            frequent.append(number)
    return np.array(sorted(frequent), dtype=np.int64)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text. A token that is only part of a character has none: it is shown as its vocabulary entry."""
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    out = []
    for number, piece in zip(ids, pieces, strict=True):
        text = tokenizer.decode([int(number)], clean_up_tokenization_spaces=False)
        out.append(piece if not text or "\ufffd" in text else text)
    return out


def token_mask(size: int, ids: np.ndarray, *, keep: bool) -> np.ndarray:
    """Mask by token id, ``(size,)`` bool: the tokens ``ids`` alone, or (without ``keep``) all but these."""
    mask = np.full(size, not keep)
    mask[ids] = keep
    return mask
