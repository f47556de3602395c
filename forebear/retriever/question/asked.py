"""What is asked about: test rows passed through the models, and the class that is explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.indexer.model.encoding import Encoded, Texts
from forebear.indexer.model.forward import Forward, run_forward
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models


@dataclass(frozen=True)
class Asked:
    """A block of test rows after the models have seen them.

    Attributes:
        forwards: Forward pass of each checkpoint asked for, by checkpoint number.
        sentence: Sentence embeddings ``(q, s)``, or None.
        labels: Gold class ids ``(q,)``, or None.
        targets: Class whose loss is explained, ``(q,)``.
    """

    forwards: dict[int, Forward]
    sentence: np.ndarray | None
    labels: np.ndarray | None
    targets: np.ndarray
    last: int

    def take(self, which: np.ndarray) -> Asked:
        """Some of the test rows."""
        forwards = {c: f.take(which) for c, f in self.forwards.items()}
        sentence = None if self.sentence is None else self.sentence[which]
        labels = None if self.labels is None else self.labels[which]
        return Asked(forwards, sentence, labels, self.targets[which], self.last)

    @property
    def forward(self) -> Forward:
        """Of the last checkpoint, the model that is explained."""
        return self.forwards[self.last]


def ask(
    models: Models,
    methods: Sequence[Method],
    texts: Texts,
    labels: np.ndarray | None,
    target: str,
    n_checkpoints: int,
    first_row: int = 0,
    forward: Forward | None = None,
) -> Asked:
    """Run every model that the methods need over a block of test rows, once; ``forward`` of the last is not redone.

    Test rows may be encoded, but for methods that compare sentence embeddings.
    """
    last = n_checkpoints - 1
    wanted = range(n_checkpoints) if any(m.all_checkpoints and m.representation != "words" for m in methods) else [last]
    forwards = {last: forward} if forward is not None else {}
    for c in wanted:
        if c not in forwards:
            forwards[c] = run_forward(models.classifier(c), texts, first_row=first_row)
    sentence = None
    if any(m.representation == "sentence" for m in methods):
        assert not isinstance(texts, Encoded)
        sentence = models.sentence_encoder.embed(texts)
    targets = choose_targets(target, forwards[last].predictions, labels, models.classifier().label_names)
    return Asked(forwards, sentence, labels, targets, last)


def choose_targets(target: str, predictions: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """The class whose loss is explained, for each test row: ``predicted``, ``gold`` or a label's name."""
    if target == "predicted":
        return predictions
    if target == "gold":
        if labels is None:
            raise InputError("--target gold needs labels in the test file. Name their column by --label-column.")
        return labels
    fitting = [i for i, name in enumerate(names) if name == target]
    fitting = fitting or [i for i, name in enumerate(names) if name.casefold() == target.casefold()]
    if len(fitting) != 1:
        raise InputError(f"--target {target!r}: expected predicted, gold, or one of {', '.join(names)}.")
    return np.full(len(predictions), fitting[0])
