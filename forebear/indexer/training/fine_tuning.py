"""Fine-tuning a text classifier into a run folder: a checkpoint an epoch, and the facts that the index needs of each.

    OUT/
      run.json                what was trained on what, and each checkpoint's eta; written last
      checkpoints/epoch-1/    model and tokenizer as ``save_pretrained`` writes them, no optimiser state

The loop is transformers' Trainer: AdamW, linear warm-up and decay, gradients clipped at norm 1, rows grouped
by length. A folder without ``run.json`` is an unfinished run. The same seed, device and (on a CPU) thread count give
the same weights, with development rows or without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from forebear.errors import DataError, InputError
from forebear.indexer.losses.choices import weights_of_classes
from forebear.indexer.losses.kinds import check_one_label, loss_of
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on
from forebear.indexer.model.device.half import has_half_products
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import dropout_settings
from forebear.indexer.model.network.batches import tokenize
from forebear.indexer.model.network.pretrained import quiet_transformers
from forebear.indexer.model.reading import Reading, count_reading
from forebear.indexer.rows.labels import LabelMap, label_map
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.storage.locks import check_free, exclusive
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.course import FIXED, Course, run_trainer
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.run import Run
from forebear.indexer.training.run_folder import check_out, clear_out
from forebear.indexer.training.start import freeze_below, load_start
from forebear.progress import Progress, ignore_warning, no_progress, progress_of

__all__ = ["TrainOptions", "fine_tune", "train"]

BLOCK_ROWS = 4096
LIBRARIES = ("forebear", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


def train(
    source: RowSource,
    model: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    dev: RowSource | None = None,
    force: bool = False,
    progress: Progress | bool = no_progress,
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
        progress: Called with the stage (``reading rows``, ``training``, ``evaluating``); True: the usual bar.
        warn: Called before the first step if many words are unknown to the tokenizer, or many rows are cut.

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
        return _train(source, model, folder, options, dev, progress_of(progress), warn)


def _train(
    source: RowSource,
    model: str | Path,
    folder: Path,
    options: TrainOptions,
    dev: RowSource | None,
    progress: Progress,
    warn: Callable[[str | None], None],
) -> Run:
    check_one_label(source.problem_type, options.class_weights, options.label_smoothing)
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
        problem_type = source.problem_type
        labels = label_map(source, classifier.label_names, options.label_mode, problem_type=problem_type)
        counts = labels.n_rows_by_class(classifier.n_classes)
        weights = weights_of_classes(options.class_weights, classifier.label_names, counts, source.name)
        options = replace(options, max_length=classifier.max_length, class_weights=weights)
        classifier = replace(classifier, loss=loss_of(problem_type, weights, options.label_smoothing))
        rows, reading = _encode_labelled(source, classifier, labels, progress)
        for warning in reading.warnings(classifier.max_length, f"the rows of {source.name}"):
            warn(warning)
        data_sha256 = source.sha256()
        evaluation = None if dev is None else _Evaluation(dev, source, classifier, options.label_mode, progress)
        clear_out(folder)
        course = Course(classifier, rows, folder, options, evaluation, progress)
        run_trainer(course)
    run = _describe_run(course, evaluation, source, model, data_sha256, head)
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
        rows: Word pieces by name, and the class id (or ``IGNORED``) under ``labels``, one dictionary a row; either
            none or all of them with a number under ``weight``, by which their losses are weighted.
        options: Epochs, rates, batch size and seed are taken from here; what is frozen, from the model.
        lengths: Lengths by which rows are grouped into batches; None: their numbers of word pieces.
        progress: Called with the stage, and the steps done and in all.

    Raises:
        NonFiniteError: The loss or a weight became NaN or infinite.
    """
    with quiet_transformers(), TemporaryDirectory() as scratch:
        course = Course(classifier, rows, Path(scratch), options, None, progress, lengths=lengths, saves=False)
        run_trainer(course)
    classifier.model.eval()


def _describe_run(
    course: Course, evaluation: _Evaluation | None, source: RowSource, model: str | Path, data_sha256: str, head: str
) -> Run:
    """The content of ``run.json`` for a finished course."""
    classifier, options = course.classifier, course.options
    settings = {**asdict(options), **FIXED, **course.plan, "head": head, "start_sha256": classifier.sha256}
    settings |= {"n_rows": source.n_rows, "unlabelled": source.unlabelled, "threads": torch.get_num_threads()}
    settings["class_weights"] = list(options.class_weights)
    settings["computed_on"] = computed_on(classifier.device, classifier.precision)
    settings["dropout"] = dropout_settings(classifier.model)
    if source.problem_type != SINGLE_LABEL:
        settings["problem_type"] = source.problem_type
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
        row_format=source.format("the run").stated(),
    )


def _pick_training_device(name: str) -> torch.device:
    """The CPU or the first CUDA device: Trainer knows no other."""
    device = pick_device(name)
    if device.type not in ("cpu", "cuda"):
        raise _no_training_device(device)
    refuse_other_gpus(device)
    return device


def refuse_other_gpus(device: torch.device) -> None:
    """Refuse a GPU other than the first: Trainer would train on the first one.

    Raises:
        InputError: It is another one.
    """
    if device.type == "cuda" and device.index not in (None, 0):
        raise _no_training_device(device)


def _no_training_device(device: torch.device) -> InputError:
    return InputError(
        f"device '{device}': training runs on cpu or on the first CUDA device. Choose a GPU by CUDA_VISIBLE_DEVICES."
    )


def _pick_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 where the device has products of it."""
    return precision if precision != "auto" else "bf16" if has_half_products(device) else "fp32"


def _encode_labelled(
    source: RowSource, classifier: Classifier, labels: LabelMap | TargetMap, progress: Progress
) -> tuple[list[dict[str, Any]], Reading]:
    """Word pieces and target of every row, and how much of them the model reads.

    Raises:
        DataError: All rows have the same target.
    """
    rows: list[dict[str, Any]] = []
    reading = Reading()
    for block in source.blocks(BLOCK_ROWS):
        ids = labels(block.labels or [], block.start)
        encoded = tokenize(classifier.tokenizer, block.texts, classifier.max_length)
        reading += count_reading(classifier.tokenizer, block.texts, encoded, classifier.max_length)
        for row, label in zip(encoded, ids, strict=True):
            pieces = {key: np.asarray(values, dtype=np.int32) for key, values in row.items()}
            rows.append({**pieces, "labels": label.tolist()})
        progress("reading rows", len(rows), source.n_rows)
    targets = np.array([row["labels"] for row in rows])
    if (targets == targets[0]).all():
        (only,) = classifier.loss.texts(targets[:1], classifier.label_names)
        raise DataError(f"every row of {source.name} is {only}; training needs rows of two or more.")
    return rows, reading


class _Evaluation:
    """How well the model predicts the development rows."""

    def __init__(
        self, dev: RowSource, source: RowSource, classifier: Classifier, mode: str | None, progress: Progress
    ) -> None:
        if len(dev.text_columns) != len(source.text_columns):
            raise DataError(
                f"{dev.name} has the text column(s) {', '.join(dev.text_columns)}, the training rows "
                f"{', '.join(source.text_columns)}; expected as many. Name them by --text-columns."
            )
        self._dev, self._classifier, self._progress = dev, classifier, progress
        self._loss: Loss = classifier.loss
        labels = label_map(dev, classifier.label_names, mode, problem_type=self._loss.problem_type)
        self._targets = np.concatenate([labels(b.labels or [], b.start) for b in dev.blocks(BLOCK_ROWS)])  # refuses -1
        self._warning = labels.warning

    def measures(self) -> dict[str, float]:
        """The loss' measures of the predictions: of one label a row the share that is right."""
        self._classifier.model.eval()
        predictions = []
        for block in self._dev.blocks(BLOCK_ROWS):
            predictions.append(run_forward(self._classifier, block.texts, first_row=block.start).predictions)
            self._progress("evaluating", block.start + len(block), self._dev.n_rows)
        return self._loss.measures(np.concatenate(predictions), self._targets)

    def record(self) -> dict[str, Any]:
        """The facts about the development rows for ``run.json``."""
        dev = self._dev
        return {"data": dev.name, "sha256": dev.sha256(), "n_rows": dev.n_rows, "warning": self._warning}
