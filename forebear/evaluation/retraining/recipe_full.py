"""Retraining in full, by the loop of ``forebear train``, from the start model of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forebear.evaluation.retraining.jobs import Job, TrainingRows
from forebear.indexer.model.device.arithmetic import own_random_numbers
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.training.fine_tuning import fine_tune, refuse_other_gpus
from forebear.indexer.training.recorded_start import Start, arrays
from forebear.indexer.training.start import freeze_below


class FullRecipe:
    """Fine-tune as the run did, without its checkpoints; see :class:`~forebear.evaluation.retraining.jobs.Recipe`."""

    name = "full"
    seeded = True

    def __init__(self, start: Start, rows: TrainingRows, evaluation: Sequence[Sequence[str]]) -> None:
        self._start, self._labels = start, rows.labels
        refuse_other_gpus(start.device)
        k = start.options.freeze_below
        if k is not None:
            start.prepare(lambda classifier: freeze_below(classifier.model, k, classifier.name))
        classifier = start.at(start.options.seed)
        self._encoded = arrays(encode(classifier, rows.texts))
        self._lengths = np.array([len(row["input_ids"]) for row in self._encoded])
        self._evaluation = Encoded(encode(classifier, evaluation))
        self.facts: Mapping[str, Any] = start.facts
        self.note = "Each model is fine-tuned as the run was."
        if start.is_older:
            self.note += " The run was made by an older version: its own order of rows and dropout were others."

    def train(self, job: Job) -> np.ndarray:
        """Logits of the retrained model on the evaluation rows, ``(q, c)``."""
        classifier = self._start.at(job.seed)
        encoded = [self._encoded[row] for row in job.rows] + [{}] * len(job.extra)
        places, texts = job.changed()
        if len(places):
            for i, row in zip(places, arrays(encode(classifier, texts)), strict=True):
                encoded[i] = row
        labels, weights = job.weighted_labels(self._labels)
        labelled = [{**row, "labels": int(label)} for row, label in zip(encoded, labels, strict=True)]
        if weights is not None:
            labelled = [{**row, "weight": float(weight)} for row, weight in zip(labelled, weights, strict=True)]
        options = replace(self._start.options, seed=job.seed)
        with own_random_numbers(classifier.device):
            fine_tune(classifier, labelled, options, lengths=placed_lengths(job, self._lengths))
        return run_forward(classifier, self._evaluation).logits


def placed_lengths(job: Job, row_lengths: np.ndarray) -> list[int]:
    """Lengths by which rows are grouped into batches: the length of each row before its edit.

    So a changed text moves no other row. Added rows take the lengths of rows drawn from all rows of the index: jobs
    that add equally many rows then have the same batches, whatever the added texts are.

    Args:
        job: The rows of the training.
        row_lengths: Word pieces of all rows of the index.
    """
    drawn = np.random.default_rng(0).integers(len(row_lengths), size=len(job.extra))
    return [*row_lengths[job.rows].tolist(), *row_lengths[drawn].tolist()]
