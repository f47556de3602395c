"""Audits and evaluations of an index of several labels or of numbers: they work, or are refused by name in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny_model, sentences, write_jsonl
from torch import nn

from forebear import audits, evaluations, explain
from forebear.cli.main import run
from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model import loading
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.retriever import Retriever

N_ROWS, NAMES = 30, ("bad", "film", "good")
TEXTS = sentences(N_ROWS, 3)
KINDS = ("multi_label_classification", "regression")
REFUSED = {
    "audit hans": "audits.hans", "audit overlap": "audits.overlap", "audit negation": "audits.negation",
    "audit errors": "audits.errors", "audit poison": "audits.poison",
    "evaluate removal": "evaluations.removal",
    "evaluate deletion-curve": "evaluations.deletion_curve", "evaluate retraining-loss": "evaluations.retraining_loss",
    "evaluate lds": "evaluations.lds", "evaluate randomized": "evaluations.randomized",
    "evaluate saliency-consistency": "evaluations.saliency_consistency",
    "evaluate faithfulness": "evaluations.faithfulness", "evaluate semantic-agreement": "evaluations.agreement",
    "evaluate label-agreement": "evaluations.agreement", "perturb attack": "perturb", "perturb fix": "perturb",
}  # fmt: skip
WORKING = (
    ("audit mislabelled",), ("audit duplicates",), ("audit duplicates", "--test"), ("audit hubs",),
    ("audit hubs", "--test"), ("evaluate correlation", "--test"), ("evaluate overlap", "--test"),
    ("evaluate recall", "--test"), ("evaluate near-duplicates",), ("evaluate mislabelled", "--wrong-rows"),
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory) -> Path:
    """A folder with an index, its rows and rows to ask about."""
    folder, several = tmp_path_factory.mktemp("kinds"), request.param == KINDS[0]
    model = make_tiny_model(folder / "model", n_classes=len(NAMES) if several else 1)
    config = json.loads((model / "config.json").read_text())
    names = dict(enumerate(NAMES)) if several else {0: "length"}
    (model / "config.json").write_text(json.dumps(config | {"problem_type": request.param, "id2label": names}))
    targets: list[Any] = [[name for name in NAMES if name in text.split()] for text in TEXTS]
    if not several:
        targets = [float(len(text)) for text in TEXTS]
    rows = write_jsonl(folder / "rows.jsonl", text=TEXTS, label=targets)
    Index.build(model, rows, folder / "index", warn=lambda _line: None)
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is loaded."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(loading, "load_pretrained", refuse)


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_of_one_label_a_row_is_refused_before_any_work(command, place, tmp_path, capsys, no_model):
    out, rows = tmp_path / "out", place / "rows.jsonl"
    given = ["--dev", str(rows)] if command == "perturb fix" else []
    call = [*command.split(), "--index", str(place / "index"), "--test", str(rows), "--out", str(out), *given]
    assert run(call) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    has = "several labels a row" if "multi" in Index.open(place / "index").manifest.spec.problem_type else "numbers"
    said = "perturb" if command.startswith("perturb") else command.replace("semantic-", "").replace("label-", "")
    assert f"error: {said} is for one label a row; {place / 'index'} has {has}" in line
    assert not list(out.glob("*"))


def test_python_names_its_own_functions(place):
    with pytest.raises(InputError, match=r"audits\.hans is for one label a row"):
        audits.hans(place / "index", [("a", "b")])
    with pytest.raises(InputError, match=r"evaluations\.randomized is for one label a row"):
        evaluations.randomized(place / "index", ["a"])


@pytest.mark.parametrize("command", WORKING, ids=" ".join)
def test_what_counts_rows_works_for_any_targets(command, place, tmp_path):
    call = [*command[0].split(), "--index", str(place / "index"), "--out", str(tmp_path / "out")]
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("3\n7\n")
    call += ["--top", "5"] if command[0] == "evaluate overlap" else []
    call += [str(x) for option in command[1:] for x in (option, wrong if "wrong" in option else place / "rows.jsonl")]
    assert run(call) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())  # Python reads NaN, which is no JSON
    assert "NaN" not in json.dumps(result)


def test_a_page_explains_a_prediction(place, tmp_path, capsys):
    call = ["explain", "--index", str(place / "index"), "--text", "a bad film", "--top", "2"]
    assert run([*call, "--html", str(tmp_path / "a.html")]) == 0
    capsys.readouterr()
    assert run(call) == 0
    shown = capsys.readouterr().out
    assert "The model predicts" in shown
    if "multi" in Index.open(place / "index").manifest.spec.problem_type:
        assert run([*call, "--target", "label:good"]) == 0
        assert "good”" in capsys.readouterr().out
        found = explain(place / "index", "a bad film")
        predicted = [name for name, probability, _ in found.probabilities if probability > 0.5]
        assert predicted
        assert [name for name in NAMES if "predicted, explained" in found.remark_on(name)] == sorted(predicted)


def test_the_doubted_label_is_the_one_of_largest_loss(place):
    retriever = Retriever(place / "index")
    index, found = retriever.index, audits.suspects(retriever, n_neighbours=5).numbers
    if index.loss.problem_type == KINDS[1]:
        assert found.doubts.doubted is None
        np.testing.assert_allclose(found.suggested, index.predictions)
        np.testing.assert_allclose(found.majority, np.median(index.labels[found.neighbours], axis=1))
        return
    probabilities = torch.from_numpy(np.concatenate([b.column("probabilities").flatten().to_numpy().reshape(-1, 3)
                                                     for b in index._shards("rows")])).double()  # fmt: skip
    losses = nn.functional.binary_cross_entropy(probabilities, torch.from_numpy(index.labels), reduction="none")
    np.testing.assert_array_equal(found.doubts.doubted, losses.argmax(dim=1).numpy())
    for row, (own, suggested, k) in enumerate(zip(index.labels, found.suggested, found.doubts.doubted, strict=True)):
        disagrees = (index.predictions[row, k] > 0.5) != (own[k] > 0.5)
        votes = index.labels[found.neighbours[row], k].sum()
        outvoted = votes > 2.5 if own[k] < 0.5 else votes < 2.5
        if disagrees or outvoted:
            assert np.flatnonzero(own != suggested).tolist() == [k]
        else:
            assert np.isnan(suggested).all()
    (table,) = audits.suspects(retriever, n_neighbours=5, n_listed=4).report.tables
    place_of = table.columns.index("doubted")
    assert [line[place_of] for line in table.rows] == [
        NAMES[found.doubts.doubted[position]] for position in found.order[:4]
    ]


def test_test_rows_of_another_number_are_counted_by_the_number(place):
    index = Index.open(place / "index")
    if index.loss.problem_type == KINDS[0]:
        return
    numbers = index.labels[:4, 0] + np.array([0.0, 1e-7, 1e-7, 2.0])
    rows = rows_from_texts(TEXTS[:4], numbers.tolist(), problem_type=KINDS[1])
    report = audits.duplicates(index, rows).report
    (table,) = [table for table in report.tables if "test rows" in table.title.lower() and len(table.columns) == 4]
    assert sum(row[3] for row in table.rows if row[1]) >= 3
