"""A recorded run, trained once more: its batches, rates and states, and each stretch of it again, to the last bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import MismatchError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import own_random_numbers, repeatable
from forebear.indexer.model.device.memory import refusing_lack
from forebear.indexer.model.network.pretrained import quiet_transformers
from forebear.indexer.training.course import MAX_GRAD_NORM, Course, run_trainer
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.replay.adamw import Update
from forebear.indexer.training.replay.states import KeptStates, State, copied
from forebear.progress import Progress, no_progress

MEMORY_BYTES = 2 << 30  # of the states that are kept in memory for a whole run, and again for one stretch of it
CheckWeights = Callable[[int, Classifier], None]  # called at the end of an epoch, with the steps taken


class Trajectory:
    """The states that a run went through, of which some are kept and the others are computed again when asked for.

    All states are kept if they fit in memory, else those after every k steps, k the root of the number of steps.

    Attributes:
        course: Batches, logits and losses of the run.
        parameters: The trained parameters, in the order of the tensors of a state.
        n_steps: Steps taken.
        batches: Rows of each step.
        losses: Mean loss of each step's batch.
    """

    def __init__(
        self,
        classifier: Classifier,
        rows: list[dict[str, Any]],
        options: TrainOptions,
        *,
        n_epochs: int | None = None,
        check: CheckWeights = lambda _step, _classifier: None,
        memory_bytes: int = MEMORY_BYTES,
        progress: Progress = no_progress,
    ) -> None:
        """Train, and keep states on the way.

        Args:
            classifier: The start model, as :func:`~forebear.indexer.training.start.load_start` makes it, with what is
                frozen; its weights are changed, by all that is done here.
            rows: Word pieces by name, and the class id under ``labels``, one dictionary a row.
            options: Those of the run.
            n_epochs: Epochs after which the training ends, its rates being those of the whole; None: all.
            check: Called at the end of each epoch; raises where the weights are not those of the run.
            memory_bytes: Bytes of kept states that are in memory; further ones are in temporary files.
            progress: Called with the stage, and the steps done and in all.

        Raises:
            NonFiniteError: A loss is NaN or infinite.
            StorageError: States do not fit on the disk.
        """
        self._memory_bytes = memory_bytes
        with TemporaryDirectory() as scratch, quiet_transformers(), own_random_numbers(classifier.device):
            self.course = _RecordedCourse(classifier, rows, Path(scratch), options, n_epochs, check, memory_bytes)
            self.course.tell = progress
            run_trainer(self.course)
        self.n_steps, self.batches, self.losses = self.course.n_steps, self.course.batches, self.course.step_losses
        self.parameters, self._groups, self._kept = self.course.parameters, self.course.groups, self.course.kept

    @property
    def classifier(self) -> Classifier:
        """The model, with the weights of the step that was computed last."""
        return self.course.classifier

    @property
    def n_bytes(self) -> int:
        """Bytes of the states in memory."""
        return self._kept.n_bytes

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The steps between one kept state and the next, first and last, in order."""
        return list(itertools.pairwise(self._kept.steps))

    def last_weights(self) -> None:
        """Put the weights after the last step into the model."""
        self.put(self._kept.get(self.n_steps))

    def put(self, state: State) -> None:
        """Put the weights of a state into the model."""
        with torch.no_grad():
            for parameter, weights in zip(self.parameters, state.weights, strict=True):
                parameter.copy_(weights)

    def update(self, step: int, group: dict[str, Any]) -> Update:
        """The numbers of a step, counted from 0, for one group of parameters."""
        beta1, beta2 = group["betas"]
        rate, decay, eps = self.course.rates[step], group["weight_decay"], group["eps"]
        return Update(rate=rate, decay=decay, beta1=beta1, beta2=beta2, eps=eps, step=step + 1)

    def updates(self, step: int) -> list[Update]:
        """The numbers of a step for each parameter."""
        return [update for group in self._groups for update in [self.update(step, group)] * group["n_parameters"]]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The padded batch of a step, on the model's device, with its labels."""
        batch = self.course.collate([self.course.rows[row] for row in self.batches[step]])
        return {key: values.to(self.classifier.device) for key, values in batch.items()}

    def states(self, first: int, last: int) -> KeptStates:
        """The states after ``first`` to ``last`` steps, these two being those of one stretch.

        Raises:
            MismatchError: The stretch does not lead to the state that the training had there.
        """
        start, end = self._kept.get(first), self._kept.get(last)
        states = KeptStates(self._memory_bytes)
        states.put(first, start)
        if last > first + 1:
            optimizer = self._optimizer(first, start)
            self.put(start)
            self.classifier.model.train()
            with repeatable(self.classifier.device), own_random_numbers(self.classifier.device):
                for step in range(first, last):
                    self._take(step, optimizer)
                    if step + 1 < last:
                        states.put(step + 1, _state_of(self.parameters, optimizer))
            if not _state_of(self.parameters, optimizer).equals(end):
                raise MismatchError(
                    f"steps {first + 1} to {last} of the run, taken again, lead to other weights than before: this "
                    "machine does not repeat its numbers. Use a device that does (--device cpu)."
                )
        states.put(last, end)
        return states

    def _optimizer(self, step: int, state: State) -> torch.optim.Optimizer:
        """AdamW as it was after a number of steps."""
        groups, start = [], 0
        for group in self._groups:
            chosen = {name: value for name, value in group.items() if name != "n_parameters"}
            groups.append({**chosen, "params": self.parameters[start : start + group["n_parameters"]]})
            start += group["n_parameters"]
        optimizer = torch.optim.AdamW(groups, fused=True)
        if step:
            for parameter, first, second in zip(self.parameters, state.first, state.second, strict=True):
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    "exp_avg": first.to(parameter.device, copy=True),
                    "exp_avg_sq": second.to(parameter.device, copy=True),
                }
        return optimizer

    def _take(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Take one step, as Trainer does."""
        model, batch = self.classifier.model, self.batch(step)
        size = len(self.batches[step])
        with refusing_lack(f"a training step of {size} rows", self.classifier.device, "Train with smaller batches"):
            loss = self.classifier.loss.mean(self.course.logits(model, batch, step), batch["labels"])
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = self.course.rates[step]
        optimizer.step()
        optimizer.zero_grad()


class _RecordedCourse(Course):
    """A course that notes what its steps are made of, and writes nothing."""

    def __init__(
        self,
        classifier: Classifier,
        rows: list[dict[str, Any]],
        folder: Path,
        options: TrainOptions,
        n_epochs: int | None,
        check: CheckWeights,
        memory_bytes: int,
    ) -> None:
        super().__init__(classifier, rows, folder, options, None, self._told, saves=False)
        self.tell: Progress = no_progress
        self._check, self._numbers = check, {id(row): n for n, row in enumerate(rows)}
        self._n_epochs, self._memory_bytes = n_epochs or options.epochs, memory_bytes
        self.n_steps = self._n_epochs * math.ceil(len(rows) / options.batch_size)
        self.batches: list[np.ndarray] = []
        self.step_losses: list[float] = []
        self.rates: list[float] = []
        self.parameters: list[nn.Parameter] = []
        self.groups: list[dict[str, Any]] = []
        self.kept = KeptStates(memory_bytes)
        self._optimizer: Any = None
        self._spacing = 1

    def _told(self, _stage: str, done: int, _total: int) -> None:
        self.tell("replaying the run", done, self.n_steps)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One padded batch, whose rows are noted where Trainer makes it."""
        if len(self.batches) < self.n_steps:
            self.batches.append(np.array([self._numbers[id(row)] for row in rows]))
        return super().collate(rows)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a batch, which is noted."""
        loss = super().loss(model, batch)
        self.step_losses.append(float(loss.detach()))
        return loss

    def begin_update(self, optimizer: Any) -> None:
        """Note the rate, and keep the state before the step where it is its turn."""
        super().begin_update(optimizer)
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        step = len(self.rates) - 1
        if step == 0:
            self._begin(optimizer)
        if step % self._spacing == 0:
            self.kept.put(step, _state_of(self.parameters, optimizer))

    def _begin(self, optimizer: Any) -> None:
        """Note which parameters are trained, and choose after how many steps a state is kept."""
        self._optimizer = optimizer
        for group in optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            self.parameters += trained
            numbers = {name: group[name] for name in ("weight_decay", "betas", "eps")}
            self.groups.append({**numbers, "n_parameters": len(trained)})
        size = _state_of(self.parameters, optimizer).n_bytes
        self._spacing = 1 if (self.n_steps + 1) * size <= self._memory_bytes else math.ceil(math.sqrt(self.n_steps))

    def end_step(self) -> None:
        """Count a step, and keep the state after the last one."""
        super().end_step()
        if len(self.rates) == self.n_steps:
            self.kept.put(self.n_steps, _state_of(self.parameters, self._optimizer))

    def end_epoch(self) -> None:
        """Compare the weights with those of the run."""
        super().end_epoch()
        self._check(self.checkpoints[-1].step, self.classifier)
        self.is_over = len(self.checkpoints) == self._n_epochs


def _state_of(parameters: list[nn.Parameter], optimizer: Any) -> State:
    """A copy of weights and moments; moments are 0 before the first step."""
    moments = [optimizer.state.get(parameter, {}) for parameter in parameters]
    nothing = [torch.zeros_like(parameter, device="cpu") for parameter in parameters] if not all(moments) else []
    first, second = (
        nothing if nothing else copied([moment[name] for moment in moments]) for name in ("exp_avg", "exp_avg_sq")
    )
    return State(copied([p.data for p in parameters]), first, second)
