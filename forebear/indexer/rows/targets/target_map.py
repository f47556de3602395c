"""From the targets of a source, several labels or numbers a row, to those of a model: one number for each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forebear.errors import DataError
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_format import REGRESSION
from forebear.indexer.rows.targets.label_lists import Label
from forebear.indexer.rows.targets.label_names import are_same, are_unnamed, key_of

if TYPE_CHECKING:
    from forebear.indexer.rows.row_source import RowSource


class TargetMap:
    """Maps one source's targets onto a model's outputs; made by ``target_map``, the counterpart of ``LabelMap``.

    Attributes:
        warning: One line for the user where the mapping rests on a guess, else None.
        remark: One line on the rows whose target the model does not know, of a map that is partial; else None.
    """

    def __init__(
        self,
        source: RowSource,
        known: Sequence[str],
        outputs: dict[Label, int] | None,
        warning: str | None,
        partial: bool,
        order: Sequence[int] | None = None,
    ) -> None:
        self.warning = warning
        self._source, self._known, self._outputs, self._partial = source, tuple(known), outputs, partial
        self._order = order  # of numbers: for each output, which of a row's numbers is its target
        unknown = [] if outputs is None else [label for label in source.label_values if label not in outputs]
        self.unknown = sorted(unknown, key=source.first_row_of)
        self.remark = None
        if self.unknown:
            first, n_rows = self.unknown[0], source.n_rows_with(self.unknown[0])
            shown = named(first, source.label_names)
            problem = unknown_label(source, first, shown, n_rows)
            if not partial:
                raise DataError(f"{problem}; it knows {listed(known)}. Mend the rows, or give --label-names.")
            self.remark = f"{problem}; theirs stays empty"

    def n_rows_by_class(self, n_classes: int) -> npt.NDArray[np.int64]:
        """In how many rows of the source each label occurs, ``(c,)``; of numbers zeros."""
        counts = np.zeros(n_classes, np.int64)
        for label, output in (self._outputs or {}).items():
            counts[output] += self._source.n_rows_with(label)
        return counts

    def __call__(self, targets: Sequence[Any], start: int = 0) -> npt.NDArray[np.float64]:
        """Map consecutive rows' targets.

        Args:
            targets: As the source has them.
            start: Row number of the first one.

        Returns:
            ``(n, c)``; of a partial map NaN throughout for a row without a target that the model knows.

        Raises:
            DataError: A row has no target, and the map is not partial; the line names it.
        """
        out = np.full((len(targets), len(self._known)), np.nan)
        for row, target in enumerate(targets):
            if isinstance(target, dict) and self._outputs is not None:
                if all(label in self._outputs for label in target):
                    out[row] = 0.0
                    for label, value in target.items():
                        out[row, self._outputs[label]] = value
            elif target is not None and self._order is not None:
                out[row] = [target[number] for number in self._order]
        if not self._partial and np.isnan(out).any():
            row = self._source.file_row(start + int(np.argmax(np.isnan(out).any(axis=1))))
            raise DataError(
                f"{self._source.name}: row {row} (from 0) has no target (null, NaN or empty). Leave such rows out by "
                "--unlabelled drop, or fill them in."
            )
        return out


def unknown_label(source: RowSource, label: Label, shown: Label, n_rows: int) -> str:
    """What is wrong with a source in which ``n_rows`` rows have labels that the model does not know, such as one."""
    return (
        f"{source.name}: row {source.first_row_of(label)} (from 0) has the label {shown!r}, which the model does not "
        f"know (as {n_rows:,} of {source.n_rows:,} rows)"
    )


def target_map(source: RowSource, model_names: Sequence[str], *, partial: bool = False) -> TargetMap:
    """Match a source's targets with a model's outputs.

    Labels that are numbers mean what the source's label names say, else the model's own outputs; those of a model
    without names (LABEL_0) are always its outputs by number, or by the order of the source's label names. Numbers of
    several columns are the outputs of the same names; of one column, or of a model without names, they go by order.

    Args:
        source: Rows with several labels, or with numbers.
        model_names: Names of the model's outputs.
        partial: Take rows without a target, or with a label that the model does not know, as NaN.

    Raises:
        DataError: A label that occurs is none of the model's; columns or vectors are not of exactly the model's labels,
            or numbers not of its outputs.
    """
    if not source.label_columns:
        raise DataError(f"{source.name} has no labels to map; name their column with --label-column.")
    if source.problem_type == REGRESSION:
        return TargetMap(source, model_names, None, None, partial, _order_of_numbers(source, model_names))
    _refuse_repeated(model_names, "the model")
    names, warning = source.label_names, None
    if source.n_labels:
        _refuse_other_labels(source, model_names)
    unnamed = are_unnamed(model_names)
    known = {key_of(name): i for i, name in enumerate(model_names)}
    if unnamed and names and len(names) == len(model_names) and not are_same(names, model_names):
        known = {key_of(name): i for i, name in enumerate(names)}
        warning = (
            f"the model's labels are unnamed ({listed(model_names)}); the label names {listed(names)} of {source.name} "
            "are taken as its outputs, in this order"
        )
    outputs: dict[Label, int] = {}
    for label in source.label_values:
        name = named(label, names)
        output = known.get(key_of(name)) if isinstance(name, str) else None
        if isinstance(name, int):
            output = known.get(str(name), name if name < len(model_names) else None)
            if str(name) not in known and not unnamed:
                warning = (
                    f"the labels of {source.name} are numbers without names, taken as the model's own outputs: "
                    f"{listed(f'{i} = {n}' for i, n in enumerate(model_names))}. If that is wrong, give --label-names"
                )
        if output is not None:
            outputs[label] = output
    return TargetMap(source, model_names, outputs, warning, partial)


def named(label: Label, names: Sequence[str] | None) -> Label:
    """A label by its name, where it is a number that has one."""
    return names[label] if isinstance(label, int) and names is not None and label < len(names) else label


def _order_of_numbers(source: RowSource, model_names: Sequence[str]) -> list[int]:
    """Which of a row's numbers each output has: that of its name where columns give several, else by their order.

    Raises:
        DataError: There are not as many numbers as outputs, or the names of several differ.
    """
    columns = source.label_columns
    if source.n_labels != len(model_names):
        raise DataError(
            f"{source.name} gives {source.n_labels} number(s) a row ({listed(columns)}), the model "
            f"{len(model_names)} ({listed(model_names)}). Name as many columns with --label-column."
        )
    by_order = list(range(len(model_names)))
    if len(columns) < 2:
        return by_order
    if are_same(columns, model_names):
        place = {key_of(column): number for number, column in enumerate(columns)}
        return [place[key_of(name)] for name in model_names]
    if are_unnamed(model_names):
        return by_order
    raise DataError(
        f"{source.name} gives the numbers {listed(columns)}, the model {listed(model_names)}; expected columns of the "
        "same names, in any order. Name others with --label-column, or rename them."
    )


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    if len({key_of(name) for name in names}) < len(names):
        raise DataError(
            f"{where} has the labels {listed(names)}, of which two differ in case, hyphens or spaces alone; spell each "
            "one way."
        )


def _refuse_other_labels(source: RowSource, model_names: Sequence[str]) -> None:
    """Refuse columns of 0 and 1, or vectors, that are not of exactly the model's labels: a lack is no 0.

    Raises:
        DataError: The line names the labels that are missing, and those that the model does not have.
    """
    names = source.label_names
    if names is None or are_unnamed(model_names):
        if source.n_labels != len(model_names):
            raise DataError(
                f"{source.name} gives {source.n_labels} label(s) a row ({listed(source.label_columns)}), the model has "
                f"{len(model_names)} ({listed(model_names)}). Give a 0 or 1 for each, in this order; or lists of names."
            )
    elif not are_same(names, model_names):
        lacking = [name for name in model_names if key_of(name) not in set(map(key_of, names))]
        surplus = [name for name in names if key_of(name) not in set(map(key_of, model_names))]
        raise DataError(
            f"{source.name} gives the labels {listed(names)}, the model has {listed(model_names)}: missing "
            f"{listed(lacking)}, surplus {listed(surplus)}. Name a column for each of the model's labels with "
            "--label-column, or give lists of names."
        )


def names_of_outputs(source: RowSource) -> tuple[str, ...]:
    """Names of the outputs of a new model: of several labels theirs, of numbers those of their columns.

    Raises:
        DataError: There are no labels, or two have the same name but for case.
    """
    if source.problem_type == REGRESSION and len(source.label_columns) == source.n_labels:
        _refuse_repeated(source.label_columns, source.name)
        return source.label_columns
    if source.label_names:
        _refuse_repeated(source.label_names, source.name)
        return source.label_names
    if source.problem_type == REGRESSION:
        return tuple(str(number) for number in range(source.n_labels))
    numbers = [label for label in source.label_values if isinstance(label, int)]
    if numbers and len(numbers) < len(source.label_values):
        raise DataError(
            f"{source.name} has labels that are numbers ({numbers[0]}) and labels that are names; expected one of the "
            "two. Mend them."
        )
    names = [str(i) for i in range(max([source.n_labels, *(number + 1 for number in numbers)]))] if numbers else [
        str(label) for label in source.label_values
    ]  # fmt: skip
    if not names:
        raise DataError(f"{source.name} has no labels to learn: every row has none of them.")
    _refuse_repeated(names, source.name)
    return tuple(names)
