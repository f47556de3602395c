"""Retraining in full, by the loop of ``forebear train``, from the start model of the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from forebear.errors import MismatchError
from forebear.evaluation.retraining.jobs import LIBRARIES, Job, TrainingRows
from forebear.indexer.index import Index
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on, own_random_numbers
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import dropout_settings
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.course import RANDOM_NUMBERS
from forebear.indexer.training.fine_tuning import fine_tune, refuse_other_gpus
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.run import Run
from forebear.indexer.training.start import freeze_below, load_start

PAIRING = 2  # raised when places, random numbers or weights of rows change


class Start:
    """The model before its first step, in memory.

    Attributes:
        options: Options of the training run.
        name: Name of the start model.
        device: Device that models are trained on.
        is_older: Whether an older version made the run, which drew random numbers otherwise than a retraining does.
        facts: All choices that decide an outcome, beside the rows and the recipe.
    """

    def __init__(self, run: Run, rows: TrainingRows, index: Index, device: str) -> None:
        self._names, self.device = rows.label_names, pick_device(device)
        known = {f.name for f in fields(TrainOptions)}
        settings = {name: value for name, value in run.settings.items() if name in known}
        self.options = TrainOptions(**{**settings, "label_mode": None, "device": self.device.type})
        self.name, self.is_older = run.base_model, run.settings.get("random_numbers") != RANDOM_NUMBERS
        self._loaded: tuple[int, Classifier, dict[str, torch.Tensor]] | None = None
        self._prepare: Callable[[Classifier], None] = lambda _classifier: None
        sha256 = self.at(self.options.seed).sha256
        if sha256 != run.settings["start_sha256"]:
            raise MismatchError(
                f"{self.name} is not the model that the run started from: sha256 {sha256[:12]}, expected "
                f"{run.settings['start_sha256'][:12]}. Restore it, or train and index again."
            )
        if self.at(self.options.seed).tokenizer_sha256 != index.manifest.spec.tokenizer_sha256:
            raise MismatchError(f"{self.name} has another tokenizer than the index. Name the right run by --run.")
        dropout = dropout_settings(self.at(self.options.seed).model)
        if dropout != run.settings.get("dropout", dropout):  # runs of older versions did not record it
            raise MismatchError(
                f"{self.name} has other dropout than when the run started from it: {dropout}, then "
                f"{run.settings['dropout']}. Restore its config.json, or train and index again."
            )
        options = {f.name: getattr(self.options, f.name) for f in fields(TrainOptions) if f.name != "seed"}
        for name in ("class_weights", "label_smoothing"):  # outcomes of older versions, which had none, stay known
            if not options[name]:
                del options[name]
        self.facts: Mapping[str, Any] = {
            "start_model": self.name, "start_sha256": sha256, "dropout": dropout,
            "tokenizer_sha256": index.manifest.spec.tokenizer_sha256, "options": options,
            "libraries": library_versions(LIBRARIES), "threads": torch.get_num_threads(), "pairing": PAIRING,
        }  # fmt: skip
        where = computed_on(self.device, self.options.precision)
        if where["device"] != "cpu":  # outcomes of older versions on the CPU stay known
            self.facts = {**self.facts, "computed_on": where}

    def prepare(self, change: Callable[[Classifier], None]) -> None:
        """Apply a function that freezes or cuts layers to every model that is loaded from now on."""
        self._prepare, self._loaded = change, None

    def at(self, seed: int) -> Classifier:
        """The start model with the new head of a seed, as it is before the first step.

        Calls with the same seed return the same object with its weights set back.
        """
        if self._loaded is None or self._loaded[0] != seed:
            with own_random_numbers(self.device):
                classifier, _ = load_start(
                    rows_from_texts([""] * len(self._names), range(len(self._names)), label_names=self._names),
                    self.name,
                    label_mode=None,
                    max_length=self.options.max_length,
                    precision=self.options.precision,
                    seed=seed,
                    device=self.device,
                )
            loss = CrossEntropy(tuple(float(w) for w in self.options.class_weights), self.options.label_smoothing)
            classifier = replace(classifier, loss=loss)
            self._prepare(classifier)
            self._loaded = seed, classifier, copy.deepcopy(classifier.model.state_dict())
        _, classifier, state = self._loaded
        classifier.model.load_state_dict(state)
        return classifier


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
        self._encoded = _arrays(encode(classifier, rows.texts))
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
            for i, row in zip(places, _arrays(encode(classifier, texts)), strict=True):
                encoded[i] = row
        labelled = [{**row, "labels": int(label)} for row, label in zip(encoded, job.labels(self._labels), strict=True)]
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


def _arrays(encoded: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
    return [{key: np.asarray(values, np.int32) for key, values in row.items()} for row in encoded]
