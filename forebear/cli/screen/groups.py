"""Sums of scores by group on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from forebear.cli.screen.answers import EFFECTS, SHOWN_QUERIES, cell
from forebear.cli.screen.console import OUT, shortened, warn

if TYPE_CHECKING:
    import pyarrow as pa

    from forebear.indexer.rows.row_source import RowSource


def show_groups(
    tables: Iterator[pa.Table], source: RowSource, column: str, meanings: Mapping[str, str], *, aggregate: bool
) -> None:
    """Print the groups behind the first few queries, or behind all of them together.

    Args:
        tables: As ``Retriever.groups`` gives them.
        source: The test rows.
        column: The column by which rows are grouped.
        meanings: What the effects of each method mean, a sentence by name; empty where it estimates none.
        aggregate: Whether there is one answer to all test rows together.
    """
    from rich.markup import escape

    lines = next(tables).to_pylist()
    texts = next(iter(source.blocks(SHOWN_QUERIES))).texts
    for number, of_query in groupby(lines, key=lambda line: line["query"]):
        if number >= SHOWN_QUERIES:
            break
        own = list(of_query)
        if aggregate:
            OUT.print(f"[bold]{source.n_rows:,} queries together[/bold]")
        else:
            gold = "" if own[0]["query_label"] is None else f", labelled {own[0]['query_label']}"
            predicted = escape(own[0]["query_prediction"])
            OUT.print(f"[bold]query {number}[/bold]  predicted [bold]{predicted}[/bold]{escape(gold)}")
            for text in texts:
                OUT.print(f"  {escape(shortened(text[number]))}")
        for method, of_method in groupby(own, key=lambda line: line["method"]):
            _print_groups(method, column, list(of_method), meanings[method])
        OUT.print()
    if not aggregate and source.n_rows > SHOWN_QUERIES:
        shown = f"shown: the first {SHOWN_QUERIES} of {source.n_rows:,} queries"
        warn(f"{shown}. Give --out NAME.parquet for all of them.")


def _print_groups(method: str, column: str, lines: list[dict[str, Any]], meaning: str) -> None:
    """Print one method's groups for one query."""
    from rich.markup import escape
    from rich.table import Table

    from forebear.retriever.effects.refits import TOO_LITTLE

    target = lines[0]["target"] or "each test row's target"
    title = f"{method}: {escape(column)} behind {escape(target)}"
    effects = [name for name in EFFECTS if any(line.get(name) is not None for line in lines)]
    if meaning and not effects:
        meaning = f"No effect: {TOO_LITTLE}, whichever group is left out."
    elif meaning and any(line["effect"] is None for line in lines):
        meaning += f" Where it is empty, {TOO_LITTLE}."
    grid = Table(title=title, title_justify="left", caption=escape(meaning) or None, caption_justify="left")
    grid.add_column(escape(column), overflow="fold")
    titles = ["\n".join(EFFECTS[name] for name in effects)] if effects else []
    for name in ("rows", "sum", "mean", "share of\n|scores|", *titles, "best\nrow", "its\nscore"):
        grid.add_column(name, justify="right", no_wrap=True)
    before = 0
    for line in lines:
        if line["rank"] > before + 1:
            grid.add_row(f"({line['rank'] - before - 1:,} more)", *[""] * (6 + len(titles)))
        before = line["rank"]
        numbers = [f"{line[name]:.4g}" for name in ("sum", "mean")]
        name = "null" if line["group"] is None else shortened(cell(line["group"]))
        best = [str(line["best_row"]), f"{line['best_score']:.4g}"]
        changes = ["\n".join("" if line[name] is None else f"{line[name]:+.3g}" for name in effects)] if effects else []
        grid.add_row(escape(name), f"{line['rows']:,}", *numbers, f"{line['share']:.1%}", *changes, *best)
    OUT.print(grid)
