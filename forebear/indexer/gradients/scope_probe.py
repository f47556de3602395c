"""Whether a model's gradients can be had over the scopes of an index: found out before the pass, on one short text."""

from __future__ import annotations

from collections.abc import Sequence

from forebear.indexer.gradients.tape import Tape, loss_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.probe import encoded_text
from forebear.indexer.model.scopes import embedding_block, scope_blocks


def check_gradients(
    classifier: Classifier, scopes: Sequence[str], *, with_bias: bool = False, words: bool = False
) -> None:
    """Refuse scopes over which gradients would be wrong or would miss a layer.

    Args:
        classifier: At a checkpoint.
        scopes: As the index names them; nothing is run for the head.
        with_bias: Whether the scopes hold biases and LayerNorm.
        words: Whether gradients of words are wanted, too.

    Raises:
        InputError: A scope is not one of this model's.
        ModelError: A layer of a scope is not supported, or is used in a way that is not; it is named.
    """
    row = encoded_text(classifier.tokenizer, classifier.max_length, classifier.name)
    model = classifier.model
    wanted = {
        scope: scope_blocks(model, classifier.head_name, scope, classifier.name, with_bias=with_bias)
        for scope in scopes
        if scope != "head"
    }
    if words:
        wanted["embedding"] = (embedding_block(model, classifier.name),)
    for scope, blocks in wanted.items():
        # Two rows: an input without an entry for each row then shows by its shape.
        Tape(classifier, blocks, scope).record([row, row], loss_of(None), lambda _name, _factors: None)
