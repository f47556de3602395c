"""What is told of an index's rows after a build: whether the model predicts them, and how much of them it reads.

A wrong file, another order of labels or a wrong tokenizer give answers that look right; these numbers show them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from forebear.errors import DataError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.reading import Reading, count_reading, share
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.training.run import RunCheckpoint, path_to, read_run
from forebear.wording import worded

READING_KEY = b"forebear.reading"  # of a shard of rows, in its schema's metadata
SAMPLED_ROWS = 1024  # test rows that are looked at before they are asked about
FAR_BELOW_DEV = 0.15  # below the accuracy on the run's development rows, which training rows exceed
HARDLY_ABOVE_CHANCE = 0.1  # of the way from naming the most frequent label to all right; where dev rows say nothing


def reading_of_first_rows(classifier: Classifier, source: RowSource) -> Reading:
    """How much of a source's first rows, at most 1,024, a classifier reads; they are encoded, the model is not run."""
    block = next(source.blocks(SAMPLED_ROWS))
    return count_reading(classifier.tokenizer, block.texts, encode(classifier, block.texts), classifier.max_length)


@dataclass(frozen=True)
class RowFacts:
    """What is told of an index's live rows.

    Attributes:
        accuracy: Share of rows whose label the model predicts.
        mean_loss: In nats.
        most_frequent: Share of the most frequent label.
        dev_accuracy: On the development rows of the run that the model comes from; None where there is none.
        train_loss: Mean training loss over the run's last epoch; None where there is no run.
        max_length: Longest row in word pieces.
        reading: Of all rows given out; None in an index of an older version.
    """

    accuracy: float
    mean_loss: float
    most_frequent: float
    dev_accuracy: float | None
    train_loss: float | None
    max_length: int
    reading: Reading | None

    def describe(self) -> list[str]:
        """Lines for the user."""
        beside = []
        if self.dev_accuracy is not None:
            beside.append(f"{share(self.dev_accuracy)} on the run's development rows")
        beside.append(f"the most frequent label has {share(self.most_frequent)}")
        loss = f", mean loss {self.mean_loss:.3f}"
        if self.train_loss is not None:
            loss += f" ({self.train_loss:.3f} over the run's last epoch, while it trained)"
        lines = [f"accuracy on the indexed rows {share(self.accuracy)} ({'; '.join(beside)}){loss}"]
        if self.reading is not None:
            lines.append(self.reading.describe(self.max_length))
        return lines

    def warnings(self) -> list[str]:
        """What is wrong with the rows."""
        found = []
        floor = self.most_frequent + HARDLY_ABOVE_CHANCE * (1 - self.most_frequent)
        if self.dev_accuracy is not None and self.accuracy < self.dev_accuracy - FAR_BELOW_DEV:
            beside = f"it had {share(self.dev_accuracy)} on its run's development rows"
            found.append(_low_accuracy(self.accuracy, beside))
        elif self.dev_accuracy is None and self.most_frequent < 1 and self.accuracy < floor:
            found.append(_low_accuracy(self.accuracy, f"the most frequent label alone has {share(self.most_frequent)}"))
        if self.reading is not None:
            found += self.reading.warnings(self.max_length, "the indexed rows")
        return found


def _low_accuracy(accuracy: float, beside: str) -> str:
    return worded(
        f"the model predicts the label of {share(accuracy)} of the indexed rows ({beside}). Are these the rows that it "
        "was trained on, and their labels in the model's order (--label-names)?"
    )


def row_facts(index: Index) -> RowFacts:
    """What is told of an index's rows; read from its rows and from the run that its model comes from."""
    live = index.live
    labels = index.labels[live]
    last = index.manifest.checkpoints[-1]
    run = run_checkpoint(path_to(index.folder, last.path))
    return RowFacts(
        accuracy=float((index.predictions[live] == labels).mean()),
        mean_loss=float(index.losses[live].mean(dtype=np.float64)),
        most_frequent=float(np.bincount(labels).max() / len(labels)),
        dev_accuracy=None if run is None else run.accuracy,
        train_loss=None if run is None else run.train_loss,
        max_length=index.manifest.spec.max_length,
        reading=_stored_reading(index),
    )


def reading_metadata(reading: Reading) -> dict[bytes, bytes]:
    """As a shard of rows keeps it."""
    return {READING_KEY: json.dumps(asdict(reading), allow_nan=False).encode()}


def _stored_reading(index: Index) -> Reading | None:
    """Over all shards; None where a shard of an older version says nothing of it."""
    total = Reading()
    for metadata in index.row_metadata():
        if READING_KEY not in metadata:
            return None
        total += Reading(**json.loads(metadata[READING_KEY]))
    return total


def run_checkpoint(path: str) -> RunCheckpoint | None:
    """What ``run.json`` says of a checkpoint folder of a run; None for any other model."""
    folder = Path(path).resolve()
    try:
        run = read_run(folder.parent.parent)
    except DataError:  # its checkpoints can be indexed all the same
        return None
    if run is None:
        return None
    return next((c for c in run.checkpoints if (folder.parent.parent / c.path).resolve() == folder), None)
