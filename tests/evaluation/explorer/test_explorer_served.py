"""The explorer at ``/`` of the server: its routes, what it keeps, and the same pages in a browser."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forebear import audits, retire_rows
from forebear.cli.main import run
from forebear.evaluation.worklists.files import read_work_list
from forebear.server.worklists import WorkLists

TOKEN = "0123456789abcdef0123"
MARK = {"row": 7, "decision": "remove", "note": "twice"}
SENTENCE = "the good film"


def visit(page: Any, port: int, place: str = "") -> None:
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{port}/{place}")
    page.wait_for_selector("h1")


def test_what_the_page_loads_is_no_other_sites_and_holds_nothing_without_the_token(site, start):
    live = start(site.index, token=TOKEN, site=str(site.folder))
    for path in ("/", "/scripts/frame.js", "/explorer.css", "/data/site.js"):
        reply = live.ask(path)
        assert reply.status == 200, path
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in reply.headers["content-security-policy"]
        assert b"film" not in reply.body
    assert live.ask("/").body == (site.folder / "index.html").read_bytes()
    asked = (
        "/explorer/site",
        "/explorer/records/tests/0",
        "/explorer/rows/3",
        "/explorer/worklist",
        "/data/tests-0.js",
    )
    for path in asked:
        assert live.ask(path).status == 401, path
        assert live.ask(path, method="PUT").status == 401, path
    reply = live.ask("/explorer/site", authorization=f"Bearer {TOKEN}")
    assert (reply.status, reply.json["n_tests"]) == (200, len(site.test))
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"


def test_records_are_those_of_the_folder_and_rows_those_of_the_index(site, start):
    live = start(site.index, site=str(site.folder))
    for kind in ("tests", "predictions", "rows"):
        assert live.ask(f"/explorer/records/{kind}/1").json == chunk(site, kind, 1)
    for record in site.records("rows")[::9]:
        without = {**record, "drives": [], "duplicates": None}
        found = live.ask(f"/explorer/rows/{record['row']}").json
        without["evidence"] = without["evidence"].replace("a duplicate has another label; ", "")
        assert found == without
    for path, status in (
        ("/explorer/records/tests/99", 422), ("/explorer/records/site/0", 422), ("/explorer/records/tests/..", 422),
        ("/explorer/records/tests/-1", 422), ("/explorer/rows/60", 422), ("/explorer/rows/x", 422),
        ("/explorer/site?index=other", 422),
    ):  # fmt: skip
        reply = live.ask(path)
        assert reply.status == status, path
        assert reply.error


def chunk(site: Any, kind: str, number: int) -> Any:
    script = (site.folder / "data" / f"{kind}-{number}.js").read_text()
    return json.loads(re.sub(r'^forebear\.add\("\w+", \d+, |\);\n$', "", script))


def test_marked_rows_are_on_disk_when_they_are_answered_and_read_again(site, start, tmp_path):
    folder = tmp_path / "marked"
    live = start(f"tiny={site.index}", worklists=str(folder))
    assert live.ask("/explorer/worklist").json == []
    assert not folder.exists()
    for row in (7, 3, 5):
        assert live.ask(f"/explorer/worklist/{row}", {**MARK, "row": row}, method="PUT").status == 204
        assert row in [json.loads(line)["row"] for line in (folder / "tiny.jsonl").read_text().splitlines()]
    assert live.ask("/explorer/worklist/3", {**MARK, "row": 3, "note": "new\u2028line"}, method="PUT").status == 204
    assert live.ask("/explorer/worklist/5", method="DELETE").status == 204
    for body in (
        {**MARK, "row": 8},
        {**MARK, "decision": "burn"},
        {**MARK, "more": 1},
        {"row": 7},
        {**MARK, "row": "7"},
        {**MARK, "text: text": "film " * 120_000},
    ):
        assert live.ask("/explorer/worklist/7", body, method="PUT").status == 422, body
    later = start(f"tiny={site.index}", worklists=str(folder)).ask("/explorer/worklist").json
    assert [(entry["row"], entry["note"]) for entry in later] == [(3, "new\u2028line"), (7, "twice")]
    assert [(item.row, item.decision) for item in read_work_list(folder / "tiny.jsonl")] == [
        (3, "remove"),
        (7, "remove"),
    ]
    assert [path.name for path in folder.iterdir()] == ["tiny.jsonl"]


def test_a_list_that_is_being_written_holds_no_other_request(site, start, tmp_path, monkeypatch):
    live, threads = start(f"tiny={site.index}", worklists=str(tmp_path)), []

    def entries(*_given: Any) -> list[Any]:
        with suppress(RuntimeError):  # there is none in this thread
            threads.append(asyncio.get_running_loop())
        return [MARK]

    monkeypatch.setattr(WorkLists, "entries", entries)
    assert live.ask("/explorer/worklist").json == [MARK]
    assert not threads


def test_the_work_list_of_an_audit_is_where_the_servers_list_begins(site, start, tmp_path):
    found = audits.suspects(site.index, n_listed=5, n_neighbours=3)
    found.write(tmp_path / "suspects")
    live = start(f"tiny={site.index}", worklists=str(tmp_path / "suspects"))
    listed = {entry["row"]: entry for entry in live.ask("/explorer/worklist").json}
    assert set(listed) == {item.row for item in found.work_list}
    first = found.work_list.items[0]
    assert listed[first.row]["reason"] == first.reason
    marked = {**listed[first.row], "decision": "relabel", "suggested": "LABEL_0"}
    assert live.ask(f"/explorer/worklist/{first.row}", marked, method="PUT").status == 204
    kept = {item.row: item for item in read_work_list(tmp_path / "suspects" / "tiny.jsonl")}
    assert kept[first.row] == replace(first, decision="relabel", suggested="LABEL_0")
    assert kept == {item.row: item for item in found.work_list} | {first.row: kept[first.row]}
    assert read_work_list(tmp_path / "suspects" / "worklist.csv") == found.work_list


def test_the_work_list_of_an_audit_of_another_index_is_refused(site, start, bert_world, tmp_path, monkeypatch, capsys):
    audits.duplicates(site.index).write(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    assert run(["serve", str(bert_world.index.folder), "--port", "0", "--worklists", "theirs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"theirs holds the work list of an audit of another index, {site.index}, or of this one before" in line
    assert not (tmp_path / "theirs" / "tiny.jsonl").exists()
    (tmp_path / "theirs" / "result.json").unlink()  # a work list alone does not say which index it is of
    assert start(str(bert_world.index.folder), worklists="theirs").ask("/explorer/worklist").json


def test_a_list_that_was_kept_before_is_read_and_written_anew(site, start, tmp_path):
    old = {
        "row": 4,
        "text": "a",
        "label": "LABEL_0",
        "evidence": "loss 3",
        "probability": 0.25,
        "decision": "wrong label",
    }
    (tmp_path / "tiny.jsonl").write_text(json.dumps(old) + "\n")
    (entry,) = start(f"tiny={site.index}", worklists=str(tmp_path)).ask("/explorer/worklist").json
    assert (entry["given"], entry["decision"], entry["probability"]) == ("LABEL_0", "relabel", None)
    assert entry["evidence: probability of the label"] == 0.25


def test_a_server_that_keeps_no_list_says_so(site, start):
    live = start(site.index)
    assert live.ask("/explorer/site").json["keeps"] is False
    assert "--worklists" not in live.ask("/explorer/worklist").error
    assert "worklists" in live.ask("/explorer/worklist/7", MARK, method="PUT").error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--site", "nowhere"], "--site nowhere: no folder of `forebear export-site`."),
        (["--worklists", "."], "index.jsonl is no work list of the explorer"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_served(site, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    Path("index.jsonl").write_text("{}\n")
    assert run(["serve", str(site.index), "--port", "0", *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error


def test_a_site_of_an_index_that_has_changed_since_is_refused(site, tmp_path, capsys):
    index = Path(shutil.copytree(site.index, tmp_path / "index"))
    retire_rows(index, [59])
    assert run(["serve", str(index), "--port", "0", "--site", str(site.folder)]) == 2
    assert "was exported from another index than is served, or from it before a change." in capsys.readouterr().err


@pytest.mark.slow
def test_the_pages_of_a_server_show_the_site_and_ask_about_new_texts(page, site, start, tmp_path):
    folder = tmp_path / "marked"
    live = start(f"tiny={site.index}", site=str(site.folder), worklists=str(folder))
    visit(page, live.port)
    assert page.locator(".lines a").count() == len(site.test)
    page.get_by_role("link", name="Test row 7", exact=True).click()
    page.wait_for_selector("h1:has-text('Test row 7')")
    assert page.locator(".methods h4").count() == 18
    page.get_by_role("link", name="Explain a text").click()
    page.get_by_label("text", exact=True).fill(SENTENCE)
    page.get_by_label("Rows at each end").fill("2")
    page.get_by_text("Methods").click()
    for name in ("gc", "tracin-we-topk"):
        page.get_by_label(name, exact=True).check()
    page.get_by_role("button", name="Explain").click()
    page.wait_for_selector("h2:has-text('Proponents')")
    wanted = live.ask("/v1/explain", {"text": SENTENCE, "top": 2, "methods": ["tracin-we-topk", "gc"]}).json["answers"][
        0
    ]
    by_method = {a["method"]: [[r["row"] for r in side["rows"]] for side in a["sides"]] for a in wanted["answers"]}
    shown: dict[str, list[list[int]]] = {}
    for i in range(2):
        for section in page.locator(".methods").nth(i).locator("section").all():
            rows = [int(text.split()[1]) for text in section.locator("h4 a").all_inner_texts()]
            shown.setdefault(section.locator("h3").inner_text(), []).append(rows)
    assert shown == by_method
    assert page.locator(".methods mark").count() > 0
    row = by_method["gc"][0][0]
    page.get_by_role("link", name=f"row {row}", exact=True).first.click()
    page.wait_for_selector(f"h1:has-text('Training row {row}')")
    unlisted = min(set(range(60)) - {record["row"] for record in site.records("rows")})
    visit(page, live.port, f"#/row/{unlisted}")
    assert site.train[unlisted]["text"] in page.locator("article dd").inner_text()
    page.get_by_label("remove").check()
    page.wait_for_selector("text=is on the work list: remove")
    assert json.loads((folder / "tiny.jsonl").read_text())["text: text"] == site.train[unlisted]["text"]
    live.stop()
    again = start(f"tiny={site.index}", worklists=str(folder))
    visit(page, again.port, "#/work")
    assert page.get_by_text("1 training row marked.").is_visible()
    assert page.get_by_text("The server keeps the list").is_visible()
    page.get_by_role("button", name=f"Take row {unlisted} off the list").click()
    page.wait_for_selector("a:has-text('Work list (0)')")
    page.wait_for_selector("text=No training row is marked.")
    assert (folder / "tiny.jsonl").read_text() == ""


@pytest.mark.slow
def test_two_quick_marks_are_kept_as_they_were_made_and_only_texts_of_the_row(page, site, start, tmp_path):
    live = start(f"tiny={site.index}", worklists=str(tmp_path / "marked"))
    held: list[Any] = []
    page.route("**/explorer/worklist/3*", lambda route: route.continue_() if held else held.append(route))
    page.route("**/explorer/rows/3*", lambda route: route.fulfill(json={**route.fetch().json(), "has_texts": False}))
    visit(page, live.port, "#/row/3")
    for decision in ("remove", "keep"):
        page.get_by_label(decision, exact=True).check()
    page.wait_for_timeout(200)
    held[0].continue_()
    page.wait_for_selector("text=is on the work list: keep")
    page.wait_for_timeout(200)
    (entry,) = live.ask("/explorer/worklist").json
    assert (entry["decision"], entry.get("text: text")) == ("keep", None)


@pytest.mark.slow
def test_a_browser_gives_the_token_once_and_chooses_among_indexes(browser, site, start, bert_world):
    live = start(f"one={site.index}", f"two={bert_world.index.folder}", token=TOKEN)
    context = browser.new_context()
    page = context.new_page()
    visit(page, live.port)
    assert page.locator("h1").inner_text() == "This server asks for its token"
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The server has another token.")
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Explain a text')")
    visit(page, live.port, "#/about")
    assert page.get_by_role("definition").filter(has_text=re.compile("^one$")).count() == 1
    page.get_by_label("Index").select_option("two")
    page.wait_for_selector("h1:has-text('Explain a text')")
    visit(page, live.port, "#/row/0")
    assert page.get_by_label("Index").input_value() == "one"
    assert page.locator("article dd").evaluate("node => node.textContent").startswith("</script>")
    assert page.evaluate("window.hurt") is None
    context.close()
