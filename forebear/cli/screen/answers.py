"""Answers on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from forebear.cli.screen.console import OUT, note, shortened, warn

if TYPE_CHECKING:
    import pyarrow as pa

    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.answers.results import Answers
    from forebear.retriever.answers.signs import SignCounts
    from forebear.retriever.question.methods import Method
    from forebear.retriever.question.spec import Question
    from forebear.retriever.retriever import Retriever

SHOWN_QUERIES = 5
SHOWN_WORDS = 4
EFFECTS = {"effect": "effect", "effect_probability": "p change"}  # columns of results, and their titles
EFFECT_WIDTH = 28  # characters that effects leave less of the next
COLUMN_WIDTH = 40  # characters that the user's own columns may take beside the texts


def show_answers(
    answers_in_order: Iterator[Answers],
    tables_of: Callable[[Answers], Iterator[pa.Table]],
    source: RowSource,
    methods: Sequence[Method],
    meanings: Mapping[str, str],
    text_names: list[str],
    column_names: list[str],
    *,
    aggregate: bool,
) -> None:
    """Print the answers to the first few queries, or the one answer to all.

    Args:
        answers_in_order: Answers, in the order of the test rows.
        tables_of: Turns answers into tables.
        source: The test rows.
        methods: Methods of the question.
        meanings: What the effects of each mean, a sentence by name; empty where a method estimates none.
        text_names: Columns of the tables that hold the training rows' texts.
        column_names: Those that hold other columns of the training rows, of which the narrow ones are shown.
        aggregate: Whether there is one answer to all test rows together.
    """
    import pyarrow as pa

    if aggregate:
        table = pa.concat_tables(tables_of(next(answers_in_order)))
        OUT.print(f"[bold]{source.n_rows:,} queries together[/bold]")
        _print_rankings(rows := table.to_pylist(), methods, meanings, text_names, column_names, [])
        _say_signs(rows, methods)
        return
    block = next(iter(source.blocks(SHOWN_QUERIES)))
    n_shown = 0
    while n_shown < len(block):
        answers = next(answers_in_order)
        table = pa.concat_tables(tables_of(answers))
        rows = table.to_pylist()
        for number in range(answers.start, min(answers.start + len(answers.predictions), len(block))):
            results = [row for row in rows if row["query"] == number]
            texts = [column[number] for column in block.texts]
            _print_answer(results, methods, meanings, text_names, column_names, texts)
            _say_signs(results, methods)
            n_shown += 1
    if n_shown < source.n_rows:
        warn(f"shown: the first {n_shown} of {source.n_rows:,} queries. Give --out NAME.parquet for all of them.")


def _print_answer(
    results: list[dict[str, Any]],
    methods: Sequence[Method],
    meanings: Mapping[str, str],
    text_names: list[str],
    column_names: list[str],
    texts: list[str],
) -> None:
    """Print a query, whose texts are ``texts``, and all its rankings."""
    from rich.markup import escape

    first = results[0]
    gold = "" if first["query_label"] is None else f", labelled {first['query_label']}"
    number, predicted = first["query"], escape(first["query_prediction"])
    OUT.print(f"[bold]query {number}[/bold]  predicted [bold]{predicted}[/bold]{escape(gold)}")
    for text in texts:
        OUT.print(f"  {escape(shortened(text))}")
    _print_rankings(results, methods, meanings, text_names, column_names, texts)


def _print_rankings(
    results: list[dict[str, Any]],
    methods: Sequence[Method],
    meanings: Mapping[str, str],
    text_names: list[str],
    column_names: list[str],
    texts: list[str],
) -> None:
    """Print both ends of each method's ranking for one query, whose texts are ``texts``."""
    from rich.markup import escape
    from rich.table import Table

    from forebear.retriever.answers.results import SIDES

    width = COLUMN_WIDTH - (EFFECT_WIDTH if results[0].get("effect") is not None else 0)
    narrow = narrow_columns(results, column_names, width)
    target = results[0]["target"] or "each test row's target"  # the rows of an aggregate may have different targets
    for method in methods:
        for side in SIDES:
            grid = Table(title=f"{method.name}: {side}s of {escape(target)}", title_justify="left", expand=True)
            rows_of_side = [row for row in results if (row["method"], row["side"]) == (method.name, side)]
            caption, meaning = _caption(rows_of_side, method, texts), meanings[method.name]
            if meaning and caption:
                caption = f"{meaning} {caption[0].upper()}{caption[1:]}."
            caption = caption or meaning
            grid.caption, grid.caption_justify = escape(caption) or None, "left"
            for name in ("row", "score"):
                grid.add_column(name, justify="right", no_wrap=True)
            for name in ("label", "prediction"):
                grid.add_column(name, no_wrap=True)
            effects = [name for name in EFFECTS if rows_of_side[0].get(name) is not None]
            if effects:
                grid.add_column("\n".join(EFFECTS[name] for name in effects), justify="right", no_wrap=True)
            hub_share = rows_of_side[0].get("hub_share") is not None
            if hub_share:
                grid.add_column("hub share", justify="right", no_wrap=True)
            by_words = rows_of_side[0].get("words") is not None
            by_spans = rows_of_side[0].get("span") is not None
            if by_words or by_spans:
                grid.add_column("span" if by_spans else "shared words", ratio=1)
            for name in narrow:
                grid.add_column(escape(name), no_wrap=True)
            for name in text_names:
                grid.add_column(escape(name), ratio=1)
            for row in rows_of_side:
                grid.add_row(
                    str(row["row"]),
                    f"{row['score']:.4g}",
                    escape(row["label"]),
                    escape(row["prediction"]),
                    *(["\n".join(f"{row[name]:+.2g}" for name in effects)] if effects else []),
                    *([f"{row['hub_share']:.1%}"] if hub_share else []),
                    *([escape(_shared(row) if by_words else shortened(row["span"]))] if by_words or by_spans else []),
                    *(escape(cell(row[name])) for name in narrow),
                    *(escape(shortened(row[name])) for name in text_names),
                )
            OUT.print(grid)
    if len(narrow) < len(column_names):
        wide = ", ".join(name for name in column_names if name not in narrow)
        OUT.print(escape(f"not shown: {wide}. --out NAME.parquet has them."), style="dim")
    OUT.print()


def narrow_columns(rows: Sequence[dict[str, Any]], names: Sequence[str], left: int = COLUMN_WIDTH) -> list[str]:
    """Those columns that fit into ``left`` characters beside texts, in their order."""
    narrow = []
    for name in names:
        width = 3 + max(len(name), *(len(cell(row[name])) for row in rows))
        if width <= left:
            left -= width
            narrow.append(name)
    return narrow


def cell(value: Any) -> str:
    """A value of a user's column on the screen."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _shared(row: dict[str, Any]) -> str:
    """The words that contribute most, with their share of the score."""
    contributions = zip(row["words"], row["contributions"], strict=True)
    shown = [f"{word.strip()} {value:+.2g}" for word, value in list(contributions)[:SHOWN_WORDS]]
    more = len(row["words"]) - len(shown)
    return ", ".join(shown) + (f", {more} more" if more > 0 else "") or "none"


def _caption(rows: list[dict[str, Any]], method: Method, texts: list[str]) -> str:
    """Facts of a table of results, below it: the query's span, proof, how well H^-1 was solved, spans left out.

    And what is predicted without all its rows together.
    """
    from forebear.indexer.curvature.convergence import convergence_phrase
    from forebear.retriever.effects.refits import UNSTATED

    row, notes = rows[0], []
    if len(rows) > 1 and "effect_together" in row and row["effect"] is not None and method.query == "preconditioned":
        together = row["effect_together"]
        stated = UNSTATED if together is None else f"effect {together:+.3g}"
        notes.append(f"without all {len(rows)} together: {stated}")
    if row.get("query_span_start") is not None:
        text = texts[row["query_span_column"]]
        notes.append(f"the query's span: {shortened(text[row['query_span_start'] : row['query_span_end']])}")
    if row.get("proven") is not None:
        notes.append(f"{'proven' if row['proven'] else 'not proven'}, {row['rows_scored']:,} rows scored exactly")
    if row.get("residual") is not None:
        notes.append(f"H^-1 solved to {convergence_phrase(row['residual'], row['iterations'])}")
    if row.get("spans_cut"):
        notes.append(f"{row['spans_cut']:,} spans that the model does not read (cut by truncation, or blank) left out")
    return "; ".join(notes)


def _say_signs(results: list[dict[str, Any]], methods: Sequence[Method]) -> None:
    """Print a note for each side of a method where scores of one query have the sign of the other side."""
    import numpy as np

    from forebear.retriever.answers.signs import SignCounts

    counts = SignCounts(methods)
    for row in results:
        counts.count(row["method"], row["side"], np.array([row["score"]]))
    say_signs(counts)


def say_signs(counts: SignCounts) -> None:
    """Print a note for each side of a method that has scores of the other side's sign."""
    for name, sentence in counts.by_method():
        note(name, sentence)


def say_recall(retriever: Retriever, question: Question) -> None:
    """Print a note for each method whose recall is not proven: the calibrated recall, or why there is none."""
    for name, facts in retriever.facts(question)["methods"].items():
        recall, reason, n = facts["recall"], facts.get("recall_note"), facts.get("candidates")
        lines = [] if reason is None else [reason]
        if recall is not None and recall < 1:
            candidates = "" if n is None else f" ({n:,} candidates at each end)"
            lines.insert(0, f"recall {recall:.3g} expected of the exact top {question.spec.top}{candidates}")
        if lines:
            note(name, "; ".join(lines))
