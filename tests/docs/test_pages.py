"""The documents: they build without a warning, their links lead somewhere, and what they say of the code is so."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from warm import run_program

import forebear
from forebear import METHODS, Index, Retriever, open_rows

GOLDEN = ROOT / "tests" / "golden"
PAGES = sorted(
    path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if "build" not in path.relative_to(ROOT).parts
)
WIDEST = 120
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")


def prose(path: Path) -> list[str]:
    """Lines of a page that are neither code nor a table."""
    kept, fence = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == fence:
            fence = ""
        elif not fence and not line.startswith("|"):
            kept.append(line)
    return kept


def anchors(path: Path) -> set[str]:
    """Headings of a page as GitHub and MyST name them, and names that the page gives itself."""
    text = "\n".join(prose(path))
    headings = [
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    ]
    return {*headings, *re.findall(r"^\(([\w-]+)\)=$", text, re.M)}


def page_id(path: Path) -> str:
    """A page's name in the list of tests."""
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None,
    reason="the build of the docs is not tested: no sphinx (pip install -e '.[docs]')",
)
def test_the_docs_build_without_a_warning(tmp_path):
    arguments = ["-W", "--keep-going", "-n", "-q", "-b", "html", "docs", str(tmp_path)]
    done = run_program(f"import sys; from sphinx.cmd.build import main; sys.exit(main({arguments!r}))", ROOT)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in ("retrieve", "audit-hans", "evaluate-removal", "perturb-attack", "verify"):
        assert f'id="forebear-{name}"' in commands
    api = (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
    for name in forebear.__all__:
        assert f'id="forebear.{name}"' in api, f"the API page does not document forebear.{name}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_are_there(path):
    text = "\n".join(prose(path))
    assert "[](" not in text, "a link without text is nothing to click on where Sphinx does not build the page"
    for target in LINK.findall(text):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name) if name else path
        assert found.exists(), f"{path}: {target}"
        assert found.resolve().is_relative_to(ROOT), f"{path}: {target} is not in a clone"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{path}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_lines_of_prose_wrap(path):
    for line in prose(path):
        assert len(line) <= WIDEST or " " not in line.strip() or LINK.search(line), f"{path}: {line}"


def test_the_methods_page_defines_every_method_and_every_short_name():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page[page.index("## The methods") :]
    for method in METHODS.values():
        assert f"`{method.name}`" in table, f"{method.name} is not in the table"
        for source in method.source.split(", "):
            short = source.split(" eq.")[0]
            assert re.search(rf"^{short}\n:|\*{short}\*", page, re.M), f"{short} is not defined"


def test_citations_name_the_five_papers_once_each():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    papers = {
        p["title"]: [i["value"] for i in p.get("identifiers", [])] + [p[k] for k in ("doi",) if k in p]
        for p in cited["references"]
    }
    assert len(papers) == 5
    page = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    for title, identifiers in papers.items():
        assert page.count(f"*{title}.*") == 1
        assert identifiers
        for identifier in identifiers:
            assert identifier in page


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path for path in (ROOT / "forebear").glob("*/*/") if (path / "__init__.py").is_file()]
    assert len(rooms) > 20
    for room in rooms:
        assert f"`{room.relative_to(ROOT / 'forebear')}`" in page, f"{room} is not on the page"
    for named in re.findall(r"`((?:indexer|retriever|evaluation|cli)/[\w./]+)`", page):
        assert (ROOT / "forebear" / named).exists(), f"the page names {named}"


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "images" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.drawing() == (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")


def read_index_example():
    """docs/examples/read_index.py as a module."""
    spec = importlib.util.spec_from_file_location("read_index", ROOT / "docs" / "examples" / "read_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_reads_what_forebear_reads(monkeypatch):
    reader, index = read_index_example(), Index.open(GOLDEN / "index")
    manifest = reader.read_manifest(index.folder)
    rows, head = (reader.read_shards(index.folder, manifest, kind) for kind in ("rows", "features/final"))
    everything = np.arange(index.manifest.n_rows)
    assert rows.num_rows == index.manifest.n_rows
    assert rows["text_0"].to_pylist() == index.text_lists(everything)[0]
    feature, residual = reader.matrix(head["feature"]), reader.matrix(head["residual"])
    np.testing.assert_array_equal(feature, index.features().take(everything))
    np.testing.assert_array_equal(residual, index.residuals().take(everything))
    monkeypatch.chdir(GOLDEN)
    retriever = Retriever(index, device="cpu")
    texts = rows["text_0"].to_pylist()
    right = [n for n, row in enumerate(rows.to_pylist()) if row["label"] == row["prediction"]]
    assert len(right) >= 3
    for row in right:  # predicted as labelled, so that the target is the gold label
        for name, scores in reader.head_scores(feature, residual, row).items():
            (truth,) = retriever.scores([texts[row]], name)
            np.testing.assert_allclose(scores, truth, rtol=0, atol=1e-6 * np.abs(truth).max())


def test_the_example_prints_what_the_page_shows():
    page = (ROOT / "docs" / "index-format.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"\$ python read_index.py tests/golden/index\n(.*?)```", page, re.DOTALL)
    command = [sys.executable, "docs/examples/read_index.py", "tests/golden/index"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == shown


@pytest.mark.parametrize("change", ["another format", "an altered shard", "an altered manifest"])
def test_the_example_refuses_what_is_not_whole(index_copy, change):
    reader, path = read_index_example(), index_copy / "manifest.json"
    if change == "an altered shard":
        name = next(iter((index_copy / "rows").iterdir()))
        name.write_bytes(name.read_bytes()[:-1] + b"x")
        with pytest.raises(SystemExit, match="was altered"):
            reader.read_shards(index_copy, reader.read_manifest(index_copy), "rows")
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"format": 3} if change == "another format" else {"n_retired": 1}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="another format, or the manifest was altered"):
        reader.read_manifest(index_copy)


def test_the_answers_page_describes_every_column_and_fact(bert_world):
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    retriever, queries = bert_world.retriever, bert_world.queries[:1]
    asked = [
        {"methods": ["tracin-we", "if"], "curvature": "cg"},
        {"methods": ["tracin++"], "spans": "words"},
    ]
    for choices in asked:
        answers = retriever.retrieve(queries, top=2, **choices)
        for name in answers.schema.names:
            assert f"`{name}`" in page or name == "text", f"the page does not describe the column {name}"
        facts = json.loads(answers.schema.metadata[b"forebear"])
        assert {"index_digest", "query_digest", "methods"} <= facts.keys()
        assert all("recall" in of_method for of_method in facts["methods"].values())


def test_the_index_format_page_lists_every_column_and_key(bert_world):
    import pyarrow as pa

    page = (ROOT / "docs" / "index-format.md").read_text(encoding="utf-8")
    for path in bert_world.index.folder.rglob("*.arrow"):
        for name in pa.ipc.open_file(str(path)).schema.names:
            stem = re.sub(r"_\d+$", "", name)
            assert f"`{name}`" in page or f"`{stem}_<i>`" in page, f"{path.name} has a column {name}"
    for key in json.loads((bert_world.index.folder / "manifest.json").read_text(encoding="utf-8")):
        assert f"`{key}`" in page, f"the manifest has a key {key}"


def test_rows_have_the_digest_that_the_page_describes(tmp_path):
    import hashlib

    path = tmp_path / "rows.csv"
    path.write_text('text,label\na good film,1\n"dull, slow",0\n', encoding="utf-8")
    digest = hashlib.sha256(b"rows of 1 texts")
    for row in (["a good film", 1], ["dull, slow", 0]):
        digest.update(json.dumps(row).encode() + b"\n")
    assert open_rows(path).sha256() == digest.hexdigest()


def test_every_page_that_the_code_cites_is_in_the_repository():
    cited = {
        (path.name, name)
        for path in (ROOT / "forebear").rglob("*.py")
        for name in re.findall(r"\b[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert ("scoring.py", "docs/methods.md") in cited
    assert not [one for one in cited if not (ROOT / one[1]).is_file()]
