"""What the explorer shows besides what it asks: a site that was exported, and work lists that are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebear.errors import InputError
from forebear.evaluation.explorer.site import CHUNKS, SITE, chunk_name
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
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
            facts = json.loads(_value(folder / SITE))
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
            return _value(self.folder / chunk_name(kind, number))
        except (OSError, ValueError) as error:
            raise InputError(f"the site holds no {kind}-{number}.") from error


def _value(path: Path) -> bytes:
    """The JSON that a script of a site holds; it is ASCII, so that the brackets at its ends are its own."""
    text = path.read_bytes()
    start = min(place for place in (text.find(b"["), text.find(b"{")) if place >= 0)
    return text[start : max(text.rfind(b"]"), text.rfind(b"}")) + 1]


@dataclass(frozen=True)
class Explored:
    """What the explorer shows besides what it asks.

    Attributes:
        site: Test rows that were explained before; None: texts are asked one by one.
        worklists: Lists that the server keeps; None: each browser keeps its own.
    """

    site: ExportedSite | None = None
    worklists: WorkLists | None = None

    def facts(self, opened: Opened, names: Sequence[str]) -> dict[str, Any]:
        """What the pages say of an index; with those of the site where it is of this index, as it is now."""
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
        return facts | {
            "index": opened.name, "indexes": list(names), "text_columns": list(spec.text_columns),
            "known_methods": list(opened.methods), "keeps": self.worklists is not None,
        }  # fmt: skip
