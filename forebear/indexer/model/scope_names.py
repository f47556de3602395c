"""Names of parameter scopes: what ``head``, ``top-K``, ``all``, ``adapter`` and ``layer:NAME`` say, without a model."""

from __future__ import annotations

import re

HEAD = "head"
ALL = "all"
ADAPTER = "adapter"
LAYER_PREFIX = "layer:"
EMBEDDING = "embedding"  # the word embeddings: no scope that a user names, but that of stored words
ENCODER_INPUT = "encoder-input"  # no parameters: the gradient at what enters the first layer


def n_top_layers(name: str) -> int | None:
    """K of the scope ``top-K``; None of any other."""
    match = re.fullmatch(r"top-(\d+)", name)
    return None if match is None else int(match[1])


def scope_named(name: str) -> str:
    """The scope that a user means by ``head``, ``top-K``, ``all`` or ``adapter``, or by the bare name of a layer."""
    return name if name in (HEAD, ALL, ADAPTER) or n_top_layers(name) is not None else f"{LAYER_PREFIX}{name}"
