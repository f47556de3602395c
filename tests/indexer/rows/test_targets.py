"""Rows of several labels, and of numbers: every layout that files have gives the same targets, or is refused by row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forebear.errors import DataError
from forebear.indexer.rows.labels import classes_for, label_map
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION, RowFormat

TEXTS = ["w", "x", "y", "z"]
SETS = [["a", "c"], [], ["b"], ["a"]]
WANTED = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], float)


def write_csv(path: Path, *rows: list[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_lines(path: Path, targets: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(TEXTS, targets, strict=False)))
    return path


def targets_of(source: Any, names: tuple[str, ...] = ("a", "b", "c"), problem_type: str = MULTI_LABEL) -> np.ndarray:
    assert source.problem_type == problem_type
    mapping = label_map(source, names, problem_type=problem_type)
    return np.concatenate([mapping(block.labels, block.start) for block in source.blocks(3)])


def test_every_layout_gives_the_same_targets_and_one_digest(tmp_path: Path) -> None:
    vectors = WANTED.tolist()
    by_number = [["ABC".lower().index(name) for name in names] for names in SETS]
    columns = {name: [int(row[i]) for row in WANTED] for i, name in enumerate("abc")}
    parquet = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"text": TEXTS, "label": SETS}), parquet)
    pq.write_table(pa.table({"text": TEXTS, "label": vectors}), tmp_path / "vectors.parquet")
    flags = write_csv(tmp_path / "flags.csv", ["text", *"abc"], *zip(TEXTS, *columns.values(), strict=True))
    as_text = write_csv(tmp_path / "t.csv", ["text", "label"], *zip(TEXTS, map(str, SETS), strict=True))
    named = {"need_labels": True, "label_names": ["a", "b", "c"]}
    of_names = [
        open_rows(write_lines(tmp_path / "names.jsonl", SETS), need_labels=True),
        open_rows(parquet, need_labels=True),
        open_rows(as_text, need_labels=True, problem_type="multi-label"),
        open_rows(flags, need_labels=True, label_column="a,b,c"),
        open_rows(flags, need_labels=True, label_column=["a", "b", "c"]),
        open_rows([dict(zip(["text", *"abc"], r, strict=True)) for r in zip(TEXTS, *columns.values(), strict=True)],
                  label_column=("a", "b", "c")),
        rows_from_texts(TEXTS, SETS),
        rows_from_texts(TEXTS, [set(names) for names in SETS]),
    ]  # fmt: skip
    of_numbers = [
        open_rows(write_lines(tmp_path / "ids.jsonl", by_number), **named),
        open_rows(write_lines(tmp_path / "vectors.jsonl", vectors), **named),
        open_rows(tmp_path / "vectors.parquet", **named),
        rows_from_texts(TEXTS, WANTED, label_names=["a", "b", "c"]),
    ]
    for source in (*of_names, *of_numbers):
        np.testing.assert_array_equal(targets_of(source), WANTED)
        assert classes_for(source) == ("a", "b", "c")
    assert len({source.sha256() for source in of_names}) == 1
    assert len({source.sha256() for source in of_numbers}) == 1


def test_names_of_numbers_in_lists_come_from_the_feature(tmp_path: Path) -> None:
    """As data sets of the hub have them: a list of ClassLabel."""
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["a", "b", "c"]))})
    numbers = [["abc".index(name) for name in names] for names in SETS]
    rows = Dataset.from_dict({"text": TEXTS, "labels": numbers}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in (open_rows(rows), open_rows(tmp_path / "rows.parquet")):
        assert classes_for(source) == ("a", "b", "c")
        np.testing.assert_array_equal(targets_of(source, ("c", "a", "b")), WANTED[:, [2, 0, 1]])


def test_cells_are_parted_by_the_one_sign_that_occurs(tmp_path: Path) -> None:
    for sign in (";", "|", ","):
        path = write_csv(tmp_path / "a.csv", ["text", "label"], ["w", f"a{sign} c"], ["x", "b"])
        np.testing.assert_array_equal(targets_of(open_rows(path, problem_type=MULTI_LABEL)), WANTED[[0, 2]])
    path = write_csv(tmp_path / "a.csv", ["text", "label"], ["w", "a;c"], ["x", "a,b"])
    with pytest.raises(DataError, match="holds , and ;, of which either may part"):
        open_rows(path, problem_type=MULTI_LABEL)


def test_several_columns_are_remembered_by_their_names(tmp_path: Path) -> None:
    """Also where a name holds a comma."""
    path = write_csv(tmp_path / "a.csv", ["text", "good, warm", "bad"], ["w", "1", "0"], ["x", "0", "1"])
    stated = open_rows(path, label_column=["good, warm", "bad"]).format("the run").stated()
    like = RowFormat.of(stated, "the run", MULTI_LABEL)
    again = open_rows(path, like=like)
    assert again.label_columns == ("good, warm", "bad")
    np.testing.assert_array_equal(targets_of(again, ("good, warm", "bad")), [[1, 0], [0, 1]])


def test_shares_between_0_and_1_are_targets(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["text", "a", "b"], ["w", "0.25", "1"], ["x", "0", "true"])
    np.testing.assert_array_equal(
        targets_of(open_rows(path, label_column="a,b"), ("a", "b")), [[0.25, 1.0], [0.0, 1.0]]
    )


def test_names_match_in_the_models_order_and_an_unknown_one_is_refused_by_row() -> None:
    source = rows_from_texts(TEXTS, SETS)
    np.testing.assert_array_equal(targets_of(source, ("C", "a", "B")), WANTED[:, [2, 0, 1]])
    with pytest.raises(DataError, match=r"row 2 \(from 0\) has the label 'b', which the model does not know"):
        targets_of(source, ("a", "c"))
    partial = label_map(source, ("a", "c"), problem_type=MULTI_LABEL, partial=True)
    found = partial(next(source.blocks()).labels)
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [False, False, True, False])
    assert "theirs stays empty" in str(partial.remark)


@pytest.mark.parametrize("layout", ["null in a list column", "-1 in columns", "empty cell"])
def test_missing_labels_are_refused_by_row_or_left_out(layout: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"problem_type": MULTI_LABEL}
    if layout == "null in a list column":
        path = write_lines(tmp_path / "a.jsonl", [["a"], None, ["b"]])
    elif layout == "empty cell":
        path = write_csv(tmp_path / "a.csv", ["text", "label"], ["w", "a"], ["x", ""], ["y", "b"])
    else:
        path = write_csv(tmp_path / "a.csv", ["text", "a", "b"], ["w", "1", "0"], ["x", "-1", "-1"], ["y", "0", "1"])
        options["label_column"] = "a,b"
    with pytest.raises(DataError, match=r"gives no labels in 1 of 3 rows, first in row 1 \(from 0\)"):
        open_rows(path, need_labels=True, **options)
    if layout == "-1 in columns":  # a mark, which training rows are left out by
        marked = open_rows(path, need_labels=True, unlabelled="drop-marked", **options)
        assert (marked.n_rows, marked.marks) == (2, (-1,))
        assert "rows have no label (-1) and are left out" in marked.remarks()[0]
    else:
        with pytest.raises(DataError, match="gives no labels in 1 of 3 rows"):
            open_rows(path, need_labels=True, unlabelled="drop-marked", **options)
    kept = open_rows(path, need_labels=True, unlabelled="drop", **options)
    assert (kept.n_rows, kept.n_dropped) == (2, 1)
    np.testing.assert_array_equal(targets_of(kept, ("a", "b")), [[1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([["a"], [["b"]]], r"in row 1 \(from 0\), \['b'\] in a list of labels"),
        ([["a"], [-2]], r"in row 1 \(from 0\), -2 in a list of labels"),
        ([["a"], ["b", None]], r"in row 1 \(from 0\), None in a list of labels"),
    ],
)
def test_what_is_no_label_is_refused_by_row(targets: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        open_rows(write_lines(tmp_path / "a.jsonl", targets))


def test_a_value_beyond_0_and_1_is_no_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["text", "a", "b"], ["w", "1", "0"], ["x", "3", "0"])
    with pytest.raises(DataError, match=r"in row 1 \(from 0\), 3; expected 0, 1, or a share"):
        open_rows(path, label_column="a,b")
    with pytest.raises(DataError, match="but a row has one label here"):
        open_rows(path, label_column="a,b", problem_type="single-label")


@pytest.mark.parametrize("numbers", [[1, 2, 5], [1.5, -2.0, 3e3], ["1", "2.5", "-3"]])
def test_numbers_are_read_as_they_are(numbers: list[Any], tmp_path: Path) -> None:
    wanted = [[float(number)] for number in numbers]
    lines = open_rows(write_lines(tmp_path / "a.jsonl", numbers), problem_type=REGRESSION)
    as_csv = open_rows(
        write_csv(tmp_path / "a.csv", ["text", "label"], *zip(TEXTS, numbers, strict=False)), problem_type=REGRESSION
    )
    for source in (lines, as_csv, rows_from_texts(TEXTS[:3], numbers, problem_type=REGRESSION)):
        np.testing.assert_array_equal(targets_of(source, ("score",), REGRESSION), wanted)
        assert classes_for(source) == ("label",)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (None, r"gives no number in 1 of 2 rows, first in row 1 \(from 0\): null, NaN or empty\."),
        (float("nan"), r"gives no number in 1 of 2 rows, first in row 1 \(from 0\)"),
        (float("inf"), r"in row 1 \(from 0\), inf; expected a number up to 1e\+18"),
        (-1e25, r"in row 1 \(from 0\), -1e\+25; expected a number up to 1e\+18"),
        ("many", r"in row 1 \(from 0\), 'many'; expected a number"),
    ],
)
def test_what_is_no_number_is_refused_by_row(number: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_rows([{"text": "w", "score": 1.5}, {"text": "x", "score": number}],
                  label_column="score", problem_type=REGRESSION, need_labels=True)  # fmt: skip


def test_rows_of_another_kind_than_the_models_are_refused() -> None:
    with pytest.raises(DataError, match=r"has several labels a row .* trained on one label a row"):
        label_map(rows_from_texts(TEXTS, SETS), ("a", "b", "c"))
    with pytest.raises(DataError, match=r"has one label a row .* trained on numbers"):
        label_map(rows_from_texts(TEXTS, [0, 1, 0, 1]), ("score",), problem_type=REGRESSION)
    two = open_rows([{"text": "w", "x": 1, "y": 2}], label_column="x,y", problem_type=REGRESSION)
    with pytest.raises(DataError, match=r"gives 2 number\(s\) a row \(x, y\), the model 1"):
        label_map(two, ("score",), problem_type=REGRESSION)
