"""Fine-tuning a text classifier into a run folder: a checkpoint an epoch, and what the index must know of each.

    OUT/
      run.json                what was trained on what, and each checkpoint's eta; written last
      checkpoints/epoch-1/    model and tokenizer as ``save_pretrained`` writes them, no optimiser state

The loop is transformers' Trainer: AdamW, linear warm-up and decay, gradients clipped at norm 1, rows grouped
by length. A folder without ``run.json`` is an unfinished run. On a CPU the same seed and thread count give the
same weights, with development rows or without; a GPU may sum in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import DataError, InputError, NonFiniteError
from forebear.indexer.model.classifier import Classifier, pick_device
from forebear.indexer.model.encoding import pad_batch, tokenize
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import check_finite_weights, dropout_settings
from forebear.indexer.model.pretrained import quiet_transformers
from forebear.indexer.model.reading import Reading, count_reading
from forebear.indexer.rows.labels import label_map
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.storage.locks import check_free, exclusive
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.run import Run, RunCheckpoint
from forebear.indexer.training.run_folder import CHECKPOINTS, check_out, clear_out, save_checkpoint
from forebear.indexer.training.start import freeze_below, load_start
from forebear.progress import Progress, ignore_warning, no_progress

MAX_GRAD_NORM = 1.0
IGNORED = -100  # in the place of a class id: the row weighs nothing
BLOCK_ROWS = 4096
LIBRARIES = ("forebear", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
RANDOM_NUMBERS = "by seed and step"  # of dropout; before, in one stream
FIXED = {
    "optimizer": "adamw_torch_fused", "scheduler": "linear", "max_grad_norm": MAX_GRAD_NORM,
    "random_numbers": RANDOM_NUMBERS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Every choice that changes the weights, beside the rows and the model.

    Attributes:
        epochs: Passes over the rows; each ends in a checkpoint.
        learning_rate: The highest rate, reached after the warm-up and falling linearly to 0.
        batch_size: Rows a step.
        weight_decay: AdamW's, on weights but not on biases and LayerNorm.
        warmup_ratio: Share of the steps, rounded down, in which the rate rises from 0.
        freeze_below: Keep everything in the base model fixed but encoder layers >= this and the pooler.
        label_mode: ``binary-nli`` merges neutral and contradiction.
        max_length: Longest input in word pieces; default 128, or the model's limit if that is shorter.
        precision: ``bf16``, ``fp32``, or ``auto``: bf16 where the device computes in it natively.
        seed: Of the new head, the order of the rows and dropout.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    freeze_below: int | None = None
    label_mode: str | None = None
    max_length: int | None = None
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a positive number"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_ratio": (0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
            "precision": (self.precision in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        }
        for name, (is_right, expected) in checks.items():
            if not is_right:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}.")


def train(
    source: RowSource,
    model: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    dev: RowSource | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    warn: Callable[[str | None], None] = ignore_warning,
) -> Run:
    """Fine-tune a classifier on labelled rows and write the run folder.

    A head stored with the source's label names is trained on, in its own order of classes; any other model
    gets a new head.

    Args:
        source: Training rows.
        model: A model folder, a hub name, or ``minilm``.
        out: The run folder to write.
        options: Default :class:`TrainOptions`.
        dev: Rows on which each checkpoint's accuracy is recorded, in the precision of the training.
        force: Replace an earlier run in ``out``; only files of such a run are removed.
        progress: Told of each stage (``reading rows``, ``training``, ``evaluating``).
        warn: Told before the first step where many words are unknown to the tokenizer, or many rows are cut.

    Returns:
        What was written to ``run.json``.

    Raises:
        DataError: The rows hold fewer than two classes, or labels that cannot be mapped.
        ModelError: The model is no text classifier with a linear head, or its layers cannot be frozen.
        OutputExistsError: ``out`` is not empty.
        InUseError: Another process is writing there.
        NonFiniteError: The loss or a weight became NaN or infinite; that epoch is not saved.
        StorageError: A checkpoint cannot be written.
    """
    options = options or TrainOptions()
    folder = Path(out)
    check_free(folder / LOCK_NAME, str(folder))
    check_out(folder, force)
    with exclusive(folder / LOCK_NAME, str(folder)):
        check_out(folder, force)
        return _train(source, model, folder, options, dev, progress, warn)


def _train(
    source: RowSource,
    model: str | Path,
    folder: Path,
    options: TrainOptions,
    dev: RowSource | None,
    progress: Progress,
    warn: Callable[[str | None], None],
) -> Run:
    device = _pick_training_device(options.device)
    options = replace(options, precision=_pick_precision(options.precision, device), device=device.type)
    with quiet_transformers():
        classifier, head = load_start(
            source,
            str(model),
            label_mode=options.label_mode,
            max_length=options.max_length,
            precision=options.precision,
            seed=options.seed,
            device=device,
        )
        if options.freeze_below is not None:
            freeze_below(classifier.model, options.freeze_below, classifier.name)
        options = replace(options, max_length=classifier.max_length)
        rows, reading = _encode_labelled(source, classifier, options.label_mode, progress)
        for warning in reading.warnings(classifier.max_length, f"the rows of {source.name}"):
            warn(warning)
        data_sha256 = source.sha256()
        evaluation = None if dev is None else _Evaluation(dev, source, classifier, options.label_mode, progress)
        clear_out(folder)
        course = _Course(classifier, rows, folder, options, evaluation, progress)
        _run_trainer(course)
    run = _describe_run(course, source, model, data_sha256, head)
    run.write(folder)
    return run


def fine_tune(
    classifier: Classifier,
    rows: list[dict[str, Any]],
    options: TrainOptions,
    *,
    lengths: Sequence[int] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Train a classifier in memory by the loop of :func:`train`, writing nothing.

    Args:
        classifier: As :func:`~forebear.indexer.training.start.load_start` makes it; left trained, in ``eval()`` mode.
        rows: Word pieces by name, and the class id (or ``IGNORED``) under ``labels``, one dictionary a row.
        options: Epochs, rates, batch size and seed are taken from here; what is frozen, from the model.
        lengths: By which rows are grouped into batches; None: their numbers of word pieces.
        progress: Told of the steps.

    Raises:
        NonFiniteError: The loss or a weight became NaN or infinite.
    """
    with quiet_transformers(), TemporaryDirectory() as scratch:
        course = _Course(classifier, rows, Path(scratch), options, None, progress, lengths=lengths, saves=False)
        _run_trainer(course)
    classifier.model.eval()


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a batch ``(b, c)`` in nats, over the rows that are not ``IGNORED``; 0 if all are."""
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def seed_step(seed: int, step: int) -> None:
    """Let the random numbers of a training step follow from the seed and the step alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]))


def _describe_run(course: _Course, source: RowSource, model: str | Path, data_sha256: str, head: str) -> Run:
    """What ``run.json`` says of a finished course."""
    classifier, options, evaluation = course.classifier, course.options, course.evaluation
    settings = {**asdict(options), **FIXED, **course.plan, "head": head, "start_sha256": classifier.sha256}
    settings |= {"n_rows": source.n_rows, "threads": torch.get_num_threads()}
    settings["dropout"] = dropout_settings(classifier.model)
    settings["dev"] = None if evaluation is None else evaluation.record()
    return Run(
        base_model=str(Path(model).resolve()) if Path(model).is_dir() else str(model),
        data=source.name,
        data_sha256=data_sha256,
        text_columns=source.text_columns,
        label_names=classifier.label_names,
        label_mode=options.label_mode,
        max_length=classifier.max_length,
        settings=settings,
        checkpoints=tuple(course.checkpoints),
        libraries=library_versions(LIBRARIES),
    )


def _pick_training_device(name: str) -> torch.device:
    """The CPU or the first CUDA device: Trainer knows no other."""
    device = pick_device(name)
    if device.type not in ("cpu", "cuda") or device.index not in (None, 0):
        raise InputError(
            f"device {name!r}: training runs on cpu or on the first CUDA device. Choose a GPU by CUDA_VISIBLE_DEVICES."
        )
    return device


def _pick_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 where it is native (elsewhere it is emulated, and slower than fp32)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "fp32"
    return "bf16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"


def _encode_labelled(
    source: RowSource, classifier: Classifier, mode: str | None, progress: Progress
) -> tuple[list[dict[str, Any]], Reading]:
    """Word pieces and class id of every row, and how much of them the model reads.

    Raises:
        DataError: Fewer than two classes occur.
    """
    labels = label_map(source, classifier.label_names, mode)
    rows: list[dict[str, Any]] = []
    reading = Reading()
    for block in source.blocks(BLOCK_ROWS):
        ids = labels(block.labels or [], block.start)
        encoded = tokenize(classifier.tokenizer, block.texts, classifier.max_length)
        reading += count_reading(classifier.tokenizer, block.texts, encoded, classifier.max_length)
        for row, label in zip(encoded, ids, strict=True):
            pieces = {key: np.asarray(values, dtype=np.int32) for key, values in row.items()}
            rows.append({**pieces, "labels": int(label)})
        progress("reading rows", len(rows), source.n_rows)
    found = {row["labels"] for row in rows}
    if len(found) < 2:
        only = classifier.label_names[found.pop()]
        raise DataError(f"every row of {source.name} is {only}; a classifier needs rows of two classes or more.")
    return rows, reading


class _Evaluation:
    """Accuracy on the development rows."""

    def __init__(
        self, dev: RowSource, source: RowSource, classifier: Classifier, mode: str | None, progress: Progress
    ) -> None:
        if len(dev.text_columns) != len(source.text_columns):
            raise DataError(
                f"{dev.name} has the text column(s) {', '.join(dev.text_columns)}, the training rows "
                f"{', '.join(source.text_columns)}; expected as many. Name them by --text-columns."
            )
        self._dev, self._classifier, self._progress = dev, classifier, progress
        labels = label_map(dev, classifier.label_names, mode)
        self._ids = np.concatenate([labels(b.labels or [], b.start) for b in dev.blocks(BLOCK_ROWS)])  # refuses -1
        self._warning = labels.warning

    def accuracy(self) -> float:
        """Share of rows whose most probable class is their label."""
        self._classifier.model.eval()
        n_right = 0
        for block in self._dev.blocks(BLOCK_ROWS):
            predictions = run_forward(self._classifier, block.texts, first_row=block.start).predictions
            n_right += int((predictions == self._ids[block.start : block.start + len(block)]).sum())
            self._progress("evaluating", block.start + len(block), self._dev.n_rows)
        return n_right / self._dev.n_rows

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says of the rows."""
        dev = self._dev
        return {"data": dev.name, "sha256": dev.sha256(), "n_rows": dev.n_rows, "warning": self._warning}


class _Course:
    """The loss of a step, and the record of rates, losses and checkpoints."""

    def __init__(
        self,
        classifier: Classifier,
        rows: list[dict[str, Any]],
        folder: Path,
        options: TrainOptions,
        evaluation: _Evaluation | None,
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
        self._step = 0
        self._rates: list[float] = []  # since the previous checkpoint, one a step
        self._losses: list[tuple[float, int]] = []  # likewise: mean over the batch, rows in it

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One padded batch, on the CPU."""
        inputs = [{key: row[key] for key in row if key != "labels"} for row in rows]
        batch = pad_batch(self.classifier.tokenizer, inputs, torch.device("cpu"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of a batch, in nats; refuses NaN and infinity."""
        labels = batch["labels"]
        seed_step(self.options.seed, self._step)
        with self.classifier.autocast():
            logits = model(**{key: batch[key] for key in batch if key != "labels"}).logits
        loss = mean_loss(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the training loss is {value} at step {self._step + 1} of {self.plan['n_steps']}; nothing of this "
                f"epoch was saved. Lower --learning-rate (now {self.options.learning_rate:g}), or try --precision fp32."
            )
        self._losses.append((value, int((labels != IGNORED).sum())))
        return loss

    def note_rate(self, rate: float) -> None:
        """Before each step: the learning rate that it is taken with."""
        self._rates.append(rate)

    def end_step(self) -> None:
        """After each step."""
        self._step += 1
        self._progress("training", self._step, self.plan["n_steps"])

    def end_epoch(self) -> None:
        """Check, evaluate and save the model."""
        name = f"epoch-{len(self.checkpoints) + 1}"
        check_finite_weights(self.classifier.model, f"the model after step {self._step}")
        accuracy = None if self.evaluation is None else self.evaluation.accuracy()
        path = f"{CHECKPOINTS}/{name}"
        if self._saves:
            save_checkpoint(self.classifier, self.folder / path)
        n_rows = sum(n for _loss, n in self._losses)
        checkpoint = RunCheckpoint(
            name=name,
            path=path,
            step=self._step,
            eta=math.fsum(self._rates) / len(self._rates),
            train_loss=math.fsum(loss * n for loss, n in self._losses) / n_rows,
            accuracy=accuracy,
        )
        self.checkpoints.append(checkpoint)
        self._rates, self._losses = [], []


def _run_trainer(course: _Course) -> None:
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
            course.note_rate(float(optimizer.param_groups[0]["lr"]))

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            course.end_step()

        def on_epoch_end(self, *_args: Any, **_kwargs: Any) -> None:
            course.end_epoch()

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
    trainer.train()
    assert course.checkpoints[-1].step == course.plan["n_steps"]
