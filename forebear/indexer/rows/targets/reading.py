"""The label columns of a source, read as what its rows' targets are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from forebear.errors import DataError
from forebear.indexer.rows.files.reader import Reader, listed
from forebear.indexer.rows.row_format import MULTI_LABEL, NUMBERS, REGRESSION, SINGLE_LABEL, RowFormat, problem_type_of
from forebear.indexer.rows.targets.label_column import (
    UNLABELLED,
    LabelColumn,
    check_labels,
    class_label_names,
    names_of_numbers,
    scan_labels,
)
from forebear.indexer.rows.targets.label_lists import Label, holds_lists, holds_text, one_value
from forebear.indexer.rows.targets.label_names import are_same, key_of
from forebear.indexer.rows.targets.target_columns import (
    TargetColumns,
    check_targets,
    holds_shares,
    names_of_targets,
    scan_targets,
)


def read_targets(
    reader: Reader,
    text_column: str,
    columns: Sequence[str],
    *,
    label_names: Sequence[str] | None,
    recorded: Sequence[str] | None,
    like: RowFormat,
    problem_type: str | None,
    need_labels: bool,
    unlabelled: str,
    classes: Sequence[str],
    is_named: bool,
) -> tuple[LabelColumn | TargetColumns, Sequence[str] | None, bool]:
    """Scan and check the label columns.

    Args:
        reader: The source.
        text_column: A column of texts, by which rows are counted where there are no labels.
        columns: The label columns; none: the source has no labels.
        label_names: The names that numbers of labels index, as the user gave them.
        recorded: The same as a ``dataset.json`` beside the file has them.
        like: What a run or an index remembers.
        problem_type: What the user says that targets are; None: as remembered, else by the columns.
        need_labels: Whether rows without a target are refused.
        unlabelled: What becomes of such rows.
        classes: The model's class names, where it is known.
        is_named: The columns are named by the user, or remembered; so that one column of 0 and 1 may be one of several
            labels, that of its name.

    Returns:
        What the columns hold, the names that numbers of labels index, and whether these names are remembered ones.

    Raises:
        DataError: They are no labels, or no targets of this problem type. Where the model's type is all that says it,
            and labels are not needed, such columns are not read, and what is returned says so.
    """
    how: Any = {
        "label_names": label_names, "recorded": recorded, "like": like, "need_labels": need_labels,
        "unlabelled": unlabelled, "classes": classes, "is_named": is_named,
    }  # fmt: skip
    if unlabelled not in UNLABELLED:
        raise DataError(f"--unlabelled {unlabelled}: expected {', '.join(UNLABELLED)}.")
    if problem_type is not None or like.problem_type is None:
        asked = None if problem_type is None else problem_type_of(problem_type)
        return _read(reader, text_column, columns, asked, **how)
    try:
        _refuse_other_kind(reader, columns, like.problem_type)
        return _read(reader, text_column, columns, like.problem_type, **how)
    except DataError as error:
        if need_labels or label_names is not None or not columns:
            raise
        reason = str(error).removeprefix(f"{reader.name}: ")
        labels = LabelColumn(None, _n_rows(reader, text_column))
        labels.unread = f"its labels are not read, theirs stays empty: {reason}"
        return labels, None, False


def _read(
    reader: Reader,
    text_column: str,
    columns: Sequence[str],
    asked: str | None,
    *,
    label_names: Sequence[str] | None,
    recorded: Sequence[str] | None,
    like: RowFormat,
    need_labels: bool,
    unlabelled: str,
    classes: Sequence[str],
    is_named: bool,
) -> tuple[LabelColumn | TargetColumns, Sequence[str] | None, bool]:
    kind = asked or (MULTI_LABEL if _hold_several(reader, columns) else SINGLE_LABEL)
    if columns and kind != SINGLE_LABEL:
        of_feature = class_label_names(reader.schema, columns[0])
        given = label_names or of_feature or recorded
        of_shares = kind == MULTI_LABEL and len(columns) == 1 and holds_shares(reader, columns[0])
        if of_shares and not is_named and not classes:  # not two labels called 0 and 1
            raise one_value(reader, columns[0])
        fits = len(classes) < 2 or key_of(columns[0]) in map(key_of, classes)
        targets = scan_targets(
            reader, columns, kind, form=NUMBERS if of_feature else like.label_lists,
            n_labels=len(classes or given or like.label_names or ()) or None,
            is_one_label=of_shares and is_named and fits,
        )  # fmt: skip
        _refuse_no_rows(reader, targets.n_rows)
        check_targets(reader.name, targets, unlabelled, need_labels=need_labels)
        if targets.are_labels and label_names and not are_same(label_names, columns):
            raise DataError(
                f"{reader.name}: --label-names {listed(label_names)}, but columns of labels have their own names: "
                f"{listed(columns)}. Leave --label-names out, or rename the columns."
            )
        return targets, names_of_targets(reader.name, targets, given, like), False
    if len(columns) > 1:
        raise DataError(
            f"{reader.name}: --label-column names {listed(columns)}, but a row has one label here. Name one column."
        )
    labels = scan_labels(reader, columns[0]) if columns else LabelColumn(None, _n_rows(reader, text_column))
    _refuse_no_rows(reader, labels.n_rows)
    if _are_lists(labels.first_rows) and not {*map(str, labels.first_rows)} & {*classes} and asked == like.problem_type:
        if asked is not None:
            raise other_kind(reader.name, columns, MULTI_LABEL, SINGLE_LABEL)
        raise DataError(
            f"{reader.name}: label column {columns[0]!r} holds text that reads as lists, such as "
            f"{next(iter(labels.first_rows))!r}. Give --problem-type multi-label; or single-label, if each is the name "
            "of one class."
        )
    names, are_remembered = names_of_numbers(reader, labels, label_names, recorded, like)
    check_labels(reader.name, labels, names, need_labels, unlabelled, classes)
    return labels, names, are_remembered


_TARGETS = {SINGLE_LABEL: "one label a row", MULTI_LABEL: "several labels a row", REGRESSION: "numbers"}


def other_kind(name: str, columns: Sequence[str], found: str, expected: str) -> DataError:
    """The error of a source whose targets are not what the model takes, with what to do."""
    return DataError(
        f"{name} has {_TARGETS[found]} ({listed(columns)}), the model was trained on {_TARGETS[expected]} "
        f"(problem_type {expected}). Name other columns with --label-column; or, if the model was trained on such "
        "rows, correct the problem_type in its config.json."
    )


def _refuse_other_kind(reader: Reader, columns: Sequence[str], kind: str) -> None:
    """Refuse columns that cannot hold what the model takes, whatever their values.

    Raises:
        DataError: As :func:`other_kind` says it.
    """
    if kind == SINGLE_LABEL and _hold_several(reader, columns):
        raise other_kind(reader.name, columns, MULTI_LABEL, kind)
    if kind == MULTI_LABEL and len(columns) == 1:
        column = columns[0]
        if not (holds_text(reader, column) or holds_lists(reader, column) or holds_shares(reader, column)):
            raise other_kind(reader.name, columns, SINGLE_LABEL, kind)


def _hold_several(reader: Reader, columns: Sequence[str]) -> bool:
    return len(columns) > 1 or any(holds_lists(reader, column) for column in columns)


def _are_lists(labels: Iterable[Label]) -> bool:
    """Whether all labels are lists as JSON or Python writes them."""
    texts = [str(label).strip() for label in labels]
    return bool(texts) and all(text.startswith("[") and text.endswith("]") for text in texts)


def _n_rows(reader: Reader, text_column: str) -> int:
    return reader.n_rows or sum(len(table) for table in reader.tables(0, [text_column]))


def _refuse_no_rows(reader: Reader, n_rows: int) -> None:
    if not n_rows:
        raise DataError(f"{reader.name} has no rows below its header; expected at least one row of text.")
