"""Reports side by side: tables joined by their labels, checked cell by cell; folders that cannot be joined."""

from __future__ import annotations

import csv
import hashlib
import json

import pytest

from forebear.cli.main import run
from forebear.errors import CorruptIndexError, InputError
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Figure, Passage, Report, Table, report_from_json, write_report
from forebear.evaluation.reports.report import Group as ReportGroup
from forebear.evaluation.reports.side_by_side import join_tables, read_folders, side_by_side


def report_of(rows, title="Recall", note="by method", columns=("method", "mean", "n")):
    chart = bar_chart(["gd", "if"], {"mean": [0.5, 0.25]}, xlabel="mean")
    passage = ReportGroup("rows", [Passage("row 1", {"text": "secret words"})])
    table = Table(title, columns, rows, note)
    return Report("A title", "A finding.", (table,), (Figure("A chart", chart, "caption"),), (passage,), {"index": "I"})


@pytest.fixture
def folders(tmp_path):
    """Two reports of one table, which share a line and differ in two."""
    write_report(report_of([["gd", 0.5, 3], ["if", 0.25, None]]), tmp_path / "a", result={"x": 1})
    write_report(report_of([["if", 0.75, 4], ["rep", 1.0, 5]]), tmp_path / "b", result={"x": 2})
    return tmp_path / "a", tmp_path / "b"


def test_a_report_comes_back_from_its_file_without_its_data_rows(folders):
    text = (folders[0] / "report.json").read_text(encoding="utf-8")
    written = report_of([["gd", 0.5, 3], ["if", 0.25, None]])
    found = report_from_json(text)
    assert (found.title, found.summary, found.provenance) == (written.title, written.summary, written.provenance)
    assert [vars(t) | {"columns": list(t.columns)} for t in found.tables] == [
        {"title": "Recall", "columns": ["method", "mean", "n"], "rows": [["gd", 0.5, 3], ["if", 0.25, None]]}
        | {"note": "by method"}
    ]
    assert found.figures == list(written.figures)
    assert not found.groups
    assert "secret" not in text


def test_tables_of_one_title_are_joined_by_their_label(folders):
    page, result = side_by_side(read_folders([str(f) for f in folders]), "forebear report a b")
    (table,) = page.tables
    assert list(table.columns) == ["method", "a · mean", "a · n", "b · mean", "b · n"]
    assert table.rows == [
        ["gd", 0.5, 3, None, None],
        ["if", 0.25, None, 0.75, 4],
        ["rep", None, None, 1.0, 5],
    ]
    assert table.note == "by method"
    assert [f.title for f in page.figures] == ["a: A chart", "b: A chart"]
    assert page.provenance["a: index"] == page.provenance["b: index"] == "I"
    assert [f["result_sha256"] for f in result["folders"]] == [
        hashlib.sha256((f / "result.json").read_bytes()).hexdigest() for f in folders
    ]


def test_labels_of_several_columns_and_lines_that_cannot_be_told_apart():
    pairs = Table("t", ["first", "second", "mean"], [["a", "b", 1.0], ["a", "c", 2.0]])
    more = Table("t", ["first", "second", "mean"], [["a", "c", 3.0]], "one")
    joined = join_tables("t", [("x", pairs), ("y", more)])
    assert list(joined.columns) == ["first", "second", "x · mean", "y · mean"]
    assert joined.rows == [["a", "b", 1.0, None], ["a", "c", 2.0, 3.0]]
    numbered = Table("t", ["row", "score"], [[7, 1.0], [7, 2.0]])
    assert join_tables("t", [("x", numbered), ("y", numbered)]) is None
    assert join_tables("t", [("x", pairs)]) is None
    other = Table("t", ["one", "second", "mean"], [["a", "c", 3.0]])
    assert join_tables("t", [("x", pairs), ("y", other)]) is None
    texts = Table("t", ["method", "verdict"], [["gd", "good"]])
    both = join_tables("t", [("x", texts), ("y", texts)])
    assert list(both.columns) == ["method", "x · verdict", "y · verdict"]
    empty = Table("t", ["method", "mean"], [])
    assert join_tables("t", [("x", empty), ("y", empty)]).rows == []


def test_numbers_tell_lines_apart_where_they_must():
    columns = ["method", "removed", "mean", "n"]
    first = Table("T", columns, [["gd", 2, 0.5, 3], ["gd", 5, 0.25, 3]])
    second = Table("T", columns, [["gd", 5, 0.75, 4], ["gd", 2, 1.0, 4]])
    joined = join_tables("T", [("a", first), ("b", second)])
    assert list(joined.columns) == ["method", "removed", "a · mean", "a · n", "b · mean", "b · n"]
    assert joined.rows == [["gd", 2, 0.5, 3, 1.0, 4], ["gd", 5, 0.25, 3, 0.75, 4]]


def test_a_report_that_is_read_is_not_written_over(folders, capsys):
    before = (folders[0] / "result.json").read_bytes()
    assert run(["report", str(folders[0]), str(folders[1]), "--out", str(folders[0]), "--force"]) == 2
    assert "is one of the reports that are read" in " ".join(capsys.readouterr().err.split())
    assert (folders[0] / "result.json").read_bytes() == before


def test_tables_that_are_not_shared_stay_as_they_are(tmp_path):
    write_report(report_of([["gd", 0.5, 3]]), tmp_path / "a", result={})
    write_report(report_of([["gd", 0.5, 3]], title="Other"), tmp_path / "b", result={})
    page, _ = side_by_side(read_folders([str(tmp_path / "a"), str(tmp_path / "b")]), "")
    assert [t.title for t in page.tables] == ["a: Recall", "b: Other"]


def test_the_command_writes_one_page_and_pages_can_be_joined_again(folders, tmp_path, capsys):
    a, b = map(str, folders)
    out = tmp_path / "both"
    assert run(["report", a, b, "--out", str(out)]) == 0
    assert "0.750" in capsys.readouterr().out
    rows = list(csv.reader((out / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["method", "a · mean", "a · n", "b · mean", "b · n"]
    assert rows[2] == ["if", "0.25", "", "0.75", "4"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert json.loads((out / "result.json").read_text())["folders"][1]["name"] == "b"
    assert run(["report", a, b, "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["report", a, b, "--out", str(out), "--force", "--quiet"]) == 0
    assert run(["report", str(out), a, "--out", str(tmp_path / "again"), "--quiet"]) == 0


def test_folders_without_a_result_are_refused_in_one_line(folders, tmp_path, capsys):
    a, b = map(str, folders)
    (tmp_path / "nothing").mkdir()
    assert run(["report", a, str(tmp_path / "nothing"), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "holds no result.json" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="two or more"):
        read_folders([a])
    with pytest.raises(InputError, match="twice"):
        read_folders([a, f"{a}/../a"])
    (folders[1] / "report.json").write_text('{"title": 1}')
    with pytest.raises(CorruptIndexError, match="cannot be read"):
        read_folders([a, b])
    (folders[1] / "report.json").unlink()
    with pytest.raises(InputError, match="older version"):
        read_folders([a, b])


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for parent in ("x", "y"):
        write_report(report_of([["gd", 0.5, 3]]), tmp_path / parent / "same", result={})
    names = [f.name for f in read_folders([str(tmp_path / p / "same") for p in ("x", "y")])]
    assert names == [str(tmp_path / p / "same") for p in ("x", "y")]
