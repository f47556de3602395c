"""Test rows that the server lists without an exported site, and hub shares of the test rows themselves."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exploring import METHODS
from serving import until

from forebear import open_rows, retire_rows
from forebear.cli.main import run
from forebear.evaluation.explorer.asking import ask
from forebear.evaluation.explorer.site import export_site
from forebear.progress import no_progress
from forebear.server import listed_rows
from forebear.server.listed_rows import Listing


def listing_of(site: Any, **choices: Any) -> Listing:
    return Listing(
        test=str(site.folder.parent / "test.jsonl"), open_rows=open_rows, methods=METHODS, top=3,
        progress=lambda: nullcontext(no_progress), **choices,
    )  # fmt: skip


@pytest.fixture(scope="module")
def without_hubs(site: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The site of the same test rows, without an audit of hubs."""
    folder = tmp_path_factory.mktemp("plain") / "site"
    export_site(ask(site.index, site.folder.parent / "test.jsonl", methods=METHODS, top=3), folder, "")
    return replace(site, folder=folder)


def explained_all(live: Any, n: int) -> bool:
    """Whether all are explained after a while; without a request, which would put it off."""
    return until(lambda: live.service.explored.listed.n_explained == n)


def test_without_an_audit_hub_shares_are_of_the_test_rows_themselves(without_hubs):
    pages = without_hubs.records("predictions")
    counts: Counter[Any] = Counter()
    for page in pages:
        for answer in page["answers"]:
            counts.update((answer["method"], row) for row in {found["row"] for found in answer["sides"][0]["rows"]})
    for page in pages:
        assert page["hub_queries"] == "20 test rows"
        for answer in page["answers"]:
            for found in answer["sides"][0]["rows"]:
                assert found["hub_share"] == counts[answer["method"], found["row"]] / 20
            assert all(found["hub_share"] is None for found in answer["sides"][1]["rows"])
    assert len(set(counts.values())) > 3


def test_a_server_lists_and_explains_test_rows_as_an_export_does(site, start):
    live = start(site.index, listing=listing_of(site, hubs=str(site.hubs)))
    facts = live.ask("/explorer/site").json
    assert (facts["n_tests"], facts["labelled"], facts["hubs"], facts["top"]) == (20, True, True, 3)
    assert str(site.index) not in [value for _, value in facts["provenance"]]
    lines, wanted = live.ask("/explorer/records/tests/0").json, site.records("tests")
    assert [{**line, "probability": None} for line in lines] == [{**line, "probability": None} for line in wanted]
    for line, other in zip(lines, wanted, strict=True):  # together and alone, the last bits differ
        assert line["probability"] == pytest.approx(other["probability"], rel=1e-4)
    pages = site.records("predictions")
    for number in (0, 5, 6, 12):
        assert live.ask(f"/explorer/tests/{number}").json == pages[number]
    for path in ("/explorer/tests/20", "/explorer/tests/-1", "/explorer/records/tests/1", "/explorer/records/rows/0"):
        assert live.ask(path).status == 422, path


def test_while_nobody_asks_all_test_rows_are_explained_and_rows_say_what_they_drive(site, without_hubs, start):
    live = start(site.index, listing=listing_of(site))
    assert explained_all(live, 20)
    for record in without_hubs.records("rows")[::5]:
        found = live.ask(f"/explorer/rows/{record['row']}").json
        drives, wanted = (
            Counter(json.dumps(place, sort_keys=True) for place in one["drives"]) for one in (found, record)
        )
        assert drives == wanted
        assert (found["n_explained"], found["n_tests"]) == (20, 20)
    assert live.ask("/explorer/tests/7").json == without_hubs.records("predictions")[7]


def test_a_changed_index_is_asked_as_it_is_and_another_model_ends_the_list(site, start, tmp_path, monkeypatch):
    index = Path(shutil.copytree(site.index, tmp_path / "index"))
    live = start(index, listing=listing_of(site, hubs=str(site.hubs)))
    page = live.ask("/explorer/tests/0").json
    assert page["duplicate"]["row"] == 0
    first = page["answers"][1]["sides"][0]["rows"][0]["row"]
    retire_rows(index, sorted({0, first}))
    assert until(lambda: live.ask("/explorer/tests/0").json["duplicate"] is None)
    page = live.ask("/explorer/tests/0").json
    assert not {0, first} & {found["row"] for a in page["answers"] for s in a["sides"] for found in s["rows"]}
    assert live.ask("/explorer/records/tests/0").json[0]["duplicate"] is False
    monkeypatch.setattr(listed_rows, "same_model", lambda *_: False)
    assert "has another model than when the server was started" in live.ask("/explorer/tests/0").error
    facts = live.ask("/explorer/site").json
    assert facts["n_tests"] == 0
    assert dict(facts["provenance"])["test rows"].startswith("not listed: the index has another model")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["two={index}", "--test", "dev.csv"], "several indexes are served. Say which one the test rows are for"),
        (["two={index}", "--test", "three=dev.csv"], "--test index=three=dev.csv"),
        (["--test", "nowhere.csv"], "nowhere.csv"),
        (["--test", "index={test}", "--method", "nonsense"], "nonsense"),
        (["--test", "{test}", "--site", "{site}"], "--site and --test: both list test rows of one index."),
        (["--hubs", "{hubs}"], "--method and --hubs are asked of test rows. Give a file of them by --test."),
    ],
)
def test_test_rows_that_cannot_be_listed_are_refused(site, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    places = {
        "index": site.index, "site": site.folder, "hubs": site.hubs, "test": site.folder.parent / "test.jsonl"
    }  # fmt: skip
    assert run(["serve", str(site.index), "--port", "0", *(one.format(**places) for one in given)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_list_is_there_from_the_start_and_a_page_when_it_is_opened(page, site, start):
    live = start(f"one={site.index}", listing=listing_of(site))
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("h1:has-text('Test rows')")
    assert page.locator(".lines a").count() == 20
    page.get_by_label("Show").select_option("wrong")
    wrong = [line["number"] for line in site.records("tests") if line["wrong"]]
    assert [int(text.split()[-1]) for text in page.locator(".lines a").all_inner_texts()] == wrong
    page.get_by_role("link", name=f"Test row {wrong[1]}", exact=True).click()
    page.wait_for_selector(f"h1:has-text('Test row {wrong[1]}')")
    assert page.get_by_text(f"Labelled \u201c{site.test[wrong[1]]['label']}\u201d.").is_visible()
    row = site.records("predictions")[wrong[1]]["answers"][1]["sides"][0]["rows"][0]["row"]
    page.get_by_role("link", name=f"row {row}", exact=True).first.click()
    page.wait_for_selector(f"h1:has-text('Training row {row}')")
    assert page.get_by_role("link", name=f"Test row {wrong[1]}", exact=True).is_visible()  # what was opened is known
    assert explained_all(live, 20)
    page.reload()
    page.wait_for_selector(f"h1:has-text('Training row {row}')")
    drives = next(one["drives"] for one in site.records("rows") if one["row"] == row)
    wanted = sorted({place["test"] for place in drives if place["side"] == "proponent"})
    links = page.locator("section[aria-labelledby='drives-proponent'] .lines a").all_inner_texts()
    assert [int(text.split()[-1]) for text in links] == wanted
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{live.port}/#/test/{wrong[0]}")
    page.wait_for_selector("h1:has-text('Test row')")
    assert page.get_by_text("% of 20 test rows").count() > 0
