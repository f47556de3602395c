"""Labels by name: from a data source's labels to a model's class ids.

Names match whatever their case, with "-", "_" and space alike; "not_entailment" is non-entailment. The mode
``binary-nli`` merges neutral and contradiction into non-entailment, so that the three labels of MNLI and the
two of HANS meet.

Numbers mean what the source's ``label_names`` say. Without those, they are matched as names where every name
of the model is a number, and are else taken as the model's own ids, with a warning. A model whose names say
nothing ("LABEL_0") always has its ids taken, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from forebear.errors import DataError, InputError
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL, RowFormat
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.label_column import MAX_CLASSES
from forebear.indexer.rows.targets.label_lists import Label
from forebear.indexer.rows.targets.label_names import NUMBER, are_unnamed, key_of
from forebear.indexer.rows.targets.reading import other_kind
from forebear.indexer.rows.targets.target_map import TargetMap, names_of_outputs, target_map, unknown_label
from forebear.wording import worded

BINARY_NLI = "binary-nli"
BINARY_NLI_NAMES = ("entailment", "non-entailment")
NLI_IDS = {"entailment": 0, "neutral": 1, "contradiction": 1, "non entailment": 1}  # in BINARY_NLI_NAMES


UNKNOWN = -1  # instead of a class id, for a row without a label, or with one that the model does not know


class LabelMap:
    """Maps one source's labels onto a model's class ids; made by ``label_map``.

    Attributes:
        warning: One line for the user where the mapping rests on a guess, else None.
        remark: One line on the rows whose label the model does not know, of a map that is partial; else None.
    """

    def __init__(
        self,
        source: RowSource,
        known: Sequence[str],
        ids: dict[int | str, int],
        warning: str | None = None,
        *,
        partial: bool = False,
    ) -> None:
        self.warning = warning
        self._source = source
        self._known = tuple(known)
        self._ids = ids  # by integer label, or by the key of a name
        self._partial = partial
        unknown = self.unknown_labels()
        self.remark = self._problem(unknown) + "; theirs stays empty" if partial and unknown else None

    def unknown_labels(self) -> list[Label]:
        """Labels that occur in the source and have no class, by the first row with each."""
        unknown = [label for label in self._source.label_values if _own_key(label) not in self._ids]
        return sorted(unknown, key=self._source.first_row_of)

    def n_rows_by_class(self, n_classes: int) -> npt.NDArray[np.int64]:
        """In how many rows of the source each class id occurs, ``(c,)``."""
        counts = np.zeros(n_classes, np.int64)
        for label in self._source.label_values:
            if (class_id := self._ids.get(_own_key(label))) is not None:
                counts[class_id] += self._source.n_rows_with(label)
        return counts

    def refuse_unknown(self) -> None:
        """Refuse a source in which some label has no class.

        Raises:
            DataError: The line names the first such row.
        """
        if unknown := self.unknown_labels():
            raise DataError(
                f"{self._problem(unknown)}; it knows {listed(self._known)}. Mend the rows, or give --label-names."
            )

    def _problem(self, unknown: Sequence[Label]) -> str:
        n_rows = sum(self._source.n_rows_with(label) for label in unknown)
        return unknown_label(self._source, unknown[0], unknown[0], n_rows)

    def _reason(self, label: Label | None) -> str:
        if label is None:
            return "no label (null, empty, '-' or -1). Leave such rows out by --unlabelled drop, or label them."
        return (
            f"the label {label!r}, which the model does not know; it knows {listed(self._known)}. Mend the row, or "
            "give --label-names."
        )

    def __call__(self, labels: Sequence[Label | None], start: int = 0) -> npt.NDArray[np.int64]:
        """Map consecutive rows' labels.

        Args:
            labels: Labels as the source has them.
            start: Row number of the first one.

        Returns:
            The model's class ids, ``(n,)``; of a partial map ``UNKNOWN`` where there is none.

        Raises:
            DataError: A label has no class, and the map is not partial; the line names its row.
        """
        ids = {label: None if label is None else self._ids.get(_own_key(label)) for label in set(labels)}
        if not self._partial:
            for row, label in enumerate(labels, start):
                if ids[label] is None:
                    raise DataError(
                        f"{self._source.name}: row {self._source.file_row(row)} (from 0) has {self._reason(label)}"
                    )
        class_ids = [ids[label] for label in labels]
        return np.array([UNKNOWN if class_id is None else class_id for class_id in class_ids], dtype=np.int64)


def label_map(
    source: RowSource,
    model_names: Sequence[str],
    mode: str | None = None,
    *,
    partial: bool = False,
    problem_type: str = SINGLE_LABEL,
) -> LabelMap | TargetMap:
    """Match a source's labels with a model's names, and check every label that occurs.

    Args:
        source: Rows with labels.
        model_names: The model's class names, by id.
        mode: ``"binary-nli"`` for a model trained with it, else None.
        partial: Take labels that the model does not know, and rows without one, as ``UNKNOWN``, if it knows others.
        problem_type: What the model takes targets for.

    Returns:
        The map; of several labels or numbers a row as :func:`target_map` makes it. Unless partial, it refuses rows
        without a label when it meets them.

    Raises:
        DataError: The names do not match, or a label that occurs has no class; the line names its row.
    """
    _check_mode(mode)
    if source.label_columns and source.problem_type != problem_type:
        raise other_kind(source.name, source.label_columns, source.problem_type, problem_type)
    if problem_type != SINGLE_LABEL:
        _refuse_mode(mode)
        return target_map(source, model_names, partial=partial)
    if not source.label_values:
        raise DataError(f"{source.name} has no labels to map; name their column with --label-column.")
    model = {key_of(name): class_id for class_id, name in enumerate(model_names)}
    if taken_out := [mark for mark in source.marks if key_of(str(mark).strip()) in model]:
        raise InputError(
            f"{source.name}: {taken_out[0]!r} was taken for no label, but the model has a class of this name. Open the "
            "rows with classes=, the model's class names."
        )
    if len(model) < len(model_names):
        raise DataError(f"the model's labels {', '.join(model_names)} repeat a name; mend its id2label.")
    if mode == BINARY_NLI and set(model) != {key_of(name) for name in BINARY_NLI_NAMES}:
        raise DataError(
            f"--labels binary-nli needs a model with the labels entailment and non-entailment; this one has "
            f"{', '.join(model_names)}. Train one with --labels binary-nli, or leave the option out."
        )
    ids, warning = _match(source, model_names, model, mode)
    mapping = LabelMap(source, names_of_classes(model_names, source), ids, warning, partial=partial)
    if unknown := mapping.unknown_labels():
        some_known = len(unknown) < len(source.label_values)
        _refuse_foreign_names(source, model_names, any_known=some_known or warning is not None)
        if not partial:
            mapping.refuse_unknown()
    return mapping


def refuse_other_form(source: RowSource, like: RowFormat) -> None:
    """Refuse rows, opened without a look at the index, whose lists of numbers are read otherwise than the index's.

    Raises:
        DataError: One holds vectors of 0 and 1, the other numbers of labels.
    """
    form = source.format(source.name).label_lists
    if form is not None and like.label_lists not in (None, form):
        raise DataError(
            f"{source.name}: label column {listed(source.label_columns)} is read as lists of {form}, those of "
            f'{like.owner} are {like.label_lists}. Give {like.label_lists}, or write the labels by name (["a", "b"]).'
        )


def _match(
    source: RowSource, model_names: Sequence[str], model: dict[str, int], mode: str | None
) -> tuple[dict[int | str, int], str | None]:
    """Class ids by label (for integers) or by key (for names), and a warning where the match is a guess."""
    by_key: dict[int | str, int] = {key_of(name): class_id for class_id, name in enumerate(model_names)}
    if mode == BINARY_NLI:
        by_key |= {key: model[key_of(BINARY_NLI_NAMES[merged])] for key, merged in NLI_IDS.items()}
    is_generic = are_unnamed(model_names)
    own_ids: dict[int | str, int] = {class_id: class_id for class_id in range(len(model_names))}
    shown = names_of_classes(model_names, source)  # the user's own words, where the model's say nothing
    as_listed = ", ".join(f"{class_id} = {name}" for class_id, name in enumerate(shown))
    names = source.label_names
    if isinstance(source.label_values[0], str):
        if not (is_generic and names) or any(key_of(str(label)) in model for label in source.label_values):
            return by_key, None
        warning = (
            f"the model's labels are unnamed ({', '.join(model_names)}); the label names {', '.join(names)} "
            f"of {source.name} are taken as its ids 0 to {len(names) - 1}, in this order"
        )
        return {key_of(name): class_id for class_id, name in enumerate(names[: len(model_names)])}, warning
    if is_generic:
        warning = f"the model's labels are unnamed; numbers in {source.name} are taken as its ids: {as_listed}"
        if names is not None and len(names) != len(model_names):
            warning += f". The {len(names)} label names are not used: the model has {len(model_names)} classes"
        return own_ids, warning
    if names is not None:
        return {label: by_key[key_of(name)] for label, name in enumerate(names) if key_of(name) in by_key}, None
    if all(re.fullmatch(NUMBER, key) for key in model):
        return {int(key): class_id for key, class_id in model.items()}, None
    return own_ids, worded(
        f"the labels of {source.name} are numbers without names, taken as the model's own ids: {as_listed}. "
        f"If that is wrong, give --label-names"
    )


def _refuse_foreign_names(source: RowSource, model_names: Sequence[str], any_known: bool) -> None:
    """Say what to do about a source whose names are not the model's at all, or another kind of NLI labels."""
    names = source.label_names or tuple(str(label) for label in source.label_values)
    both = f"{source.name} has the labels {', '.join(names)}, the model has {', '.join(model_names)}"
    if collapse_to_binary_nli(model_names) is not None and {key_of(name) for name in names} <= NLI_IDS.keys():
        if len(model_names) == len(BINARY_NLI_NAMES):
            raise DataError(f"{both}; merge neutral and contradiction with --labels binary-nli.")
        raise DataError(
            f"{both}; non-entailment is neither neutral nor contradiction. Use forebear audit hans, which "
            f"merges the model's classes, or a model trained with --labels binary-nli."
        )
    if not any_known and are_unnamed(model_names):
        raise DataError(
            f"{both}, which say nothing. Say which name is which by --label-names, in the order {listed(model_names)}."
        )
    if not any_known:
        raise DataError(
            f"{both}; no name agrees. Give the names of the source's classes, in the model's words and in "
            f"the order of their numbers, with --label-names."
        )


def names_of_classes(model_names: Sequence[str], source: RowSource) -> tuple[str, ...]:
    """The names of a model's classes in results.

    Args:
        model_names: The model's own names, by id.
        source: The model's training rows.

    Returns:
        The model's names, by id; of an unnamed model the source's label names, if there is one for each class.
    """
    given = source.label_columns if source.problem_type == REGRESSION else source.label_names
    takes_given = are_unnamed(model_names) and given is not None and len(given) == len(model_names)
    return tuple(given) if takes_given and given is not None else tuple(model_names)


def classes_for(source_or_names: RowSource | Sequence[str], mode: str | None = None) -> tuple[str, ...]:
    """Name the classes of a new model, by id.

    Args:
        source_or_names: What it will be trained on, or the names of those labels.
        mode: ``"binary-nli"`` to merge neutral and contradiction, else None.

    Returns:
        The source's label names; else its distinct names, sorted; else its numbers, from 0 (or from the
        lowest, if that is above 0) to the highest. With ``binary-nli``: entailment, non-entailment.

    Raises:
        DataError: There are no labels, or ``binary-nli`` is asked of labels that are not NLI's.
    """
    _check_mode(mode)
    if isinstance(source_or_names, RowSource) and source_or_names.problem_type != SINGLE_LABEL:
        _refuse_mode(mode)
        return names_of_outputs(source_or_names)
    where = source_or_names.name if isinstance(source_or_names, RowSource) else "the source"
    names = _names_of(source_or_names) if isinstance(source_or_names, RowSource) else tuple(source_or_names)
    if not names:
        raise DataError(f"{where} has no labels to learn; name their column with --label-column.")
    if len({key_of(name) for name in names}) < len(names):
        raise DataError(
            f"{where} has the labels {', '.join(names)}, of which two differ in case, hyphens or spaces alone; "
            f"spell each one way."
        )
    if mode is None:
        return names
    if collapse_to_binary_nli(names) is None:
        raise DataError(
            f"--labels binary-nli merges neutral and contradiction; {where} has the labels "
            f"{', '.join(names)}. Leave the option out, or name the numbers' classes with --label-names."
        )
    return BINARY_NLI_NAMES


def _names_of(source: RowSource) -> tuple[str, ...]:
    values = source.label_values
    if source.label_names and values:
        return source.label_names
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and numbers[0] >= 0 and numbers[-1] < MAX_CLASSES:
        return tuple(str(number) for number in range(numbers[0], numbers[-1] + 1))
    return tuple(str(value).strip() for value in values)


def nli_id(name: str) -> int | None:
    """0 for the name of entailment, 1 for that of neutral, contradiction or non-entailment, else None."""
    return NLI_IDS.get(key_of(name))


def collapse_to_binary_nli(names: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """Merge a model's NLI classes into entailment and the rest.

    Args:
        names: The model's class names, by id, ``(c,)``.

    Returns:
        0 for entailment and 1 for any other class, ``(c,)``; None unless these are the names of NLI labels,
        entailment and at least one other.
    """
    merged = [nli_id(name) for name in names]
    if None in merged or set(merged) != {0, 1}:
        return None
    return np.array(merged, dtype=np.int64)


def _own_key(label: int | str) -> int | str:
    return key_of(label) if isinstance(label, str) else label


def _check_mode(mode: str | None) -> None:
    if mode not in (None, BINARY_NLI):
        raise DataError(f"--labels {mode} is unknown; expected binary-nli, or leave the option out.")


def _refuse_mode(mode: str | None) -> None:
    if mode is not None:
        raise DataError(f"--labels {mode} is for one label a row. Leave the option out.")
