"""d s / d theta of a word's saliency: why does the model look at this word? (Joint, eqs. 4 and 5)

s is the summed-gradient saliency of one word of a row: the sum, over its word pieces and over dimensions, of the
gradient of the target's probability at what enters the encoder (see :mod:`forebear.retriever.saliency.maps`). Its
gradient takes a second backward pass, for which fused attention has no derivative: the math kernel runs instead.
All of it is in full precision, like saliency itself, whatever the precision of the index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.errors import InputError, NonFiniteError
from forebear.indexer.gradients.tape import only_asking
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch, send
from forebear.indexer.model.device.memory import refusing_lack
from forebear.indexer.model.encoding import encode_with_places
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.layers import encoder_layers
from forebear.indexer.model.scopes import Scope
from forebear.indexer.spans.masking import pieces_of
from forebear.indexer.spans.text import Span
from forebear.retriever.saliency.maps import SUMMED_GRADIENT, SalientWord, saliency, words_of


def salient_words(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    targets: np.ndarray,
    word: str | None,
    numbers: Sequence[int] | None = None,
) -> list[Span]:
    """The word of each row whose saliency is explained: the most salient one, or the first that reads ``word``.

    Punctuation is chosen only where it is named, or a row has no other word.

    Args:
        classifier: The model.
        texts: Test rows, one list a text column.
        targets: Class whose probability counts, ``(q,)``.
        word: As it stands in the text, in any case; None: the word of largest summed-gradient saliency.
        numbers: Numbers of the rows in their source, for messages; None: from 0.

    Raises:
        InputError: A row has no word, or not this one.
    """
    maps = saliency(classifier, texts, targets, form=SUMMED_GRADIENT)
    return [_chosen(m.words, word, i if numbers is None else numbers[i]) for i, m in enumerate(maps)]


def _chosen(row_words: Sequence[SalientWord], word: str | None, number: int) -> Span:
    """The word of one row, whose number is for messages, that :func:`salient_words` is asked for."""
    words = [w for w in row_words if word is None or w.text.casefold() == word.casefold()]
    if word is None:
        words = [w for w in words if any(c.isalnum() for c in w.text)] or words
    if not words:
        missing = "no word that the model reads"
        if word is not None:
            listed = ", ".join(dict.fromkeys(w.text for w in row_words)) or "none"
            missing = f"no word {word!r} (its words, as the tokenizer divides them: {listed})"
        raise InputError(f"test row {number} has {missing}, so there is no saliency to explain.")
    best = max(words, key=lambda w: w.value) if word is None else words[0]
    return Span(best.column, best.start, best.end)


def salient_gradients(
    classifier: Classifier,
    scope: Scope,
    texts: Sequence[Sequence[str]],
    targets: np.ndarray,
    word: str | None,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Span], Vectors]:
    """The word that :func:`salient_words` gives for each row, and its :func:`saliency_gradients`, from one pass.

    Arguments and errors are those of the two.
    """

    def choose(i: int, places: Any, at_input: torch.Tensor) -> Span:
        (values,) = fetch(at_input.detach().double().sum(dim=1))
        row_words = words_of(places, i, [column[i] for column in texts], values)
        return _chosen(row_words, word, i if numbers is None else numbers[i])

    return _gradients(classifier, scope, texts, targets, choose, numbers)


def saliency_gradients(
    classifier: Classifier,
    scope: Scope,
    texts: Sequence[Sequence[str]],
    targets: np.ndarray,
    words: Sequence[Span],
    numbers: Sequence[int] | None = None,
) -> Vectors:
    """-d s / d theta of one word of each row.

    Its dot with a loss gradient g_n is positive where a training step on row n raises the word's saliency.

    Args:
        classifier: The model.
        scope: Parameters of the gradients.
        texts: Test rows, one list a text column.
        targets: Class whose probability counts, ``(q,)``.
        words: One word a row.
        numbers: Numbers of the rows in their source, for messages; None: from 0.

    Returns:
        ``(q, n_out, n_in)`` for each block.

    Raises:
        NonFiniteError: A gradient is NaN or infinite; the row is named.
        NotEnoughMemoryError: The gradient of a row does not fit in memory.
    """
    return _gradients(classifier, scope, texts, targets, lambda i, _places, _at_input: words[i], numbers)[1]


def _gradients(
    classifier: Classifier,
    scope: Scope,
    texts: Sequence[Sequence[str]],
    targets: np.ndarray,
    choose: Callable[[int, Any, torch.Tensor], Span],
    numbers: Sequence[int] | None,
) -> tuple[list[Span], Vectors]:
    """The word of each row that ``choose`` takes by number, encoding and dS/de ``(t, h)``, and -d s / d theta of it."""
    model = classifier.model
    out, chosen = scope.zeros(len(targets), classifier.head.weight), []
    names = [name for block in scope.blocks for name in block.parameter_names]
    parameters = [model.get_parameter(name) for name in names]
    prefix, _ = encoder_layers(model, classifier.name)
    first_layer = model.get_submodule(f"{prefix}.0")
    rows, places = encode_with_places(classifier, texts)
    for i in range(len(targets)):
        leaf: list[torch.Tensor] = []

        def grow(_module: torch.nn.Module, args: tuple, kwargs: dict, leaf: list[torch.Tensor] = leaf) -> tuple:  # type: ignore[type-arg]
            values = args[0] if args else kwargs["hidden_states"]
            # Below this layer only the embeddings' LayerNorm can be in the scope (--with-bias): it then takes part.
            leaf.append(values if values.requires_grad else values.detach().requires_grad_(True))
            return ((leaf[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaf[0]})

        hook = first_layer.register_forward_pre_hook(grow, with_kwargs=True)
        subject = f"the saliency gradient of test row {i if numbers is None else numbers[i]}"
        try:
            with (
                refusing_lack(subject, classifier.device, "Ask at a smaller --scope"),
                repeatable(classifier.device), sdpa_kernel(SDPBackend.MATH),
                only_asking(model, parameters), torch.enable_grad(),
            ):  # fmt: skip
                logits = model(**pad_batch(classifier.tokenizer, [rows[i]], classifier.device)).logits
                target = send(targets[i : i + 1], logits.device)
                support = classifier.loss.support(logits.double(), target)[0]
                (at_input,) = torch.autograd.grad(support, leaf[0], create_graph=True)
                chosen.append(choose(i, places, at_input[0, : len(rows[i]["input_ids"])]))
                inside = pieces_of(places, i, chosen[i])
                s = at_input[0, send(np.flatnonzero(inside), at_input.device)].sum()
                row_gradients = torch.autograd.grad(s, parameters, materialize_grads=True)
        finally:
            hook.remove()
        gradients = dict(zip(names, row_gradients, strict=True))
        for block in scope.blocks:
            out[block.name][i] = -block.join(gradients)
    (finite,) = fetch(torch.stack([torch.isfinite(values).flatten(1).all(dim=1) for values in out.values()]))
    if not finite.all():
        number, position = np.argwhere(~finite)[0]
        row = position if numbers is None else numbers[position]
        raise NonFiniteError(
            f"{classifier.name}: the saliency gradient of test row {row} is NaN or infinite in {list(out)[number]}. "
            "Check the model."
        )
    return chosen, out
