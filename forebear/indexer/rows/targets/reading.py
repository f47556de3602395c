"""The label columns of a source, read as what its rows' targets are."""

from __future__ import annotations

from collections.abc import Sequence

from forebear.errors import DataError
from forebear.indexer.rows.files.file_formats import Reader, listed
from forebear.indexer.rows.row_format import MULTI_LABEL, NUMBERS, SINGLE_LABEL, RowFormat, problem_type_of
from forebear.indexer.rows.targets.label_column import (
    LabelColumn,
    check_labels,
    class_label_names,
    names_of_numbers,
    scan_labels,
)
from forebear.indexer.rows.targets.label_lists import holds_lists
from forebear.indexer.rows.targets.label_names import are_same
from forebear.indexer.rows.targets.target_columns import (
    TargetColumns,
    check_targets,
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

    Returns:
        What the columns hold, the names that numbers of labels index, and whether these names are remembered ones.

    Raises:
        DataError: They are no labels, or no targets of this problem type.
    """
    asked = problem_type_of(problem_type) if problem_type is not None else like.problem_type
    kind = asked or (MULTI_LABEL if len(columns) > 1 or any(holds_lists(reader, c) for c in columns) else SINGLE_LABEL)
    if columns and kind != SINGLE_LABEL:
        of_feature = class_label_names(reader.schema, columns[0])
        given = label_names or of_feature or recorded
        targets = scan_targets(
            reader, columns, kind, form=NUMBERS if of_feature else like.label_lists,
            n_labels=len(classes or given or like.label_names or ()) or None,
        )  # fmt: skip
        _refuse_no_rows(reader, targets.n_rows)
        check_targets(reader.name, targets, unlabelled, need_labels=need_labels)
        if targets.form is None and len(columns) > 1 and label_names and not are_same(label_names, columns):
            raise DataError(
                f"{reader.name}: --label-names {listed(label_names)}, but columns of labels have their own names: "
                f"{listed(columns)}. Leave --label-names out, or rename the columns."
            )
        return targets, names_of_targets(reader.name, targets, given, like), False
    if len(columns) > 1:
        raise DataError(
            f"{reader.name}: --label-column names {listed(columns)}, but a row has one label here. Name one column."
        )
    if columns:
        labels = scan_labels(reader, columns[0])
    else:
        labels = LabelColumn(None, reader.n_rows or sum(len(table) for table in reader.tables(0, [text_column])))
    _refuse_no_rows(reader, labels.n_rows)
    names, are_remembered = names_of_numbers(reader, labels, label_names, recorded, like)
    check_labels(reader.name, labels, names, need_labels, unlabelled, classes)
    return labels, names, are_remembered


def _refuse_no_rows(reader: Reader, n_rows: int) -> None:
    if not n_rows:
        raise DataError(f"{reader.name} has no rows below its header; expected at least one row of text.")
