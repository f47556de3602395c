"""Retraining of the last K encoder layers, pooler and head, on stored states of the layers below.

What enters the first trained layer is computed once and kept in memory, without dropout in the layers below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import InputError, ModelError
from forebear.evaluation.retraining.jobs import Job, TrainingRows
from forebear.evaluation.retraining.recipe_full import placed_lengths
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import own_random_numbers, repeatable
from forebear.indexer.model.device.copies import Fetched, one_late, send
from forebear.indexer.model.device.memory import refusing_lack, run_batches
from forebear.indexer.model.encoding import encode, plan_batches
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.layers import encoder_layers
from forebear.indexer.storage.ragged import offsets
from forebear.indexer.training.course import MAX_GRAD_NORM, seed_step
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.recorded_start import Start
from forebear.indexer.training.start import freeze_below
from forebear.indexer.training.step_losses import StepLosses

FULL_PRECISION_BYTES = 2 << 30  # hidden states of more are kept in fp16


class _Hidden:
    """Hidden states that enter the first trained layer, ``(t, h)`` a row, the rows one after another."""

    def __init__(self, states: torch.Tensor, starts: np.ndarray) -> None:
        self.states, self.starts = states, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, ``(n,)``."""
        return np.diff(self.starts)

    def row(self, i: int) -> torch.Tensor:
        """States of row ``i``, ``(t, h)``."""
        return self.states[self.starts[i] : self.starts[i + 1]]


class _Stored(nn.Module):
    """Module in the place of the embeddings; its output is the stored states that were assigned to it."""

    states: torch.Tensor

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.states


class TopRecipe:
    """Train the last K encoder layers, pooler and head; see :class:`~forebear.evaluation.retraining.jobs.Recipe`."""

    seeded = True

    def __init__(self, start: Start, rows: TrainingRows, evaluation: Sequence[Sequence[str]], name: str) -> None:
        self.name, self._start, self._labels, self._k = name, start, rows.labels, int(name.removeprefix("top-"))
        whole = start.at(start.options.seed)
        layers, n_layers = encoder_layers(whole.model, whole.name)
        if self._k > n_layers:
            raise InputError(f"--retrain {name}: {whole.name} has {n_layers} encoder layers.")
        freeze_below(whole.model, n_layers - self._k, whole.name)  # refuses layers that share their weights
        self._below = copy.deepcopy(whole)
        self._first = f"{layers}.{n_layers - self._k}"
        self._dtype: torch.dtype | None = None
        self._rows = self._hidden(rows.texts)
        self._evaluation = self._hidden(evaluation)
        frozen = start.options.freeze_below  # layers that the run froze stay frozen
        first_trained = max(frozen or 0, n_layers - self._k)

        def change(classifier: Classifier) -> None:
            if frozen is not None:
                freeze_below(classifier.model, first_trained, classifier.name)
            _cut(classifier, layers, n_layers - self._k)

        start.prepare(change)
        self._check(rows.texts)
        kept = "fp32" if self._dtype == torch.float32 else "fp16"
        self.facts: Mapping[str, Any] = {**start.facts, "layers": self._k, "hidden": kept}
        trained = f"its last {n_layers - first_trained} of {n_layers} layers, pooler and head"
        self.note = (
            f"A stand-in for fine-tuning all of the model: {trained} "
            f"are trained on stored states ({kept}) of the layers below, which are those of {start.name}."
        )

    def _hidden(self, texts: Sequence[Sequence[str]]) -> _Hidden:
        """States entering the first trained layer."""
        rows = encode(self._below, texts)
        starts = offsets(np.array([len(row["input_ids"]) for row in rows]))
        config: Any = self._below.model.config
        if self._dtype is None:  # decided by the training rows, which come first
            n_bytes = int(starts[-1]) * config.hidden_size * 4
            self._dtype = torch.float32 if n_bytes <= FULL_PRECISION_BYTES else torch.float16
        states = torch.empty((int(starts[-1]), config.hidden_size), dtype=self._dtype)
        for batch, (batch_states,) in one_late(_forward_to(self._below, self._first, rows)):
            for i, values in zip(batch, batch_states, strict=True):
                states[starts[i] : starts[i + 1]] = torch.from_numpy(values[: len(rows[i]["input_ids"])])
        return _Hidden(states, starts)

    def _check(self, texts: Sequence[Sequence[str]]) -> None:
        """Check that the cut model gives the logits of the whole model.

        Raises:
            ModelError: It does not.
        """
        few = [list(column[:4]) for column in texts]
        whole = run_forward(self._below, few).logits
        cut = self._logits(self._start.at(self._start.options.seed), self._hidden(few))
        is_exact = self._start.options.precision == "fp32" and self._dtype == torch.float32
        tolerance = 1e-4 if is_exact else 0.05
        if not np.allclose(whole, cut, rtol=tolerance, atol=tolerance):
            raise ModelError(
                f"{self._start.name} does not compute the same from the states that enter its last {self._k} layers "
                "(something passes by them). Take --retrain full."
            )

    def train(self, job: Job) -> np.ndarray:
        """Logits of the retrained model on the evaluation rows, ``(q, c)``."""
        classifier = self._start.at(job.seed)
        hidden = [self._rows.row(row) for row in job.rows] + [torch.empty(0)] * len(job.extra)
        places, texts = job.changed()
        if len(places):
            new_states = self._hidden(texts)
            for j, i in enumerate(places):
                hidden[i] = new_states.row(j)
        labels, weights = (
            None if values is None else torch.from_numpy(values) for values in job.weighted_labels(self._labels)
        )
        assert labels is not None
        options = replace(self._start.options, seed=job.seed)
        subject, remedy = f"a training step of {options.batch_size} rows", "Train with a smaller --batch-size"
        with (
            own_random_numbers(classifier.device),
            repeatable(classifier.device),
            refusing_lack(subject, classifier.device, remedy),
        ):
            train_top(classifier, hidden, labels, options, placed_lengths(job, self._rows.lengths), weights)
        return self._logits(classifier, self._evaluation)

    def _logits(self, classifier: Classifier, hidden: _Hidden) -> np.ndarray:
        out = np.empty((len(hidden), classifier.n_classes))
        lengths = hidden.lengths.tolist()

        def run(batch: list[int]) -> Fetched:
            with torch.no_grad():
                return Fetched(top_logits(classifier, [hidden.row(i) for i in batch]).double())

        plan = plan_batches(lengths, classifier.batch_tokens(), equal_lengths=classifier.equal_lengths)
        for batch, (logits,) in one_late(run_batches(plan, run, device=classifier.device, lengths=lengths)):
            out[batch] = logits
        return out


def _forward_to(
    classifier: Classifier, layer: str, rows: Sequence[dict[str, list[int]]]
) -> Iterator[tuple[list[int], Fetched]]:
    """Batches of row positions, and the states ``(b, t, h)`` that enter a layer."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    def run(batch: list[int]) -> Fetched:
        with torch.no_grad(), classifier.arithmetic():
            classifier.model(**pad_batch(classifier.tokenizer, [rows[i] for i in batch], classifier.device))
        return Fetched(caught.pop().float())

    hook = classifier.model.get_submodule(layer).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        lengths = [len(row["input_ids"]) for row in rows]
        plan = plan_batches(lengths, classifier.batch_tokens(), equal_lengths=classifier.equal_lengths)
        yield from run_batches(
            plan, run, device=classifier.device, lengths=lengths, let_go=lambda _batch: caught.clear()
        )
    finally:
        hook.remove()


def _cut(classifier: Classifier, layers: str, first: int) -> None:
    """Cut a model: remove the embeddings and the layers below layer ``first``.

    Raises:
        ModelError: The model's embeddings are not where transformers' encoders have them.
    """
    model: Any = classifier.model
    base = model.base_model
    if not isinstance(getattr(base, "embeddings", None), nn.Module):
        raise ModelError(f"{classifier.name} ({type(model).__name__}) has no module 'embeddings'. Take --retrain full.")
    base.embeddings = _Stored()
    if hasattr(base, "embeddings_project"):  # ELECTRA
        base.embeddings_project = nn.Identity()
    parent, _, name = layers.rpartition(".")
    setattr(model.get_submodule(parent), name, model.get_submodule(layers)[first:])


def top_logits(classifier: Classifier, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits ``(b, c)`` float32 of a cut model, from states ``(t, h)`` of each row."""
    states = send(nn.utils.rnn.pad_sequence(list(hidden), batch_first=True), classifier.device).float()
    lengths = torch.tensor([len(row) for row in hidden])
    mask = send((torch.arange(states.shape[1]) < lengths[:, None]).long(), states.device)
    model: Any = classifier.model
    model.base_model.embeddings.states = states
    ids = torch.zeros_like(mask)  # not read: the states of these tokens are stored
    with classifier.arithmetic():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()


def train_top(
    classifier: Classifier,
    hidden: Sequence[torch.Tensor],
    labels: torch.Tensor,
    options: TrainOptions,
    lengths: Sequence[int],
    weights: torch.Tensor | None = None,
) -> None:
    """Train a cut model on stored states, as the run trains: AdamW, linear warm-up and decay, clipped gradients.

    Args:
        classifier: Cut; left trained, in ``eval()`` mode.
        hidden: States of each row, ``(t, h)``.
        labels: Class ids, ``(n,)``; ``IGNORED`` for rows that weigh nothing.
        options: Epochs, rates, batch size and seed.
        lengths: Lengths by which rows are grouped into batches, ``(n,)``.
        weights: Factors of the rows' losses, ``(n,)``, where no label is ``IGNORED``; None: there are none.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
    """
    from transformers import get_linear_schedule_with_warmup

    model = classifier.model
    n_steps = options.epochs * math.ceil(len(hidden) / options.batch_size)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.ndim <= 1]  # biases and LayerNorm
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(n_steps * options.warmup_ratio), n_steps)
    model.train()
    n_batches, step = math.ceil(len(hidden) / options.batch_size), 0

    def refusal(step: int, loss: float) -> str:
        return (
            f"the training loss is {loss} in epoch {step // n_batches + 1} of a retraining with seed {options.seed}. "
            f"Lower the learning rate of the run (now {options.learning_rate:g})."
        )

    losses = StepLosses(refusal)
    for epoch in range(options.epochs):
        for batch in epoch_batches(lengths, options.batch_size, options.seed, epoch):
            seed_step(options.seed, step)
            step += 1
            logits = top_logits(classifier, [hidden[i] for i in batch])
            batch_labels = send(labels[batch], logits.device)
            if weights is None:
                loss = classifier.loss.mean(logits, batch_labels)
            else:
                loss = classifier.loss.weighted_mean(
                    logits, batch_labels, send(weights[batch].to(logits.dtype), logits.device)
                )
            losses.add(loss, loss.new_ones(()))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    losses.settle()
    model.eval()


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of each step of an epoch: in random order, rows of similar length together.

    As transformers groups by length: shuffled, cut into stretches of up to 50 batches, each sorted by length; the
    batches themselves are then shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    stretch = batch_size * max(1, min(50, len(lengths) // (4 * batch_size)))
    batches = []
    for start in range(0, len(order), stretch):
        by_length = sorted(order[start : start + stretch].tolist(), key=lambda i: -lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
