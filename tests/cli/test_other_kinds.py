"""Models of several labels and of numbers are built and asked; what does not fit the model is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run

LISTS, NUMBERS = [["a", "b"], ["b"], [], ["a"]], [0.37, 1.25, 3.5, 2.25]


def model_of(folder: Path, n_outputs: int, kind: str | None) -> Path:
    model = make_tiny_model(folder, n_classes=n_outputs)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"problem_type": kind}))
    return model


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert run([*map(str, arguments), "--out", str(out)]) == 2
    assert not list(out.glob("*"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("warning:", "note:"))]
    assert line.startswith("error: ")
    return line


def test_targets_of_another_kind_than_the_models_are_named(tmp_path, capsys):
    lists = write_jsonl(tmp_path / "lists.jsonl", text=sentences(4), label=LISTS)
    numbers = write_jsonl(tmp_path / "numbers.jsonl", text=sentences(4), label=NUMBERS)
    names = write_jsonl(tmp_path / "names.jsonl", text=sentences(4), label=["x", "y", "y", "x"])
    single = model_of(tmp_path / "single", 2, None)
    build = ("index", "--model")
    line = refused(capsys, tmp_path / "out", *build, single, "--train", lists)
    assert "has several labels a row (label), the model was trained on one label a row" in line
    line = refused(capsys, tmp_path / "out", *build, single, "--train", numbers)
    assert "Numbers that are measured are no classes" in line
    assert "--problem-type regression" in line
    several = model_of(tmp_path / "several", 2, "multi_label_classification")
    line = refused(capsys, tmp_path / "out", *build, several, "--train", numbers)
    assert "has one label a row (label), the model was trained on several labels a row" in line
    number = model_of(tmp_path / "number", 1, None)  # one output is a regression, as transformers has it
    line = refused(capsys, tmp_path / "out", *build, number, "--train", names)
    assert "in row 0 (from 0), 'x'; expected a number" in line
    line = refused(capsys, tmp_path / "out", *build, several, "--train", lists, "--class-weights", "balanced")
    assert "--class-weights is for one label a row" in line
    line = refused(capsys, tmp_path / "out", *build, several, "--train", lists, "--rep-refit", "--label-names", "a,b")
    assert "--rep-refit refits a softmax head" in line


def test_training_on_numbers_that_are_no_classes_says_what_to_do(tmp_path, capsys):
    numbers = write_jsonl(tmp_path / "numbers.jsonl", text=sentences(4), label=NUMBERS)
    model = make_tiny_model(tmp_path / "model")
    line = refused(capsys, tmp_path / "out", "train", "--data", numbers, "--model", model)
    assert "train a model of numbers (--problem-type regression)" in line


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_one_command_after_the_other_from_rows_to_answers(kind, tmp_path, capsys):
    several = kind == "several"
    texts = sentences(24)
    columns = {"toxic": [int("bad" in t) for t in texts], "rude": [int("dull" in t) for t in texts]}
    columns = columns if several else {"stars": [len(t) / 7 for t in texts]}
    train = tmp_path / "train.csv"
    lines = [",".join(map(str, row)) for row in zip(texts, *columns.values(), strict=True)]
    train.write_text("\n".join([",".join(["comment", *columns]), *lines]) + "\n")
    names = ",".join(columns)
    how = ["--label-column", names] + ([] if several else ["--problem-type", "regression"])
    model, out = make_tiny_model(tmp_path / "model"), tmp_path / "run"
    learn = ["train", "--data", train, "--model", model, "--out", out, "--epochs", 1, "--device", "cpu", *how]
    assert run(list(map(str, learn))) == 0
    index = tmp_path / "index"
    assert run(["index", "--model", str(out), "--train", str(train), "--out", str(index)]) == 0
    assert ("micro-F1" if several else "RMSE") in capsys.readouterr().err
    asked = ["retrieve", "--index", str(index), "--method", "if,rif,gd,nn-cos", "--top", "2"]
    assert run([*asked, "--test", str(train), "--target", "gold", "--out", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text().count("\n") == 1 + 24 * 4 * 2 * 2
    capsys.readouterr()
    assert run([*asked, "--text", "a bad film"]) == 0
    assert "query 0" in capsys.readouterr().out
    if several:
        assert run([*asked, "--text", "a bad film", "--target", "label:toxic"]) == 0
        shown = capsys.readouterr().out
        assert "s of toxic" in shown or "s of not toxic" in shown
    assert run(["verify", str(index)]) == 0
    assert run(["index", "--out", str(index), "--append", "--train", str(train), "--force"]) == 0
