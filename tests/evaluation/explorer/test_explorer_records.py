"""What the explorer's files say, against the model, the rankings and the files of rows; no browser is needed."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from forebear import Index, Retriever, rows_from_texts
from forebear.cli.main import run
from forebear.evaluation.explorer import site as of_site
from forebear.evaluation.explorer.asking import ask

METHODS = ("tracin-we-topk", "gc", "if")


def joined(texts: list[list[Any]]) -> str:
    """The one text of marked texts: its pieces one after another."""
    ((_, pieces),) = texts
    return "".join(piece[0] for piece in pieces)


def test_predictions_are_those_of_the_model_and_texts_those_of_the_file(site):
    network = transformers.AutoModelForSequenceClassification.from_pretrained(site.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(site.model)
    pages, lines = site.records("predictions"), site.records("tests")
    assert [page["number"] for page in pages] == [line["number"] for line in lines] == list(range(len(site.test)))
    wrong = 0
    for page, line, row in zip(pages, lines, site.test, strict=True):
        inputs = tokenizer(row["text"], truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            chances = network(**inputs).logits.softmax(-1)[0].numpy()
        assert page["prediction"] == f"LABEL_{chances.argmax()}"
        np.testing.assert_allclose(page["probability"], chances.max(), rtol=1e-4)
        assert page["label"] == row["label"]
        assert page["wrong"] is line["wrong"] is (page["prediction"] != row["label"])
        assert joined(page["texts"]) == row["text"]
        assert line["texts"] == [row["text"][:2000]]
        wrong += page["wrong"]
    assert 0 < wrong < len(pages)


def test_rows_are_those_of_a_search_over_all_test_rows_at_once(site):
    retriever = Retriever(site.index)
    table = retriever.retrieve(rows_from_texts([row["text"] for row in site.test]), methods=METHODS, top=3)
    wanted = {(r["query"], r["method"], r["side"], r["rank"]): r for r in table.to_pylist()}
    seen = 0
    for page in site.records("predictions"):
        for answer in page["answers"]:
            for side in answer["sides"]:
                for found in side["rows"]:
                    result = wanted[page["number"], answer["method"], side["name"], found["rank"]]
                    assert found["row"] == result["row"]
                    assert (found["label"], found["prediction"]) == (result["label"], result["prediction"])
                    largest = max(abs(float(other["score"])) for other in side["rows"])
                    assert abs(float(found["score"]) - result["score"]) <= 1e-3 * largest
                    assert joined(found["texts"]) == site.train[found["row"]]["text"]
                    seen += 1
    assert seen == len(wanted)


def test_what_a_row_drives_is_where_predictions_list_it(site):
    listed: dict[int, Counter[Any]] = {}
    for page in site.records("predictions"):
        for answer in page["answers"]:
            for side in answer["sides"]:
                for found in side["rows"]:
                    place = (
                        page["number"],
                        answer["method"],
                        side["name"],
                        found["rank"],
                        found["score"],
                        found["effect"],
                    )
                    listed.setdefault(found["row"], Counter())[place] += 1
    records = site.records("rows")
    assert [record["row"] for record in records] == sorted(listed)
    for record in records:
        names = ("test", "method", "side", "rank", "score", "effect")
        assert Counter(tuple(one[name] for name in names) for one in record["drives"]) == listed[record["row"]]


def test_training_rows_say_where_they_come_from_and_what_speaks_against_them(site):
    features = Index.open(site.index).features().take(np.arange(60)).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    gold = np.array([row["label"] for row in site.train])
    for record in site.records("rows"):
        row = site.train[record["source_row"]]
        assert record["source"].endswith("train.jsonl")
        assert record["texts"] == [["text", row["text"]]]
        assert record["columns"] == [["__proto__", row["__proto__"]]]
        assert record["label"] == row["label"]
        assert record["probability"] == pytest.approx(np.exp(-record["loss"]))
        near = gold[np.argsort(-cosines[record["row"]], kind="stable")[:10]]
        contradicting = int((near != row["label"]).sum())
        assert record["evidence"].startswith(f"{contradicting} of 10 nearest rows contradict the label")
        differs = record["prediction"] != record["label"]
        assert (f"the model predicts {record['prediction']}" in record["evidence"]) is differs
        (other,) = {"LABEL_0", "LABEL_1"} - {row["label"]}
        assert record["suggested"] == (other if differs or contradicting > 5 else None)


def test_duplicates_that_were_planted_are_named_and_no_others(site):
    pages = {page["number"]: page["duplicate"] for page in site.records("predictions") if page["duplicate"]}
    hostile = {number: {"row": number, "kind": "same texts", "jaccard": 1.0} for number in range(5)}
    shouted = {12: {"row": 30, "kind": "same words", "jaccard": 1.0}}
    assert pages == hostile | shouted
    assert [line["number"] for line in site.records("tests") if line["duplicate"]] == sorted(pages)
    of_rows = {record["row"]: record["duplicates"] for record in site.records("rows") if record["duplicates"]}
    twins = {10: 20, 20: 10}
    assert of_rows.keys() == twins.keys() & {record["row"] for record in site.records("rows")}
    for row, found in of_rows.items():
        assert found == {"rows": [twins[row]], "n_rows": 1, "kind": "same texts", "conflict": True}


def test_hub_shares_are_those_of_the_audit(site):
    audit = json.loads((site.hubs / "result.json").read_text())
    shares = Counter()
    for page in site.records("predictions"):
        for answer in page["answers"]:
            for side in answer["sides"]:
                for found in side["rows"]:
                    count = audit["counts"][answer["method"]].get(str(found["row"]), 0)
                    assert found["hub_share"] == (count / 60 if side["name"] == "proponent" else None)
                    shares[found["hub_share"]] += 1
    assert len(shares) > 3


def test_files_hold_nothing_that_ends_a_script_and_no_invisible_character(site):
    texts = "".join(row["text"] for row in site.test)
    assert "</script>" in texts
    assert "\u202e" in texts
    for path in (site.folder / "data").iterdir():
        script = path.read_bytes()
        assert script.isascii()
        assert b"<" not in script
        assert all(byte >= 32 for byte in script.rstrip(b"\n"))
    page = (site.folder / "index.html").read_text()
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert page.count("<script") == page.count("<script src=")
    scripts = sorted(path.relative_to(site.folder).as_posix() for path in (site.folder / "scripts").iterdir())
    assert sorted(re.findall(r'<script src="([^"]+)" defer></script>', page)) == ["data/site.js", *scripts]
    code = "".join((site.folder / name).read_text() for name in scripts)
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "http"):
        assert dangerous not in code, dangerous


def test_records_lie_in_as_many_files_as_their_numbers_say(site):
    facts = json.loads((site.folder / "data" / "site.js").read_text().removeprefix("forebear.site = ")[:-2])
    names = Counter(path.stem.split("-")[0] for path in (site.folder / "data").glob("*-*.js"))
    assert (names["tests"], names["predictions"], names["rows"]) == (3, 7, -(-facts["n_rows"] // 7))
    rows = [record["row"] for record in site.records("rows")]
    assert facts["first_rows"] == rows[::7]
    assert facts["n_rows"] == len(rows)


def test_a_folder_that_holds_something_else_is_never_replaced(site, tmp_path, capsys):
    command = ["export-site", "--index", str(site.index), "--test", "none.csv", "--force", "--out"]
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("ten years")
    for folder in (kept, kept / "thesis.txt"):
        assert run([*command, str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"error: --out {folder}: something else is there. Name a folder that does not exist.\n"
        )
    assert (kept / "thesis.txt").read_text() == "ten years"
    assert run([*command[:-2], "--out", str(site.folder)]) == 2
    assert "holds a site. Give another --out, or --force to replace it." in capsys.readouterr().err


def test_a_site_is_replaced_as_a_whole_or_not_at_all(site, tmp_path, monkeypatch):
    folder = tmp_path / "site"
    shutil.copytree(site.folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    asked = ask(site.index, ["a good film", "a bad film"], methods=["gc"], top=2)

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(of_site, "row_records", fail)
        with pytest.raises(Exception, match="No space left on device"):
            of_site.export_site(asked, folder, "", force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]
    of_site.export_site(asked, folder, "", force=True)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == sorted([
        "data/predictions-0.js", "data/rows-0.js", "data/site.js", "data/tests-0.js", "explorer.css", "index.html",
        *of_site.SCRIPTS,
    ])  # fmt: skip
    assert [record["label"] for record in replace(site, folder=folder).records("tests")] == [None, None]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--target", "gold"], "--target gold: the explorer explains predictions."),
        (["--method", "nonsense"], "nonsense"),
        (["--hubs", "nowhere"], "nowhere holds no audit of hubs."),
        (["--top", "0"], "--top 0"),
    ],
)
def test_a_question_that_means_nothing_is_one_line(site, tmp_path, capsys, given, said):
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"text": "a good film", "label": 1}\n')
    command = ["export-site", "--index", str(site.index), "--test", str(rows), "--out", str(tmp_path / "s"), "-q"]
    assert run([*command, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
