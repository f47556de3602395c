"""Models and labels of kinds that are not explained: refused by name in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert run([*map(str, arguments), "--out", str(out)]) == 2
    assert not list(out.glob("*"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("n_outputs", "kind", "said"),
    [
        (3, "multi_label_classification", "is a multi-label classifier (problem_type multi_label_classification, 3"),
        (1, "regression", "gives 1 number(s) a row and no class (problem_type regression)"),
        (1, None, "gives 1 number(s) a row and no class"),
    ],
)
def test_a_model_of_another_kind_is_named(n_outputs, kind, said, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "model", n_classes=n_outputs)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"problem_type": kind}))
    train = write_jsonl(tmp_path / "train.jsonl", text=sentences(8), label=labels(8))
    line = refused(capsys, tmp_path / "out", "index", "--model", model, "--train", train)
    assert said in line
    assert "Expected a classifier of" in line
    assert "forebear train" in line


@pytest.mark.parametrize("command", [("train", "--data"), ("index", "--train")])
def test_labels_of_another_kind_are_named(command, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "model")
    lists = write_jsonl(tmp_path / "lists.jsonl", text=sentences(4), label=[["a", "b"], ["b"], [], ["a"]])
    pq.write_table(pa.table({"text": sentences(4), "label": [[1, 0], [0, 1], [0, 0], [1, 1]]}), tmp_path / "l.parquet")
    numbers = write_jsonl(tmp_path / "numbers.jsonl", text=sentences(4), label=[0.37, 1.25, 3.5, 2.25])
    for rows in (lists, tmp_path / "l.parquet"):
        line = refused(capsys, tmp_path / "out", *command, rows, "--model", model)
        assert "A row has one label here, not several" in line
    line = refused(capsys, tmp_path / "out", *command, numbers, "--model", model)
    assert "Numbers that are measured are no classes" in line
