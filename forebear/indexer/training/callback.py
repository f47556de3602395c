"""A callback of transformers' Trainer, by which its output folder becomes a run that forebear reads.

    from forebear import ForebearCallback
    trainer = Trainer(..., processing_class=tokenizer, callbacks=[ForebearCallback("train.csv")])

``run.json`` is written beside the ``checkpoint-N`` folders at every save, so that a run that was interrupted can be
indexed as far as it came. The learning rate is noted at every step: eta does not depend on what Trainer logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from forebear.errors import InputError, ModelError
from forebear.indexer.losses.choices import check_loss_choices
from forebear.indexer.losses.kinds import check_one_label
from forebear.indexer.model.network.pretrained import trainer_checkpoints
from forebear.indexer.model.network.tokenizer import input_limit
from forebear.indexer.rows.labels import names_of_classes
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.label_column import DROP_MARKED
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.model_choice import ColumnKeywords
from forebear.indexer.training.run import Run, RunCheckpoint, read_run
from forebear.indexer.training.run_folder import save_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

SETTINGS = (
    "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay",
    "warmup_steps", "lr_scheduler_type", "optim", "max_grad_norm", "seed", "bf16", "fp16",
)  # fmt: skip


class ForebearCallback(TrainerCallback):  # type: ignore[misc]
    """Leaves ``run.json`` in the output folder of a Trainer."""

    def __init__(
        self,
        rows: Any,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        class_weights: Sequence[float] = (),
        **columns: Unpack[ColumnKeywords],
    ) -> None:
        """Open the training rows.

        Args:
            rows: The training rows as texts and labels: what ``open_rows`` takes, such as a file, a
                ``datasets.Dataset`` before it is tokenized, a DataFrame; or opened rows.
            tokenizer: Default: Trainer's ``processing_class``.
            max_length: Longest input in word pieces. Default: at what length the tokenizer last cut texts, else the
                model's limit.
            class_weights: One positive number a class, by id, if the script's loss has such factors. (Label smoothing
                is read from Trainer's arguments.)
            **columns: Columns of the rows, as ``open_rows`` takes them.

        Raises:
            DataError: The rows cannot be read as labelled text.
            InputError: A class weight is not positive.
        """
        if not isinstance(rows, RowSource):
            how: Any = {**columns, "unlabelled": columns.get("unlabelled") or DROP_MARKED}
            rows = open_rows(rows, need_labels=True, **how)
        self._source: RowSource = rows
        self._tokenizer, self._max_length = tokenizer, max_length
        check_loss_choices(tuple(class_weights), 0.0)
        check_one_label(self._source.problem_type, tuple(class_weights), 0.0)
        self._class_weights = tuple(class_weights)
        self._rates: list[float] = []  # learning rate of every step
        self._optimizer: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check that a run folder can be written; take up the rates of a run that is resumed.

        Raises:
            InputError: There is no tokenizer, or the run was begun without this callback.
        """
        self._tokenizer = self._tokenizer or given.get("processing_class")
        if not hasattr(self._tokenizer, "save_pretrained"):
            raise InputError(
                "ForebearCallback has no tokenizer to save with the checkpoints. Give Trainer "
                "processing_class=tokenizer, or give ForebearCallback tokenizer=tokenizer."
            )
        self._rates = []
        if state.global_step:
            run = read_run(Path(args.output_dir))
            steps = {} if run is None else {c.step: c.eta for c in run.checkpoints if c.step <= state.global_step}
            if state.global_step not in steps:
                raise InputError(
                    f"{args.output_dir} is resumed at step {state.global_step}, which ForebearCallback did not see, so "
                    "the learning rates before it are not known. Train from the start; or leave the callback out, and "
                    "index by --checkpoints all, with the rates that Trainer logged."
                )
            for step, eta in steps.items():
                self._rates += [eta] * (step - len(self._rates))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **given: Any) -> None:
        """Note the learning rate of a step, and what takes it, before it is taken."""
        self._rates.append(float(optimizer.param_groups[0]["lr"]))
        self._optimizer = _optimizer_facts(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Give the checkpoint its tokenizer, and write ``run.json``."""
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._write(args, state, given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the model as it is at the end, where Trainer did not, and write ``run.json``."""
        if not state.is_world_process_zero:
            return
        last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not last.is_dir():
            save_model(given["model"], self._tokenizer, last)
        self._write(args, state, given["model"])

    @cached_property
    def _rows_sha256(self) -> str:
        """Digest of the rows, of which one pass is enough for all checkpoints."""
        return self._source.sha256()

    def _write(self, args: Any, state: Any, model: Any) -> None:
        """Write the record of the checkpoints that are there: Trainer removes old ones (``save_total_limit``)."""
        folder, config = Path(args.output_dir), model.config
        checkpoints, before = [], 0
        for path in trainer_checkpoints(folder):
            step = int(path.name.rpartition("-")[2])
            if step > len(self._rates):  # of another run in this folder
                continue
            rates = self._rates[before:step]
            losses = [e["loss"] for e in state.log_history if "loss" in e and before < e["step"] <= step]
            checkpoints.append(
                RunCheckpoint(
                    name=path.name,
                    path=path.name,
                    step=step,
                    eta=math.fsum(rates) / len(rates),
                    train_loss=math.fsum(losses) / len(losses) if losses else None,
                )
            )
            before = step
        Run(
            base_model=str(getattr(config, "_name_or_path", "")),
            data=self._source.name,
            data_sha256=self._rows_sha256,
            text_columns=self._source.text_columns,
            row_format=self._source.format("the run").stated(),
            label_names=names_of_classes(
                tuple(str(config.id2label[i]) for i in range(config.num_labels)), self._source
            ),
            label_mode=None,
            max_length=self._length(model),
            settings={
                "trainer": True,
                "n_rows": self._source.n_rows,
                "unlabelled": self._source.unlabelled,
                "class_weights": list(self._class_weights),
                "label_smoothing": args.label_smoothing_factor,
                "optimizer": self._optimizer,
            }
            | ({} if self._source.problem_type == SINGLE_LABEL else {"problem_type": self._source.problem_type})
            | {name: _plain(getattr(args, name)) for name in SETTINGS if hasattr(args, name)},
            checkpoints=tuple(checkpoints),
            libraries=library_versions(),
        ).write(folder)

    def _length(self, model: Any) -> int:
        """Longest input in word pieces."""
        cut = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "truncation", None) or {}
        asked = self._max_length or cut.get("max_length")
        try:
            return input_limit(model, self._tokenizer, asked, "the model")
        except (InputError, ModelError):  # the tokenizer cuts for something else
            return input_limit(model, self._tokenizer, None, "the model")


def _optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """Name of an optimizer, its largest momentum and weight decay, and whether parameters have different rates."""
    groups = optimizer.param_groups
    return {
        "name": type(getattr(optimizer, "optimizer", optimizer)).__name__,  # accelerate wraps it
        "momentum": max(float(group.get("momentum", 0.0)) for group in groups),
        "weight_decay": max(float(group.get("weight_decay", 0.0)) for group in groups),
        "several_rates": len({float(group["lr"]) for group in groups}) > 1,
    }


def _plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else getattr(value, "value", str(value))
