"""Claims about reading text rows, on files that the tests write themselves."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import DATA, NO_DATA

from forebear.errors import DataError
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_source import RowSource

TEXTS = ["NA", "None", "", "007", 'she said "no"', "two\nlines, one row", "naïve 💡", "NA"]
NUMBERS = [0, 1, 1, 0, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    return DATA


@pytest.fixture(autouse=True)
def quiet_datasets() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_parquet(path: Path, **options: Any) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "label": NUMBERS}), path, **options)
    return path


def saved_dataset(names: tuple[str, ...] = ("bad", "good"), labels: list[int] = NUMBERS) -> Any:
    kinds = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels}, features=kinds)


def make_source(kind: str, folder: Path) -> str:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(path, row_group_size=3)
    elif kind == "csv":
        write_csv(path, [["text", "label"], *zip(TEXTS, NUMBERS, strict=True)])
    elif kind.startswith("json"):
        write_lines(path, [{"text": t, "label": n} for t, n in zip(TEXTS, NUMBERS, strict=True)])
    else:
        saved_dataset().save_to_disk(str(path))
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


def texts_of(source: RowSource, **options: Any) -> list[str]:
    return [text for block in source.blocks(**options) for text in block.texts[0]]


def labels_of(source: RowSource) -> list[Any]:
    return [label for block in source.blocks(2) for label in block.labels or []]


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened = open_rows(source, **options)
        for _ in opened.blocks():
            pass
    message = str(caught.value)
    assert "\n" not in message
    return message


KINDS = ["parquet", "csv", "jsonl", "json", "jsonl.gz", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows_untouched(tmp_path: Path, kind: str) -> None:
    source = open_rows(make_source(kind, tmp_path), need_labels=True)
    assert (source.text_columns, source.label_column, source.n_rows) == (("text",), "label", 8)
    assert source.label_values == (0, 1)
    assert texts_of(source) == TEXTS
    assert texts_of(source) == TEXTS  # and again
    assert labels_of(source) == NUMBERS
    assert all(type(label) is int for label in labels_of(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 2, 3, 7, 8, 20])
def test_blocks_are_exact_and_start_skips(tmp_path: Path, kind: str, start: int) -> None:
    source = open_rows(make_source(kind, tmp_path))
    blocks = list(source.blocks(3, start))
    left = max(0, 8 - start)
    assert [len(block) for block in blocks] == [3] * (left // 3) + ([left % 3] if left % 3 else [])
    assert [block.start for block in blocks] == list(range(start, 8, 3))
    assert [text for block in blocks for text in block.texts[0]] == TEXTS[start:]
    for block in blocks:
        assert block.table.num_rows == len(block.texts[0]) == len(block.labels or [])
        assert block.table.column("text").to_pylist() == block.texts[0]


def test_digest_ignores_format_and_column_names_but_no_text_label_or_order(tmp_path: Path) -> None:
    digests = {open_rows(make_source(kind, tmp_path)).sha256() for kind in KINDS}
    digests.add(rows_from_texts(TEXTS, NUMBERS).sha256())
    digests.add(rows_from_texts(TEXTS, NUMBERS, text_columns=["words"]).sha256())
    assert len(digests) == 1
    others = [
        rows_from_texts(TEXTS[::-1], NUMBERS),
        rows_from_texts(TEXTS, NUMBERS[::-1]),
        rows_from_texts(TEXTS, [str(number) for number in NUMBERS]),
        rows_from_texts(TEXTS),
        rows_from_texts([(text, "") for text in TEXTS], NUMBERS),
        rows_from_texts([("", text) for text in TEXTS], NUMBERS),
    ]
    assert len(digests | {other.sha256() for other in others}) == 7


def test_digest_does_not_depend_on_row_groups(tmp_path: Path) -> None:
    one = write_parquet(tmp_path / "one.parquet")
    many = write_parquet(tmp_path / "many.parquet", row_group_size=1)
    assert open_rows(one).sha256() == open_rows(many).sha256()


def test_equal_rows_stay_separate() -> None:
    source = rows_from_texts(["a"] * 5, [0] * 5)
    assert (source.n_rows, texts_of(source)) == (5, ["a"] * 5)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    line = json.dumps({"text": "word " * 200, "label": 0}) + "\n"
    with path.open("w") as file:
        file.writelines(line for _ in range(40_000))  # 40 MB
    source = open_rows(path)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    arrow = max(pa.total_allocated_bytes() - before for _ in source.blocks(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert arrow < 15e6
    assert peak < 25e6


# Text columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["label", "text"], ("text",)),
        (["Sentence", "idx"], ("Sentence",)),
        (["review", "label"], ("review",)),
        (["text", "content"], ("text",)),
        (["hypothesis", "premise", "text"], ("premise", "hypothesis")),
        (["Sentence2", "sentence1"], ("sentence1", "Sentence2")),
        (["question", "sentence"], ("question", "sentence")),
        (["question1", "question2"], ("question1", "question2")),
    ],
)
def test_text_columns_are_found_by_name(tmp_path: Path, columns: list[str], expected: tuple[str, ...]) -> None:
    path = write_csv(tmp_path / "a.csv", [columns, ["x"] * len(columns)])
    assert open_rows(path).text_columns == expected


@pytest.mark.parametrize(
    "columns",
    [["a", "b"], ["text", "sentence"], ["premise", "hypothesis", "sentence1", "sentence2"], ["premise", "b"]],
)
def test_absent_or_ambiguous_text_columns_are_listed(tmp_path: Path, columns: list[str]) -> None:
    message = refusal(write_csv(tmp_path / "a.csv", [columns, ["x"] * len(columns)]))
    assert ", ".join(columns) in message
    assert "text_columns=" in message


def test_text_columns_given_keep_their_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["premise", "hypothesis", "Other"], ["p", "h", "o"]])
    source = open_rows(path, text_columns=["other", "premise"])
    assert source.text_columns == ("Other", "premise")
    assert next(source.blocks()).texts == (["o"], ["p"])


def test_unknown_text_column_is_refused_with_the_list(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "label"], ["x", "1"]])
    message = refusal(path, text_columns=["body"])
    assert "'body'" in message
    assert "text, label" in message
    assert "one or two" in refusal(path, text_columns=["text", "label", "text"])
    assert "one or two" in refusal(path, text_columns=["text", "text"])
    assert "both as text and as label" in refusal(path, text_columns=["label"], label_column="label")


def test_text_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "int64" in refusal(tmp_path / "a.parquet")
    message = refusal(write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": 5}]))
    assert "an integer in row 2" in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "missing.jsonl"])
def test_null_text_is_an_error_that_names_row_and_column(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    texts = ["a", "", None]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1)
    else:
        write_lines(path, [{"text": t, "x": 1} if t is not None or kind == "jsonl" else {"x": 1} for t in texts])
    message = refusal(path)
    assert "row 2" in message
    assert "'text'" in message
    with pytest.raises(DataError, match="row 2"):
        open_rows(path).sha256()


def test_dictionary_and_large_strings_are_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "premise": pa.array(["a", "b", "a"]).dictionary_encode(),
            "hypothesis": pa.array(["c", "d", "e"], pa.large_string()),
            "label": pa.array(["no", "yes", "no"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_rows(tmp_path / "a.parquet")
    assert next(source.blocks()).texts == (["a", "b", "a"], ["c", "d", "e"])
    assert labels_of(source) == ["no", "yes", "no"]


# Labels


@pytest.mark.parametrize("name", ["label", "labels", "Gold_Label", "class", "target"])
def test_label_column_is_found_by_name(tmp_path: Path, name: str) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", name], ["x", "yes"]])
    assert open_rows(path).label_column == name


def test_label_wins_over_gold_label_unless_given(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "gold_label", "label"], ["x", "yes", "1"]])
    assert open_rows(path).label_values == (1,)
    assert open_rows(path, label_column="gold_label").label_values == ("yes",)
    assert "'other'" in refusal(path, label_column="other")


def test_a_source_without_labels_opens_unless_they_are_needed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "other"], ["x", "1"]])
    source = open_rows(path)
    assert (source.label_column, source.label_values, next(source.blocks()).labels) == (None, (), None)
    message = refusal(path, need_labels=True)
    assert "text, other" in message
    assert "label_column=" in message


def test_csv_labels_are_integers_only_if_all_are(tmp_path: Path) -> None:
    rows = [["text", "label"], ["007", "1"], ["008", "0"], ["9", "2"]]
    source = open_rows(write_csv(tmp_path / "a.csv", rows))
    assert labels_of(source) == [1, 0, 2]
    assert texts_of(source) == ["007", "008", "9"]
    assert next(source.blocks()).table.column("label").to_pylist() == ["1", "0", "2"]
    names = open_rows(write_csv(tmp_path / "b.csv", [["text", "label"], ["a", "yes"], ["b", "NA"]]))
    assert labels_of(names) == ["yes", "NA"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, "one"], "an integer in row 0 and a name in row 2"),
        (["a", 1], "a name in row 0 and an integer in row 1"),
        ([0, 1.5], "an integer in row 0 and a number in row 1"),
        ([1.5, 0.5], "a number in row 0"),
        ([1.0, float("inf")], "an integer in row 0 and a number in row 1"),
        ([[0], 1], "a list in row 0 and an integer in row 1"),
        ([0, True], "an integer in row 0 and true/false in row 1"),
        ([2**70, 1], "a long integer in row 0"),
    ],
)
def test_labels_of_unlike_types_are_refused_by_row_in_json(tmp_path: Path, labels: list[Any], said: str) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    assert said in refusal(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError) as caught:
        rows_from_texts(["x"] * len(labels), labels)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["0", "1", "one"], "an integer in row 0 and a name in row 2"),
        (["0", "1.5"], "an integer in row 0 and a number in row 1"),
        (["1.5", "0.0"], "a number in row 0 and an integer in row 1"),
    ],
)
def test_labels_of_unlike_types_are_refused_by_row_in_csv(tmp_path: Path, labels: list[str], said: str) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "label"], *(["x", label] for label in labels)])
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (pa.array([0.5, 1.0]), "a number in row 0 and an integer in row 1"),
        (pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 2)]), "date32[day] in row 0"),
        (pa.array([1, 2**64 - 1], pa.uint64()), "cannot be read as labelled text"),
    ],
)
def test_labels_of_other_types_are_refused_in_parquet(tmp_path: Path, labels: pa.Array, said: str) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "a.parquet")
    assert said in refusal(tmp_path / "a.parquet")


def test_a_column_with_too_many_values_is_no_label_column(tmp_path: Path) -> None:
    table = pa.table({"text": ["x"] * 10_001, "label": np.arange(10_001)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "10000 different values" in refusal(tmp_path / "a.parquet")


def test_wholly_unlabelled_sources_open_unless_labels_are_needed(tmp_path: Path) -> None:
    saved_dataset(labels=[-1, -1]).save_to_disk(str(tmp_path / "hub"))
    pq.write_table(pa.table({"text": ["a"], "label": pa.nulls(1)}), tmp_path / "null.parquet")
    write_csv(tmp_path / "blank.csv", [["text", "label"], ["a", ""]])
    for path in (tmp_path / "hub", tmp_path / "null.parquet", tmp_path / "blank.csv"):
        source = open_rows(path)
        assert (source.label_column, next(source.blocks()).labels) == (None, None)
        assert "in row 0" in refusal(path, need_labels=True)


def test_whole_floats_and_truth_values_are_labels(tmp_path: Path) -> None:
    assert labels_of(rows_from_texts(["a", "b", "c"], [1.0, 0.0, float("nan")])) == [1, 0, None]
    assert labels_of(rows_from_texts(["a", "b"], [True, False])) == ["true", "false"]
    floats = write_csv(tmp_path / "a.csv", [["text", "label"], ["a", "1.0"], ["b", ""], ["c", "0.0"]])
    assert labels_of(open_rows(floats)) == [1, None, 0]
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([1.0, 0.0])}), tmp_path / "a.parquet")
    assert open_rows(tmp_path / "a.parquet").sha256() == rows_from_texts(["a", "b"], [1, 0]).sha256()


def test_minus_one_is_a_label_like_any_where_numbers_have_no_names() -> None:
    assert rows_from_texts(["a", "b"], [-1, 1]).label_values == (-1, 1)


def test_label_names_come_from_argument_then_feature_then_dataset_json(tmp_path: Path) -> None:
    described = tmp_path / "rows.parquet"
    saved_dataset().to_parquet(str(described))
    plain = write_parquet(tmp_path / "plain.parquet")
    assert open_rows(plain).label_names is None
    (tmp_path / "dataset.json").write_text(json.dumps({"label_names": ["worse", "better"]}))
    assert open_rows(plain).label_names == ("worse", "better")
    assert open_rows(described).label_names == ("bad", "good")
    assert open_rows(described, label_names=["no", "yes"]).label_names == ("no", "yes")


def test_labels_outside_the_names_are_refused_by_row(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "label"], ["a", "1"], ["b", "2"]])
    message = refusal(path, label_names=["no", "yes"])
    assert "2 in row 1" in message
    assert "label_names=" in message
    assert "repeat" in refusal(path, label_names=["no", "no"])


def test_recorded_names_of_other_labels_are_not_put_upon_names(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"label_names": ["no", "yes"]}))
    other = write_csv(tmp_path / "a.csv", [["text", "label"], ["a", "maybe"]])
    assert open_rows(other).label_names is None
    same = write_csv(tmp_path / "b.csv", [["text", "label"], ["a", "yes"]])
    assert open_rows(same).label_names == ("no", "yes")


def test_dataset_json_names_the_text_columns_too(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"text_columns": ["text", "term"]}))
    assert open_rows(write_csv(tmp_path / "a.csv", [["term", "text"], ["t", "x"]])).text_columns == (
        "text",
        "term",
    )
    assert open_rows(write_csv(tmp_path / "b.csv", [["text"], ["x"]])).text_columns == ("text",)


@pytest.mark.parametrize("content", ["{", '{"label_names": "no,yes"}', '{"label_names": [0, 1]}'])
def test_broken_dataset_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    assert "dataset.json" in refusal(write_csv(tmp_path / "a.csv", [["text"], ["x"]]))


# Formats


def test_tsv_quotes_are_ordinary_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n"it opens\t0\nand never "closes"\t1\n')
    source = open_rows(path)
    assert texts_of(source) == ['"it opens', 'and never "closes"']
    assert labels_of(source) == [0, 1]


def test_csv_reads_quotes_newlines_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbftext,label\n"a ""b"",\r\nc",x\n"",y\n'
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    source = open_rows(tmp_path / "a.csv.gz")
    assert texts_of(source) == ['a "b",\r\nc', ""]


def test_one_column_csv_keeps_quoted_empty_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\na\n""\n\nb\n')
    assert texts_of(open_rows(tmp_path / "a.csv")) == ["a", "", "b"]


def test_json_columns_have_the_same_type_in_every_block(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "x": None, "n": 1, "mixed": "one", "deep": [1], "flag": True},
        {"text": "b", "x": "X", "n": 2.5, "mixed": 1, "deep": {"k": "é"}},
        {"text": "c", "late": 2**70, "count": 7},
    ]
    blocks = list(open_rows(write_lines(tmp_path / "a.jsonl", rows)).blocks(1))
    assert len({str(block.table.schema) for block in blocks}) == 1
    assert pa.concat_tables([block.table for block in blocks]).to_pydict() == {
        "text": ["a", "b", "c"],
        "x": [None, "X", None],
        "n": [1.0, 2.5, None],
        "mixed": ["one", "1", None],
        "deep": ["[1]", '{"k": "é"}', None],
        "flag": [True, None, None],
        "late": [None, None, str(2**70)],
        "count": [None, None, 7],
    }


def test_json_blank_lines_and_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert texts_of(open_rows(tmp_path / "a.jsonl"), start=1) == ["b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "line 3"),
        (b'{"text": "a"}\n["b"]\n', "line 2 holds a list"),
        (b'{"text": "a"}\n3\n', "line 2 holds an integer"),
        (b'{"text": "a", "text": "b"}\n', "'text' comes twice"),
        (b'{"text": "\xff"}\n', "line 1"),
        (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2"),
        (b' \n[{"text": "a"}', "ends before its bracket"),
        (b'[{"text": "a"} {"text": "b"}]', "after 1 elements (a comma is missing)"),
        (b'[{"text": "a"}, 3]', "element 2 (from 1) holds an integer"),
        (b'[{"text": "a"},]', "after 1 elements"),
        (b'[{"text": "a"}] x', "something follows"),
        (b'[{"text": "a", "text": "b"}]', "'text' comes twice"),
        (b"\n\n", "no rows"),
        (b"{" * 3 + b'"a":' * 3, "line 1"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1"),
    ],
)
def test_broken_json_lines_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert said in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,label\na,1\nb\n", "Row #3: Expected 2 columns, got 1"),
        (b"text,label\na,1\n\xff\xfe,1\n", "byte 15 (from 0), in line 3, is 0xff"),
        (b"text,label\n", "no rows"),
        (b"text,text\na,b\n", "more than one column 'text'"),
        (b'text,label\n"a,1\nb,2\n', "cannot be read as CSV"),
        (b"\n\n", "cannot be read as CSV"),
        (b"text;label\na;1\n", "text;label"),
    ],
)
def test_broken_csv_is_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert said in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv", ".csv.gz"])
def test_empty_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    assert "empty (0 bytes)" in refusal(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".csv.gz", ".tsv.bz2", ".csv", ".jsonl"])
def test_files_of_another_kind_than_they_say_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert str(path) in refusal(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.jsonl.gz"):
        path = Path(make_source(name.removeprefix("rows."), tmp_path))
        path.write_bytes(path.read_bytes()[:-20])
        assert str(path) in refusal(path)


def test_damaged_parquet_pages_are_refused_while_streaming(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    assert "cannot be read as" in refusal(path)


def test_a_file_that_shrinks_or_grows_after_opening_is_noticed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text"], ["a"], ["b"], ["c"]])
    source = open_rows(path)
    write_csv(path, [["text"], ["a"]])
    with pytest.raises(DataError, match="has 1 of the 3 rows"):
        list(source.blocks())
    write_csv(path, [["text"], *(["a"] for _ in range(4))])
    with pytest.raises(DataError, match="more than the 3 rows"):
        list(source.blocks())


def test_parquet_without_rows_or_with_twin_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "no rows" in refusal(tmp_path / "a.parquet")
    twins = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twins, tmp_path / "b.parquet")
    assert "more than one column 'text'" in refusal(tmp_path / "b.parquet")


# What a source may be called


@pytest.mark.parametrize(
    "name", ["missing.csv", "./missing", "/nowhere/at/all", "missing", "", "x.parquet:train", "~/x"]
)
def test_missing_paths_are_said_to_be_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert "no such file or folder" in refusal(name)


def test_odd_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    assert ".jsonl" in refusal(tmp_path / "a.docx")
    path = write_parquet(tmp_path / "a.parquet")
    assert "leave out :train" in refusal(f"{path}:train")
    assert "no such file" in refusal("a\0b")
    assert "no such file" in refusal("x" * 5000)
    path.rename(tmp_path / "a.txt")
    assert "holds no data files" in refusal(tmp_path)


def test_saved_dict_needs_a_split(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(train=saved_dataset(), test=saved_dataset(labels=[1, 0])).save_to_disk(folder)
    source = open_rows(f"{folder}:test")
    assert (source.n_rows, source.label_names, labels_of(source)) == (2, ("bad", "good"), [1, 0])
    for message in (refusal(folder), refusal(f"{folder}:dev")):
        assert "train, test" in message
    assert "leave out :train" in refusal(f"{folder}/test:train")


def test_saved_selection_keeps_its_order(tmp_path: Path) -> None:
    saved_dataset().select([4, 1, 3]).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(open_rows(tmp_path / "saved")) == [TEXTS[4], TEXTS[1], TEXTS[3]]


def test_broken_saved_folder_is_refused(tmp_path: Path) -> None:
    saved_dataset().save_to_disk(str(tmp_path / "saved"))
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"junk")
    assert "cannot be read as a saved data set" in refusal(tmp_path / "saved")


def fake_hub(monkeypatch: pytest.MonkeyPatch, known: dict[tuple[str, str | None], Any]) -> list[Any]:
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        found = known.get((name, config), datasets.exceptions.DatasetNotFoundError("gone"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("glue/sst2:train", [("glue/sst2", None, "train"), ("glue", "sst2", "train")]),
        ("owner/repo:test", [("owner/repo", None, "test")]),
        ("nyu-mll/glue/sst2:train", [("nyu-mll/glue", "sst2", "train")]),
        ("imdb:train[:100]", [("imdb", None, "train[:100]")]),
    ],
)
def test_hub_names_are_tried_as_repository_then_as_configuration(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: list[Any]
) -> None:
    hub = [("glue", "sst2"), ("owner/repo", None), ("nyu-mll/glue", "sst2"), ("imdb", None)]
    seen = fake_hub(monkeypatch, dict.fromkeys(hub, saved_dataset()))
    source = open_rows(name)
    assert seen == asked
    assert (source.name, source.label_names, texts_of(source)) == (name, ("bad", "good"), TEXTS)


def test_hub_failures_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {("a", None): ConnectionError("down"), ("b", None): ValueError("Unknown\nsplit")})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert "cannot be reached (down)" in refusal("a:train")
    assert "Unknown split" in refusal("b:train")
    assert "no data set of that name" in refusal("c/d:train")


def test_without_network_the_hub_is_asked_once_but_the_cache_for_both_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {("glue/sst2", None): ConnectionError("down"), ("glue", "sst2"): saved_dataset()}
    seen = fake_hub(monkeypatch, known)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert "HF_HUB_OFFLINE=1" in refusal("glue/sst2:train")
    assert len(seen) == 1
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert open_rows("glue/sst2:train").n_rows == 8


def test_an_existing_path_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_hub(monkeypatch, {})
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict(train=saved_dataset()).save_to_disk("glue/sst2")
    assert open_rows("glue/sst2:train").n_rows == 8
    assert seen == []


# Rows in memory


def test_rows_in_memory_behave_like_a_file() -> None:
    source = rows_from_texts([("p", "h"), ("q", "i")], np.array([1, 0]), label_names=["no", "yes"])  # type: ignore[arg-type]
    assert source.text_columns == ("premise", "hypothesis")
    assert (source.n_rows, source.label_names, source.label_values) == (2, ("no", "yes"), (0, 1))
    blocks = list(source.blocks(1))
    assert [block.texts for block in blocks] == [(["p"], ["h"]), (["q"], ["i"])]
    assert labels_of(source) == [1, 0]
    assert rows_from_texts(["a"], ["yes"]).label_values == ("yes",)
    assert texts_of(rows_from_texts(list(np.array(["a", "b"])))) == ["a", "b"]


def test_rows_in_memory_of_unlike_shape_are_refused() -> None:
    for texts, labels in [
        ([], None),
        (["a"], [1, 2]),
        (["a", ("b", "c")], None),
        ([None], None),
        (["\ud83d"], None),
    ]:
        with pytest.raises(DataError):
            rows_from_texts(texts, labels)  # type: ignore[arg-type]


def test_silly_block_sizes_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="block_rows=0"):
        rows_from_texts(["a"]).blocks(0)


# Real data


@pytest.mark.parametrize(
    ("file", "columns", "names"),
    [
        ("sst2/dev.parquet", ("text",), ("negative", "positive")),
        ("hans/test.parquet", ("premise", "hypothesis"), ("entailment", "non-entailment")),
        ("mnli10k/train.parquet", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        ("mams/dev.parquet", ("text", "term"), ("negative", "neutral", "positive")),
    ],
)
def test_real_files_open_as_their_readme_says(
    real_data: Path, file: str, columns: tuple[str, ...], names: tuple[str, ...]
) -> None:
    source = open_rows(real_data / file, need_labels=True)
    described = json.loads((real_data / file).with_name("dataset.json").read_text())
    split = described["splits"][Path(file).stem]
    assert (source.text_columns, source.label_names, source.n_rows) == (columns, names, split["rows"])
    counts = np.bincount(labels_of(source), minlength=len(names))
    assert dict(zip(names, counts.tolist(), strict=True)) == split["labels"]


def test_real_labels_beyond_the_recorded_names_are_refused(real_data: Path) -> None:
    assert "label_names=" in refusal(real_data / "sst2" / "dev.parquet", label_column="label5")
