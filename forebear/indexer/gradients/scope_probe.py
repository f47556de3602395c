"""Checks on one short text, before the pass, that a model's gradients over the scopes of an index can be computed."""

from __future__ import annotations

from collections.abc import Sequence

from forebear.indexer.gradients.tape import Tape, loss_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.network.probe import encoded_text
from forebear.indexer.model.scope_names import HEAD
from forebear.indexer.model.scopes import embedding_scope, scope_of


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
    probed = [scope_of(classifier, name, with_bias=with_bias) for name in scopes if name != HEAD]
    if words:
        probed.append(embedding_scope(classifier))
    for scope in probed:
        # Two rows: an input without an entry for each row then shows by its shape.
        Tape(classifier, [scope]).record([row, row], loss_of(None), lambda _name, _factors: None)
