"""The explorer of pairs of texts, of several labels a row and of numbers; of test rows without labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model, sentences

from forebear import Index, Retriever, rows_from_texts
from forebear.evaluation.explorer.asking import ask
from forebear.evaluation.explorer.site import export_site

KINDS = ("multi_label_classification", "regression")
TEXTS = sentences(24, 3)


def index_of(kind: str, folder: Path) -> Index:
    """A tiny index whose rows have several labels, or a number."""
    names = ("bad", "film", "good") if kind == KINDS[0] else ("length",)
    model = make_tiny_model(folder / "model", n_classes=len(names))
    config = json.loads((model / "config.json").read_text()) | {
        "problem_type": kind,
        "id2label": dict(enumerate(names)),
    }
    (model / "config.json").write_text(json.dumps(config))
    return Index.build(
        model, TEXTS, folder / "index", targets(TEXTS, kind), label_names=names if kind == KINDS[0] else None,
        warn=lambda _line: None,
    )  # fmt: skip


def targets(texts: list[str], kind: str) -> list[Any]:
    if kind == "regression":
        return [len(text.split()) / 4.0 for text in texts]
    return [[float(name in text.split()) for name in ("bad", "film", "good")] for text in texts]


def exported(site: Any, asked: Any, folder: Path) -> Any:
    export_site(asked, folder, "")
    return replace(site, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_labels_or_a_number_have_pages_that_claim_no_more_than_is_known(kind, site, page, tmp_path):
    index = index_of(kind, tmp_path)
    queries = sentences(4, 8)
    rows = rows_from_texts(queries, targets(queries, kind), problem_type=kind)
    made = exported(site, ask(index, rows, methods=["gc"], top=2), tmp_path / "site")
    predicted = Retriever(index).retrieve(rows, methods=["gc"], top=1).to_pylist()
    for record in made.records("predictions"):
        result = next(one for one in predicted if one["query"] == record["number"])
        assert record["label"] == result["query_label"]
        if kind == "regression":  # asked one by one and together: the last bits of a forward pass differ
            assert float(record["prediction"]) == pytest.approx(float(result["query_prediction"]), rel=1e-4)
        else:
            assert record["prediction"] == result["query_prediction"]
        assert record["probability"] is None
        assert record["wrong"] is (None if kind == "regression" else record["label"] != record["prediction"])
    records = made.records("rows")
    assert all(record["probability"] is None for record in records)
    if kind == "regression":
        assert all(record["suggested"] is None for record in records)
    for place in ("", "#/test/0", f"#/row/{records[0]['row']}", "#/about"):
        page.goto("about:blank")
        page.goto(made.address + place)
        page.wait_for_selector("h1")
        assert page.locator("h1").count() == 1
        assert "undefined" not in page.locator("main").inner_text()
        assert "null" not in page.locator("main").inner_text()


@pytest.mark.slow
def test_pairs_without_labels_have_two_texts_and_no_verdict(make_world, site, page, tmp_path):
    world = make_world("bert", 3, True, 1)
    made = exported(
        site, ask(world.retriever, world.queries, methods=["gc", "tracin-we-topk"], top=2), tmp_path / "site"
    )
    records = made.records("predictions")
    assert [len(record["texts"]) for record in records] == [2] * len(world.queries)
    assert {(record["label"], record["wrong"]) for record in records} == {(None, None)}
    page.goto(f"{made.address}#/test/1")
    page.wait_for_selector("h1")
    assert page.locator(".saliency dd").count() == 2
    assert page.locator(".verdict, .note.wrong").count() == 0
    row = records[1]["answers"][0]["sides"][0]["rows"][0]["row"]
    page.locator(".methods summary", has_text=f"Mark row {row}").first.click()
    page.get_by_label("keep").check()
    page.get_by_role("link", name="Work list (1)").click()
    page.wait_for_selector("h1:has-text('Work list')")
    assert page.locator(".lines .text").inner_text().split("\n") == list(world.texts[row])
