"""The choice of the model and checkpoints to index, of a run or not, and the paths by which an index finds them."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from forebear.errors import InputError
from forebear.indexer.losses.kinds import problem_type_of_config
from forebear.indexer.model.network.pretrained import stored_config, trainer_checkpoints, trainer_rates
from forebear.indexer.rows.files.file_formats import holds_dicts
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_format import SINGLE_LABEL, RowFormat
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.label_column import DROP_MARKED
from forebear.indexer.storage.manifest import Checkpoint
from forebear.indexer.training.run import RUN_NAME, Run, read_run, run_of_checkpoint
from forebear.wording import worded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ColumnKeywords(TypedDict, total=False):
    """Which columns of rows are meant; see :func:`~forebear.indexer.rows.opening.open_rows`."""

    text_columns: Sequence[str] | None
    label_column: str | Sequence[str] | None
    label_names: Sequence[str] | None
    unlabelled: str | None
    delimiter: str | None
    encoding: str | None
    problem_type: str | None


class LossChoices(TypedDict):
    """What is chosen of the loss; arguments of :class:`~forebear.indexer.losses.cross_entropy.CrossEntropy`."""

    class_weights: tuple[float, ...]
    label_smoothing: float


@dataclass(frozen=True, kw_only=True)
class CheckpointPath:
    """A checkpoint to index: its name, its path, and its weight eta in TracIn."""

    name: str
    path: str
    eta: float


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Checkpoints in training order (the last one is explained), and what the run recorded about its data.

    Attributes:
        checkpoints: In training order.
        label_mode: The run's label mode; None without a run, as are the attributes below.
        max_length: Longest input in word pieces.
        run: The content of ``run.json``.
        remark: One line for the user on where eta comes from, if neither the user nor a run gives it; on a model beside
            a Trainer's checkpoints that is none of them; on the run that the folders given lie in. Else None.
    """

    checkpoints: tuple[CheckpointPath, ...]
    label_mode: str | None = None
    max_length: int | None = None
    run: Run | None = None
    remark: str | None = None

    @property
    def loss_choices(self) -> LossChoices:
        """Class weights and label smoothing of the run, as its settings have them; none without a run."""
        settings = {} if self.run is None else self.run.settings
        return {
            "class_weights": tuple(settings.get("class_weights") or ()),
            "label_smoothing": float(settings.get("label_smoothing") or 0.0),
        }

    def class_names(self) -> tuple[str, ...]:
        """The model's class names, from the run or from the model's files; empty where they cannot be read."""
        if self.run is not None:
            return self.run.label_names
        config = self._config
        return () if config is None else tuple(map(str, config.id2label.values()))

    @cached_property
    def _config(self) -> Any:
        return stored_config(self.checkpoints[-1].path)

    @property
    def problem_type(self) -> str | None:
        """What a row's target is, from the run or from the model's files; None where they cannot be read."""
        if self.run is not None:
            return str(self.run.settings.get("problem_type", SINGLE_LABEL))
        return None if self._config is None else problem_type_of_config(self._config)

    @property
    def row_format(self) -> RowFormat:
        """How the run read its rows; without a run the problem type alone is known."""
        if self.run is None:
            return RowFormat(problem_type=self.problem_type)
        stated = {"text_columns": list(self.run.text_columns)} | self.run.row_format
        return RowFormat.of(stated, "the run", self.problem_type)

    @property
    def unlabelled(self) -> str:
        """What becomes of training rows without a label if the user does not say.

        A run hands on ``drop`` and ``keep``, which decided its rows. One that refused any had no such rows, so that the
        default, ``drop-marked``, gives the same rows.
        """
        recorded = None if self.run is None else self.run.settings.get("unlabelled")
        return str(recorded) if recorded in ("drop", "keep") else DROP_MARKED

    def open_rows(self, rows: Any, labels: Sequence[Any] | None = None, **columns: Unpack[ColumnKeywords]) -> RowSource:
        """The training rows: read as the run read its own, where nothing else is given.

        Args:
            rows: A path, hub name or table, as :func:`~forebear.indexer.rows.opening.open_rows` takes; or texts, or
                pairs of texts; or rows that are open already, which stay as they are.
            labels: Where ``rows`` are texts or pairs of texts: one label for each.
            **columns: Keyword arguments of :func:`~forebear.indexer.rows.opening.open_rows`.

        Raises:
            InputError: Texts without labels, or labels for rows that have their own.
            DataError: The rows cannot be read as labelled text.
        """
        if isinstance(rows, (list, tuple)) and not holds_dicts(rows):
            if labels is None:
                raise InputError("the training rows are texts without labels. Give labels, one a text.")
            names: dict[str, Any] = {key: columns.get(key) for key in ("text_columns", "label_names")}
            names |= {"classes": self.class_names(), "problem_type": columns.get("problem_type") or self.problem_type}
            names["unlabelled"] = columns.get("unlabelled") or self.unlabelled
            names["like"] = RowFormat(label_lists=self.row_format.label_lists)
            return rows_from_texts(rows, labels, **names)
        if labels is not None:
            raise InputError("labels are given for rows that have their own. Give labels for a list of texts alone.")
        if isinstance(rows, RowSource):
            return rows
        how: Any = {**columns, "unlabelled": columns.get("unlabelled") or self.unlabelled}
        return open_rows(rows, need_labels=True, classes=self.class_names(), like=self.row_format, **how)

    def data_remark(self, source: RowSource) -> str | None:
        """One line if the source's digest says that the run was trained on other rows; None if not, or without a run.

        Passes over the rows once.
        """
        if self.run is None:
            return None
        n_rows = self.run.settings.get("n_rows")
        sha256 = source.sha256()
        if sha256 == self.run.data_sha256:
            return None
        trained_on = f"{self.run.data} ({n_rows:,} rows, " if isinstance(n_rows, int) else f"{self.run.data} ("
        return (
            f"{source.name} ({source.n_rows:,} rows, sha256 {sha256[:12]}) is not what the run was trained on, "
            f"{trained_on}sha256 {self.run.data_sha256[:12]}); the model may not have seen these rows"
        )


def choose_model(model: str | None, checkpoints: Sequence[str] = (), etas: Sequence[float] = ()) -> ModelChoice:
    """Resolve ``--model``, ``--checkpoints`` and ``--eta``.

    Args:
        model: A run folder, a model folder or a hub name; may be None when checkpoints are paths. Where all folders
            given are checkpoints of one run, its record counts as where the run's folder is given.
        checkpoints: Empty (last one only), ``all`` (of a run, or of a Trainer's output folder), names of the run's
            checkpoints, or model folders.
        etas: One weight a checkpoint; default the run's record, else the mean rates that a Trainer logged, else 1.

    Raises:
        InputError: The three do not fit together, or a checkpoint does not exist.
    """
    run = read_run(Path(model)) if model is not None else None
    within = None if run is not None else _run_around(model, checkpoints)
    remarks = []
    if run is not None:
        assert model is not None
        chosen = _of_run(run, Path(model), list(checkpoints))
    elif within is not None:
        folder, run, chosen = within
        names = ", ".join(c.name for c in chosen)
        remarks.append(
            f"{chosen[-1].path} lies in the run {folder} ({names}): eta, length, loss and columns of rows are those "
            f"of its {RUN_NAME}, where nothing else is given"
        )
    elif not checkpoints:
        if model is None:
            raise InputError("no model given. Name one by --model, or its checkpoints by --checkpoints.")
        chosen = [CheckpointPath(name="final", path=model, eta=1.0)]
    elif list(checkpoints) == ["all"] and model is not None and (folders := trainer_checkpoints(Path(model))):
        chosen = [CheckpointPath(name=path.name, path=str(path), eta=1.0) for path in folders]
    elif list(checkpoints) == ["all"]:
        raise InputError(
            f"--checkpoints all needs a run folder (with {RUN_NAME}) or the output folder of a Trainer (with "
            f"checkpoint-N folders); {model} is none. List the checkpoint folders."
        )
    else:
        if model is not None and (missing := [path for path in checkpoints if not Path(path).exists()]):
            raise InputError(
                f"there is no checkpoint folder {missing[0]}; names of checkpoints need a run folder as --model (with "
                f"{RUN_NAME}), and {model} is none. Give the folders themselves."
            )
        chosen = [CheckpointPath(name=f"checkpoint-{i + 1}", path=path, eta=1.0) for i, path in enumerate(checkpoints)]
        if model is not None and Path(model).resolve() != Path(checkpoints[-1]).resolve():
            chosen.append(CheckpointPath(name="final", path=model, eta=1.0))
    if run is None and not etas and (len(chosen) > 1 or list(checkpoints) == ["all"]):
        chosen, remark = _with_logged_rates(chosen)
        remarks.append(remark)
    if run is None and model is not None and list(checkpoints) == ["all"] and _is_another_model(model, chosen[-1].path):
        remarks.append(
            f"{model} holds a model of its own beside its checkpoints; what is explained is the last one, "
            f"{chosen[-1].name}"
        )
    if etas:
        if len(etas) != len(chosen):
            raise InputError(
                f"--eta has {len(etas)} value(s) for {len(chosen)} checkpoint(s): give one each, in the same order."
            )
        if not all(0 < eta < float("inf") for eta in etas):
            raise InputError(f"--eta {' '.join(map(str, etas))}: expected positive numbers.")
        chosen = [CheckpointPath(name=c.name, path=c.path, eta=eta) for c, eta in zip(chosen, etas, strict=True)]
    if run is None:
        return ModelChoice(checkpoints=tuple(chosen), remark="; ".join(remarks) or None)
    return ModelChoice(
        checkpoints=tuple(chosen),
        label_mode=run.label_mode,
        max_length=run.max_length,
        run=run,
        remark="; ".join(remarks) or None,
    )


def _run_around(model: str | None, checkpoints: Sequence[str]) -> tuple[Path, Run, list[CheckpointPath]] | None:
    """The run that all folders given are checkpoints of, and these checkpoints, in the order given; None without."""
    paths = list(checkpoints)
    if model is not None and (not paths or Path(model).resolve() != Path(paths[-1]).resolve()):
        paths.append(model)
    found = [one for path in paths if (one := run_of_checkpoint(path)) is not None]
    if not paths or len(found) < len(paths) or len({folder for folder, _, _ in found}) > 1:
        return None
    folder, run, _ = found[0]
    chosen = [CheckpointPath(name=c.name, path=path, eta=c.eta) for path, (_, _, c) in zip(paths, found, strict=True)]
    return folder, run, chosen


def _is_another_model(folder: str, checkpoint: str) -> bool:
    """Whether a Trainer's output folder holds weights that are not those of a checkpoint, such as its best model's."""
    own, last = (Path(name) / "model.safetensors" for name in (folder, checkpoint))
    return own.is_file() and last.is_file() and not filecmp.cmp(own, last, shallow=False)


def _with_logged_rates(checkpoints: list[CheckpointPath]) -> tuple[list[CheckpointPath], str]:
    """Eta as transformers' Trainer logged its learning rates, else 1; and a line that says which."""
    rates = trainer_rates([Path(c.path) for c in checkpoints])
    if rates is None:
        return checkpoints, worded(
            f"the learning rates of the {len(checkpoints)} checkpoints are not known: each gets eta 1, so that TracIn "
            "weighs them alike. Give the mean rate up to each by --eta"
        )
    listed = " ".join(f"{rate:.3g}" for rate in rates)
    remark = f"eta {listed}: the mean learning rates that trainer_state.json logs; to choose others, give --eta"
    return [replace(c, eta=rate) for c, rate in zip(checkpoints, rates, strict=True)], worded(remark)


def _of_run(run: Run, folder: Path, wanted: list[str]) -> list[CheckpointPath]:
    """Checkpoints of a run: the last, all, or those named (by name or path)."""
    known = [CheckpointPath(name=c.name, path=str(folder / c.path), eta=c.eta) for c in run.checkpoints]
    if not wanted:
        return known[-1:]
    if wanted == ["all"]:
        return known
    picked = []
    for name in wanted:
        match = [c for c in known if name == c.name or Path(name).resolve() == Path(c.path).resolve()]
        if not match:
            raise InputError(
                f"checkpoint {name} is not in {folder / RUN_NAME}, which has {', '.join(c.name for c in known)}."
            )
        picked += match
    return picked


def path_from(folder: Path, name: str) -> str:
    """The path by which an index in ``folder`` stores a model: relative to the index, if it was given as relative."""
    if Path(name).is_absolute() or not Path(name).exists():  # the latter is a hub name
        return name
    return os.path.relpath(Path(name).resolve(), folder.resolve())


def path_to(folder: Path, remembered: str) -> str:
    """The path of a model that an index in ``folder`` stores as ``remembered``, valid in any working folder."""
    from_index = folder / remembered
    return str(from_index) if from_index.exists() else remembered


def moved_paths(model: str | None, checkpoints: Sequence[Checkpoint], folder: Path) -> list[str]:
    """The present paths of the checkpoints of an index.

    Args:
        model: A run folder (its checkpoints are matched by name), or the last checkpoint's folder; None: not moved.
        checkpoints: As the index lists them.
        folder: The index.

    Raises:
        InputError: The run lacks one of the checkpoints.
    """
    paths = [path_to(folder, c.path) for c in checkpoints]
    run = None if model is None else read_run(Path(model))
    if run is None:
        return paths if model is None else [*paths[:-1], model]
    assert model is not None
    paths_by_name = {c.name: str(Path(model) / c.path) for c in run.checkpoints}
    missing = [c.name for c in checkpoints if c.name not in paths_by_name]
    if missing:
        raise InputError(
            f"{model} has no checkpoint {missing[0]}, which the index holds; it has {', '.join(paths_by_name)}."
        )
    return [paths_by_name[c.name] for c in checkpoints]
