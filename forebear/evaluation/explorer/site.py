"""The explorer as a folder that opens without a server: pages, and records in scripts that a browser reads from disk.

A page that was opened from disk may read no other file but by ``<script>``. So the records lie in scripts, of so many
each that a page loads one or two of them, however many test rows there are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from forebear.errors import OutputExistsError, StorageError
from forebear.evaluation.explorer.records import (
    Asked,
    Drives,
    Record,
    add_hub_shares,
    prediction_records,
    row_records,
)
from forebear.evaluation.reports.report import page_style
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX, write_bytes
from forebear.indexer.storage.manifest import library_versions
from forebear.retriever.answers.coverage import fit_lines

STATIC = Path(__file__).with_name("static")
PAGE, STYLE = "index.html", "explorer.css"
SCRIPTS = tuple(sorted(f"scripts/{path.name}" for path in (STATIC / "scripts").glob("*.js")))
SITE = "data/site.js"
CHUNKS = {"tests": 1000, "predictions": 20, "rows": 100}  # records of one script
Progress = Callable[[str, int, int], None]


def check_site(folder: Path, *, force: bool) -> None:
    """Refuse a folder that no site can be written to; called before any work.

    Raises:
        OutputExistsError: Something is there, and it is no site or ``force`` is not given.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not (folder / SITE).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(f"--out {folder}: something else is there. Name a folder that does not exist.")
    if (folder / SITE).is_file() and not force:
        raise OutputExistsError(f"--out {folder} holds a site. Give another --out, or --force to replace it.")


def export_site(
    asked: Asked,
    folder: Path,
    command: str,
    *,
    force: bool = False,
    progress: Progress = lambda _stage, _done, _total: None,
) -> int:
    """Explain every test row, and write the site; it appears whole, or not at all.

    Args:
        asked: What is explained, and how.
        folder: To be made.
        command: What repeats this, for the page on the site.
        force: Whether a site that is there is replaced.
        progress: Called with the stage, test rows done and test rows in all.

    Returns:
        The number of training rows that have a page.

    Raises:
        OutputExistsError: See :func:`check_site`.
        StorageError: It cannot be written.
    """
    check_site(folder, force=force)
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        n_rows = _write(asked, partial, command, progress)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}. Name a folder that you may write to, on a disk that "
            "has space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return n_rows


def _write(asked: Asked, folder: Path, command: str, progress: Progress) -> int:
    drives, lines = Drives(), list[Record]()
    n_tests = len(asked.test)

    def pages() -> Iterator[Record]:
        progress("test rows", 0, n_tests)
        for line, page in prediction_records(asked, drives):
            lines.append(line)
            progress("test rows", len(lines), n_tests)
            yield page

    for number, chunk in enumerate(_parted(pages(), CHUNKS["predictions"])):
        write_bytes(folder / chunk_name("predictions", number), chunk_script("predictions", number, chunk))
    for number, chunk in enumerate(_parted(lines, CHUNKS["tests"])):
        write_bytes(folder / chunk_name("tests", number), chunk_script("tests", number, chunk))
    if asked.hubs is None:
        for number in range(-(-n_tests // CHUNKS["predictions"])):
            path = folder / chunk_name("predictions", number)
            chunk = json.loads(script_records(path.read_bytes()))
            for page in chunk:
                add_hub_shares(page, drives)
            write_bytes(path, chunk_script("predictions", number, chunk))
    first_rows = []
    for number, chunk in enumerate(row_records(asked, drives, CHUNKS["rows"])):
        write_bytes(folder / chunk_name("rows", number), chunk_script("rows", number, chunk))
        first_rows.append(chunk[0]["row"])
    facts = site_facts(asked, command) | {"first_rows": first_rows, "n_rows": len(drives.rows)}
    for name, content in front_end().items():
        write_bytes(folder / name, content)
    write_bytes(folder / SITE, f"forebear.site = {script_value(facts)};\n".encode())
    return len(drives.rows)


def site_facts(asked: Asked, command: str = "", name: str | None = None) -> Record:
    """What the pages say of the index, the question and the test rows, and how the records are parted.

    Args:
        asked: What is explained, and how.
        command: What repeats this, if anything does.
        name: What the index is called; None: by its folder.
    """
    index, question, test = asked.retriever.index, asked.question, asked.test
    manifest = index.manifest
    facts = asked.retriever.facts(question)
    versions = library_versions(("forebear", "torch", "transformers"))
    return {
        "digest": manifest.digest(),
        "one_label": manifest.spec.problem_type == SINGLE_LABEL,
        "numbers": manifest.spec.problem_type == REGRESSION,
        "label_names": list(manifest.spec.label_names),
        "text_columns": list(manifest.spec.text_columns),
        "test": test.source,
        "n_tests": len(test),
        "labelled": test.labels is not None,
        "top": question.spec.top,
        "methods": [[m.name, facts["methods"][m.name]["formula"]] for m in question.methods],
        "hubs": asked.hubs is not None,
        "chunks": CHUNKS,
        "provenance": [
            ["index", name or str(facts["index"])],
            ["index digest", str(facts["index_digest"])],
            ["computed on", computed_line(facts["computed_on"])],
            *([name, line] for name, line in fit_lines(question).items()),
            ["query digest", str(facts["query_digest"])],
            ["test rows", f"{len(test):,} of {test.source}"],
            ["training rows", f"{manifest.n_live:,} ({', '.join(s.source for s in manifest.segments)})"],
            ["sign", str(facts["sign"])],
            ["versions", ", ".join(f"{name} {number}" for name, number in versions.items())],
            *([["command", command]] if command else []),
        ],
    }


def front_end() -> dict[str, bytes]:
    """The page, its scripts and its style sheet, by their names; the same for a folder and for a server."""
    return {
        PAGE: (STATIC / PAGE).read_bytes(),
        STYLE: (page_style() + (STATIC / STYLE).read_text(encoding="utf-8")).encode(),
    } | {name: (STATIC / name).read_bytes() for name in SCRIPTS}


def chunk_name(kind: str, number: int) -> str:
    """Name of the script with some of the records, within the folder."""
    return f"data/{kind}-{number}.js"


def chunk_script(kind: str, number: int, records: list[Record]) -> bytes:
    """Some records as a script that hands them to the page."""
    return f"forebear.add({script_value(kind)}, {number}, {script_value(records)});\n".encode()


def script_records(script: bytes) -> bytes:
    """The JSON that a script of a site holds; it is ASCII, so that the brackets at its ends are its own.

    Raises:
        ValueError: It holds none.
    """
    start = min(place for place in (script.find(b"["), script.find(b"{")) if place >= 0)
    return script[start : max(script.rfind(b"]"), script.rfind(b"}")) + 1]


def script_value(value: Any) -> str:
    """A value as JavaScript: ASCII alone, and nothing that could end a script or begin a comment in HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def _parted(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    part: list[Record] = []
    for record in records:
        part.append(record)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
