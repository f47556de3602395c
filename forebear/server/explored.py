"""What the explorer shows besides what it asks: test rows, or a site of them, and work lists that are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebear.errors import InputError
from forebear.evaluation.explorer.site import CHUNKS, SITE, chunk_name, script_records
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
from forebear.server.listed_rows import OTHER_MODEL, ListedRows
from forebear.server.served_indexes import Opened
from forebear.server.worklists import WorkLists


@dataclass(frozen=True)
class ExportedSite:
    """A folder of ``forebear export-site``.

    Attributes:
        folder: The folder.
        facts: What ``data/site.js`` says.
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, digests: Sequence[str]) -> ExportedSite:
        """Open a site of one of the indexes that are served.

        Raises:
            InputError: The folder holds none, or one of another index.
        """
        try:
            facts = json.loads(script_records((folder / SITE).read_bytes()))
            digest = facts["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--site {folder}: no folder of `forebear export-site`.") from error
        if digest not in digests:
            raise InputError(
                f"--site {folder} was exported from another index than is served, or from it before a change. Export "
                "it again."
            )
        return cls(folder, facts)

    def records(self, kind: str, number: int) -> bytes:
        """Some records as JSON.

        Raises:
            InputError: There are no such records.
        """
        try:
            return script_records((self.folder / chunk_name(kind, number)).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"the site holds no {kind}-{number}.") from error


@dataclass(frozen=True)
class Explored:
    """What the explorer shows besides what it asks.

    Attributes:
        site: Test rows that were explained before, and exported.
        listed: Test rows that are explained when they are asked for. Without both, texts are asked one by one.
        worklists: Lists that the server keeps; None: each browser keeps its own.
    """

    site: ExportedSite | None = None
    listed: ListedRows | None = None
    worklists: WorkLists | None = None

    def facts(self, opened: Opened, names: Sequence[str]) -> dict[str, Any]:
        """What the pages say of an index; with those of its test rows, where the index still is what they fit."""
        manifest = opened.index.manifest
        spec = manifest.spec
        facts: dict[str, Any] = {
            "digest": opened.digest, "one_label": spec.problem_type == SINGLE_LABEL,
            "numbers": spec.problem_type == REGRESSION, "label_names": list(spec.label_names), "test": "", "n_tests": 0,
            "labelled": False, "top": 5, "methods": [], "hubs": False, "chunks": CHUNKS, "first_rows": [],
            "provenance": [["index", opened.name], ["index digest", opened.digest],
                           ["training rows", f"{manifest.n_live:,}"]],
        }  # fmt: skip
        if self.site is not None and self.site.facts["digest"] == opened.digest:
            facts |= self.site.facts
        if self.listed is not None:
            facts |= self.listed.facts(opened)
            if self.listed.name == opened.name and not self.listed.fits(opened):
                facts["provenance"].append(["test rows", f"not listed: {OTHER_MODEL}"])
        return facts | {
            "index": opened.name, "indexes": list(names), "text_columns": list(spec.text_columns),
            "known_methods": list(opened.methods), "keeps": self.worklists is not None,
        }  # fmt: skip

    def records(self, opened: Opened, kind: str, number: int) -> bytes | list[dict[str, Any]]:
        """Some records of an index's test rows: of the site as JSON, or lines of those that are listed.

        Raises:
            InputError: There are no such records.
        """
        if self.listed is not None and self.listed.fits(opened):
            start = number * CHUNKS["tests"]
            found = self.listed.lines[start : start + CHUNKS["tests"]] if kind == "tests" else []
            if not found:
                raise InputError(f"there are no {kind}-{number}.")
            return found
        if self.site is None:
            raise InputError("no test rows are served. Give a file of them by --test, or a site by --site.")
        return self.site.records(kind, number)

    def go_on(self) -> bool:
        """Explain another test row, while no request waits; whether there is more to do."""
        return self.listed is not None and self.listed.go_on()
