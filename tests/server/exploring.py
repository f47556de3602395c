"""A tiny index of hostile texts and the site of its test rows, made once a session; and a browser.

The package is imported where a fixture is made: every session of tests loads this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import CHROMIUM, NO_CHROMIUM

HOSTILE = (
    "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'> good film",
    '<!-- <b>bold</b> &amp; "quotes" \' ` ${window.hurt = 3} \\u003c good',
    "a \u202etxet desrever\u202c \u200bgood\u0000 film \u2066bad\u2069 \u2028 dull",
    "\u0641\u064a\u0644\u0645 \u062c\u064a\u062f good film",
    "\u8fd9\u90e8\u7535\u5f71\u5f88\u597d good film",
)
LONG = "good film bad plot " * 5264  # 100,016 characters
METHODS = ("tracin-we-topk", "gc", "if")
CHUNKS = {"tests": 8, "predictions": 3, "rows": 7}  # small ones, so that pages need several
LAUNCH = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """The site, and everything that it was made of."""

    folder: Path
    model: str
    index: Path
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    hubs: Path

    @property
    def address(self) -> str:
        """Of its first page."""
        return (self.folder / "index.html").as_uri()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind, as the files have them: read by a pattern and JSON, not by the page's script."""
        paths = sorted((self.folder / "data").glob(f"{kind}-*.js"), key=lambda path: int(path.stem.split("-")[1]))
        found = []
        for number, path in enumerate(paths):
            match = re.fullmatch(r'forebear\.add\("(\w+)",(\d+),(.*)\);\n', spaced(path.read_text("ascii")), re.DOTALL)
            assert match is not None, path
            assert (match[1], int(match[2])) == (kind, number)
            found += json.loads(match[3])
        return found


def spaced(script: str) -> str:
    """The call without the spaces between its arguments."""
    return re.sub(r'^(forebear\.add\("\w+"), (\d+), ', r"\1,\2,", script)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Site:
    """Sixty training rows and twenty test rows, hostile ones among both."""
    from tiny import labels, sentences

    from forebear import Index, Retriever, audits
    from forebear.cli.main import run
    from forebear.evaluation.explorer import site as of_site

    root = tmp_path_factory.mktemp("explorer")
    model = tiny_model("bert", 2, 0)
    texts, gold = [*HOSTILE, *sentences(55, seed=0)], labels(60)
    train = [
        {"text": t, "label": f"LABEL_{y}", "__proto__": f"from {i}"}
        for i, (t, y) in enumerate(zip(texts, gold, strict=True))
    ]
    train[20]["text"] = train[10]["text"]
    train[20]["label"] = f"LABEL_{1 - gold[10]}"
    test = [
        {"text": t, "label": f"LABEL_{y}"}
        for t, y in zip([*HOSTILE, LONG, "", *sentences(13, seed=50)], labels(20), strict=True)
    ]
    test[12]["text"] = train[30]["text"].upper()
    for name, rows in (("train", train), ("test", test)):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    index, hubs = root / "index", root / "hubs"
    Index.build(model, root / "train.jsonl", index, stores=("features", "words"), words_tops=(0, 3))
    audits.hubs(Retriever(index), n_queries=0, methods=METHODS, top=3).write(hubs)
    command = [
        "export-site", "--index", str(index), "--test", str(root / "test.jsonl"), "--method", ",".join(METHODS),
        "--hubs", str(hubs), "--top", "3", "--out", str(root / "site"), "--quiet",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_site, "CHUNKS", CHUNKS)
        assert run(command) == 0
    return Site(root / "site", model, index, train, test, hubs)


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """Drives browsers."""
    api = pytest.importorskip("playwright.sync_api", reason=NO_CHROMIUM)
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with api.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="session")
def launch() -> dict[str, Any]:
    """How Debian's Chromium is started."""
    return {"executable_path": CHROMIUM, "args": LAUNCH}


@pytest.fixture(scope="session")
def browser(playwright: Any, launch: dict[str, Any]) -> Iterator[Any]:
    """Debian's Chromium."""
    found = playwright.chromium.launch(**launch)
    yield found
    found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors, refused loads and requests beside files fail the test that uses it."""
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(10_000)
    found = context.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    found.on("dialog", lambda dialog: problems.append(dialog.message))
    found.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
            else problems.append(asked.url)
        ),
    )
    yield found
    assert not problems, problems
    context.close()
