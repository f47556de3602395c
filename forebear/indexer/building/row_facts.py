"""Facts about an index's rows, shown after a build: the model's accuracy on them, and how much of them it reads.

With a wrong file, another order of labels or a wrong tokenizer answers still look right; these numbers show the fault.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.reading import Reading, count_reading, share
from forebear.indexer.rows.row_source import RowSource
from forebear.wording import worded

READING_KEY = b"forebear.reading"  # in the schema metadata of a shard of rows
SAMPLED_ROWS = 1024  # rows that are read for a warning before a long pass over all of them
FAR_BELOW_DEV = 0.15  # less than the accuracy on the run's development rows; on training rows it should be higher
HARDLY_ABOVE_CHANCE = 0.1  # of the way from the most frequent label's share to 1; used without dev rows


def reading_of_first_rows(classifier: Classifier, source: RowSource) -> Reading:
    """How much of a source's first rows, at most 1,024, a classifier reads; they are encoded, the model is not run."""
    block = next(source.blocks(SAMPLED_ROWS))
    return count_reading(classifier.tokenizer, block.texts, encode(classifier, block.texts), classifier.max_length)


@dataclass(frozen=True)
class RowFacts:
    """Facts about an index's live rows.

    Attributes:
        accuracy: Share of rows whose label the model predicts; None where rows have not one label each.
        mean_loss: Mean loss of the rows; of a classifier in nats.
        most_frequent: Share of the most frequent label; None likewise.
        dev_accuracy: Accuracy on the development rows of the model's run; None without a run or without such rows.
        train_loss: Mean training loss over the run's last epoch; None where there is no run.
        max_length: Longest row in word pieces.
        reading: How much of the rows, retired ones included, the model reads; None in an index of an older version.
        measures: What is said instead of the accuracy where rows have several labels or numbers, by name.
        dev_measures: The same measures on the development rows of the model's run.
        better_than_guessing: Whether the model fits better than what could be said without reading the rows.
    """

    accuracy: float | None
    mean_loss: float
    most_frequent: float | None
    dev_accuracy: float | None
    train_loss: float | None
    max_length: int
    reading: Reading | None
    measures: dict[str, float] | None = None
    dev_measures: dict[str, float] | None = None
    better_than_guessing: bool = True

    def describe(self) -> list[str]:
        """Lines that state the facts for the user."""
        beside = []
        if self.dev_accuracy is not None:
            beside.append(f"{share(self.dev_accuracy)} on the run's development rows")
        if self.dev_measures is not None:
            beside.append(f"{_said(self.dev_measures)} on the run's development rows")
        if self.most_frequent is not None:
            beside.append(f"the most frequent label has {share(self.most_frequent)}")
        loss = f", mean loss {self.mean_loss:.3f}"
        if self.train_loss is not None:
            loss += f" ({self.train_loss:.3f} over the run's last epoch, while it trained)"
        what = _said(self.measures or {}) if self.accuracy is None else share(self.accuracy)
        lines = ["accuracy on" if self.accuracy is not None else "on"]
        lines[0] += f" the indexed rows {what}" + (f" ({'; '.join(beside)})" if beside else "") + loss
        if self.reading is not None:
            lines.append(self.reading.describe(self.max_length))
        return lines

    def warnings(self) -> list[str]:
        """Warnings: an accuracy far too low, or texts that the model hardly reads; empty where all is well."""
        warnings = self._low_accuracy()
        if not self.better_than_guessing:
            warnings.append(
                _poor(
                    f"the model predicts the indexed rows no better ({_said(self.measures or {})}) than one could "
                    "without reading them"
                )
            )
        if self.reading is not None:
            warnings += self.reading.warnings(self.max_length, "the indexed rows")
        return warnings

    def _low_accuracy(self) -> list[str]:
        if self.accuracy is None or self.most_frequent is None:
            return []
        warnings = []
        floor = self.most_frequent + HARDLY_ABOVE_CHANCE * (1 - self.most_frequent)
        if self.dev_accuracy is not None and self.accuracy < self.dev_accuracy - FAR_BELOW_DEV:
            beside = f"it had {share(self.dev_accuracy)} on its run's development rows"
            warnings.append(_low_accuracy(self.accuracy, beside))
        elif self.dev_accuracy is None and self.most_frequent < 1 and self.accuracy < floor:
            warnings.append(
                _low_accuracy(self.accuracy, f"the most frequent label alone has {share(self.most_frequent)}")
            )
        return warnings


def _said(measures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in measures.items())


def _low_accuracy(accuracy: float, beside: str) -> str:
    return _poor(f"the model predicts the label of {share(accuracy)} of the indexed rows ({beside})")


def _poor(what: str) -> str:
    return worded(
        f"{what}. Are these the rows that it was trained on, and their labels in the model's order (--label-names)?"
    )


def row_facts(index: Index) -> RowFacts:
    """The facts about an index's rows, from the index and from the run of its model."""
    live = index.live
    targets, predictions = index.targets(live), index.predictions[live]
    measures, one_label = index.loss.measures(predictions, targets), targets.ndim == 1
    found = index.run
    run = None if found is None else found[2]
    return RowFacts(
        accuracy=measures.get("accuracy"),
        mean_loss=float(index.losses[live].mean(dtype=np.float64)),
        most_frequent=float(np.bincount(targets).max() / len(targets)) if one_label else None,
        dev_accuracy=None if run is None else run.accuracy,
        train_loss=None if run is None else run.train_loss,
        max_length=index.manifest.spec.max_length,
        reading=_stored_reading(index),
        measures=None if one_label else measures,
        dev_measures=None if run is None else run.measures,
        better_than_guessing=one_label or index.loss.better_than_guessing(predictions, targets),
    )


def reading_metadata(reading: Reading) -> dict[bytes, bytes]:
    """A reading as schema metadata of a shard of rows."""
    return {READING_KEY: json.dumps(asdict(reading), allow_nan=False).encode()}


def _stored_reading(index: Index) -> Reading | None:
    """The reading summed over all shards; None if a shard of an older version has none."""
    total = Reading()
    for metadata in index.row_metadata():
        if READING_KEY not in metadata:
            return None
        total += Reading(**json.loads(metadata[READING_KEY]))
    return total
