"""Rows as callers have them, opened: files, hub names and tables, or texts; the columns found, labels checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forebear.errors import DataError
from forebear.indexer.rows.columns import PAIRS, find_label_columns, find_text_columns, said
from forebear.indexer.rows.files.file_formats import holds_dicts, memory_reader, table_reader
from forebear.indexer.rows.files.reader import Reader, listed
from forebear.indexer.rows.row_format import RowFormat
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.source_names import TextChoices, open_reader, read_beside
from forebear.indexer.rows.targets.label_column import DROP_MARKED, labelled_rows
from forebear.indexer.rows.targets.reading import read_targets


def open_rows(
    source: Any,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    need_labels: bool = False,
    unlabelled: str | None = None,
    classes: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    like: RowFormat | None = None,
    problem_type: str | None = None,
) -> RowSource:
    """Open files, a folder of ``datasets.save_to_disk``, a hub data set or a table, and check the labels.

    Args:
        source: A path; a folder or a pattern (``data/train-*.parquet``) of files, which are read as one in natural
            order; ``FOLDER:SPLIT`` for a saved DatasetDict, or for the files whose names begin with the split's; or a
            hub name with its split:
            ``NAME:SPLIT``, ``OWNER/REPO:SPLIT``, ``DATASET/CONFIG:SPLIT`` (tried in this order, as in
            ``glue/sst2:train``) or ``OWNER/REPO/CONFIG:SPLIT``. A path that exists wins over a hub name.
            Or a table in memory: a ``datasets.Dataset``, a pyarrow Table, a DataFrame of pandas or polars, a list of
            dicts.
        text_columns: One or two names, in order of encoding. Default: those of ``like``, else ``text_columns`` of a
            ``dataset.json`` beside the file, else found by name.
        label_column: One column; or several, as ``a,b,c`` or a list of names, each of which holds one label's 0 and 1
            (of a regression: one of its numbers). Default: that of ``like``, else found by name.
        label_names: The names that integer labels index. Default: those of the ClassLabel feature, else
            ``label_names`` of a ``dataset.json`` beside the file, else those of ``like``.
        need_labels: Refuse a source in which any row has no label, as ``unlabelled`` says.
        unlabelled: ``refuse`` (the default), ``drop-marked`` (that of training rows), ``drop`` or ``keep``; see
            :mod:`forebear.indexer.rows.targets.label_column`.
        classes: The model's class names, as ``Retriever.label_names``: ``-`` or -1 among them is a class here too.
        delimiter: What parts the values of a CSV or TSV file: a character, or its name, such as ``tab``. Default:
            commas in CSV, tabs in TSV.
        encoding: Of a text file without a byte order mark. Default: UTF-8.
        like: How a run or an index read its rows (``ModelChoice.row_format``, ``Index.row_format``): taken where
            nothing else is given and the source has such columns.
        problem_type: One class a row (``single_label_classification``), any number of labels
            (``multi_label_classification``), or numbers (``regression``); how files hold those is said in
            :mod:`forebear.indexer.rows.targets.target_columns`. Default: as ``like`` says, else several labels where
            the label columns are several or hold lists, else one class.

    Raises:
        DataError: The source cannot be read as (labelled) text.
    """
    choices = TextChoices(delimiter=delimiter, encoding=encoding, like=like or RowFormat())
    if isinstance(source, (str, Path)):
        reader, folder = open_reader(str(source), choices)
    else:
        reader, folder = table_reader(source), None
        choices.refuse(reader.name)
    return _make_source(
        reader,
        folder,
        text_columns,
        label_column,
        label_names,
        need_labels,
        unlabelled or "refuse",
        classes,
        choices.like,
        problem_type,
    )


def rows_given(
    rows: Any, *, need_labels: bool = False, classes: Sequence[str] = (), like: RowFormat | None = None
) -> RowSource:
    """Test rows as callers of Python have them: a list of texts or pairs, what :func:`open_rows` takes, or its result.

    Args:
        rows: The rows.
        need_labels: Whether rows without labels are refused.
        classes: The model's class names.
        like: How the run or the index read its rows.

    Raises:
        DataError: They cannot be read, or have no labels, as :func:`open_rows` says.
    """
    if isinstance(rows, RowSource):
        return rows
    if isinstance(rows, (list, tuple)) and not holds_dicts(rows):
        if need_labels:
            raise DataError("these rows need labels. Give rows_from_texts(texts, labels), or a file that has them.")
        return rows_from_texts(rows)
    return open_rows(rows, need_labels=need_labels, classes=classes, like=like)


def rows_from_texts(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[Any] | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    unlabelled: str | None = None,
    problem_type: str | None = None,
    like: RowFormat | None = None,
) -> RowSource:
    """Make a source of rows in memory; columns are ``text`` or ``premise, hypothesis``, and ``label``.

    ``classes``, ``problem_type`` and ``like`` as in ``open_rows``; rows of several labels have lists of labels, or
    vectors. Where ``unlabelled`` says what becomes of rows without a label, labels are needed.

    Raises:
        DataError: Texts are not all strings or all pairs, or labels not all integers or all names.
    """
    name = "the rows given"
    if isinstance(texts, (str, bytes)) or hasattr(texts, "columns"):
        raise DataError(
            f"{name} are one {type(texts).__name__}; expected a list of texts or of pairs. open_rows takes tables."
        )
    rows = [tuple(text) if isinstance(text, (tuple, list)) else (text,) for text in texts]
    columns = tuple(text_columns or (PAIRS[0] if rows and len(rows[0]) == 2 else ("text",)))
    if labels is not None and len(labels) != len(rows):
        raise DataError(f"{name}: {len(rows)} texts but {len(labels)} labels; give one label a text.")

    def checked() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            if len(row) != len(columns) or not all(isinstance(text, str) for text in row):
                raise DataError(f"{name}: row {number} (from 0) is not {len(columns)} strings ({listed(columns)}).")
            named: dict[str, Any] = dict(zip(columns, row, strict=True))
            if labels is not None:
                label: Any = labels[number]
                named["label"] = _plain(label)
            yield named

    label_column = None if labels is None else "label"
    return _make_source(
        memory_reader(name, checked()), None, columns, label_column, label_names, unlabelled is not None,
        unlabelled or "refuse", classes, like or RowFormat(), problem_type,
    )  # fmt: skip


def _plain(label: Any) -> Any:
    """A label in memory as JSON has it."""
    if hasattr(label, "tolist"):  # numpy's and torch's
        return label.tolist()
    if isinstance(label, (list, tuple, set, frozenset)):
        members = [_plain(member) for member in label]
        return sorted(members, key=str) if isinstance(label, (set, frozenset)) else members
    return label


def _make_source(
    reader: Reader,
    folder: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | Sequence[str] | None,
    label_names: Sequence[str] | None,
    need_labels: bool,
    unlabelled: str,
    classes: Sequence[str],
    like: RowFormat,
    problem_type: str | None,
) -> RowSource:
    if reader.n_rows == 0:
        raise DataError(f"{reader.name} has no rows; expected at least one row of text.")
    columns = reader.schema.names
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{reader.name} has more than one column {repeated[0]!r}; rename all but one.")
    beside = read_beside(folder)
    texts, text_origin = find_text_columns(reader, text_columns, beside.get("text_columns"), like)
    found, label_origin = find_label_columns(reader, label_column, texts, like, need_labels=need_labels)
    if not found and need_labels:
        raise DataError(
            f"{reader.name} has no label column among its columns {listed(columns)}; name it with --label-column."
        )
    labels, names, are_remembered = read_targets(
        reader, texts[0], found, label_names=label_names, recorded=beside.get("label_names"), like=like,
        problem_type=problem_type, need_labels=need_labels, unlabelled=unlabelled, classes=classes,
        is_named=label_column is not None or like.label_column is not None,
    )  # fmt: skip
    drops = unlabelled == "drop" or (unlabelled == DROP_MARKED and need_labels)
    drops = drops and bool(labels.columns) and labels.n_unlabelled > 0
    kept = labelled_rows(reader, labels) if drops else None
    taken = [
        (f"text column{'s' * (len(texts) > 1)} {' and '.join(texts)}", text_origin),
        (f"label column{'s' * (len(found) > 1)} {listed(found)}", label_origin),
        (f"label names {listed(names or ())}", f"as in {like.owner}" if are_remembered else None),
    ]
    said_of = said(reader.name, [(what, why) for what, why in taken if why is not None])
    return RowSource(reader, texts, labels, tuple(names) if names else None, kept, unlabelled=unlabelled, taken=said_of)
