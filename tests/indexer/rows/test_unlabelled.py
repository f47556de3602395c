"""Rows without a gold label, and labels that a model does not know: counted, refused or left out, never a class."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import labels, sentences, write_jsonl

from forebear.cli.main import run
from forebear.errors import DataError, InputError
from forebear.evaluation.audits.artifacts.regression import groups_of
from forebear.indexer.index import Index
from forebear.indexer.rows.labels import UNKNOWN, classes_for, label_map
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.training.run import read_run

NLI = ["entailment", "-", "neutral", "contradiction", "-", "neutral"]


def labels_of(source):
    return [label for block in source.blocks(2) for label in block.labels]


@pytest.fixture
def snli(tmp_path):
    """A file as SNLI is distributed."""
    texts = sentences(6)
    return write_jsonl(tmp_path / "snli.jsonl", gold_label=NLI, sentence1=texts, sentence2=texts[::-1])


def test_a_dash_is_no_class_and_the_refusal_counts_and_says_the_ways_out(snli):
    with pytest.raises(DataError) as caught:
        open_rows(snli, need_labels=True)
    message = str(caught.value)
    assert "in 2 of 6 rows, first in row 1 (from 0): '-'" in message
    assert 'unlabelled="drop"' in message
    assert 'unlabelled="keep"' in message
    source = open_rows(snli)
    assert labels_of(source) == [None if label == "-" else label for label in NLI]
    assert classes_for(source) == ("contradiction", "entailment", "neutral")
    kept = open_rows(snli, need_labels=True, unlabelled="keep")
    assert (kept.n_dropped, classes_for(kept)) == (0, ("-", "contradiction", "entailment", "neutral"))
    with pytest.raises(DataError, match="expected refuse, drop-marked, drop, keep"):
        open_rows(snli, unlabelled="yes")


def test_marked_rows_are_left_out_and_missing_labels_refused(snli, tmp_path):
    source = open_rows(snli, need_labels=True, unlabelled="drop-marked")
    assert (source.n_rows, source.n_dropped, source.unlabelled) == (4, 2, "drop-marked")
    assert source.sha256() == open_rows(snli, need_labels=True, unlabelled="drop").sha256()
    texts = sentences(4)
    for missing in (None, "", " "):
        path = write_jsonl(tmp_path / "missing.jsonl", text=texts, label=["a", "-", missing, "b"])
        with pytest.raises(DataError, match=r"no label in 2 of 4 rows.*Leave those rows out by unlabelled=\"drop\""):
            open_rows(path, need_labels=True, unlabelled="drop-marked")
    only = write_jsonl(tmp_path / "only.jsonl", text=texts, label=["+", "-", "-", "+"])
    with pytest.raises(DataError, match='unlabelled="keep"'):  # one class would be left: the mark is the other
        open_rows(only, need_labels=True, unlabelled="drop-marked")


def test_a_run_and_its_index_leave_out_the_same_marked_rows_by_default(tiny_model, tmp_path, capsys):
    given = ["bad", "good", "-", "good", "-1", "bad"]
    data = write_jsonl(tmp_path / "train.jsonl", text=sentences(6), label=given)
    run_folder, out = tmp_path / "run", tmp_path / "index"
    args = ["--model", tiny_model(), "--data", str(data), "--out", str(run_folder), "--epochs", "1"]
    assert run(["train", *args, "--label-names", "bad,good", "--dev", str(data)]) == 0
    assert "2 of 6 rows have no label ('-' and '-1') and are left out" in " ".join(capsys.readouterr().err.split())
    assert read_run(run_folder).settings["unlabelled"] == "drop-marked"
    for number, train in enumerate((str(data), open_rows(data, unlabelled="drop"), data)):
        built = Index.build(str(run_folder), train, out / str(number), dampings=(), warn=lambda line: None)
        assert built.manifest.segments[0].rows_sha256 == read_run(run_folder).data_sha256
    texts, labels_given = sentences(6), given
    built = Index.build(str(run_folder), texts, out / "texts", labels_given, dampings=(), warn=lambda line: None)
    assert built.manifest.segments[0].rows_sha256 == read_run(run_folder).data_sha256
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(3, seed=9), label=["bad", "-", "good"])
    assert run(["index", "--out", str(out / "0"), "--append", "--train", str(more)]) == 0
    assert [segment.n_left_out for segment in Index.open(out / "0").manifest.segments] == [2, 1]
    answers = tmp_path / "answers.parquet"
    asked = ["retrieve", "--index", str(out / "0"), "--test", str(more), "--top", "1", "--out", str(answers)]
    assert run(asked) == 0
    found = {row["query"]: row["query_label"] for row in pq.read_table(answers).to_pylist()}
    assert found == {0: "bad", 1: None, 2: "good"}  # a test row keeps its place


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_that_are_dropped_leave_consecutive_numbers_and_their_count(tmp_path, suffix):
    texts = sentences(6)
    path = write_jsonl(tmp_path / "rows.jsonl", text=texts, gold_label=NLI)
    table = open_rows(path, unlabelled="keep").blocks().__next__().table
    if suffix == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("text,gold_label\n" + "".join(f"{t},{n}\n" for t, n in zip(texts, NLI, strict=True)))
    elif suffix == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(table, path, row_group_size=4)
    source = open_rows(path, need_labels=True, unlabelled="drop")
    left = [0, 2, 3, 5]
    assert (source.n_rows, source.n_dropped) == (4, 2)
    for size in (1, 3, 10):
        for start in range(5):
            blocks = list(source.blocks(size, start))
            assert [block.start for block in blocks] == list(range(start, 4, size))
            assert [t for block in blocks for t in block.texts[0]] == [texts[i] for i in left[start:]]
            assert [n for block in blocks for n in block.labels] == [NLI[i] for i in left[start:]]
    assert source.sha256() == rows_from_texts([texts[i] for i in left], [NLI[i] for i in left]).sha256()
    assert [source.file_row(row) for row in range(4)] == left
    (remark,) = source.remarks()
    assert "2 of 6 rows have no label ('-') and are left out, first row 1" in remark
    assert "row numbers count the 4 rows kept" in remark


@pytest.mark.parametrize(
    ("values", "names", "unlabelled"),
    [
        ([0, 1, -1], ("no", "yes"), [2]),
        ([0, 1, -1], None, [2]),
        ([-1, 1, 1], None, []),
        ([-1, -1, -1], ("no", "yes"), [0, 1, 2]),
        ([1.0, float("nan"), 0.0], None, [1]),
        (["a", None, "b"], None, [1]),
        (["a", " ", "b"], None, [1]),
        (["a", "b", " - "], None, [2]),
        (["a", "- ", "-"], None, [1, 2]),
        (["-1", "x", " -1"], None, [0, 2]),
        (["-1", "0", "1"], None, [0]),
        (["-1", "1", "1"], None, []),
        (["-", "a", "b"], ("-", "a", "b"), []),
        (["\t", "\u2003", "a"], None, [0, 1]),
    ],
)
def test_what_counts_as_no_label(values, names, unlabelled):
    source = rows_from_texts(["x"] * 3, values, label_names=names)
    if len(unlabelled) == 3:
        assert source.label_column is None
        return
    assert [i for i, label in enumerate(labels_of(source)) if label is None] == unlabelled
    assert sum("no label" in line for line in source.remarks()) == bool(unlabelled)


def test_numbers_from_minus_one_are_classes_only_when_the_user_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", text=["a", "b", "c"], label=[-1, 0, 1])
    with pytest.raises(DataError, match=r'first in row 0 \(from 0\): -1.*unlabelled="drop".*unlabelled="keep"'):
        open_rows(path, need_labels=True)
    assert classes_for(open_rows(path, need_labels=True, unlabelled="keep")) == ("-1", "0", "1")
    with pytest.raises(DataError) as caught:
        open_rows(path, need_labels=True, label_names=["no", "yes"])
    assert 'unlabelled="keep"' not in str(caught.value)


def test_the_first_row_without_a_label_is_named_where_it_is_row_0():
    source = rows_from_texts(["a"] * 4, ["", "x", "y", "  "])
    (remark,) = source.remarks()
    assert "2 of 4 rows have no label, first row 0" in remark


@pytest.mark.parametrize(
    ("classes", "values"),
    [(("+", "-"), ["+", "-", " - ", None]), (("-1", "0", "1"), [-1, 0, 1, None]), (("-1", "0"), ["-1", "0", "-1", ""])],
)
def test_what_the_model_has_as_a_class_is_one(tmp_path, classes, values):
    path = write_jsonl(tmp_path / "a.jsonl", text=["a", "b", "c", "d"], label=values)
    source = open_rows(path, classes=classes)
    ids = label_map(source, classes, partial=True)(labels_of(source)).tolist()
    assert ids == [*(classes.index(str(value).strip()) for value in values[:3]), UNKNOWN]
    assert open_rows(path, classes=classes, unlabelled="drop").n_rows == 3
    with pytest.raises(InputError, match="has a class of this name"):
        label_map(open_rows(path), classes, partial=True)
    texts = ["a", "b", "c"]
    assert len(rows_from_texts(texts, values[:3], classes=classes).label_values) >= 2


def test_commands_take_a_dash_that_the_model_has_as_a_class(tiny_model, tmp_path, capsys):
    texts = sentences(24)
    signs = ["+" if n else "-" for n in labels(24)]
    data = write_jsonl(tmp_path / "signs.jsonl", text=texts, label=signs)
    run_folder, folder = tmp_path / "run", tmp_path / "index"
    train = ["train", "--model", tiny_model(), "--data", str(data), "--out", str(run_folder), "--epochs", "1"]
    assert run(train) == 2
    assert "--unlabelled keep" in " ".join(capsys.readouterr().err.split())
    assert run([*train, "--unlabelled", "keep"]) == 0
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    for number, model in enumerate((run_folder, checkpoint)):
        out = folder / str(number)
        args = ["index", "--model", str(model), "--train", str(data), "--out", str(out), "--damping", "none"]
        assert run(args) == 0
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(4, seed=3), label=["+", "-", "-", "+"])
    assert run(["index", "--out", str(out), "--append", "--train", str(more)]) == 0
    assert Index.open(out).manifest.n_rows == 28
    capsys.readouterr()
    answers = tmp_path / "out.parquet"
    args = ["retrieve", "--index", str(out), "--test", str(more), "--top", "1", "--out", str(answers)]
    assert run([*args, "--target", "gold"]) == 0
    assert "no label" not in capsys.readouterr().err
    found = {row["query"]: row["query_label"] for row in pq.read_table(answers).to_pylist()}
    assert found == {0: "+", 1: "-", 2: "-", 3: "+"}
    report = ["audit", "errors", "--index", str(out), "--test", str(more), "--method", "gd"]
    assert run([*report, "--out", str(tmp_path / "report")]) == 0


def test_labels_that_the_model_does_not_know_empty_their_own_rows_alone():
    source = rows_from_texts(["x"] * 5, ["good", "ugly", " BAD", "ugly", None])
    found = label_map(source, ("bad", "good"), partial=True)
    assert found(labels_of(source)).tolist() == [1, UNKNOWN, 0, UNKNOWN, UNKNOWN]
    assert "row 1 (from 0) has the label 'ugly'" in found.remark
    assert "2 of 5 rows" in found.remark
    with pytest.raises(DataError, match="2 of 5 rows"):
        label_map(source, ("bad", "good"))
    with pytest.raises(DataError, match="no name agrees"):
        label_map(rows_from_texts(["x"], ["ugly"]), ("bad", "good"), partial=True)


def test_rows_of_unknown_label_are_predicted_neither_rightly_nor_wrongly():
    groups, members = groups_of(np.array([0, 0, 1]), np.array([UNKNOWN, 1, 1]), ("bad", "good"))
    assert members[groups.index("predicted bad, wrongly")].tolist() == [False, True, False]


def test_empty_texts_are_counted_and_the_first_named():
    source = rows_from_texts([("a", "b"), ("", "b"), ("a", " \n\u2003"), ("", ""), ("\t", "x")])
    (remark,) = source.remarks()
    assert "4 of 5 rows have a text that is empty or white space alone (rows 1, 2, 3 ..., from 0)" in remark
    assert rows_from_texts(["a"], [0]).remarks() == []


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory):
    """An index of a tiny model whose classes are LABEL_0 and LABEL_1, with the names of the source."""
    folder = tmp_path_factory.mktemp("unlabelled")
    texts = sentences(30)
    train = write_jsonl(folder / "train.jsonl", text=texts, label=["good" if n else "bad" for n in labels(30)])
    args = ["index", "--model", tiny_model(), "--train", str(train), "--out", str(folder / "index")]
    assert run([*args, "--label-names", "bad,good"]) == 0
    return folder / "index"


def test_names_given_replace_those_that_say_nothing(index, tmp_path):
    assert Index.open(index).manifest.spec.label_names == ("bad", "good")
    test = write_jsonl(tmp_path / "test.jsonl", text=sentences(3, seed=4), label=["bad", "good", "bad"])
    out = tmp_path / "out.parquet"
    args = ["retrieve", "--index", str(index), "--test", str(test), "--top", "2", "--out", str(out)]
    assert run([*args, "--target", "good"]) == 0
    table = pq.read_table(out)
    for column in ("query_label", "query_prediction", "target", "label", "prediction"):
        assert set(table[column].to_pylist()) <= {"bad", "good"}
    assert set(table["target"].to_pylist()) == {"good"}


def test_the_command_empties_one_rows_label_and_says_so(index, tmp_path, capsys):
    given = ["good", "-", "maybe", " Bad", None, ""]
    test = write_jsonl(tmp_path / "test.jsonl", text=sentences(6, seed=5), label=given)
    out = tmp_path / "out.jsonl"
    args = ["retrieve", "--index", str(index), "--test", str(test), "--top", "1", "--out", str(out)]
    assert run(args) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 6 rows have no label, first row 1" in said
    assert "row 2 (from 0) has the label 'maybe'" in said
    assert "1 of 6 rows" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {row["query"]: row["query_label"] for row in rows if "query" in row}
    assert found == {0: "good", 1: None, 2: None, 3: "bad", 4: None, 5: None}
    assert run([*args, "--target", "gold", "--force"]) == 2
    assert "--unlabelled drop" in " ".join(capsys.readouterr().err.split())


def test_the_index_command_refuses_rows_without_a_label_or_leaves_them_out(tiny_model, tmp_path, capsys):
    texts = sentences(6)
    train = write_jsonl(tmp_path / "train.jsonl", text=[*texts[:5], " "], gold_label=["0", "1", "-", "1", "-", "0"])
    out = tmp_path / "index"
    args = ["index", "--model", tiny_model(), "--train", str(train), "--out", str(out), "--damping", "none"]
    assert run([*args, "--label-names", "0,1", "--unlabelled", "refuse"]) == 2
    assert "2 of 6 rows" in capsys.readouterr().err
    assert not out.exists()
    assert run([*args, "--label-names", "0,1"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 6 rows have no label ('-') and are left out" in said
    assert "1 of 4 rows have a text that is empty or white space alone (rows 3, from 0)" in said
    opened = Index.open(out)
    assert opened.manifest.n_rows == 4
    assert [segment.n_left_out for segment in opened.manifest.segments] == [2]
    assert run(["info", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 more rows of" in shown
    assert "have no label and were left out" in shown
    more = write_jsonl(tmp_path / "more.jsonl", text=texts[:2], gold_label=["0", "1"])
    assert run(["index", "--out", str(out), "--append", "--train", str(more), "--label-names", "0,1"]) == 0
    assert "n_left_out" not in json.loads((out / "manifest.json").read_text())["segments"][1]
    opened = Index.open(out)
    assert [segment.n_left_out for segment in opened.manifest.segments] == [2, 0]
    assert opened.text_lists(np.arange(4)) == [[*texts[:2], texts[3], " "]]
