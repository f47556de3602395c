"""Files as people have them: a run remembers how its rows are read, and every later command reads likewise."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import labels, make_tiny_model, sentences

from forebear import Index, audits, saliency
from forebear.cli.main import run

NAMES = ["bad", "good"]


def write(path: Path, n: int, seed: int, *, texts: list[str] | None = None) -> Path:
    """Rows with odd columns, parted by semicolons, in Latin-1."""
    with path.open("w", newline="", encoding="latin-1") as file:
        writer = csv.writer(file, delimiter=";", lineterminator="\n")
        writer.writerow(["id", "verbatim", "mark"])
        for row, (text, label) in enumerate(zip(texts or sentences(n, seed), labels(n, seed=seed), strict=True)):
            writer.writerow([row, f"{text} café; hôtel", label])
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of odd rows and an index of it, for which nothing but files is named."""
    folder = tmp_path_factory.mktemp("files")
    make_tiny_model(folder / "model")
    write(folder / "train.csv", 40, 1)
    write(folder / "test.csv", 6, 2)
    write(folder / "test.txt", 6, 2)
    lines = (folder / "train.csv").read_text("latin-1").replace(";mark", ";truth").replace(";1\n", ";0\n", 3)
    (folder / "relabelled.csv").write_text(lines, "latin-1")
    named = ["--text-columns", "verbatim", "--label-column", "mark", "--label-names", "bad,good"]
    named += ["--delimiter", "semicolon", "--encoding", "cp1252"]
    common = ["--train", str(folder / "train.csv"), "--quiet", "--out"]
    training = ["train", "--model", str(folder / "model"), "--data", str(folder / "train.csv"), "--epochs", "1"]
    assert run([*training, "--batch-size", "8", "--max-length", "24", *named, "--quiet", "--out", f"{folder}/run"]) == 0
    assert run(["index", "--model", str(folder / "run"), *common, str(folder / "index")]) == 0
    return folder


def test_run_and_index_remember_how_rows_are_read(world):
    written = json.loads((world / "run" / "run.json").read_text())["row_format"]
    assert written == {
        "text_columns": ["verbatim"], "label_column": "mark", "label_names": NAMES, "delimiter": ";",
        "encoding": "cp1252",
    }  # fmt: skip
    manifest = Index.open(world / "index").manifest
    assert manifest.row_format.stated() == written
    assert (manifest.spec.label_names, manifest.spec.max_length) == (tuple(NAMES), 24)
    assert Index.open(world / "index").text_lists(np.arange(1))[0][0].endswith("café; hôtel")


@pytest.mark.parametrize(
    "command",
    [
        "retrieve --test {0}/test.csv --method gc --top 2 --target gold --out {1}/answers.jsonl",
        "evaluate overlap --test {0}/test.csv --method gc,nn-cos --top 2",
        "evaluate mislabelled --train {0}/relabelled.csv --true-label truth --method gd",
        "audit errors --test {0}/test.csv --method gd --top 2",
        "audit duplicates --test {0}/test.csv",
        "audit errors --test {0}/test.txt --method gd --top 2",
    ],
)
def test_later_commands_read_other_rows_likewise_without_options(world, tmp_path, capsys, command):
    code = run([*command.format(world, tmp_path).split(), "--index", str(world / "index")])
    said = capsys.readouterr().err
    assert code == 0, said
    assert said.count("text column verbatim") == 1
    assert "as in the index" in said


def test_appended_rows_are_read_as_the_first_ones_and_quietly(world, tmp_path, capsys):
    shutil.copytree(world / "index", tmp_path / "index")
    write(tmp_path / "more.csv", 5, 3)
    capsys.readouterr()
    assert run(["index", "--append", "--train", f"{tmp_path}/more.csv", "--out", f"{tmp_path}/index", "--quiet"]) == 0
    assert "note:" not in capsys.readouterr().err
    index = Index.open(tmp_path / "index")
    assert index.manifest.n_rows == 45
    assert index.text_lists(np.array([44]))[0][0].endswith("café; hôtel")


def test_python_reads_other_rows_likewise(world):
    audits.duplicates(world / "index", rows=world / "test.csv")
    assert len(saliency(world / "run", world / "test.csv")) == 6


def test_an_option_wins_over_what_is_remembered(world, tmp_path, capsys):
    path = tmp_path / "test.csv"
    path.write_text("verbatim,text,mark,label\na bad film,a good film,0,1\n")
    arguments = ["retrieve", "--index", f"{world}/index", "--test", str(path), "--method", "gc", "--top", "1"]
    arguments += ["--target", "gold", "--out", f"{tmp_path}/answers.jsonl", "--force"]
    for options, target, said in (
        ([], "bad", "text column verbatim, label column mark, label names bad, good (as in the index)"),
        (["--text-columns", "text"], "bad", "label column mark, label names bad, good (as in the index)"),
        (["--label-column", "label"], "good", "text column verbatim, label names bad, good (as in the index)"),
        (["--label-column", "label", "--label-names", "good,bad"], "bad", "text column verbatim (as in the index)"),
    ):
        assert run([*arguments, *options]) == 0
        assert f"note: {path}: {said}\n" in capsys.readouterr().err.replace("\n ", " ")
        answer = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
        assert answer["target"] == target


def test_a_typo_in_a_local_path_says_what_is_missing_and_what_is_meant(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    (world / "plain.csv").write_text("text,label\na good film,good\na bad film,bad\n")
    test = ["--test", "test.csv", "--method", "gc"]
    for arguments, missing, meant in (
        (["retrieve", "--index", "indx", *test], "no such folder: indx.", "Did you mean index?"),
        (["retrieve", "--index", "index", "--test", "tset.csv"], "no such file or folder: tset.csv.", "test.csv?"),
        (
            ["index", "--model", "./modell", "--train", "plain.csv", "--out", "x"],
            "./modell: no such model folder.",
            "model?",
        ),
        (["index", "--model", "modle", "--train", "plain.csv", "--out", "x"], "modle: no such model folder", "model"),
    ):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert missing in line
        assert meant in line


def test_rows_that_are_not_the_runs_are_remarked_on(world, tmp_path, capsys):
    other = write(tmp_path / "other.csv", 40, 8)
    assert run(["index", "--model", f"{world}/run", "--train", str(other), "--out", f"{tmp_path}/i", "--quiet"]) == 0
    assert "is not what the run was trained on" in capsys.readouterr().err


def test_unknown_and_empty_labels_leave_their_own_rows_without_one(world, tmp_path, capsys):
    path = tmp_path / "test.csv"
    path.write_text("verbatim,mark\na good film,good\na bad film,odd\na dull film,\n a cold film , bad\n")
    arguments = ["retrieve", "--index", f"{world}/index", "--test", str(path), "--method", "gc", "--top", "1"]
    assert run([*arguments, "--out", f"{tmp_path}/answers.csv"]) == 0
    said = capsys.readouterr().err
    assert "1 of 4 rows have no label" in said
    assert "has the label 'odd', which the model does not know" in said
    with (tmp_path / "answers.csv").open(newline="") as file:
        found = {row["query"]: row["query_label"] for row in csv.DictReader(file)}
    assert found == {"0": "good", "1": "", "2": "", "3": "bad"}
