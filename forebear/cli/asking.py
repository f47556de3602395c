"""What the commands of ``evaluate``, ``audit`` and ``perturb`` share: options, opening, and the report at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.console import listed, say
from forebear.cli.tables import show_report
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.evaluation.comparisons import Queries
    from forebear.evaluation.report import Report
    from forebear.indexer.data import RowSource
    from forebear.retriever.query_spec import QuerySpec
    from forebear.retriever.retriever import Retriever

Test = Annotated[str, typer.Option("--test", help="Test rows: a file, folder or hub name.", show_default=False)]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Methods. Default: all that score rows from this index.", show_default=False),
]
NQueries = Annotated[int, typer.Option("--queries", help="Rows asked about, a seeded sample; 0: all.")]
NRows = Annotated[int, typer.Option("--rows", help="Training rows, a seeded sample; 0: all.")]
Seed = Annotated[int, typer.Option("--seed", help="Of samples and intervals.", min=0)]
Target = Annotated[str, typer.Option("--target", help="Whose loss: predicted, gold, or a label's name.")]
Curvature = Annotated[
    str | None,
    typer.Option("--curvature", help="Of methods with H^-1: exact, ekfac, cg, lissa or identity.", show_default=False),
]
Spans = Annotated[
    str | None,
    typer.Option(
        "--spans",
        help="clauses, sentences, words, aspect, reader:MODEL or FILE.py:function. Default: those that the index "
        "stores, else clauses.",
        show_default=False,
    ),
]
QuerySpans = Annotated[
    str | None,
    typer.Option(
        "--query-spans",
        help="Of test rows; also columns:FROM,TO or clause-of:FROM,TO. Default: as --spans.",
        show_default=False,
    ),
]
SpanColumn = Annotated[
    str | None,
    typer.Option("--span-column", help="The text column that spans are in. Default: the first.", show_default=False),
]
Exact = Annotated[str, typer.Option("--exact", help="rerank or full.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder for report.html, table.csv and result.json.")]


def open_retriever(index: str, model: str | None, device: str, out: str | None, *, force: bool) -> Retriever:
    """The index's retriever, after seeing that the report can be written."""
    from forebear.evaluation.report import check_folder
    from forebear.retriever.retriever import Retriever

    if out is not None:
        check_folder(Path(out), force=force)
    return Retriever(index, model=model, device=device)


def make_spec(retriever: Retriever, method: Sequence[str] | None, **choices: Any) -> QuerySpec:
    """The question, checked."""
    from forebear.retriever.methods import pick_methods
    from forebear.retriever.query_spec import QuerySpec

    names = tuple(m.name for m in pick_methods(listed(method))) if method else retriever.row_methods()
    spec = QuerySpec(methods=names, **choices)
    retriever.check_stores(spec.check(), spec)
    return spec


def open_test(
    test: str,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    *,
    need_labels: bool = False,
) -> RowSource:
    """Test rows, as the options say."""
    from forebear.indexer.data import open_rows

    return open_rows(
        test,
        text_columns=listed(text_columns) or None,
        label_column=label_column,
        label_names=listed(label_names) or None,
        need_labels=need_labels,
    )


def open_queries(
    retriever: Retriever,
    test: str,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    spec: QuerySpec,
    n_queries: int,
    seed: int,
) -> Queries:
    """The test rows that are asked about."""
    from forebear.evaluation.comparisons import sample_queries

    gold = spec.target == "gold"
    source = open_test(test, text_columns, label_column, label_names, need_labels=gold)
    return sample_queries(retriever, source, n_queries, seed, need_labels=gold)


def integers(option: str, values: Sequence[str] | None) -> list[int]:
    """Whole numbers of a list option."""
    given = listed(values)
    if not all(value.isascii() and value.isdigit() for value in given):
        raise InputError(f"{option} {','.join(given)}: expected whole numbers, such as 10,50.")
    return [int(value) for value in given]


def command_line() -> str:
    """What repeats the report."""
    return shlex.join(["forebear", *sys.argv[1:]])


def finish(
    report: Report,
    result: dict[str, Any],
    out: str | None,
    as_json: bool,
    force: bool,
    quiet: bool,
    shown: Report | None = None,
) -> None:
    """Write the report where it is asked for, and show it, or what is shown of it on a screen."""
    from forebear.evaluation.report import render_json, write_report

    if out is not None:
        page = write_report(report, Path(out), result=result, force=force)
    if as_json:
        sys.stdout.write(render_json({"provenance": dict(report.provenance), **result}))
    else:
        show_report(shown or report)
    if out is not None:
        say(f"wrote {page}, table.csv and result.json", quiet=quiet)
