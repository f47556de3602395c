"""The explorer in a real browser, opened from disk."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from forebear.evaluation.worklists.files import read_work_list

pytestmark = pytest.mark.slow

HIDDEN = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u200b\u2028-\u202e\u2060-\u2069\ufeff]")
FIELDS = (
    "row", "source", "source_row", "text: text", "given", "suggested", "evidence: probability of the label", "reason",
    "decision", "note",
)  # fmt: skip
PAGES = ("", "#/test/0", "#/test/2", "#/test/5", "#/row/30", "#/work", "#/about", "#/nothing")


def visit(page: Any, site: Any, place: str = "") -> None:
    """Open a page of the site, and wait until it is drawn."""
    page.goto("about:blank")
    page.goto(site.address + place)
    page.wait_for_selector("h1")


def as_shown(text: str) -> str:
    """A text as the page writes it: invisible characters by their numbers, lines as a browser breaks them."""
    return HIDDEN.sub(lambda found: f"U+{ord(found[0]):04X}", text)


def read_csv(path: Path) -> list[dict[str, str]]:
    """A CSV file by another reader than what wrote it."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers_listed(page: Any) -> list[int]:
    return [int(text.split()[-1]) for text in page.locator(".lines a").all_inner_texts()]


def test_the_list_is_filtered_by_outcome_label_and_text(page, site):
    lines = site.records("tests")
    visit(page, site)
    assert numbers_listed(page) == list(range(20))
    assert page.get_by_text("All 20 test rows.").is_visible()

    def listed(wanted: list[int]) -> None:
        assert numbers_listed(page) == wanted
        assert page.locator(".count").inner_text() == f"{len(wanted)} of 20 test rows."

    wrong = [line for line in lines if line["wrong"]]
    page.get_by_label("Show").select_option("wrong")
    listed([line["number"] for line in wrong])
    least = sorted(line["probability"] for line in wrong)[len(wrong) // 2]
    page.get_by_label("Show").select_option("confident and wrong")
    page.get_by_label("Confident from").fill(str(least))
    sure = [line["number"] for line in wrong if line["probability"] >= least]
    assert 0 < len(sure) < len(wrong)
    listed(sure)
    page.get_by_label("Show").select_option("also a training row")
    listed([0, 1, 2, 3, 4, 12])
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Label", exact=True).select_option("LABEL_1")
    listed([i for i, row in enumerate(site.test) if row["label"] == "LABEL_1"])
    page.get_by_label("Predicted").select_option("LABEL_1")
    both = [line["number"] for line in lines if line["label"] == line["prediction"] == "LABEL_1"]
    listed(both)
    page.get_by_label("Label", exact=True).select_option("any")
    page.get_by_label("Predicted").select_option("any")
    page.get_by_label("Text contains").fill("</SCRIPT>")
    listed([0])


def test_a_prediction_shows_its_rows_by_method_and_leads_to_what_they_drive(page, site):
    record = site.records("predictions")[7]
    visit(page, site, "#/test/7")
    for side in ("proponent", "opponent"):
        section = page.locator(f"section[aria-labelledby='{side}s']")
        assert section.locator("h3").all_inner_texts() == [answer["method"] for answer in record["answers"]]
        wanted = [
            (found["row"], found["score"].replace("-", "\u2212"))
            for answer in record["answers"] for one in answer["sides"] if one["name"] == side for found in one["rows"]
        ]  # fmt: skip
        headings = section.locator("h4").all_inner_texts()
        assert len(headings) == len(wanted) == 9
        for heading, (row, score) in zip(headings, wanted, strict=True):
            assert f"row {row} \u00b7 score {score}" in heading
    marks = page.locator(".methods mark").all_inner_texts()
    assert marks, "no shared word is marked"
    words = {
        piece[0]
        for a in record["answers"]
        for s in a["sides"]
        for f in s["rows"]
        for piece in f["texts"][0][1]
        if len(piece) > 1
    }
    assert {re.sub("[+\u2212]$", "", mark) for mark in marks} <= words
    first = record["answers"][1]["sides"][0]["rows"][0]["row"]
    page.get_by_role("link", name=f"row {first}", exact=True).first.click()
    page.wait_for_selector(f"h1:has-text('Training row {first}')")
    assert page.title().startswith(f"Training row {first}")
    drives = next(one["drives"] for one in site.records("rows") if one["row"] == first)
    for side in ("proponent", "opponent"):
        wanted_tests = sorted({drive["test"] for drive in drives if drive["side"] == side})
        links = page.locator(f"section[aria-labelledby='drives-{side}'] .lines a").all_inner_texts()
        assert sorted(int(text.split()[-1]) for text in links) == wanted_tests
    page.get_by_role("link", name="Test row 7", exact=True).first.click()
    page.wait_for_selector("h1:has-text('Test row 7')")


def test_hostile_texts_are_shown_letter_by_letter_and_do_nothing(page, site):
    for number, row in enumerate(site.test[:5]):
        visit(page, site, f"#/test/{number}")
        shown = page.locator(".saliency dd").evaluate(
            "node => { node = node.cloneNode(true); node.querySelectorAll('sup').forEach(n => n.remove());"
            " return node.textContent; }"
        )
        assert shown == as_shown(row["text"])
        assert page.locator("main img, main script, main b, main style, main iframe").count() == 0
        visit(page, site, f"#/row/{number}")
    assert page.evaluate("window.hurt") is None
    rules = page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert "script-src 'self'" in rules


def test_what_the_page_did_not_bring_does_not_run(browser, site):
    context = browser.new_context()
    page = context.new_page()
    visit(page, site)
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hurt = 1';"
        " document.head.append(s);"
        " const d = document.createElement('div'); d.innerHTML = '<img src=x onerror=\"window.hurt = 2\">';"
        " document.body.append(d); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hurt") is None
    context.close()


def test_long_texts_are_folded_and_open_whole(page, site):
    visit(page, site, "#/test/5")
    text = page.locator(".saliency dd")
    assert len(text.inner_text()) < 3000
    button = text.get_by_role("button", name="Show all 100,016 characters")
    assert button.get_attribute("aria-expanded") == "false"
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator(".saliency dd button").get_attribute("aria-expanded") == "true"
    assert site.test[5]["text"][-90_000:] in text.evaluate("node => node.textContent")
    page.keyboard.press("Enter")
    assert len(text.inner_text()) < 3000


def test_directions_of_texts_are_their_own(page, site):
    visit(page, site)
    lines = page.locator(".lines p.text")
    directions = [lines.nth(i).evaluate("node => getComputedStyle(node).direction") for i in range(5)]
    assert directions == ["ltr", "ltr", "ltr", "rtl", "ltr"]
    assert page.locator(".code").count() >= 5


def test_the_whole_way_goes_by_keyboard(page, site):
    visit(page, site)
    focus = "(() => { const n = document.activeElement; return n.getAttribute('aria-label') ?? n.innerText ?? ''; })()"

    def tab_to(wanted: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if re.fullmatch(wanted, page.evaluate(focus).strip()):
                return
        pytest.fail(f"{wanted} is not reached by Tab")

    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    tab_to("Test row 0")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Test row 0')")
    assert page.evaluate("document.activeElement.tagName") == "H1"
    tab_to(r"row \d+")
    row = int(page.evaluate(focus).split()[1])
    tab_to(f"Mark row {row}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".marking")
    for _ in range(2):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(f"summary:has-text('Row {row} is marked: remove')")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focus).strip() == f"Row {row} is marked: remove"
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if page.evaluate(focus) == "Work list (1)":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Work list')")
    tab_to(f"Take row {row} off the list")
    page.keyboard.press("Enter")
    page.wait_for_selector("a:has-text('Work list (0)')")
    assert page.evaluate("document.activeElement.tagName") == "H1"
    assert page.locator("#said").inner_text() == f"Row {row} is off the work list."


def test_the_work_list_survives_a_restart_and_is_exported_as_it_is(playwright, launch, site, tmp_path):
    row = next(one["row"] for one in site.records("rows") if one["row"] < 5)
    record = next(one for one in site.records("rows") if one["row"] == row)
    note = 'two lines,\n"quotes" and </script>'

    def opened() -> Any:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"), accept_downloads=True, **launch
        )
        context.set_default_timeout(10_000)
        return context

    context = opened()
    page = context.pages[0]
    visit(page, site, f"#/row/{row}")
    page.get_by_label("relabel", exact=True).check()
    page.get_by_label("Right label").select_option("LABEL_1")
    page.get_by_label("Note", exact=True).fill(note)
    page.get_by_label("Note", exact=True).blur()
    page.wait_for_selector("a:has-text('Work list (1)')")
    visit(page, site, "#/row/30")
    page.get_by_label("keep").check()
    page.get_by_label("Note", exact=True).fill("=1+1")
    page.get_by_label("Note", exact=True).blur()
    page.wait_for_function("Object.values(localStorage).some(list => list.includes('=1+1'))")
    context.close()

    context = opened()
    page = context.pages[0]
    visit(page, site, "#/work")
    assert page.get_by_text("2 training rows marked.").is_visible()
    files = {}
    for name in ("CSV", "JSON Lines"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export {name}").click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    visit(page, site, f"#/row/{row}")
    assert page.get_by_label("relabel", exact=True).is_checked()
    assert page.get_by_label("Note", exact=True).input_value() == note
    context.close()

    first, second = (json.loads(line) for line in files["JSON Lines"].read_text().splitlines())
    assert tuple(first) == tuple(second) == FIELDS
    assert first == {
        "row": row, "source": record["source"], "source_row": row, "text: text": site.train[row]["text"],
        "given": record["label"], "suggested": "LABEL_1", "evidence: probability of the label": record["probability"],
        "reason": record["evidence"], "decision": "relabel", "note": note,
    }  # fmt: skip
    assert (second["row"], second["decision"], second["note"]) == (30, "keep", "=1+1")
    cells = read_csv(files["CSV"])
    assert [list(line) for line in cells] == [list(FIELDS)] * 2
    for line, entry in zip(cells, (first, second), strict=True):
        assert line["text: text"] == entry["text: text"]
        assert line["note"] == ("'=1+1" if entry is second else note)  # no formula in a spreadsheet
        chance = "evidence: probability of the label"
        assert float(line[chance]) == entry[chance]
    lists = [read_work_list(file) for file in files.values()]  # what `forebear apply` reads
    assert lists[0] == lists[1]
    assert [(item.row, item.decision, item.note) for item in lists[0]] == [(row, "relabel", note), (30, "keep", "=1+1")]
    assert lists[0].items[0].texts == {"text": site.train[row]["text"]}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_can_be_read_and_says_what_its_controls_are(page, site, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    dark = []
    for place in PAGES:
        visit(page, site, place)
        found = page.evaluate(SURVEY)
        assert found["over"] <= 0, (place, "is wider than the window")
        assert found["unnamed"] == [], place
        assert found["faint"] == [], place
        assert found["h1"] == 1, place
        assert found["skipped"] == [], (place, "headings leave a level out")
        dark.append(found["dark"])
    assert dark == [scheme == "dark"] * len(PAGES)


def test_a_file_that_is_missing_is_named(browser, site, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(site.folder, folder)
    (folder / "data" / "predictions-2.js").write_text("forebear.add(")
    (folder / "data" / "predictions-3.js").unlink()
    context = browser.new_context()
    page = context.new_page()
    for number, name in ((6, "predictions-2"), (9, "predictions-3")):
        page.goto("about:blank")
        page.goto(f"{(folder / 'index.html').as_uri()}#/test/{number}")
        page.wait_for_selector("h1:has-text('This page could not be read')")
        assert page.locator("main p").inner_text() == f"data/{name}.js is missing or damaged."
    context.close()


# Of the page: how far it is wider than the window, controls without a name, texts of a contrast below 4.5, headings.
SURVEY = """() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [], unnamed = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.getClientRects().length || node.closest('option, :disabled')) continue;
    const pair = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5) faint.push(walker.currentNode.data.slice(0, 40));
  }
  for (const node of document.querySelectorAll('a, button, input, select, textarea, summary')) {
    const words = [node.getAttribute('aria-label'), node.innerText, ...[...(node.labels ?? [])].map(l => l.innerText)];
    const own = node.tagName === 'SELECT' ? words.filter(w => w !== node.innerText) : words;
    if (!own.some(w => w?.trim())) unnamed.push(node.outerHTML.slice(0, 80));
  }
  const levels = [...document.querySelectorAll('h1, h2, h3, h4')].map(n => Number(n.tagName[1]));
  return {
    over: document.documentElement.scrollWidth - innerWidth, unnamed, faint,
    h1: levels.filter(l => l === 1).length, skipped: levels.filter((l, i) => i && l > levels[i - 1] + 1),
    dark: light(rgb(getComputedStyle(document.body).backgroundColor)) < 0.2,
  };
}"""
