"""``forebear retrieve``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import ColumnOptions, QuerySpans, say_what_was_fitted, warn_of_labels
from forebear.cli.options.shared import (
    Damping,
    Device,
    Force,
    IndexFolder,
    LabelColumn,
    LabelNames,
    MovedModel,
    Pair,
    Quiet,
    Recall,
    Scope,
    TextColumns,
    Unlabelled,
)
from forebear.cli.screen.answers import SHOWN_QUERIES, say_recall, say_signs, show_answers
from forebear.cli.screen.console import Variadic, listed, progress_bar, say, warn
from forebear.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.answers.results import Answers
    from forebear.retriever.retriever import Retriever

HELP = """Rank the training rows behind each prediction: proponents and opponents, by one or more methods.

Examples:

    forebear retrieve --index I --text "a gripping film" --method gc,if --top 5

    forebear retrieve --index I --text "A man sleeps." --pair "A person is awake."

    forebear retrieve --index I --test dev.csv --method gc,rif --top 10 --out answers.parquet

    forebear retrieve --index I --text "a gripping film" --method tracin-we-topk,tracin-tfidf

    forebear retrieve --index I --text "dull plot, great cast" --method tracin++,if++ --spans clauses

    forebear retrieve --index I --test dev.csv --method gd,if --scope all --recall 0.95 --out answers.parquet

    forebear retrieve --index I --test mistakes.csv --method if --aggregate
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("retrieve", help=HELP, cls=Variadic)(retrieve)


def retrieve(
    index: IndexFolder,
    test: Annotated[
        str | None,
        typer.Option("--test", help="Rows to explain: a file, folder or hub name. Cut at the index's --max-length."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="One text to explain (with --pair: the first).")] = None,
    pair: Pair = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Methods; see `forebear methods`.  [default: gc]", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Rows at each end of the ranking.")] = 10,
    target: Annotated[
        str, typer.Option("--target", help="Whose loss: predicted, gold, or a label's name.")
    ] = "predicted",
    exact: Annotated[str, typer.Option("--exact", help="none, rerank or full.")] = "rerank",
    scope: Scope = "head",
    recall: Recall = 0.98,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", help="Rows (or stored spans) at each end that sketches propose.", show_default=False
        ),
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Scores of word methods over sqrt(self x self).")
    ] = False,
    spans: Annotated[
        str | None,
        typer.Option(
            "--spans",
            help="For if+, if++, tracin+, tracin++: clauses, sentences, words, aspect, reader:MODEL or "
            "FILE.py:function. Default: "
            "those that the index stores, else clauses.",
            show_default=False,
        ),
    ] = None,
    query_spans: QuerySpans = None,
    word: Annotated[
        str | None,
        typer.Option(
            "--word", help="For saliency-if: whose saliency. Default: each row's most salient word.", show_default=False
        ),
    ] = None,
    span_column: Annotated[
        str | None,
        typer.Option(
            "--span-column",
            help="The text column that spans are in. Default: the index's, or the first.",
            show_default=False,
        ),
    ] = None,
    aggregate: Annotated[
        bool,
        typer.Option("--aggregate", help="One answer to all test rows together: their query vectors are summed."),
    ] = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Prove each top k at a deeper scope, however many rows it takes.")
    ] = False,
    curvature: Annotated[
        str | None,
        typer.Option(
            "--curvature",
            help="For if and rif: exact, ekfac, cg, cg-hessian, lissa or identity. Default: exact at the head, ekfac "
            "beyond it.",
            show_default=False,
        ),
    ] = None,
    damping: Damping = None,
    curvature_rows: Annotated[
        int, typer.Option("--curvature-rows", help="Training rows that cg and lissa take at deeper scopes; 0: all.")
    ] = 1024,
    lissa: Annotated[str, typer.Option("--lissa", help="Settings: han20, pez21, or as in han20,depth=5000.")] = "han20",
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative residual at which cg stops.")] = 1e-3,
    hubs: Annotated[
        str | None,
        typer.Option(
            "--hubs",
            help="Folder of `forebear audit hubs`: adds each proponent's share of its queries.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Write to NAME.parquet or NAME.jsonl.")] = None,
    model: MovedModel = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    unlabelled: Unlabelled = "refuse",
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See HELP."""
    from forebear.evaluation.audits.rows.hub_shares import read_hub_shares, with_hub_share
    from forebear.indexer.index import Index
    from forebear.indexer.rows.row_source import rows_from_texts
    from forebear.retriever.answers.result_file import check_output, result_writer
    from forebear.retriever.answers.signs import SignCounts
    from forebear.retriever.question.spec import QuerySpec
    from forebear.retriever.retriever import Retriever

    if (test is None) == (text is None):
        raise InputError("give either --test FILE or --text '...' (with --pair for pairs).")
    if text is not None and target == "gold":
        raise InputError("--target gold needs labels: give labelled rows by --test, or name a label by --target.")
    if pair is not None and text is None:
        raise InputError("--pair is the second text of --text; give both.")
    spec = QuerySpec(
        methods=tuple(listed(method)) or ("gc",),
        top=top,
        target=target,
        exact=exact,  # type: ignore[arg-type]  # checked by spec.check
        scope=scope,
        recall=recall,
        candidates=candidates,
        normalise=normalise,
        spans=spans,
        query_spans=query_spans,
        word=word,
        aggregate=aggregate,
        certify=certify,
        curvature=curvature,
        damping=damping,
        curvature_rows=curvature_rows,
        lissa=lissa,
        tolerance=tolerance,
    )
    methods = spec.check()
    by_spans = any(m.ranks_spans for m in methods)
    for option, value in (("--spans", spans), ("--query-spans", query_spans), ("--span-column", span_column)):
        if value is not None and not by_spans:
            raise InputError(
                f"{option} is for if+, if++, tracin+ and tracin++; {', '.join(spec.methods)} compare rows."
            )
    if word is not None and not any(m.saliency for m in methods):
        raise InputError(f"--word is for saliency-if and saliency-if-token, not {', '.join(spec.methods)}.")
    if out is not None:
        check_output(Path(out), force=force)
    opened = Index.open(index)
    if span_column is not None:
        spec = replace(spec, span_column=opened.text_column(span_column))
    retriever = Retriever(opened, model=model, device=device)
    if text is not None:
        source = rows_from_texts([text] if pair is None else [(text, pair)])
    else:
        assert test is not None
        columns = ColumnOptions(
            text_columns=text_columns, label_column=label_column, label_names=label_names, unlabelled=unlabelled
        )
        source = columns.open(test, retriever, need_labels=target == "gold")
    warn_of_labels(retriever, source, required=target == "gold")

    question = retriever.resolve(spec)
    say_what_was_fitted(question, quiet=quiet)
    retriever.check_texts(source)
    _warn_of_reading(retriever, source)
    shares = None if hubs is None else read_hub_shares(Path(hubs), retriever, question)

    def tables_of(answers: Answers) -> Iterator[pa.Table]:
        for table in retriever.tables(answers):
            yield table if shares is None else with_hub_share(table, shares)

    if out is None:
        found = retriever.answers(source, question, block_rows=SHOWN_QUERIES)
        show_answers(found, tables_of, source, methods, aggregate=aggregate, quiet=quiet)
        say_recall(question, quiet=quiet)
        return
    signs = SignCounts(methods)
    with (
        progress_bar(quiet=quiet) as progress,
        result_writer(Path(out), retriever.metadata(question), force=force) as write,
    ):
        progress("queries", 0, source.n_rows)
        n_results = 0
        for answers in retriever.answers(source, question):
            signs.add(answers)
            for table in tables_of(answers):
                write(table)
                n_results += table.num_rows
            done = source.n_rows if aggregate else answers.start + len(answers.predictions)
            progress("queries", done, source.n_rows)
    together = " asked together" if aggregate else ""
    say(f"{out}: {source.n_rows:,} queries{together}, {n_results:,} results", quiet=quiet)
    say_signs(signs, quiet=quiet)
    say_recall(question, quiet=quiet)


def _warn_of_reading(retriever: Retriever, source: RowSource) -> None:
    """Say, before the work, where the model does not see much of the test rows, or of the first of many."""
    from forebear.indexer.building.row_facts import reading_of_first_rows

    classifier = retriever.classifier()
    reading = reading_of_first_rows(classifier, source)
    rows = "the test rows" if reading.n_rows == source.n_rows else f"the first {reading.n_rows:,} test rows"
    for warning in reading.warnings(classifier.max_length, rows):
        warn(warning)
