"""How rows are read: usual names of columns, what is remembered, delimiters and encodings."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from forebear.errors import DataError, InputError
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.rows.row_format import RowFormat

LIKE = RowFormat(
    owner="the run", text_columns=("verbatim",), label_column="mark", label_names=("bad", "good"), delimiter=";",
    encoding="latin-1",
)  # fmt: skip


def texts_of(source):
    return [text for block in source.blocks() for text in block.texts[0]]


def table(**columns):
    return open_rows(pa.table(columns))


@pytest.mark.parametrize("name", ["review", "comment_text", "Comment Text", " tweet ", "headline", "content"])
def test_text_columns_of_usual_names_are_found_and_said(name):
    source = table(**{"id": [1], name: ["a"], "label": [0]})
    assert source.text_columns == (name,)
    assert source.taken == f"the Table given: text column {name} (found by name)"


@pytest.mark.parametrize("name", ["sentiment", "class", "toxic", "category", "intent", "Target", "gold-label"])
def test_label_columns_of_usual_names_are_found(name):
    assert table(text=["a"], **{name: ["x"]}).label_column == name


def test_text_and_label_win_over_names_that_may_be_something_else():
    source = table(text=["a"], content=["b"], label=["x"], category=["y"], toxic=[1])
    assert (source.text_columns, source.label_column) == (("text",), "label")
    assert source.taken is None  # nobody is surprised


def test_several_columns_that_may_be_it_are_refused_by_name_where_one_is_needed():
    with pytest.raises(DataError, match=r"several columns that may be the text \(review, comment\)"):
        table(review=["a"], comment=["b"], label=[0])
    both = pa.table({"text": ["a"], "toxic": [0], "category": [1]})
    with pytest.raises(DataError, match="several columns that may be the labels: category, toxic"):
        open_rows(both, need_labels=True)
    source = open_rows(both)
    assert source.label_column is None
    assert source.taken == "the Table given: label column none (category, toxic may be it: name one with label_column=)"


def test_a_format_is_the_same_after_it_was_written():
    assert RowFormat.of(json.loads(json.dumps(LIKE.stated())), "the run") == LIKE
    assert RowFormat.of({}, "the run") == RowFormat()


def test_what_is_remembered_is_taken_where_the_rows_have_it():
    rows = pa.table({"text": ["a", "b"], "Verbatim ": ["c", "d"], "label": [0, 0], "mark": [1, 0]})
    source = open_rows(rows, like=LIKE)
    assert (source.text_columns, source.label_column) == (("Verbatim ",), "mark")
    assert source.label_names == ("bad", "good")
    others = open_rows(pa.table({"text": ["a"], "label": [2]}), like=LIKE)  # other columns, a label without a name
    assert (others.text_columns, others.label_column, others.label_names) == (("text",), "label", None)


def test_remembered_delimiter_and_encoding_are_taken_where_the_file_shows_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("verbatim;mark\ncafé, bar;1\n".encode("latin-1"))
    assert texts_of(open_rows(path, like=LIKE)) == ["café, bar"]
    path.write_text("verbatim,mark\ncafé; bar,1\n")
    source = open_rows(path, like=LIKE)
    assert texts_of(source) == ["café; bar"]
    assert (source.format("x").delimiter, source.format("x").encoding) == (",", None)


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("text;label\na;1\n", {"delimiter": ";"}, "separated by semicolons? If so, give delimiter=\";\""),
        ("text\tlabel\na\t1\n", {"delimiter": "tab"}, "separated by tabs? If so, give delimiter=\"tab\""),
        ("text|label\na|1\n", {"delimiter": "bar"}, "separated by bars? If so, give delimiter=\"|\""),
        ("text;label\na;x,5\nb;y\n", {"delimiter": "semicolon"}, "separated by semicolons?"),
    ],
)  # fmt: skip
def test_a_wrong_delimiter_is_suggested_and_the_right_one_reads_the_file(tmp_path, content, options, said):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        texts_of(open_rows(path))
    assert said.replace("'", '"') in str(caught.value).replace("'", '"')
    source = open_rows(path, text_columns=["text"], label_column=None, **options)
    assert texts_of(source)[0] == "a"


def test_a_delimiter_reads_files_of_unknown_endings_and_no_other_formats(tmp_path):
    (tmp_path / "a.txt").write_text("text\tlabel\na\t1\n")
    with pytest.raises(DataError, match="a text file: name what parts its values by delimiter="):
        open_rows(tmp_path / "a.txt")
    assert texts_of(open_rows(tmp_path / "a.txt", delimiter="tab")) == ["a"]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl is JSON"):
        open_rows(tmp_path / "a.jsonl", delimiter=";")
    with pytest.raises(InputError, match="encoding= is for text files"):
        open_rows(pa.table({"text": ["a"]}), encoding="latin-1")


def test_odd_delimiters_and_encodings_are_refused_before_the_file_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    for wrong in ("", ";;", '"', "a", "§"):
        with pytest.raises(InputError, match="expected one character"):
            open_rows(tmp_path / "a.csv", delimiter=wrong)
    for wrong in ("latin-99", "base64", ""):
        with pytest.raises(InputError, match="is not known"):
            open_rows(tmp_path / "a.csv", encoding=wrong)


def test_a_file_that_is_not_of_the_encoding_given_is_refused_by_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nfilm,0\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not ascii: after line 1 a byte is 0xe9"):
        open_rows(path, encoding="ascii")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_rows(path, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("a.xlsx", "save its sheet as CSV"), ("a.pkl", "to_parquet"), ("a.zip", "unpack it"), ("a.feather", "as Parquet")],
)
def test_files_of_other_formats_are_refused_with_the_way_out(tmp_path, name, way_out):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=way_out):
        open_rows(tmp_path / name)


def test_a_missing_local_path_is_said_to_be_missing_rather_than_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.csv").write_text("text,label\na,1\n")
    for name in ("review", "reviews/trian.csv", "./rev:train", "reviews/train.parquet"):
        with pytest.raises(DataError, match=r"^no such file or folder: .*(Did you mean|Expected)"):
            open_rows(name)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^no such file or folder: review. Did you mean reviews\?"):
        open_rows("review:train")
