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

from forebear.errors import DataError
from forebear.indexer.data import MAX_CLASSES, RowSource

BINARY_NLI = "binary-nli"
NUMBER = re.compile(r"-?[0-9]+")  # as a class name: its sign is no separator
BINARY_NLI_NAMES = ("entailment", "non-entailment")
NLI_IDS = {"entailment": 0, "neutral": 1, "contradiction": 1, "non entailment": 1}  # in BINARY_NLI_NAMES


class LabelMap:
    """Maps one source's labels onto a model's class ids; made by ``label_map``.

    Attributes:
        warning: One line for the user where the mapping rests on a guess, else None.
    """

    def __init__(
        self, source_name: str, known: Sequence[str], ids: dict[int | str, int], warning: str | None = None
    ) -> None:
        self.warning = warning
        self._source_name = source_name
        self._known = tuple(known)
        self._ids = ids  # by integer label, or by the key of a name

    def __call__(self, labels: list[int] | list[str], start: int = 0) -> npt.NDArray[np.int64]:
        """Map consecutive rows' labels.

        Args:
            labels: As the source has them.
            start: Row number of the first.

        Returns:
            The model's class ids, ``(n,)``.

        Raises:
            DataError: A label has no class; the line names its row.
        """
        rows: list[int | str] = [*labels]
        found = {label: self._ids.get(_own_key(label)) for label in set(rows)}
        for row, label in enumerate(rows, start):
            if found[label] is None:
                raise DataError(
                    f"{self._source_name}: row {row} (from 0) has the label {label!r}, which the model does "
                    f"not know; it knows {', '.join(self._known)}. Mend the row, or give --label-names."
                )
        return np.array([found[label] for label in rows], dtype=np.int64)


def label_map(source: RowSource, model_names: Sequence[str], mode: str | None = None) -> LabelMap:
    """Match a source's labels with a model's names, and check every label that occurs.

    Args:
        source: Rows with labels.
        model_names: The model's class names, by id.
        mode: ``"binary-nli"`` for a model trained with it, else None.

    Returns:
        The map. It refuses rows of -1 ("no label") in a source that names its numbers when it meets them.

    Raises:
        DataError: The names do not match, or a label that occurs has no class; the line names its row.
    """
    _check_mode(mode)
    if not source.label_values:
        raise DataError(f"{source.name} has no labels to map; name their column with --label-column.")
    model = {_key(name): class_id for class_id, name in enumerate(model_names)}
    if len(model) < len(model_names):
        raise DataError(f"the model's labels {', '.join(model_names)} repeat a name; mend its id2label.")
    if mode == BINARY_NLI and set(model) != {_key(name) for name in BINARY_NLI_NAMES}:
        raise DataError(
            f"--labels binary-nli needs a model with the labels entailment and non-entailment; this one has "
            f"{', '.join(model_names)}. Train one with --labels binary-nli, or leave the option out."
        )
    ids, warning = _match(source, model_names, model, mode)
    mapping = LabelMap(source.name, model_names, ids, warning)
    known = [label for label in source.label_values if _own_key(label) in ids]
    if len(known) < len(source.label_values):
        _refuse_foreign_names(source, model_names, any_known=bool(known) or warning is not None)
        for block in source.blocks():  # only some labels have no class: let the first such row be named
            mapping(block.labels or [], block.start)
    return mapping


def _match(
    source: RowSource, model_names: Sequence[str], model: dict[str, int], mode: str | None
) -> tuple[dict[int | str, int], str | None]:
    """Find the class ids by label, for integers, or by key, for names; and what to warn of."""
    by_key: dict[int | str, int] = {_key(name): class_id for class_id, name in enumerate(model_names)}
    if mode == BINARY_NLI:
        by_key |= {key: model[_key(BINARY_NLI_NAMES[merged])] for key, merged in NLI_IDS.items()}
    is_generic = all(re.fullmatch(r"label ?\d+", key) for key in model)
    own_ids: dict[int | str, int] = {class_id: class_id for class_id in range(len(model_names))}
    as_listed = ", ".join(f"{class_id} = {name}" for class_id, name in enumerate(model_names))
    names = source.label_names
    if isinstance(source.label_values[0], str):
        if not (is_generic and names) or any(_key(str(label)) in model for label in source.label_values):
            return by_key, None
        warning = (
            f"the model's labels are unnamed ({', '.join(model_names)}); the label names {', '.join(names)} "
            f"of {source.name} are taken as its ids 0 to {len(names) - 1}, in this order"
        )
        return {_key(name): class_id for class_id, name in enumerate(names[: len(model_names)])}, warning
    if is_generic:
        return (
            own_ids,
            f"the model's labels are unnamed; numbers in {source.name} are taken as its ids: {as_listed}",
        )
    if names is not None:
        return {label: by_key[_key(name)] for label, name in enumerate(names) if _key(name) in by_key}, None
    if all(re.fullmatch(NUMBER, key) for key in model):
        return {int(key): class_id for key, class_id in model.items()}, None
    return own_ids, (
        f"the labels of {source.name} are numbers without names, taken as the model's own ids: {as_listed}. "
        f"If that is wrong, give --label-names"
    )


def _refuse_foreign_names(source: RowSource, model_names: Sequence[str], any_known: bool) -> None:
    """Say what to do about a source whose names are not the model's at all, or another kind of NLI labels."""
    names = source.label_names or tuple(str(label) for label in source.label_values)
    both = f"{source.name} has the labels {', '.join(names)}, the model has {', '.join(model_names)}"
    if collapse_to_binary_nli(model_names) is not None and {_key(name) for name in names} <= NLI_IDS.keys():
        if len(model_names) == len(BINARY_NLI_NAMES):
            raise DataError(f"{both}; merge neutral and contradiction with --labels binary-nli.")
        raise DataError(
            f"{both}; non-entailment is neither neutral nor contradiction. Use forebear audit hans, which "
            f"merges the model's classes, or a model trained with --labels binary-nli."
        )
    if not any_known:
        raise DataError(
            f"{both}; no name agrees. Give the names of the source's classes, in the model's words and in "
            f"the order of their numbers, with --label-names."
        )


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
    where = source_or_names.name if isinstance(source_or_names, RowSource) else "the source"
    names = _names_of(source_or_names) if isinstance(source_or_names, RowSource) else tuple(source_or_names)
    if not names:
        raise DataError(f"{where} has no labels to learn; name their column with --label-column.")
    if len({_key(name) for name in names}) < len(names):
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
    return tuple(str(value) for value in values)


def nli_id(name: str) -> int | None:
    """0 for the name of entailment, 1 for that of neutral, contradiction or non-entailment, else None."""
    return NLI_IDS.get(_key(name))


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


def _key(name: str) -> str:
    if re.fullmatch(NUMBER, name):
        return name
    key = re.sub(r"[-_\s]+", " ", name).strip().casefold()
    return "non entailment" if key in ("not entailment", "nonentailment") else key


def _own_key(label: int | str) -> int | str:
    return _key(label) if isinstance(label, str) else label


def _check_mode(mode: str | None) -> None:
    if mode not in (None, BINARY_NLI):
        raise DataError(f"--labels {mode} is unknown; expected binary-nli, or leave the option out.")
