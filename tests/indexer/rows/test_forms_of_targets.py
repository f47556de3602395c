"""What lists and columns of targets mean is decided once, by the model and by what is remembered; never by one row."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run
from forebear.errors import DataError
from forebear.indexer.building.build import append_rows
from forebear.indexer.index import Index
from forebear.indexer.rows.labels import classes_for, label_map
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION
from forebear.retriever.retriever import Retriever

NAMES = ("toxic", "rude", "dull")
TEXTS = sentences(12, 3)
VECTORS = [[0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]] * 3
NUMBERS = [[number for number, value in enumerate(vector) if value] for vector in VECTORS]


def model_of(folder: Path, names: tuple[str, ...], problem_type: str | None) -> Path:
    path = make_tiny_model(folder, n_classes=len(names)) / "config.json"
    config = json.loads(path.read_text()) | {"problem_type": problem_type, "id2label": dict(enumerate(names))}
    path.write_text(json.dumps(config | {"label2id": {name: i for i, name in enumerate(names)}}))
    return folder


@pytest.fixture(scope="module")
def labels_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("labels") / "model", NAMES, MULTI_LABEL)


@pytest.fixture(scope="module")
def numbers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("numbers") / "model", ("stars", "price"), REGRESSION)


def index_call(model: Path, rows: Path, out: Path, *options: str) -> int:
    return run(["index", "--model", str(model), "--train", str(rows), "--out", str(out), *options])


def mapped(source: Any, names: tuple[str, ...] = NAMES, problem_type: str = MULTI_LABEL) -> np.ndarray:
    mapping = label_map(source, names, problem_type=problem_type)
    return np.concatenate([mapping(block.labels, block.start) for block in source.blocks()])


def flags(folder: Path, columns: dict[str, list[int]], name: str = "flags.jsonl") -> Path:
    return write_jsonl(folder / name, text=TEXTS, **columns)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [[1, 0], [], [1, 2, 0], ["rude"]])
def test_one_broken_row_does_not_change_what_vectors_mean(broken, labels_model, tmp_path, capsys):
    lists = [*VECTORS[:5], broken, *VECTORS[6:]]
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=lists)
    assert index_call(labels_model, rows, tmp_path / "index") == 2
    said = capsys.readouterr().err
    assert "in row 5 (from 0), " + repr(broken) in said
    assert "expected a vector of 3 numbers" in said


def test_lists_of_numbers_repeat_none(labels_model, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=[[0, 1], [2], [], [2, 2], *NUMBERS[4:]])
    assert index_call(labels_model, rows, tmp_path / "index") == 2
    assert "in row 3 (from 0), [2, 2], which repeats 2" in capsys.readouterr().err


@pytest.mark.parametrize(("built", "others"), [(VECTORS, NUMBERS), (NUMBERS, VECTORS)])
def test_an_index_remembers_whether_lists_are_vectors(built, others, labels_model, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=built)
    more = write_jsonl(tmp_path / "more.jsonl", text=[f"{text} a" for text in TEXTS], label=others)
    out = tmp_path / "index"
    assert index_call(labels_model, rows, out) == 0
    np.testing.assert_array_equal(Index.open(out).labels, VECTORS)
    capsys.readouterr()
    assert run(["index", "--out", str(out), "--append", "--train", str(more)]) == 2
    assert "in row 0 (from 0)" in capsys.readouterr().err
    assert run(["retrieve", "--index", str(out), "--test", str(more), "--target", "gold"]) == 2
    assert "in row 0 (from 0)" in capsys.readouterr().err
    in_memory = rows_from_texts([f"{text} a" for text in TEXTS], others, classes=NAMES)
    for ask in (partial(append_rows, out), partial(Retriever(out).scores, method="gd", target="gold")):
        with pytest.raises(DataError, match=r"is read as lists of .*, those of the index are"):
            ask(in_memory)


def test_what_is_remembered_decides_lists_that_may_be_both(tmp_path):
    """Of two labels, [0, 1] may be a vector or both labels."""
    names, texts = ("toxic", "rude"), TEXTS[:2]
    first = {"vectors": [[0, 0], [1, 1]], "numbers": [[0], ["rude"]]}
    wanted = {"vectors": [[0, 1], [1, 0]], "numbers": [[1, 1], [1, 1]]}
    for form, lists in first.items():
        like = rows_from_texts(texts, lists, classes=names, problem_type=MULTI_LABEL).format("the index")
        assert like.label_lists == form
        again = rows_from_texts(texts, [[0, 1], [1, 0]], classes=names, like=like)
        np.testing.assert_array_equal(mapped(again, names), wanted[form])


def test_the_models_labels_say_what_lists_of_0_and_1_are():
    one = rows_from_texts(TEXTS[:6], [[0]] * 3 + [[1]] * 3, classes=("toxic",))
    np.testing.assert_array_equal(mapped(one, ("toxic",))[:, 0], [0, 0, 0, 1, 1, 1])
    none = rows_from_texts(TEXTS[:6], [[0]] * 6, classes=("toxic",))
    np.testing.assert_array_equal(mapped(none, ("toxic",))[:, 0], np.zeros(6))
    two = rows_from_texts(TEXTS[:2], [[0, 1], [1, 0]], classes=("toxic", "rude"))
    np.testing.assert_array_equal(mapped(two, ("toxic", "rude")), [[0, 1], [1, 0]])
    three = rows_from_texts(TEXTS[:2], [[0, 1], [1]], classes=NAMES)
    np.testing.assert_array_equal(mapped(three), [[1, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("lists", "names"),
    [([[0], [0, 1]], ("a", "b")), ([["a"], [0, 1]], ("a", "b")), ([[0], []], ("a",)), ([[0], [1]], ())],
)
def test_where_nothing_decides_lists_are_refused(lists, names):
    with pytest.raises(DataError, match=r"may be vectors .* or numbers of labels.* Write the labels by name"):
        rows_from_texts(TEXTS[: len(lists)], lists, classes=names)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (("toxic", "rude"), "missing dull, surplus none"),
        (("toxic", "rude", "dull", "spam"), "missing none, surplus spam"),
        (("toxic", "rude", "spam"), "missing dull, surplus spam"),
    ],
)
def test_columns_are_exactly_the_models_labels(columns, said, labels_model, tmp_path, capsys):
    values = {name: [0 if name == "spam" else row % 2 for row in range(len(TEXTS))] for name in columns}
    call = ["--label-column", ",".join(columns)]
    assert index_call(labels_model, flags(tmp_path, values), tmp_path / "index", *call) == 2
    assert said in capsys.readouterr().err
    good = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=VECTORS)
    assert index_call(labels_model, good, tmp_path / "index") == 0
    capsys.readouterr()
    asked = ["retrieve", "--index", str(tmp_path / "index"), "--test", str(tmp_path / "flags.jsonl"), *call]
    assert run([*asked, "--target", "gold"]) == 2
    assert said in capsys.readouterr().err
    assert run(asked) == 0
    assert "query_label stays empty" in capsys.readouterr().err


def test_columns_are_taken_by_name_in_any_order(tmp_path):
    values = {name: [vector[NAMES.index(name.lower())] for vector in VECTORS] for name in ("dull", "Toxic", "rude")}
    source = open_rows(flags(tmp_path, values), label_column="dull,Toxic,rude")
    np.testing.assert_array_equal(mapped(source), VECTORS)
    with pytest.raises(DataError, match="columns of labels have their own names"):
        open_rows(flags(tmp_path, values), label_column="dull,Toxic,rude", label_names=["a", "b", "c"])


def test_label_names_that_are_not_the_models_are_named(labels_model, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=NUMBERS)
    assert index_call(labels_model, rows, tmp_path / "index", "--label-names", "toxic,rude,z") == 2
    assert "has the label 'z', which the model does not know" in capsys.readouterr().err
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=VECTORS)
    assert index_call(labels_model, rows, tmp_path / "index", "--label-names", "toxic,rude,z") == 2
    assert "missing dull, surplus z" in capsys.readouterr().err


@pytest.mark.parametrize("width", [2, 4])
def test_vectors_have_the_length_of_the_models_labels(width, labels_model, tmp_path, capsys):
    lists = [[*vector, 0][:width] for vector in VECTORS]
    rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=lists)
    assert index_call(labels_model, rows, tmp_path / "index") == 2
    assert f"gives {width} label(s) a row (label), the model has 3 (toxic, rude, dull)" in capsys.readouterr().err
    with pytest.raises(DataError, match=rf"gives {width} label\(s\) a row"):
        Index.build(labels_model, TEXTS, tmp_path / "index", np.array(lists), warn=lambda _line: None)


def test_numbers_of_several_columns_go_by_name(numbers_model, tmp_path, capsys):
    stars, price = [float(row) for row in range(12)], [100.0 + row for row in range(12)]
    rows = flags(tmp_path, {"price": price, "stars": stars, "size": stars})  # type: ignore[dict-item]
    assert index_call(numbers_model, rows, tmp_path / "index", "--label-column", "price,stars") == 0
    np.testing.assert_array_equal(Index.open(tmp_path / "index").labels, np.stack([stars, price], axis=1))
    capsys.readouterr()
    assert index_call(numbers_model, rows, tmp_path / "other", "--label-column", "size,stars") == 2
    assert "gives the numbers size, stars, the model stars, price" in capsys.readouterr().err


def test_training_goes_on_from_outputs_of_the_same_names(numbers_model, tmp_path):
    """The head is kept in its own order, and so are the targets: at rate 0 the loss is that of these targets."""
    stars, price = [float(row % 5) for row in range(12)], [50.0 + row for row in range(12)]
    rows = flags(tmp_path, {"price": price, "stars": stars})  # type: ignore[dict-item]
    losses = {}
    for columns in ("price,stars", "stars,price"):
        out = tmp_path / columns
        call = [
            "train",
            "--data",
            str(rows),
            "--label-column",
            columns,
            "--problem-type",
            "regression",
            "--epochs",
            "1",
        ]
        call += ["--model", str(numbers_model), "--out", str(out), "--lr", "1e-9", "--precision", "fp32"]
        assert run(call) == 0
        stated = json.loads((out / "run.json").read_text())
        assert stated["label_names"] == ["stars", "price"]
        losses[columns] = stated["checkpoints"][0]["train_loss"]
    assert losses["price,stars"] == losses["stars,price"]
    assert Index.build(tmp_path / "price,stars", rows, tmp_path / "index").labels[3].tolist() == [stars[3], price[3]]


@pytest.mark.parametrize("lists", [[["toxic"], ["Toxic"], ["rude"], []], [["no-go"], ["no go"], [], []]])
def test_labels_that_differ_in_case_alone_are_no_two_outputs(lists):
    with pytest.raises(DataError, match="two differ in case, hyphens or spaces alone"):
        classes_for(rows_from_texts(TEXTS[:4], lists))


def test_columns_that_differ_in_case_alone_are_no_two_outputs(tmp_path):
    values = {"toxic": [0, 1] * 6, "Toxic": [1, 0] * 6}
    for kind in (MULTI_LABEL, REGRESSION):
        source = open_rows(flags(tmp_path, values), label_column=["toxic", "Toxic"], problem_type=kind)
        with pytest.raises(DataError, match="two differ in case, hyphens or spaces alone"):
            classes_for(source)


@pytest.fixture(scope="module")
def indexes(labels_model: Path, numbers_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An index of several labels, of numbers, and of one label a row."""
    folder = tmp_path_factory.mktemp("indexes")
    one_label = model_of(folder / "model", ("no", "yes"), None)
    rows: list[tuple[str, Path, Any]] = [
        ("labels", labels_model, VECTORS), ("numbers", numbers_model, np.ones((12, 2))), ("one", one_label, [0, 1] * 6)
    ]  # fmt: skip
    for name, model, targets in rows:
        Index.build(model, TEXTS, folder / name, targets, warn=lambda _line: None)
    return {name: folder / name for name, _, _ in rows}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("labels", list(range(12))), ("labels", [0.5, 1.5] * 6), ("labels", [[0, 1], [5, 5]] * 6),
        ("numbers", ["good", "bad"] * 6), ("numbers", [["good"]] * 12), ("one", [["yes"], []] * 6),
        ("one", [0.25, 0.5] * 6),
    ],
)  # fmt: skip
def test_a_question_that_needs_no_labels_is_answered_whatever_they_are(name, targets, indexes, tmp_path, capsys):
    test = write_jsonl(tmp_path / "test.jsonl", text=TEXTS, label=targets)
    call = ["retrieve", "--index", str(indexes[name]), "--test", str(test), "--method", "gd"]
    assert run([*call, "--target", "gold"]) == 2
    capsys.readouterr()
    assert run(call) == 0
    assert "its labels are not read, theirs stays empty" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_one_column_of_0_and_1_is_one_label(suffix, tmp_path, capsys):
    values = [row % 2 for row in range(12)]
    rows = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        rows.write_text("text,toxic\n" + "".join(f"{t},{v}\n" for t, v in zip(TEXTS, values, strict=True)))
    else:
        write_jsonl(rows, text=TEXTS, toxic=values)
    call = ["train", "--data", str(rows), "--label-column", "toxic", "--problem-type", "multi-label", "--epochs", "1"]
    call += ["--model", str(make_tiny_model(tmp_path / "model")), "--out", str(tmp_path / "run"), "--precision", "fp32"]
    assert run(call) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["label_names"] == ["toxic"]
    assert index_call(tmp_path / "run", rows, tmp_path / "index") == 0
    assert Index.open(tmp_path / "index").labels[:, 0].tolist() == values
    capsys.readouterr()
    assert run(["retrieve", "--index", str(tmp_path / "index"), "--test", str(rows), "--target", "gold"]) == 0
    capsys.readouterr()
    assert run([*call[:3], *call[5:], "--force"]) == 2  # found by its name, it may be the two classes of a row
    assert "'toxic' holds one value a row" in capsys.readouterr().err


def test_one_column_of_several_labels_is_not_all_of_them(labels_model, tmp_path, capsys):
    rows = flags(tmp_path, {"toxic": [0, 1] * 6})
    assert index_call(labels_model, rows, tmp_path / "index", "--label-column", "toxic") == 2
    assert "missing rude, dull, surplus none" in capsys.readouterr().err


def test_lists_written_as_text_are_no_classes(indexes, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text},\"['yes', 'no']\"\n{text} a,['no']\n" for text in TEXTS[:6]))
    call = ["train", "--data", str(rows), "--model", str(make_tiny_model(tmp_path / "model")), "--epochs", "1"]
    call += ["--precision", "fp32", "--out", str(tmp_path / "run")]
    assert run(call) == 2
    said = capsys.readouterr().err
    assert "holds text that reads as lists, such as" in said
    assert "--problem-type multi-label" in said
    assert run([*call, "--problem-type", "single-label"]) == 0
    assert index_call(tmp_path / "run", rows, tmp_path / "index") == 0  # these are its classes
    capsys.readouterr()
    assert index_call(indexes["one"].parent / "model", rows, tmp_path / "other") == 2
    assert "correct the problem_type in its config.json" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["columns", "lists", "values"])
def test_a_model_whose_config_says_another_type_is_named_as_the_cause(layout, labels_model, tmp_path, capsys):
    model, options = labels_model, []
    if layout == "columns":
        model, options = model_of(tmp_path / "model", NAMES, None), ["--label-column", "toxic,rude,dull"]
        rows = flags(tmp_path, {name: [vector[i] for vector in VECTORS] for i, name in enumerate(NAMES)})
    elif layout == "lists":
        model = model_of(tmp_path / "model", NAMES, None)
        rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=VECTORS)
    else:
        rows = write_jsonl(tmp_path / "rows.jsonl", text=TEXTS, label=[0, 1, 2] * 4)
    assert index_call(model, rows, tmp_path / "index", *options) == 2
    assert "correct the problem_type in its config.json" in capsys.readouterr().err


def test_arrays_and_tensors_of_numbers_go_by_the_order_of_outputs(numbers_model, tmp_path):
    values = np.arange(24, dtype=float).reshape(12, 2)
    one = model_of(tmp_path / "model", ("stars",), REGRESSION)
    for number, given in enumerate([values, torch.from_numpy(values), values.tolist()]):
        index = Index.build(numbers_model, TEXTS, tmp_path / f"two-{number}", given, warn=lambda _line: None)
        np.testing.assert_array_equal(index.labels, values)
    for number, given in enumerate([values[:, :1], torch.from_numpy(values[:, 0])]):
        index = Index.build(one, TEXTS, tmp_path / f"one-{number}", given, warn=lambda _line: None)
        np.testing.assert_array_equal(index.labels, values[:, :1])
    source = rows_from_texts(TEXTS, torch.tensor(VECTORS), classes=NAMES)
    np.testing.assert_array_equal(mapped(source), VECTORS)
    classes = rows_from_texts(TEXTS, torch.arange(12) % 3)
    assert classes.label_values == (0, 1, 2)
    with pytest.raises(DataError, match=r"in row 1 \(from 0\), \[1.0\]; expected a list of 2 numbers"):
        rows_from_texts(TEXTS[:2], [[1.0, 2.0], [1.0]], problem_type=REGRESSION)
