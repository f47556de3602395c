"""Answers to look at: the table of :meth:`Retriever.retrieve` in few columns, one grid a query, method and side.

Of groups of rows (``group_by=``): one grid a query and method, with all columns of the groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa

from forebear.display import grid
from forebear.errors import InputError
from forebear.retriever.answers.signs import note_of
from forebear.retriever.effects.kinds import effect_meaning

SHOWN_ROWS = 200
_OF_ENDS = ("query", "method", "side")
_SHOWN = ("rank", "row", "score", "effect", "effect_probability", "label", "prediction", "span")
_OTHERS = (  # columns of results that are no texts of training rows
    *_OF_ENDS, *_SHOWN, "query_label", "query_prediction", "target", "exact", "residual", "iterations", "proven",
    "rows_scored", "span_column", "span_start", "span_end", "query_span_column", "query_span_start", "query_span_end",
    "spans_cut", "word_ids", "words", "contributions", "hub_share", "effect_together", "effect_probability_together",
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

    def _ends(self) -> list[tuple[str, list[dict[str, Any]], list[str]]]:
        """Title, results and notes of each ranking."""
        results = self.table.slice(0, self.n_shown).to_pylist()
        ends = []
        for (query, method, side), found in groupby(results, key=lambda one: tuple(map(one.get, _OF_ENDS))):
            some = list(found)
            title = f"query {query} · {method} · {side or 'group'}s of “{some[0]['target']}”"
            signs = note_of(method, side, [one["score"] for one in some]) if side else ""
            ends.append((title, some, [note for note in (signs, self._effect_notes.get(method, "")) if note]))
        return ends

    @cached_property
    def _effect_notes(self) -> dict[str, str]:
        """What the effects of each method mean, as the answers' provenance says it, where they have any."""
        metadata = (self.table.schema.metadata or {}).get(b"forebear")
        methods = {} if metadata is None else json.loads(metadata)["methods"]
        return {name: effect_meaning(facts) for name, facts in methods.items()}

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
        for title, some, notes in self._ends():
            lines.append(title)
            lines += ["  " + " | ".join(_short(one[name]) for name in self._columns) for one in some]
            lines += [f"  {note}" for note in notes]
        return "\n".join([*lines, *([self._rest] if self._rest else [])])

    def _repr_html_(self) -> str:
        names = self._columns
        grids = [
            grid(title, names, [[one[name] for name in names] for one in some], notes)
            for title, some, notes in self._ends()
        ]
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
