"""What Python callers get from ``forebear``: explanations, saliency, audits, evaluations, and how they look."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import labels, sentences

import forebear
from forebear.cli.main import run
from forebear.evaluation.python.opening import Finding
from forebear.retriever.saliency import maps

TEXTS, OTHERS = sentences(24, seed=3), sentences(24, seed=4)
HOSTILE = '<script>alert("x")</script> & <img src=http://elsewhere/x.png>'


@pytest.fixture(scope="module")
def index(tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> forebear.Index:
    """Of single texts, one of them hostile, by the one call."""
    rows = [*TEXTS[:-1], HOSTILE]
    out = tmp_path_factory.mktemp("door") / "index"
    unheard: list[str | None] = []
    return forebear.Index.build(
        tiny_model(), rows, out, labels(24), stores=["features", "words"], device="cpu", warn=unheard.append
    )


@pytest.fixture(scope="module")
def retriever(index: forebear.Index) -> forebear.Retriever:
    return forebear.Retriever(index, device="cpu")


class _Elements(HTMLParser):
    """The elements of a piece of HTML, those of framed pages included."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag not in ("meta", "link", "img", "br", "input", "hr"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value is not None and not value.startswith("#"):
                self.addresses.append(value)
            if name == "srcdoc":
                page = _Elements(value or "")
                self.names += page.names
                self.addresses += page.addresses

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---------------------------------------------------------------- how things look


def test_what_a_notebook_shows_is_escaped_and_needs_no_network(
    index: forebear.Index, retriever: forebear.Retriever
) -> None:
    answers = retriever.retrieve([HOSTILE], methods=["gc"], top=24)
    assert HOSTILE in answers.column("text").to_pylist()
    shown = {
        "index": (index, "rows: 24"),
        "question": (retriever.resolve(forebear.QuerySpec(methods=("gd", "if"), top=3)), "methods='gd, if', top=3"),
        "answers": (forebear.show(answers), "query 0 · gc · proponents of"),
        "explanation": (forebear.explain(retriever, HOSTILE, methods=["gc"], top=24), "Why"),
        "finding": (forebear.audits.suspects(retriever, n_listed=24), "Finding"),
        "report": (forebear.audits.suspects(retriever, n_listed=24).report, "Report"),
    }
    for name, (thing, said) in shown.items():
        assert said in repr(thing), name
        assert len(repr(thing)) < 12_000, name
        html = thing._repr_html_()
        elements = _Elements(html)
        assert len(elements.names) > 5, name
        assert not elements.open, name
        assert {"script", "img"} & set(elements.names) == set(), name
        assert elements.addresses == [], name
    for name in ("answers", "explanation", "finding", "report"):
        assert "alert(" in shown[name][0]._repr_html_(), name  # the text is there, as text


def test_long_answers_are_cut_and_that_is_said(retriever: forebear.Retriever) -> None:
    answers = retriever.retrieve(TEXTS[:2], methods=["gc"], top=3)
    shown = forebear.show(answers, 5)
    assert shown.table is answers
    assert "7 more results are in .table" in repr(shown)
    assert "7 more results are in .table" in shown._repr_html_()
    assert "more results" not in repr(forebear.show(answers))
    with pytest.raises(forebear.InputError, match="has no column method"):
        forebear.show(answers.select(["query", "row"]))


# ---------------------------------------------------------------- explanations and saliency


def test_explain_says_what_the_command_says(
    index: forebear.Index, tmp_path: Path, retriever: forebear.Retriever
) -> None:
    page = tmp_path / "page.html"
    assert run(["explain", "--index", str(index.folder), "--text", TEXTS[0], "--html", str(page)]) == 0
    explanation = forebear.explain(retriever, TEXTS[0])
    assert [a.method for a in explanation.answers] == ["tracin-we-topk", "gc"]
    assert [len(side.rows) for answer in explanation.answers for side in answer.sides] == [5] * 4
    for answer in explanation.answers:
        for row in answer.sides[0].rows:
            assert row.score.replace("-", "\u2212") in page.read_text(encoding="utf-8")
    assert [a.method for a in forebear.explain(retriever, TEXTS[0], methods="gd", top=1).answers] == ["gd"]
    asked = forebear.explain(retriever, TEXTS[0], spec=forebear.QuerySpec(methods=("nn-cos",), top=2))
    assert [len(side.rows) for side in asked.answers[0].sides] == [2, 2]


@pytest.mark.parametrize("kind", ["retriever", "index", "index folder", "model folder", "classifier"])
def test_saliency_takes_rows_from_whoever_holds_the_model(
    kind: str, index: forebear.Index, retriever: forebear.Retriever, tiny_model: Callable[..., str]
) -> None:
    model: Any = {
        "retriever": retriever, "index": index, "index folder": index.folder, "model folder": tiny_model(),
        "classifier": retriever.classifier(),
    }[kind]  # fmt: skip
    classifier, names = retriever.classifier(), retriever.label_names
    truth = maps.saliency(classifier, [TEXTS[:3]], np.array([1, 1, 1]))
    found = forebear.saliency(model, TEXTS[:3], names[1])
    assert [m.pieces for m in found] == [m.pieces for m in truth]
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-8)
    gold = forebear.rows_from_texts(TEXTS[:3], [0, 1, 0])
    of_gold = forebear.saliency(model, gold, "gold")
    np.testing.assert_allclose(of_gold[1].values, truth[1].values, rtol=1e-5, atol=1e-8)
    assert np.abs(of_gold[0].values - truth[0].values).max() > 1e-6


def test_saliency_of_pairs_takes_pairs(tiny_model: Callable[..., str]) -> None:
    pairs = list(zip(TEXTS[:3], OTHERS[:3], strict=True))
    found = forebear.saliency(tiny_model(), pairs)
    assert {word.column for m in found for word in m.words} == {0, 1}
    assert [" ".join(w.text for w in m.words if w.column == 0) for m in found] == TEXTS[:3]


@pytest.mark.parametrize(
    ("rows", "target"),
    [
        ([TEXTS[:2]], np.array([0, 1])),  # as before 0.2
        ([TEXTS[:2], OTHERS[:2]], np.array([0, 1])),  # two columns of two rows look like two pairs
        ([TEXTS[:2], OTHERS[:2]], "predicted"),
        ([TEXTS[:1]], "predicted"),
        (((TEXTS[0], TEXTS[1]),), np.array([0, 1])),
        (TEXTS[:2], 0),
    ],
)
def test_saliency_refuses_columns_rather_than_read_them_as_rows(
    rows: Any, target: Any, retriever: forebear.Retriever
) -> None:
    with pytest.raises(forebear.InputError, match="saliency takes rows"):
        forebear.saliency(retriever, rows, target)


def test_saliency_refuses_what_means_nothing(retriever: forebear.Retriever) -> None:
    with pytest.raises(forebear.InputError, match="form 'x' is not known"):
        forebear.saliency(retriever, TEXTS[:1], form="x")
    with pytest.raises(forebear.InputError, match="expected predicted, gold, or one of"):
        forebear.saliency(retriever, TEXTS[:1], "nobody")
    with pytest.raises(forebear.MismatchError, match=r"gives 2 text\(s\) a row"):
        forebear.saliency(retriever, [(TEXTS[0], TEXTS[1])])


# ---------------------------------------------------------------- audits and evaluations


def result_of(command: list[str], folder: Path) -> dict[str, Any]:
    """What a command writes, without what names the command."""
    assert run([*command, "--out", str(folder), "--quiet"]) == 0
    return plain(json.loads((folder / "result.json").read_text()))


def plain(result: Any) -> dict[str, Any]:
    """A result as JSON has it, without provenance and times."""
    found: dict[str, Any] = json.loads(json.dumps(dict(result), default=lambda value: value.tolist()))
    return {name: value for name, value in found.items() if name != "provenance"}


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled test rows."""
    path = tmp_path_factory.mktemp("test") / "test.jsonl"
    gold = labels(24, seed=7)
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(OTHERS, gold, strict=True)))
    return path


CASES: dict[str, tuple[Callable[..., Finding[Any]], str, dict[str, Any]]] = {  # with a command's words; {} is the file
    "hubs": (forebear.audits.hubs, "audit hubs --method gd,gc --top 3 --test {}", {"methods": ["gd", "gc"], "top": 3}),
    "overlap": (
        forebear.evaluations.overlap, "evaluate overlap --method gd,if --top 2,5 --test {}",
        {"methods": ["gd", "if"], "tops": [2, 5]},
    ),
    "recall": (forebear.evaluations.recall, "evaluate recall --method gd --test {}", {"methods": ["gd"]}),
    "removal": (
        forebear.evaluations.removal, "evaluate removal --method gd --remove 3 --queries 2 --seeds 1 --test {}",
        {"methods": ["gd"], "remove": [3], "n_queries": 2, "how": forebear.evaluations.Retraining(n_seeds=1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_audits_and_evaluations_find_what_their_commands_find(
    name: str, index: forebear.Index, retriever: forebear.Retriever, tested: Path, tmp_path: Path
) -> None:
    function, words, choices = CASES[name]
    command = words.format(tested).split()
    rows = [tested] if "--test" in command else []
    by_command = result_of([*command, "--index", str(index.folder)], tmp_path / "command")
    finding = function(retriever, *rows, **choices)
    assert without_times(plain(finding.result)) == without_times(by_command)
    page = finding.write(tmp_path / "python")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(forebear.OutputExistsError):
        finding.write(tmp_path / "python")
    assert "in Python" in finding.report.provenance["command"]


def without_times(result: Any) -> Any:
    """A result without what another run measures otherwise."""
    if isinstance(result, dict):
        return {k: without_times(v) for k, v in result.items() if "seconds" not in k and "faster" not in k}
    return [without_times(value) for value in result] if isinstance(result, list) else result


def test_an_artifact_is_a_function(retriever: forebear.Retriever) -> None:
    finding = forebear.audits.artifact(retriever, OTHERS, lambda row: len(row["text"]), n_queries=5, methods=["gd"])
    assert "lambda" in finding.report.title + finding.report.summary
    with pytest.raises(forebear.InputError, match="failed on training row 0"):
        forebear.audits.artifact(retriever, OTHERS, lambda row: len(row["no such"]), methods=["gd"])


def test_hans_is_of_pairs(retriever: forebear.Retriever, tested: Path) -> None:
    with pytest.raises(forebear.ForebearError):
        forebear.audits.hans(retriever, tested)


def test_labels_are_asked_for_where_they_are_needed(retriever: forebear.Retriever) -> None:
    with pytest.raises(forebear.InputError, match="need labels"):
        forebear.audits.errors(retriever, OTHERS, methods=["gd"])
    labelled = forebear.rows_from_texts(OTHERS, labels(24, seed=7))
    assert forebear.audits.errors(retriever, labelled, methods=["gd"]).result


def test_progress_true_is_the_usual_bar(retriever: forebear.Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "forebear.progress.ProgressBar.__call__", lambda _self, stage, _done, _total: told.append(stage)
    )
    forebear.evaluations.overlap(retriever, OTHERS, methods=["gd", "gc"], tops=[2], progress=True)
    assert told
    count = len(told)
    forebear.evaluations.overlap(retriever, OTHERS, methods=["gd", "gc"], tops=[2])
    assert len(told) == count
