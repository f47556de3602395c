"""Columns besides texts and labels: kept with their types, by whatever way the rows come, and given back by row."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from datetime import date, datetime, timezone

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interruptions import hashes
from places import ROOT
from tiny import labels, sentences, write_jsonl

import forebear
from forebear.cli.main import run
from forebear.errors import DataError, InputError, MismatchError
from forebear.indexer.building import build
from forebear.indexer.building.build import append_rows, refit_index, retire_rows
from forebear.indexer.building.verify import verify_index
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import open_rows, rows_from_texts

N = 23
TEXTS, LABELS = sentences(N), labels(N)
SOURCES = [("web", "books", None, "mail")[i % 4] for i in range(N)]
SCORES = [None if i % 5 == 0 else i / 4 for i in range(N)]
DAYS = [date(2024, 1, 1 + i) for i in range(N)]
TIMES = [datetime(2024, 1, 1, i % 24, 30, 0, 250) for i in range(N)]
MOMENTS = [time.replace(tzinfo=timezone.utc) for time in TIMES]
COLUMNS = {"id": list(range(N)), "source": SOURCES, "score": SCORES, "is_old": [i % 2 == 0 for i in range(N)]}
COLUMNS |= {"day": DAYS, "at": TIMES, "moment": MOMENTS}
KINDS = {"id": "int64", "source": "string", "score": "float64", "is_old": "bool", "day": "date", "at": "timestamp"}
KINDS |= {"moment": "timestamp UTC"}
ROWS = [
    dict(zip(("text", "label", *COLUMNS), row, strict=True))
    for row in zip(TEXTS, LABELS, *COLUMNS.values(), strict=True)
]
CHOICES = {"dampings": (), "shard_rows": 7, "device": "cpu", "warn": lambda _line: None}


def built(tiny_model, rows, out, **choices) -> Index:
    return Index.build(tiny_model(), rows, out, **CHOICES | choices)


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory) -> Index:
    return built(tiny_model, ROWS, tmp_path_factory.mktemp("kept") / "index")


def test_scalar_columns_are_kept_with_their_types_and_given_by_row(index):
    assert index.manifest.columns == KINDS
    rows = [22, 0, 0, 9]
    table = index.columns(rows)
    assert table.column_names == list(COLUMNS)
    for name, values in COLUMNS.items():
        assert table.column(name).to_pylist() == [values[row] for row in rows], name
    assert pa.types.is_dictionary(table.schema.field("source").type)
    assert index.columns(np.arange(N)).to_pylist() == [{name: row[name] for name in COLUMNS} for row in ROWS]
    assert verify_index(index.folder).problems == ()


@pytest.mark.parametrize("kind", ["pandas", "arrow", "datasets", "parquet"])
def test_equal_values_give_equal_bytes_whatever_holds_them(index, tiny_model, tmp_path, kind):
    frame = pd.DataFrame(ROWS)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if kind == "parquet":  # in other types, and with an index that pandas writes
        small = table.set_column(2, "id", table.column("id").cast(pa.int16()))
        small = small.set_column(3, "source", small.column("source").dictionary_encode())
        small = small.set_column(7, "at", small.column("at").cast(pa.timestamp("ns")))
        pq.write_table(small.append_column("__index_level_0__", pa.array(range(N))), tmp_path / "rows.parquet")
    rows = {"pandas": frame, "arrow": table, "datasets": datasets.Dataset(table), "parquet": tmp_path / "rows.parquet"}
    found = built(tiny_model, rows[kind], tmp_path / "index")
    names = [name for name in index.manifest.files if not name.startswith("ann")]
    assert {name: found.manifest.files[name] for name in names} == {name: index.manifest.files[name] for name in names}
    own, other = (i.manifest.segments[0] for i in (index, found))
    assert own.rows == other.rows
    assert own.user_columns_sha256 is not None


def test_what_is_a_string_in_a_file_is_one_in_memory_too(tiny_model, tmp_path):
    """CSV has no types: its columns are those of a DataFrame of strings."""
    frame = pd.DataFrame(
        {"text": TEXTS, "label": LABELS, "id": [f"{i:03}" for i in range(N)], "by": ["a", "b"] * 11 + ["a"]}
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    write_jsonl(tmp_path / "rows.jsonl", **{name: frame[name].tolist() for name in frame})
    found = [
        built(tiny_model, rows, tmp_path / str(number)).manifest
        for number, rows in enumerate((frame, tmp_path / "rows.csv", frame.to_dict("records"), tmp_path / "rows.jsonl"))
    ]
    assert found[0].columns == {"id": "string", "by": "string"}
    assert len({manifest.segments[0].user_columns_sha256 for manifest in found}) == 1
    assert len({json.dumps(manifest.files, sort_keys=True) for manifest in found}) == 1


def test_without_other_columns_an_index_is_as_it_was(tiny_model, tmp_path):
    """No folder, no field: the golden index still has its digest."""
    found = built(tiny_model, [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)], tmp_path / "a")
    written = json.loads((found.folder / "manifest.json").read_text())
    assert "columns" not in written
    assert "user_columns_sha256" not in written["segments"][0]
    assert not (found.folder / "columns").exists()
    left_out = built(tiny_model, ROWS, tmp_path / "b", keep_columns="none")
    ours, theirs = (hashes(i.folder) for i in (found, left_out))
    assert {n: h for n, h in ours.items() if n != "manifest.json"} == {
        n: h for n, h in theirs.items() if n != "manifest.json"
    }
    assert found.columns([0, 1]).num_columns == 0


def test_what_is_no_scalar_is_not_kept_and_refused_by_name(tiny_model, tmp_path):
    rows = [row | {"tags": ["a", "b"], "meta": {"x": 1}, "empty": None} for row in ROWS]
    assert list(built(tiny_model, rows, tmp_path / "all").manifest.columns) == list(COLUMNS)
    vectors = pa.table({"text": TEXTS, "label": LABELS, "vector": [[0.5, 1.0]] * N, "raw": [b"x"] * N, "id": range(N)})
    assert built(tiny_model, vectors, tmp_path / "v").manifest.columns == {"id": "int64"}
    for source, name, message in (
        (rows, "tags", "tags.*: it holds a list, which is not kept"),
        (rows, "meta", "meta.*: it holds an object"),
        (vectors, "vector", r"vector.*: it holds list<"),
        (vectors, "raw", "raw.*: it holds binary"),
        (rows, "empty", "empty.*: it holds null"),
        (rows, "nothing", r"nothing.*: .* has no such column; its other columns are id, source"),
        (rows, "text", "text.*: it holds the texts or labels"),
    ):
        with pytest.raises(InputError, match=message):
            built(tiny_model, source, tmp_path / "refused", keep_columns=[name])
    assert not (tmp_path / "refused").exists()
    broken = pa.table({"text": TEXTS, "label": LABELS, "by": pa.array([b"\xff"] * N).view(pa.string())})
    with pytest.raises(DataError, match=r"column 'by' cannot be read as string \(leave it out by keep_columns=\)"):
        built(tiny_model, broken, tmp_path / "refused")
    assert not (tmp_path / "refused" / "manifest.json").exists()
    assert built(tiny_model, broken, tmp_path / "without", keep_columns=()).manifest.columns == {}
    chosen = built(tiny_model, rows, tmp_path / "two", keep_columns=("Source", "id"))
    assert list(chosen.manifest.columns) == ["id", "source"]


def test_appended_rows_bring_their_values_or_nulls_or_are_refused(index, tiny_model, tmp_path):
    folder = tmp_path / "index"
    built(tiny_model, ROWS, folder, keep_columns=["id", "source"])
    said: list[str | None] = []
    more = [{"text": t, "label": 0, "source": "new", "other": 1} for t in sentences(4, seed=8)]
    appended = append_rows(folder, open_rows(more), warn=said.append)
    assert appended.columns(range(N - 1, N + 4)).to_pylist() == [
        {"id": 22, "source": None}, *[{"id": None, "source": "new"}] * 4,
    ]  # fmt: skip
    assert (
        sum("has no column id, which" in (line or "") and "null for these rows" in (line or "") for line in said) == 1
    )
    before = hashes(folder)
    with pytest.raises(MismatchError, match=r"column 'id' holds string, .* keeps it as int64"):
        append_rows(folder, open_rows([{"text": "a film", "label": 1, "id": "7"}]), warn=said.append)
    assert hashes(folder) == before
    retired = retire_rows(folder, [0, 25])
    assert retired.columns([26, 25]).to_pylist() == [{"id": None, "source": "new"}] * 2
    assert verify_index(folder).problems == ()
    path = next((folder / "columns").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "columns/" in verify_index(folder, n_rows=0).problems[0]


def test_a_resumed_build_has_the_same_columns_and_refuses_others(index, tiny_model, tmp_path, monkeypatch):
    def die(*_given):
        raise RuntimeError("killed")

    folder = tmp_path / "index"
    with monkeypatch.context() as patched:
        patched.setattr(build, "finish_build", die)
        with pytest.raises(RuntimeError, match="killed"):
            built(tiny_model, ROWS, folder)
    for rows, choices in ((ROWS, {"keep_columns": ["id"]}), ([r | {"source": "x"} for r in ROWS], {})):
        with pytest.raises(MismatchError, match=r"keep_columns=|user_columns_sha256="):
            built(tiny_model, rows, folder, resume=True, **choices)
    for path in (folder / "columns" / "00002.arrow", next((folder / "features").iterdir()) / "00002.arrow"):
        path.unlink()
    resumed = built(tiny_model, ROWS, folder, resume=True)
    assert resumed.manifest.files == index.manifest.files
    with pytest.raises(MismatchError, match="keep_columns="):
        built(tiny_model, ROWS, folder, resume=True, keep_columns="none")


def test_a_refit_keeps_them(tiny_model, tmp_path):
    folder = tmp_path / "index"
    built(tiny_model, ROWS, folder, scopes=("head", "top-1"), dampings=("0.1x",), calibration_queries=0)
    append_rows(folder, rows_from_texts(sentences(3, seed=4), [0, 1, 0]), warn=lambda _line: None)
    refitted = refit_index(folder, warn=lambda _line: None)
    assert refitted.columns([1]).column("id").to_pylist() == [1]
    assert refitted.columns([N]).column("id").to_pylist() == [None]
    assert verify_index(folder).problems == ()


def test_the_command_says_what_is_kept_and_results_have_it(tiny_model, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    rows = [
        {"text": r["text"], "sentiment": r["label"], "label": r["source"], "query": r["id"], "day": str(r["day"])}
        for r in ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "index"
    command = ["index", "--model", tiny_model(), "--train", str(path), "--out", str(out), "--damping", "none"]
    assert run([*command, "--label-column", "sentiment"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "columns kept besides texts and labels: label (string), query (int64), day (string); " in said
    assert "--keep-columns chooses" in said
    assert run([*command, "--label-column", "sentiment", "--force", "--keep-columns", "query,days"]) == 2
    assert "--keep-columns days: " in capsys.readouterr().err
    ask = ["retrieve", "--index", str(out), "--text", "a good film", "--top", "3"]
    assert run(ask) == 0
    shown = capsys.readouterr().out
    assert "row_label" in shown
    assert "row_query" in shown
    assert "2024-01-" in shown
    for suffix in ("parquet", "jsonl", "csv"):
        answers = tmp_path / f"answers.{suffix}"
        assert run([*ask, "--out", str(answers)]) == 0
        found = {
            "parquet": lambda p: pq.read_table(p).to_pylist(),
            "jsonl": lambda p: [json.loads(line) for line in p.read_text().splitlines()],
            "csv": lambda p: list(csv.DictReader(p.read_text().splitlines())),
        }[suffix](answers)
        assert len(found) == 6
        for row in found:
            own = rows[int(row["row"])]
            assert (row["row_label"] or None, int(row["row_query"]), row["day"]) == (
                own["label"],
                own["query"],
                own["day"],
            )
            assert row["label"] in ("LABEL_0", "LABEL_1")
    assert run(["info", str(out)]) == 0
    assert "label (string), query (int64)" in " ".join(capsys.readouterr().out.split())


def test_dates_and_numbers_are_written_to_every_format(index, tmp_path):
    retriever = forebear.Retriever(index)
    table = retriever.retrieve(["a good film"], methods=["gc"], top=3)
    for row in table.to_pylist():
        assert {name: row["row_score" if name == "score" else name] for name in COLUMNS} == {
            name: values[row["row"]] for name, values in COLUMNS.items()
        }
    assert "2024-01-" in repr(forebear.show(table))
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"a.{suffix}"
        assert run(["retrieve", "--index", str(index.folder), "--text", "a film", "--out", str(path)]) == 0
        assert "T" in path.read_text()
        assert DAYS[0].isoformat()[:8] in path.read_text()


def test_the_reader_of_the_format_page_reads_columns(index):
    program = "import sys; sys.path.insert(0, 'docs/examples'); import read_index as r; from pathlib import Path\n"
    program += f"i = Path({str(index.folder)!r}); t = r.read_shards(i, r.read_manifest(i), 'columns')\n"
    program += "print(t['source'].to_pylist())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(SOURCES)


def test_explanations_and_audits_show_them(index, tmp_path, capsys):
    folder, test = str(index.folder), tmp_path / "test.jsonl"
    write_jsonl(test, text=sentences(8, seed=6), label=labels(8, seed=6))
    assert run(["explain", "--index", folder, "--text", "a good film", "--top", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "source: " in shown
    assert "day: 2024-01-" in shown
    page = tmp_path / "page.html"
    assert run(["explain", "--index", folder, "--text", "a good film", "--html", str(page)]) == 0
    assert "<span>moment</span> 2024-01-" in page.read_text()
    same = tmp_path / "same.jsonl"
    write_jsonl(same, text=TEXTS[:3], label=LABELS[:3])
    commands = {
        "mislabelled": ["--method", "gd"],
        "errors": ["--method", "gd", "--test", str(test)],
        "hubs": ["--method", "gd", "--test", str(test)],
        "duplicates": ["--test", str(same)],
    }
    for name, options in commands.items():
        out = tmp_path / name
        assert run(["audit", name, "--index", folder, *options, "--out", str(out), "--quiet"]) == 0, name
        tables = json.loads((out / "report.json").read_text())["tables"]
        (table,) = [one for one in tables if "row" in one["columns"] and one["rows"] and "column: id" in one["columns"]]
        for row in table["rows"]:
            cells = dict(zip(table["columns"], row, strict=True))
            own = ROWS[cells["row"]]
            assert {n: cells[f"column: {n}"] for n in ("id", "source", "day")} == {
                "id": own["id"], "source": own["source"], "day": str(own["day"]),
            }  # fmt: skip
    assert "<span>source</span>" in (tmp_path / "mislabelled" / "report.html").read_text()


def test_suspects_are_counted_by_group(tiny_model, tmp_path, capsys):
    """One annotator's labels are all wrong: theirs are the suspects."""
    by = ["careless" if i % 4 == 1 else "careful" for i in range(N)]
    rows = [{"text": t, "label": y, "by": who} for t, y, who in zip(TEXTS, LABELS, by, strict=True)]
    index = built(tiny_model, rows, tmp_path / "index", dampings=("0.1x",))
    predicted = index.predictions.tolist()
    for row, right in zip(rows, predicted, strict=True):
        row["label"] = right if row["by"] == "careful" else 1 - right
    index = built(tiny_model, rows, tmp_path / "flipped", dampings=("0.1x",))
    out = tmp_path / "report"
    n_wrong = by.count("careless")
    args = ["audit", "mislabelled", "--index", str(index.folder), "--top", str(n_wrong), "--out", str(out)]
    assert run([*args, "--group-by", "by"]) == 0
    assert "Suspects by by" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    counted = {group["by"]: group["suspects"] for group in result["groups"]}
    assert counted == {who: sum(by[row] == who for row in result["listed"]) for who in ("careful", "careless")}
    assert counted["careless"] > n_wrong / 2
    rows_of = {group["by"]: (group["rows"], group["share of its rows"]) for group in result["groups"]}
    assert rows_of["careless"] == (n_wrong, counted["careless"] / n_wrong)
    assert run([*args, "--force", "--group-by", "source"]) == 2
    assert "keeps no such column; it keeps by" in capsys.readouterr().err
    found = forebear.audits.suspects(index, group_by="label", n_listed=5)
    assert sum(group["suspects"] for group in found.result["groups"]) == 5


def test_an_index_of_a_random_model_needs_none(index):
    found = forebear.evaluations.randomized(index, sentences(3, seed=2), methods=["gd"], seeds=(0,), n_queries=2)
    assert found.result
