"""One course of training by transformers' Trainer: a step's loss, and the record of rates, losses and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.memory import refusing_lack
from forebear.indexer.model.loading import check_finite_weights
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.run import RunCheckpoint
from forebear.indexer.training.run_folder import CHECKPOINTS, save_checkpoint
from forebear.indexer.training.step_losses import StepLosses
from forebear.progress import Progress

MAX_GRAD_NORM = 1.0
RANDOM_NUMBERS = "by seed and step"  # of dropout; older versions drew them from one stream
FIXED = {
    "optimizer": "adamw_torch_fused", "scheduler": "linear", "max_grad_norm": MAX_GRAD_NORM,
    "random_numbers": RANDOM_NUMBERS,
}  # fmt: skip
NO_INPUTS = ("labels", "weight")  # what a row has besides word pieces: its target; perhaps its weight in the loss


class Evaluation(Protocol):
    """Development rows, on which every checkpoint is evaluated."""

    def measures(self) -> dict[str, float]:
        """The loss' measures of the predictions, by name; of one label a row ``accuracy`` alone."""


def seed_step(seed: int, step: int) -> None:
    """Let the random numbers of a training step follow from the seed and the step alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]))


class Course:
    """The loss of a step, and the record of rates, losses and checkpoints."""

    def __init__(
        self,
        classifier: Classifier,
        rows: list[dict[str, Any]],
        folder: Path,
        options: TrainOptions,
        evaluation: Evaluation | None,
        progress: Progress,
        *,
        lengths: Sequence[int] | None = None,
        saves: bool = True,
    ) -> None:
        self.lengths = list(lengths) if lengths is not None else [len(row["input_ids"]) for row in rows]
        self.classifier, self.rows, self.folder, self.options = classifier, rows, folder, options
        self.evaluation, self._progress, self._saves = evaluation, progress, saves
        n_steps = options.epochs * math.ceil(len(rows) / options.batch_size)
        self.plan = {"n_steps": n_steps, "warmup_steps": int(n_steps * options.warmup_ratio)}
        self.checkpoints: list[RunCheckpoint] = []
        self.is_over = False  # set at the end of an epoch, to train no further
        self._step = 0
        self._rates: list[float] = []  # learning rate of each step since the previous checkpoint
        self._losses = StepLosses(self._refusal)  # of these steps

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One padded batch, on the CPU."""
        inputs = [{key: row[key] for key in row if key not in NO_INPUTS} for row in rows]
        batch = pad_batch(self.classifier.tokenizer, inputs, torch.device("cpu"))
        return {**batch, **{key: torch.tensor([row[key] for row in rows]) for key in NO_INPUTS if key in rows[0]}}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a batch; refuses NaN and infinity."""
        labels = batch["labels"]
        logits = self.logits(model, batch, self._step)
        if "weight" in batch:
            loss = self.classifier.loss.weighted_mean(logits, labels, batch["weight"].to(logits))
        else:
            loss = self.classifier.loss.mean(logits, labels)
        self._losses.add(loss, self.classifier.loss.total_weight(labels))
        return loss

    def logits(
        self, model: nn.Module, batch: dict[str, torch.Tensor], step: int, *, twice: bool = False
    ) -> torch.Tensor:
        """Logits of a batch, ``(n, c)`` in at least float32, with the dropout of a step, counted from 0.

        Args:
            model: The network.
            batch: As :meth:`collate` makes it.
            step: Number of the step.
            twice: Whether they can be differentiated twice: attention is then computed from its formula, which gives
                other last bits than a fused kernel.
        """
        seed_step(self.options.seed, step)
        with self.classifier.arithmetic(), sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            logits: torch.Tensor = model(**{key: batch[key] for key in batch if key not in NO_INPUTS}).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _refusal(self, step: int, loss: float) -> str:
        return (
            f"the training loss is {loss} at step {step + 1} of {self.plan['n_steps']}; nothing of this epoch was "
            f"saved. Lower --learning-rate (now {self.options.learning_rate:g}), or try --precision fp32."
        )

    def begin_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the learning rate of a step, whose gradient is there and clipped, before it is taken."""
        self._rates.append(float(optimizer.param_groups[0]["lr"]))

    def end_step(self) -> None:
        """Count a step that was taken."""
        self._step += 1
        self._progress("training", self._step, self.plan["n_steps"])

    def end_epoch(self) -> None:
        """Check, evaluate and save the model."""
        name = f"epoch-{len(self.checkpoints) + 1}"
        self._losses.settle()
        check_finite_weights(self.classifier.model, f"the model after step {self._step}")
        measures = None if self.evaluation is None else self.evaluation.measures()
        path = f"{CHECKPOINTS}/{name}"
        if self._saves:
            save_checkpoint(self.classifier, self.folder / path)
        losses, self._losses.read = self._losses.read, []
        total_weight = math.fsum(weight for _loss, weight in losses)
        checkpoint = RunCheckpoint(
            name=name,
            path=path,
            step=self._step,
            eta=math.fsum(self._rates) / len(self._rates),
            train_loss=math.fsum(loss * weight for loss, weight in losses) / total_weight,
            accuracy=None if measures is None else measures.get("accuracy"),
            measures=None if measures is None or "accuracy" in measures else measures,
        )
        self.checkpoints.append(checkpoint)
        self._rates = []


def run_trainer(course: Course) -> None:
    """Hand the loop to transformers' Trainer, without its log, its bars and its checkpoints."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class CourseTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            return course.loss(model, inputs)

        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            order = torch.Generator().manual_seed(course.options.seed)
            return LengthGroupedSampler(course.options.batch_size, lengths=course.lengths, generator=order)

    class CourseCallback(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_args: Any, optimizer: Any, **_kwargs: Any) -> None:
            course.begin_update(optimizer)

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            course.end_step()

        def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
            course.end_epoch()
            control.should_training_stop |= course.is_over

    options = course.options
    arguments = TrainingArguments(
        output_dir=str(course.folder / CHECKPOINTS),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        weight_decay=options.weight_decay,
        warmup_steps=course.plan["warmup_steps"],
        optim=FIXED["optimizer"],
        lr_scheduler_type=FIXED["scheduler"],
        max_grad_norm=MAX_GRAD_NORM,
        remove_unused_columns=False,
        seed=options.seed,
        use_cpu=course.classifier.device.type == "cpu",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # would read the loss of each step
        accelerator_config={"non_blocking": True},  # batches are copied from pinned memory
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs would multiply the batch
    trainer = CourseTrainer(
        model=course.classifier.model,
        args=arguments,
        train_dataset=course.rows,
        data_collator=course.collate,
        callbacks=[CourseCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    subject, remedy = f"a training step of {options.batch_size} rows", "Train with a smaller --batch-size"
    device = course.classifier.device
    with repeatable(device), refusing_lack(subject, device, remedy):
        trainer.train()
    assert course.is_over or course.checkpoints[-1].step == course.plan["n_steps"]
