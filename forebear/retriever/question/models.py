"""The models that a question runs: checkpoints of the index, its sentence encoder, variants one step away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from forebear.errors import MismatchError, MissingStoreError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on, repeatable
from forebear.indexer.model.device.batch_size import BATCH_TOKENS
from forebear.indexer.model.device.copies import send
from forebear.indexer.model.device.kept_arrays import DeviceMemory
from forebear.indexer.model.device.memory import moved, run_batches
from forebear.indexer.model.device.picking import pick_device, pick_devices
from forebear.indexer.model.encoding import encode, plan_batches
from forebear.indexer.model.loading import check_same_model, load_classifier, weights_sha256
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.retriever.question.kept import Kept, budget_on

T = TypeVar("T")

N_VARIANTS = 3  # models one step away, as in the Span paper's TracInF
VARIANT_ROWS = 32
VARIANT_LEARNING_RATE = 1e-4


def one_step_away(classifier: Classifier, index: Index, number: int) -> Classifier:
    """A variant of a model: one SGD step on the mean loss of a seeded mini-batch of training rows (Span, TracInF).

    All weights move; dropout is off. The classifier itself stays as it is.
    """
    seed = index.manifest.spec.seed
    rows = np.random.default_rng([seed, 7, number]).permutation(index.live)[:VARIANT_ROWS]
    model = copy.deepcopy(classifier.model).requires_grad_(True)
    encoded = encode(classifier, index.text_lists(rows))
    lengths = [len(row["input_ids"]) for row in encoded]
    targets = torch.from_numpy(index.targets(rows))
    parameters = list(model.parameters())
    total_weight = classifier.loss.total_weight(targets).item()

    def run(positions: list[int]) -> tuple[torch.Tensor | None, ...]:
        with classifier.arithmetic():
            logits = model(**pad_batch(classifier.tokenizer, [encoded[i] for i in positions], classifier.device)).logits
        share = classifier.loss.total_weight(targets[positions]).item() / total_weight
        loss = classifier.loss.mean(logits.float(), send(targets[positions], logits.device)) * share
        with repeatable(classifier.device):
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    plan = plan_batches(lengths, len(rows) * max(lengths), equal_lengths=classifier.equal_lengths)
    batches = run_batches(
        map(sorted, plan), run, device=classifier.device, lengths=lengths, name=lambda i: f"training row {rows[i]}"
    )
    gradients: list[torch.Tensor | None] = [None] * len(parameters)
    for _, of_batch in batches:
        for i, gradient in enumerate(of_batch):
            so_far = gradients[i]
            if gradient is not None:
                gradients[i] = gradient if so_far is None else so_far + gradient
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(VARIANT_LEARNING_RATE * gradient)
    name = f"{classifier.name} (variant {number})"
    return replace(classifier, name=name, model=model.requires_grad_(False), sha256=weights_sha256(model))


class Models:
    """The models of an index, loaded when first asked for and checked against its fingerprints.

    Attributes:
        index: The index, with its checkpoints where they are now.
        query_tokens: Most word pieces, padding included, that a batch of test rows has on the CPU.
    """

    def __init__(
        self,
        index: Index,
        *,
        model: str | Classifier | None = None,
        device: str = "auto",
        devices: Sequence[str | int] = (),
        device_bytes: int | None = None,
    ) -> None:
        """Set up without loading a model.

        Args:
            index: The index.
            model: Where the last checkpoint's model is now, or the model itself; None: where it was.
            device: As :func:`~forebear.indexer.model.device.picking.pick_device` takes it.
            devices: In place of ``device`` several, among which exact scores beyond the head are divided.
            device_bytes: Most bytes of stored vectors that are kept on a GPU; None: half of what is free.
        """
        self.index = index.at(model if isinstance(model, str) else None)
        self.query_tokens = BATCH_TOKENS
        self._device_bytes = device_bytes
        self._override = model if isinstance(model, Classifier) else None
        self._devices = pick_devices(device, devices)
        self._device = self._devices[0]

    @cached_property
    def kept(self) -> Kept:
        """What was loaded and computed, within one number of bytes."""
        return Kept(budget_on(self.device))

    @cached_property
    def device(self) -> torch.device:
        """Device that the models run on."""
        return pick_device(self._device) if self._override is None else self._override.device

    def computed_on(self) -> dict[str, Any]:
        """Where and how answers are computed; see :func:`~forebear.indexer.model.device.arithmetic.computed_on`."""
        return computed_on(self.device, self.index.manifest.spec.precision)

    @cached_property
    def memory(self) -> DeviceMemory:
        """What searches keep on the device on which the models run."""
        return DeviceMemory(self.device, self._device_bytes)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object kept under ``key``, which ``make`` makes when it is first asked for.

        Searches of a scope are kept so for later questions.
        """
        return self.kept.get(key, make)

    def classifier(self, checkpoint: int = -1) -> Classifier:
        """The classifier at a checkpoint of the index; the last by default. Numbers past it are its variants."""
        checkpoints = self.index.manifest.checkpoints
        number = checkpoint if checkpoint >= 0 else checkpoint % len(checkpoints)
        last = number == len(checkpoints) - 1

        def make() -> Classifier:
            if number < len(checkpoints):
                return self._load(number, last=last)
            return one_step_away(self.classifier(), self.index, number - len(checkpoints))

        return self.kept.get(("model", number), make, stays=last)

    def exact(self, checkpoint: int = -1) -> Classifier:
        """:meth:`classifier` in fp32, whose gradients are exact also where the index was built in bf16."""
        return replace(self.classifier(checkpoint), precision="fp32")

    def replicas(self, number: int) -> list[Classifier]:
        """:meth:`exact` on each device of the retriever, the first one first."""
        classifier = self.exact(number)

        def on(name: str) -> Classifier:
            model = moved(copy.deepcopy(classifier.model), pick_device(name), classifier.name)
            return replace(classifier, model=model, tokenizer=copy.deepcopy(classifier.tokenizer))

        others = [
            self.kept.get(("model", number, place), partial(on, name))
            for place, name in enumerate(self._devices[1:], 1)
        ]
        return [classifier, *others]

    def _load(self, number: int, *, last: bool) -> Classifier:
        manifest = self.index.manifest
        spec, listed = manifest.spec, manifest.checkpoints[number]
        if last and self._override is not None:
            classifier = self._override
        else:
            path = self.index.checkpoint_paths[number]
            classifier = load_classifier(
                path, device=self._device, precision=spec.precision, max_length=spec.max_length
            )
        check_same_model(classifier, listed.sha256, spec.tokenizer_sha256)
        return replace(
            classifier, label_names=spec.label_names, loss=spec.loss
        )  # the model's own names may be empty ones, such as LABEL_0

    @property
    def sentence_encoder(self) -> SentenceEncoder:
        """The encoder, not fine-tuned, of the index's sentence embeddings."""
        return self.kept.get("sentence encoder", self._load_sentence_encoder)

    def _load_sentence_encoder(self) -> SentenceEncoder:
        manifest = self.index.manifest
        if manifest.sentence_model is None:
            raise MissingStoreError(
                f"{self.index.folder} holds no sentence embeddings. Build it with --store features,sbert."
            )
        encoder = load_sentence_encoder(manifest.sentence_model, device=self._device)
        if encoder.sha256 != manifest.spec.sentence_sha256:
            raise MismatchError(
                f"{encoder.name} is not the sentence model of the index: sha256 {encoder.sha256[:12]}, expected "
                f"{(manifest.spec.sentence_sha256 or '')[:12]}."
            )
        return encoder
