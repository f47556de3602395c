"""A paper's figures beside ours: cells, tables, and how they are written in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forebear.evaluation.common.statistics import mean_of


class Table(dict[str, Any]):
    """A table as JSON keeps it: ``corner``, ``columns``, ``rows``, from a label to one cell a column, and its looks.

    A cell holds ``paper`` (a number, or text as the paper prints it, such as a bound) and ``ours`` (mean, 95% interval,
    number of queries or rows); either may be None.
    """

    def __str__(self) -> str:
        """As Markdown; columns that the paper has no figures for show ours alone."""
        cells = list(self["rows"].values())
        from_paper = [any(row[i]["paper"] is not None for row in cells) for i in range(len(self["columns"]))]
        heads = [self["corner"]]
        for name, given in zip(self["columns"], from_paper, strict=True):
            heads += [f"{name}, paper", "ours"] if given else [name]
        lines = [heads, ["---"] * len(heads)]
        for label, row in self["rows"].items():
            shown = [label]
            for one, given in zip(row, from_paper, strict=True):
                shown += [self._paper(one)] * given + [self._ours(one)]
            lines.append(shown)
        return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines)])

    def _paper(self, one: dict[str, Any]) -> str:
        value = one["paper"]
        return value if isinstance(value, str) else self._number(value)

    def _ours(self, one: dict[str, Any]) -> str:
        ours = one["ours"]
        if ours is None:
            return ""
        mean = self._number(ours["mean"])
        if ours["low"] is None or not self["intervals"]:
            return mean
        return f"{mean} [{self._number(ours['low'])}, {self._number(ours['high'])}]"

    def _number(self, value: float | None) -> str:
        return "" if value is None else f"{value:.{self['digits']}f}"


def cell(values: np.ndarray | None, paper: float | str | None = None) -> dict[str, Any]:
    """A cell of a table: the mean of one value a query, ``(q,)``, those that are NaN left out, with its interval."""
    kept = np.empty(0) if values is None else values[~np.isnan(values)]
    if not len(kept):
        return {"paper": paper, "ours": None}
    found = mean_of(kept)
    ours = {"mean": found.mean, "error": found.error, "low": found.low, "high": found.high, "n": found.n}
    return {"paper": paper, "ours": ours}


def table(
    corner: str,
    columns: Sequence[str],
    rows: dict[str, list[dict[str, Any]]],
    digits: int = 2,
    *,
    intervals: bool = True,
) -> Table:
    """A table of cells, ``digits`` after the point, intervals shown or kept in the JSON alone."""
    return Table(corner=corner, columns=list(columns), digits=digits, intervals=intervals, rows=rows)
