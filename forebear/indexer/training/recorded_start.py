"""The start model of a recorded run, loaded again: what the run is repeated from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from forebear.errors import MismatchError
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on, own_random_numbers
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.loading import dropout_settings
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.course import RANDOM_NUMBERS
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.run import Run
from forebear.indexer.training.start import load_start

LIBRARIES = ("forebear", "torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy")  # decide last bits
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

    def __init__(self, run: Run, label_names: Sequence[str], tokenizer_sha256: str, device: str) -> None:
        """Load it, and check that it is the one that the run started from.

        Args:
            run: A run of ``forebear train`` on rows of one label.
            label_names: Names of the classes, by id.
            tokenizer_sha256: Digest of the tokenizer of the run's checkpoints.
            device: As :func:`~forebear.indexer.model.device.picking.pick_device` takes it.

        Raises:
            MismatchError: The model, its tokenizer or its dropout are others.
        """
        self._names, self.device = tuple(label_names), pick_device(device)
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
        if self.at(self.options.seed).tokenizer_sha256 != tokenizer_sha256:
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
            "tokenizer_sha256": tokenizer_sha256, "options": options,
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


def arrays(encoded: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Word pieces as training takes them, ``(t,)`` int32 by name, one dictionary a row."""
    return [{key: np.asarray(values, np.int32) for key, values in row.items()} for row in encoded]
