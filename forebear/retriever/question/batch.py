"""A batch of test rows, with the outputs of the models and the class that is explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from forebear.indexer.model.encoding import Encoded, Texts, take_texts
from forebear.indexer.model.forward import Forward, run_forward
from forebear.retriever.question.models import Models
from forebear.retriever.question.spec import Question
from forebear.retriever.question.targets import choose_targets


@dataclass(frozen=True, eq=False)
class Batch:
    """Test rows that are asked about together, after the models have seen them.

    Attributes:
        texts: One list a text column; or encoded, for methods that read word pieces alone.
        forwards: Forward pass of each checkpoint that the question needs, by checkpoint number.
        targets: Whose loss is explained: of one label a row the class, ``(q,)``; else ``(q, c)``.
        last: Number of the checkpoint that is explained.
        sentence: Sentence embeddings ``(q, s)``, or None.
        labels: Gold class ids ``(q,)``, or None.
        numbers: Numbers of the test rows in their source, for messages.
        table: The rows with all their columns, where spans are given by columns; else None.
    """

    texts: Texts
    forwards: dict[int, Forward]
    targets: np.ndarray
    last: int
    numbers: Sequence[int]
    sentence: np.ndarray | None = None
    labels: np.ndarray | None = None
    table: pa.Table | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def forward(self) -> Forward:
        """The forward pass of the last checkpoint, the model that is explained."""
        return self.forwards[self.last]

    @property
    def columns(self) -> list[list[str]]:
        """The texts, one list a text column; only where they were not given encoded."""
        assert not isinstance(self.texts, Encoded)
        return [list(column) for column in self.texts]

    def take(self, indices: np.ndarray) -> Batch:
        """The test rows at some indices."""
        return replace(
            self,
            texts=take_texts(self.texts, indices),
            forwards={c: f.take(indices) for c, f in self.forwards.items()},
            targets=self.targets[indices],
            numbers=[self.numbers[i] for i in indices.tolist()],
            sentence=None if self.sentence is None else self.sentence[indices],
            labels=None if self.labels is None else self.labels[indices],
            table=None if self.table is None else self.table.take(indices),
        )


def make_batch(
    question: Question,
    models: Models,
    texts: Texts,
    labels: np.ndarray | None,
    *,
    numbers: Sequence[int],
    forward: Forward | None = None,
    table: pa.Table | None = None,
) -> Batch:
    """Run every model that a question needs over a batch of test rows, once.

    Args:
        question: Its methods say which checkpoints are needed, and whether sentence embeddings are.
        models: Models of the index.
        texts: One list a text column; or encoded, unless a method compares sentence embeddings.
        labels: Gold class ids ``(q,)``, or None.
        numbers: Numbers of the test rows in their source, for messages.
        forward: The last checkpoint's pass over the test rows, if already run.
        table: The rows with all their columns, where spans are given by columns.
    """
    n_checkpoints = len(question.index.manifest.checkpoints)
    last = n_checkpoints - 1
    needs_all = any(m.all_checkpoints and m.representation != "words" for m in question.methods)
    forwards = {} if forward is None else {last: forward}
    for c in range(n_checkpoints) if needs_all else [last]:
        if c not in forwards:
            classifier, first = models.classifier(c), numbers[0] if len(numbers) else 0
            batch_tokens = classifier.batch_tokens(models.query_tokens)
            forwards[c] = run_forward(classifier, texts, batch_tokens=batch_tokens, first_row=first)
    sentence = None
    if any(m.representation == "sentence" for m in question.methods):
        assert not isinstance(texts, Encoded)
        sentence = models.sentence_encoder.embed(texts)
    names = models.classifier().label_names
    targets = choose_targets(question.spec.target, forwards[last].predictions, labels, names, question.index.loss)
    return Batch(texts, forwards, targets, last, numbers, sentence, labels, table)
