"""How a job is trained: all of the run again (``full``), its last layers (``top-K``) or its head (``head``).

``full`` is the training run once more, by its own loop. The other two are stand-ins that cost less. ``top-K`` trains
the last K encoder layers, pooler and head from the run's start model; what enters these layers is computed once and
kept in memory, without dropout in the layers below. ``head`` fits the head alone to the features of the index's last
checkpoint, to convergence: the encoder then still knows the rows that were removed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import InputError, MismatchError, ModelError, NonFiniteError
from forebear.evaluation.retraining import Job, Recipe, Retrainer, TrainingRows
from forebear.indexer.data import rows_from_texts
from forebear.indexer.encoding import Encoded, encode, pad_batch, plan_batches
from forebear.indexer.forward import DEFAULT_BATCH_TOKENS, run_forward
from forebear.indexer.index import Index
from forebear.indexer.manifest import digest_of, library_versions
from forebear.indexer.model import Classifier, dropout_settings, pick_device
from forebear.indexer.runs import RUN_NAME, Run, path_to, read_run
from forebear.indexer.scopes import encoder_layers
from forebear.indexer.start import freeze_below, load_start
from forebear.indexer.training import IGNORED, MAX_GRAD_NORM, TrainOptions, fine_tune, mean_loss, seed_step
from forebear.indexer.words import offsets
from forebear.retriever.retriever import Retriever

DEFAULT_L2 = 0.01  # of Pez21's head
GRADIENT_TOLERANCE = 1e-8
ACCEPTED_GRADIENT = 1e-6  # where the line search ends at the last bits of the loss
FULL_PRECISION_BYTES = 2 << 30  # hidden states of more are kept in fp16
LIBRARIES = ("forebear", "torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy")


def open_retrainer(
    retriever: Retriever,
    name: str,
    evaluation: Sequence[Sequence[str]],
    cache: str | Path,
    *,
    run: str | Path | None = None,
    l2: float = DEFAULT_L2,
    device: str = "auto",
) -> Retrainer:
    """A retrainer of the model that an index explains.

    Args:
        retriever: Over the index; its rows are what jobs choose from.
        name: ``full``, ``top-K`` or ``head``.
        evaluation: Texts that retrained models are asked of, one list a text column.
        cache: Folder of outcomes.
        run: Run folder of ``forebear train``; None: the one that the index's last checkpoint lies in.
        l2: For ``head``: weight of half the squared norm of the head beside the mean loss.
        device: ``auto``, ``cpu``, ``cuda``.

    Raises:
        InputError: No such recipe, a model without a run folder, or layers that are not there.
        MismatchError: The run's start model is not what it was.
        ModelError: The model's layers cannot be trained alone.
    """
    rows = TrainingRows(retriever.index)
    recipe: Recipe
    if name == "head":
        recipe = HeadRecipe(retriever, rows, evaluation, l2)
    elif name == "full" or re.fullmatch(r"top-[1-9]\d*", name):
        start = _Start(_find_run(retriever.index, run), rows, retriever.index, device)
        recipe = FullRecipe(start, rows, evaluation) if name == "full" else TopRecipe(start, rows, evaluation, name)
    else:
        raise InputError(f"--retrain {name!r}: expected full, top-K (such as top-2) or head.")
    return Retrainer(recipe, rows, evaluation, cache)


def _find_run(index: Index, run: str | Path | None) -> Run:
    """The training run behind an index."""
    folder = Path(run) if run is not None else None
    if folder is None:
        last = Path(path_to(index.folder, index.manifest.checkpoints[-1].path)).resolve()
        folder = next((parent for parent in last.parents if (parent / RUN_NAME).is_file()), last)
    found = read_run(folder)
    if found is None:
        raise InputError(
            f"{folder} is no training run (no {RUN_NAME}): how the model was trained is not known. Name the run "
            "folder by --run, or take --retrain head."
        )
    if found.label_names != index.manifest.spec.label_names:
        raise MismatchError(
            f"{folder} trained on the labels {', '.join(found.label_names)}, the index has "
            f"{', '.join(index.manifest.spec.label_names)}. Name the right run by --run."
        )
    return found


class _Start:
    """The model before its first step, in memory.

    Attributes:
        options: Of the run.
        name: Of the start model.
        facts: What decides an outcome, beside rows and recipe.
    """

    def __init__(self, run: Run, rows: TrainingRows, index: Index, device: str) -> None:
        self._names, self._device = rows.label_names, pick_device(device)
        known = {f.name for f in fields(TrainOptions)}
        settings = {name: value for name, value in run.settings.items() if name in known}
        self.options = TrainOptions(**{**settings, "label_mode": None, "device": self._device.type})
        self.name = run.base_model
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
        found = dropout_settings(self.at(self.options.seed).model)
        if found != run.settings.get("dropout", found):  # runs of older versions do not say
            raise MismatchError(
                f"{self.name} has other dropout than when the run started from it: {found}, then "
                f"{run.settings['dropout']}. Restore its config.json, or train and index again."
            )
        options = {f.name: getattr(self.options, f.name) for f in fields(TrainOptions) if f.name != "seed"}
        self.facts: Mapping[str, Any] = {
            "start_model": self.name, "start_sha256": sha256, "dropout": found,
            "tokenizer_sha256": index.manifest.spec.tokenizer_sha256, "options": options,
            "libraries": library_versions(LIBRARIES), "threads": torch.get_num_threads(), "paired": True,
        }  # fmt: skip

    def prepare(self, change: Callable[[Classifier], None]) -> None:
        """Freeze or cut every model from now on by this function."""
        self._prepare, self._loaded = change, None

    def at(self, seed: int) -> Classifier:
        """The start model with a seed's new head, always the same object for one seed after another."""
        if self._loaded is None or self._loaded[0] != seed:
            with torch.random.fork_rng(devices=[]):
                classifier, _ = load_start(
                    rows_from_texts([""] * len(self._names), range(len(self._names)), label_names=self._names),
                    self.name,
                    label_mode=None,
                    max_length=self.options.max_length,
                    precision=self.options.precision,
                    seed=seed,
                    device=self._device,
                )
            self._prepare(classifier)
            self._loaded = seed, classifier, copy.deepcopy(classifier.model.state_dict())
        _, classifier, state = self._loaded
        classifier.model.load_state_dict(state)
        return classifier


class FullRecipe:
    """Fine-tune as the run did, without its checkpoints; see :class:`~forebear.evaluation.retraining.Recipe`."""

    name = "full"
    seeded = True
    note = "Each model is fine-tuned as the run was."

    def __init__(self, start: _Start, rows: TrainingRows, evaluation: Sequence[Sequence[str]]) -> None:
        self._start, self._labels = start, rows.labels
        k = start.options.freeze_below
        if k is not None:
            start.prepare(lambda classifier: freeze_below(classifier.model, k, classifier.name))
        classifier = start.at(start.options.seed)
        self._encoded = _arrays(encode(classifier, rows.texts))
        self._lengths = np.array([len(row["input_ids"]) for row in self._encoded])
        self._evaluation = Encoded(encode(classifier, evaluation))
        self.facts: Mapping[str, Any] = start.facts

    def train(self, job: Job) -> np.ndarray:
        """Logits of the retrained model on the evaluation rows, ``(q, c)``."""
        classifier = self._start.at(job.seed)
        encoded = [self._encoded[row] for row in job.rows] + [{}] * len(job.extra)
        at, texts = job.changed()
        if len(at):
            for i, row in zip(at, _arrays(encode(classifier, texts)), strict=True):
                encoded[i] = row
        labelled = [{**row, "labels": int(label)} for row, label in zip(encoded, job.labels(self._labels), strict=True)]
        lengths = _placed_lengths(job, self._lengths, [len(row["input_ids"]) for row in encoded])
        fine_tune(classifier, labelled, replace(self._start.options, seed=job.seed), lengths=lengths)
        return run_forward(classifier, self._evaluation).logits


def _placed_lengths(job: Job, of_rows: np.ndarray, found: Sequence[int]) -> list[int]:
    """What rows are grouped into batches by: the length before an edit, so that an edit moves no row."""
    return [*of_rows[job.rows].tolist(), *found[len(job.rows) :]]


def _arrays(encoded: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
    return [{key: np.asarray(values, np.int32) for key, values in row.items()} for row in encoded]


class _Hidden:
    """What enters the first trained layer, for each of some rows: ``(t, h)`` each, one after another."""

    def __init__(self, states: torch.Tensor, starts: np.ndarray) -> None:
        self.states, self.starts = states, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """t of each row, ``(n,)``."""
        return np.diff(self.starts)

    def row(self, i: int) -> torch.Tensor:
        """``(t, h)``."""
        return self.states[self.starts[i] : self.starts[i + 1]]


class _Stored(nn.Module):
    """Stands where the embeddings were, and gives what was put in."""

    states: torch.Tensor

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.states


class TopRecipe:
    """Train the last K encoder layers, pooler and head; see :class:`~forebear.evaluation.retraining.Recipe`."""

    seeded = True

    def __init__(self, start: _Start, rows: TrainingRows, evaluation: Sequence[Sequence[str]], name: str) -> None:
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
        frozen = start.options.freeze_below  # what the run left as it was stays so
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
        if self._dtype is None:  # of the training rows, which come first
            n_bytes = int(starts[-1]) * config.hidden_size * 4
            self._dtype = torch.float32 if n_bytes <= FULL_PRECISION_BYTES else torch.float16
        states = torch.empty((int(starts[-1]), config.hidden_size), dtype=self._dtype)
        for batch, found in _forward_to(self._below, self._first, rows):
            for i, values in zip(batch, found, strict=True):
                states[starts[i] : starts[i + 1]] = values[: len(rows[i]["input_ids"])]
        return _Hidden(states, starts)

    def _check(self, texts: Sequence[Sequence[str]]) -> None:
        """See that the cut model gives the whole model's logits."""
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
        at, texts = job.changed()
        if len(at):
            changed = self._hidden(texts)
            for j, i in enumerate(at):
                hidden[i] = changed.row(j)
        labels = torch.from_numpy(job.labels(self._labels))
        with torch.random.fork_rng(devices=[classifier.device] if classifier.device.type == "cuda" else []):
            lengths = _placed_lengths(job, self._rows.lengths, [len(row) for row in hidden])
            train_top(classifier, hidden, labels, replace(self._start.options, seed=job.seed), lengths)
        return self._logits(classifier, self._evaluation)

    def _logits(self, classifier: Classifier, hidden: _Hidden) -> np.ndarray:
        out = np.empty((len(hidden), classifier.n_classes))
        with torch.no_grad():
            for batch in plan_batches(hidden.lengths.tolist(), DEFAULT_BATCH_TOKENS):
                logits = top_logits(classifier, [hidden.row(i) for i in batch])
                out[batch] = logits.double().cpu().numpy()
        return out


def _forward_to(
    classifier: Classifier, layer: str, rows: Sequence[dict[str, list[int]]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of row positions, and the states ``(b, t, h)`` that enter a layer."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    hook = classifier.model.get_submodule(layer).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in plan_batches([len(row["input_ids"]) for row in rows], DEFAULT_BATCH_TOKENS):
            with torch.no_grad(), classifier.autocast():
                classifier.model(**pad_batch(classifier.tokenizer, [rows[i] for i in batch], classifier.device))
            yield batch, caught.pop().float().cpu()
    finally:
        hook.remove()


def _cut(classifier: Classifier, layers: str, first: int) -> None:
    """Leave of a model what follows the states that enter layer ``first``.

    Raises:
        ModelError: Its embeddings are not where transformers' encoders have them.
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
    states = nn.utils.rnn.pad_sequence([row.float() for row in hidden], batch_first=True).to(classifier.device)
    mask = torch.zeros(states.shape[:2], dtype=torch.long)
    for i, row in enumerate(hidden):
        mask[i, : len(row)] = 1
    model: Any = classifier.model
    model.base_model.embeddings.states = states
    ids = torch.zeros_like(mask)  # not looked at: what they stand for is stored
    with classifier.autocast():
        logits: torch.Tensor = model(input_ids=ids.to(states.device), attention_mask=mask.to(states.device)).logits
    return logits.float()


def train_top(
    classifier: Classifier,
    hidden: Sequence[torch.Tensor],
    labels: torch.Tensor,
    options: TrainOptions,
    lengths: Sequence[int],
) -> None:
    """Train a cut model on stored states, as the run trains: AdamW, linear warm-up and decay, clipped gradients.

    Args:
        classifier: Cut; left trained, in ``eval()`` mode.
        hidden: States of each row, ``(t, h)``.
        labels: Class ids, ``(n,)``; ``IGNORED`` for rows that weigh nothing.
        options: Epochs, rates, batch size and seed.
        lengths: By which rows are grouped into batches.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
    """
    from transformers import get_linear_schedule_with_warmup

    model = classifier.model
    n_steps = options.epochs * math.ceil(len(hidden) / options.batch_size)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases and LayerNorm
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(n_steps * options.warmup_ratio), n_steps)
    model.train()
    step = 0
    for epoch in range(options.epochs):
        for batch in epoch_batches(lengths, options.batch_size, options.seed, epoch):
            seed_step(options.seed, step)
            step += 1
            logits = top_logits(classifier, [hidden[i] for i in batch])
            loss = mean_loss(logits, labels[batch].to(logits.device))
            if not math.isfinite(loss.item()):
                raise NonFiniteError(
                    f"the training loss is {loss.item()} in epoch {epoch + 1} of a retraining with seed "
                    f"{options.seed}. Lower the learning rate of the run (now {options.learning_rate:g})."
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
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
        some = sorted(order[start : start + stretch].tolist(), key=lambda i: -lengths[i])
        batches += [some[i : i + batch_size] for i in range(0, len(some), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class HeadRecipe:
    """Fit the head to stored features; see :class:`~forebear.evaluation.retraining.Recipe`.

    Softmax regression without dropout or a random start: the loss is strictly convex, its minimum does not depend on
    the seed. The bias, where the head has one, is the weight of one more feature that is 1, and penalised alike; so the
    minimum exists also when a class has no rows left, whose probability is then small.
    """

    name = "head"
    seeded = False

    def __init__(
        self, retriever: Retriever, rows: TrainingRows, evaluation: Sequence[Sequence[str]], l2: float
    ) -> None:
        if not 0 < l2 < math.inf:
            raise InputError(f"--l2 {l2}: expected a positive number; without it the head has no best weights.")
        self._classifier, self._labels, self._l2 = retriever.classifier(), rows.labels, l2
        self._has_bias = self._classifier.head.bias is not None
        index = retriever.index
        self._features = self._extended(index.features().take(np.arange(len(rows.labels))))
        self._evaluation = self._extended(run_forward(self._classifier, evaluation).features)
        self._begin = torch.zeros((len(rows.label_names), self._features.shape[1]), dtype=torch.float64)
        self._begin = self._fit(self._features[rows.live], torch.from_numpy(rows.labels[rows.live]), "all rows")
        spec = index.manifest.spec
        self.facts: Mapping[str, Any] = {
            "checkpoint_sha256": spec.checkpoint_sha256[-1], "tokenizer_sha256": spec.tokenizer_sha256,
            "max_length": spec.max_length, "precision": spec.precision, "l2": l2, "bias": self._has_bias,
            "begin": digest_of(rows.live.tolist()), "libraries": library_versions(LIBRARIES),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        self.note = (
            f"A stand-in for fine-tuning: only the head is fitted again (L2 {l2:g}, to convergence), on features of "
            "the trained encoder, which has seen all rows. Seeds make no difference to it."
        )

    def _extended(self, features: np.ndarray) -> torch.Tensor:
        """Features in float64, with a last column of ones for the bias."""
        found = torch.from_numpy(features.astype(np.float64))
        return torch.cat([found, torch.ones((len(found), 1), dtype=torch.float64)], dim=1) if self._has_bias else found

    def train(self, job: Job) -> np.ndarray:
        """Logits of the refitted head on the evaluation rows, ``(q, c)``."""
        labels = torch.from_numpy(job.labels(self._labels))
        features = torch.empty((len(labels), self._features.shape[1]), dtype=torch.float64)
        features[: len(job.rows)] = self._features[job.rows]
        at, texts = job.changed()
        if len(at):
            features[at] = self._extended(run_forward(self._classifier, texts).features)
        kept = labels != IGNORED
        weights = self._fit(features[kept], labels[kept], f"{len(job)} rows")
        return (self._evaluation @ weights.T).numpy()

    def _fit(self, features: torch.Tensor, labels: torch.Tensor, what: str) -> torch.Tensor:
        """Weights ``(c, h)`` that minimise mean cross-entropy + l2 / 2 ||W||^2, from the fit to all rows on."""
        from scipy.optimize import minimize

        shape = self._begin.shape
        onehot = nn.functional.one_hot(labels, shape[0]).double()

        def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(flat).view(shape)
            log_p = nn.functional.log_softmax(features @ weights.T, dim=1)
            loss = -(log_p * onehot).sum() / len(labels) + self._l2 / 2 * weights.square().sum()
            gradient = (log_p.exp() - onehot).T @ features / len(labels) + self._l2 * weights
            return loss.item(), gradient.reshape(-1).numpy()

        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": GRADIENT_TOLERANCE, "ftol": 0.0, "maxcor": 20}
        found = minimize(
            loss_and_gradient, self._begin.reshape(-1).numpy(), jac=True, method="L-BFGS-B", options=options
        )
        largest = float(np.abs(found.jac).max())
        if not largest <= ACCEPTED_GRADIENT:
            raise InputError(
                f"the head's fit to {what} did not converge: largest gradient {largest:.1e}, expected "
                f"{ACCEPTED_GRADIENT:g}. Give a larger --l2 (now {self._l2:g})."
            )
        return torch.from_numpy(found.x).view(shape)
