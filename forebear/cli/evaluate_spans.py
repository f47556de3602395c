"""``forebear evaluate``: the evaluations of the methods that compare spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.asking import (
    Curvature,
    Exact,
    NQueries,
    NRows,
    Out,
    QuerySpans,
    Seed,
    SpanColumn,
    Spans,
    Target,
    Test,
    command_line,
    finish,
    integers,
    open_retriever,
    open_test,
)
from forebear.cli.console import Variadic, listed, progress_bar
from forebear.cli.options import (
    Damping,
    Device,
    Force,
    IndexFolder,
    JsonOut,
    LabelColumn,
    LabelNames,
    MovedModel,
    Quiet,
    Recall,
    Scope,
    TextColumns,
)
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.evaluation.agreement import Measure
    from forebear.evaluation.comparisons import Queries
    from forebear.retriever.query_spec import QuerySpec
    from forebear.retriever.retriever import Retriever

SEMANTIC_HELP = """Do the rows and spans at the top mean what the query means? Sag@K of several methods.

Mean cosine (times 100) of what the retrieved span adds to its row's embedding with what the query's span adds to its
own; of whole rows for methods that compare rows. The query's span is given, or the one of largest importance, for all
methods that compare spans. Beside them: random rows and random spans.

Examples:

    forebear evaluate semantic-agreement --index I --test test.parquet --spans aspect --queries 200 --at 10,100

    forebear evaluate semantic-agreement --index I --test dev.csv --method if,if++,tracin++ --scope top-2 --out R
"""
LABEL_HELP = """Do the rows at the top bear the query's label? Lag@K of several methods, beside the label's share.

The query's label is its target: the predicted one, unless --target says otherwise.

Examples:

    forebear evaluate label-agreement --index I --test test.parquet --spans aspect --queries 200 --at 10,100

    forebear evaluate label-agreement --index I --test dev.csv --method if,gd,gc,nn-cos --target gold
"""
FAITHFULNESS_HELP = """Do span methods rank spans as the final model itself does? Spearman with its own span scores.

The yardstick is tracin++ at the final checkpoint alone. Compared with it: tracin++ (three variants of the model), if++,
tracin++ summed over the last three checkpoints, and random scores. Each run draws other training rows and variants.

Example:

    forebear evaluate faithfulness --index I --test test.parquet --spans aspect --queries 50 --rows 200 --runs 5
"""


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    evaluations.command("semantic-agreement", help=SEMANTIC_HELP, cls=Variadic)(_agreement("semantic"))
    evaluations.command("label-agreement", help=LABEL_HELP, cls=Variadic)(_agreement("label"))
    evaluations.command("faithfulness", help=FAITHFULNESS_HELP, cls=Variadic)(faithfulness)


def _agreement(measure: Measure) -> Callable[..., None]:
    """The command of one measure; both take the same options."""

    def agreement(
        index: IndexFolder,
        test: Test,
        method: Annotated[
            list[str] | None,
            typer.Option(
                "--method", help="Methods. Default: if, if+, if++, tracin-f, tracin+, tracin++.", show_default=False
            ),
        ] = None,
        at: Annotated[
            list[str] | None, typer.Option("--at", help="K, up to six. Default: 10.", show_default=False)
        ] = None,
        spans: Spans = None,
        query_spans: QuerySpans = None,
        span_column: SpanColumn = None,
        scope: Scope = "head",
        target: Target = "predicted",
        curvature: Curvature = None,
        damping: Damping = None,
        exact: Exact = "rerank",
        recall: Recall = 0.98,
        queries: NQueries = 200,
        seed: Seed = 0,
        out: Out = None,
        model: MovedModel = None,
        text_columns: TextColumns = None,
        label_column: LabelColumn = None,
        label_names: LabelNames = None,
        device: Device = "auto",
        json_out: JsonOut = False,
        force: Force = False,
        quiet: Quiet = False,
    ) -> None:
        """See SEMANTIC_HELP and LABEL_HELP."""
        from forebear.evaluation.agreement import PAPER_METHODS, agreement_report, depths, measure_agreement

        tops = depths(integers("--at", at) or [10])
        retriever = open_retriever(index, model, device, out, force=force)
        spec = _spec(
            retriever, span_column, methods=tuple(listed(method)) or PAPER_METHODS, top=tops[-1], spans=spans,
            query_spans=query_spans, scope=scope, target=target, curvature=curvature, damping=damping, exact=exact,
            recall=recall,
        )  # fmt: skip
        asked = _queries(retriever, test, text_columns, label_column, label_names, spec, queries, seed)
        with progress_bar(quiet=quiet) as progress:
            found = measure_agreement(retriever, asked, spec, tops, measure, seed=seed, progress=progress)
        finish(*agreement_report(found, retriever, asked, spec, seed, command_line()), out, json_out, force, quiet)

    return agreement


def faithfulness(
    index: IndexFolder,
    test: Test,
    spans: Spans = None,
    query_spans: QuerySpans = None,
    span_column: SpanColumn = None,
    scope: Scope = "head",
    target: Target = "predicted",
    curvature: Curvature = None,
    damping: Damping = None,
    queries: NQueries = 50,
    rows: NRows = 200,
    runs: Annotated[int, typer.Option("--runs", help="Each with other training rows and other variants.")] = 5,
    seed: Seed = 0,
    out: Out = None,
    model: MovedModel = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    device: Device = "auto",
    json_out: JsonOut = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See FAITHFULNESS_HELP."""
    from forebear.evaluation.faithfulness import METHODS, faithfulness_report, measure_faithfulness

    retriever = open_retriever(index, model, device, out, force=force)
    spec = _spec(
        retriever, span_column, methods=METHODS, spans=spans, query_spans=query_spans, scope=scope, target=target,
        curvature=curvature, damping=damping,
    )  # fmt: skip
    asked = _queries(retriever, test, text_columns, label_column, label_names, spec, queries, seed)
    with progress_bar(quiet=quiet) as progress:
        found = measure_faithfulness(
            retriever, asked, spec, n_rows=rows, n_runs=runs, seed=seed, progress=progress
        )  # fmt: skip
    finish(*faithfulness_report(found, retriever, asked, spec, seed, command_line()), out, json_out, force, quiet)


def _spec(retriever: Retriever, span_column: str | None, **choices: Any) -> QuerySpec:
    """The question, settled and checked."""
    from forebear.retriever.query_spec import QuerySpec

    column = None if span_column is None else retriever.index.text_column(span_column)
    spec = retriever.settled(QuerySpec(span_column=column, **choices))
    if spec.exact == "none":
        raise InputError("--exact none ranks by sketches alone; give rerank or full.")
    return spec


def _queries(
    retriever: Retriever,
    test: str,
    text_columns: list[str] | None,
    label_column: str | None,
    label_names: list[str] | None,
    spec: QuerySpec,
    n_queries: int,
    seed: int,
) -> Queries:
    """The test rows that are asked about."""
    from forebear.evaluation.span_queries import sample_span_queries

    source = open_test(test, text_columns, label_column, label_names, need_labels=spec.target == "gold")
    return sample_span_queries(retriever, source, spec, n_queries, seed)
