"""Answers to look at: the table of :meth:`Retriever.retrieve` in few columns, one grid a query, method and side.

Of groups of rows (``group_by=``): one grid a query and method, with all columns of the groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa

from forebear.display import grid
from forebear.errors import InputError

SHOWN_ROWS = 200
_OF_ENDS = ("query", "method", "side")
_SHOWN = ("rank", "row", "score", "label", "prediction", "span")
_OTHERS = (  # columns of results that are no texts of training rows
    *_OF_ENDS, *_SHOWN, "query_label", "query_prediction", "target", "exact", "residual", "proven", "rows_scored",
    "span_column", "span_start", "span_end", "query_span_column", "query_span_start", "query_span_end", "spans_cut",
    "word_ids", "words", "contributions", "hub_share",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class ShownAnswers:
    """Answers as a notebook shows them; see :func:`show`.

    Attributes:
        table: All of them.
        n_shown: How many results are shown.
    """

    table: pa.Table
    n_shown: int

    def _ends(self) -> list[tuple[str, list[dict[str, Any]]]]:
        results = self.table.slice(0, self.n_shown).to_pylist()
        return [
            (f"query {query} · {method} · {side or 'group'}s of “{some[0]['target']}”", some)
            for (query, method, side), found in groupby(results, key=lambda one: tuple(map(one.get, _OF_ENDS)))
            if (some := list(found))
        ]

    @property
    def _columns(self) -> list[str]:
        names: list[str] = self.table.column_names
        if "group" in names and "side" not in names:
            return names[names.index("rank") :]
        return [name for name in _SHOWN if name in names] + [name for name in names if name not in _OTHERS]

    @property
    def _rest(self) -> str:
        left = self.table.num_rows - self.n_shown
        return f"{left:,} more results are in .table" if left > 0 else ""

    def __repr__(self) -> str:
        lines = []
        for title, some in self._ends():
            lines.append(title)
            lines += ["  " + " | ".join(_short(one[name]) for name in self._columns) for one in some]
        return "\n".join([*lines, *([self._rest] if self._rest else [])])

    def _repr_html_(self) -> str:
        names = self._columns
        grids = [grid(title, names, [[one[name] for name in names] for one in some]) for title, some in self._ends()]
        return "".join(grids) + (f"<p>{self._rest}</p>" if self._rest else "")


def show(answers: pa.Table, n_shown: int = SHOWN_ROWS) -> ShownAnswers:
    """Answers to look at, in a notebook or at a prompt.

    Args:
        answers: The table that :meth:`Retriever.retrieve` gives, or some of its rows.
        n_shown: Results shown at most.

    Raises:
        InputError: The table is none of answers.

    Example:
        >>> import forebear
        >>> retriever = forebear.Retriever("runs/demo/index")
        >>> forebear.show(retriever.retrieve([("The cat sat .", "A cat sat .")], methods=["gc"], top=3))
    """
    of_rows, of_groups = (*_OF_ENDS, "target", "rank", "row", "score"), ("query", "method", "target", "rank", "group")
    wanted = of_rows if "side" in answers.column_names or "sum" not in answers.column_names else of_groups
    missing = [name for name in wanted if name not in answers.column_names]
    if missing:
        raise InputError(f"this table has no column {missing[0]}. Give the one that retrieve gives, with all columns.")
    return ShownAnswers(answers, min(n_shown, answers.num_rows))


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
