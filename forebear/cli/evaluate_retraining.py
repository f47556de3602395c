"""``forebear evaluate``: the evaluations that retrain the model without some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.asking import (
    Curvature,
    NQueries,
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
    open_test,
)
from forebear.cli.console import Variadic, listed, progress_bar, warn
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
    Scope,
    TextColumns,
)
from forebear.cli.workers import Workers, start_workers

if TYPE_CHECKING:
    import numpy as np

    from forebear.evaluation.comparisons import Queries
    from forebear.evaluation.retraining import Retrainer
    from forebear.retriever.query_spec import QuerySpec
    from forebear.retriever.retriever import Retriever

_HOW = """--retrain full fine-tunes as the run did. Stand-ins: top-K trains the last K layers from stored states, at K
layers' share of the cost; head fits the last layer to stored features, in about a second. Finished retrainings are
kept (--cache): after a kill the same command goes on, and --workers share them.
"""
REMOVAL_HELP = f"""How does the confidence change without the rows that a method names, after retraining?

For each test row: without the top, bottom, least influential and random rows; the change of the probability of the
class that the same seed's retraining on all rows predicts.

{_HOW}
Examples:

    forebear evaluate removal --index I --test dev.csv --method if,gc,nn-cos --share 0.1 --queries 50 --out R

    forebear evaluate removal --index I --test dev.csv --method if --remove 50,500 --retrain top-2 --budget 400
"""
DELETION_HELP = f"""DEL+ and DEL-: the gold class's probability without the top k proponents or opponents, retrained.

{_HOW}
Examples:

    forebear evaluate deletion-curve --index I --test dev.csv --method tracin-we,tracin-last --queries 30 --out R

    forebear evaluate deletion-curve --index I --test dev.csv --method tracin-we --no-overlap 2000 --remove 10,50,100
"""
LOSS_HELP = f"""How much accuracy is lost without the rows of largest score summed over the queries, retrained? (Ral)

Accuracy is measured on all test rows; scores are summed over a sample of them. Beside it: random rows.

{_HOW}
Example:

    forebear evaluate retraining-loss --index I --test test.csv --method if,if++,tracin++ --share 0.2,0.5 --queries 200
"""
LDS_HELP = f"""Linear datamodeling score: do summed scores foretell what models trained on random halves say?

{_HOW}
Example:

    forebear evaluate lds --index I --test dev.csv --method if,gd,tracin --subsets 100 --retrain top-2 --seeds 2
"""

Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Methods. Default: all that score rows from this index.", show_default=False),
]
Remove = Annotated[list[str] | None, typer.Option("--remove", help="Numbers of rows to remove.", show_default=False)]
Share = Annotated[
    list[str] | None, typer.Option("--share", help="Shares of all rows to remove, such as 0.1.", show_default=False)
]
Retrain = Annotated[str, typer.Option("--retrain", help="full, top-K (such as top-2), or head.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Retrainings of each kind; for head one is enough.")]
L2 = Annotated[float, typer.Option("--l2", help="For --retrain head: weight of half the squared norm.")]
Budget = Annotated[
    int | None,
    typer.Option("--budget", help="Models to train at most: what is compared is sampled.", show_default=False, min=1),
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Folder of finished retrainings. Default: INDEX-retraining.", show_default=False),
]
RunFolder = Annotated[
    str | None,
    typer.Option("--run", help="The training run. Default: where the index's model lies.", show_default=False),
]


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("removal", REMOVAL_HELP, removal),
        ("deletion-curve", DELETION_HELP, deletion_curve),
        ("retraining-loss", LOSS_HELP, retraining_loss),
        ("lds", LDS_HELP, lds),
    ):
        evaluations.command(name, help=help_text, cls=Variadic)(command)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What all four commands are given, opened.

    Attributes:
        retriever: Over the index.
        spec: The question.
        queries: Test rows that scores are computed for.
        every: All test rows.
        open_retrainer: From texts, a retrainer.
    """

    retriever: Retriever
    spec: QuerySpec
    queries: Queries
    every: Queries
    open_retrainer: Callable[[Sequence[Sequence[str]]], Retrainer]

    @property
    def n_live(self) -> int:
        """Rows of the index that are not retired."""
        return len(self.retriever.index.live)

    def scores(self) -> dict[str, np.ndarray]:
        """Of all live rows, by method."""
        from forebear.evaluation.row_choice import row_scores

        return row_scores(self.retriever, self.queries, self.spec)


def _ask(
    *,
    index: str,
    test: str,
    method: Sequence[str] | None,
    scope: str,
    target: str,
    curvature: str | None,
    damping: str | None,
    spans: str | None,
    query_spans: str | None,
    span_column: str | None,
    need_labels: bool,
    retrain: str,
    l2: float,
    cache: str | None,
    workers: int,
    run: str | None,
    queries: int,
    seed: int,
    out: str | None,
    model: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    device: str,
    force: bool,
) -> _Asked:
    """Open everything, after seeing that the report can be written."""
    from forebear.evaluation.comparisons import sample_queries
    from forebear.evaluation.recipes import open_retrainer
    from forebear.evaluation.report import check_folder
    from forebear.evaluation.row_choice import removal_methods
    from forebear.evaluation.span_queries import sample_span_queries
    from forebear.retriever.query_spec import QuerySpec
    from forebear.retriever.retriever import Retriever

    if out is not None:
        check_folder(Path(out), force=force)
    retriever = Retriever(index, model=model, device=device)
    spec = QuerySpec(
        methods=removal_methods(retriever, listed(method)),
        scope=scope,
        target=target,
        curvature=curvature,
        damping=damping,
        spans=spans,
        query_spans=query_spans,
        span_column=None if span_column is None else retriever.index.text_column(span_column),
    )
    spec = retriever.settled(spec)
    retriever.check_stores(spec.check(), spec)
    labelled = need_labels or target == "gold"
    source = open_test(test, text_columns, label_column, label_names, need_labels=labelled)
    folder = Path(cache) if cache is not None else Path(f"{Path(index).resolve()}-retraining")
    start_workers(workers, folder)
    return _Asked(
        retriever=retriever,
        spec=spec,
        queries=sample_span_queries(retriever, source, spec, queries, seed, need_labels=labelled),
        every=sample_queries(retriever, source, 0, seed, need_labels=labelled),
        open_retrainer=lambda texts: open_retrainer(retriever, retrain, texts, folder, run=run, l2=l2, device=device),
    )


def _warn(retrainer: Retrainer) -> None:
    """Say which files of the cache were damaged."""
    for line in retrainer.warnings:
        warn(line)


def removal(
    index: IndexFolder,
    test: Test,
    method: Methods = None,
    remove: Remove = None,
    share: Share = None,
    sides: Annotated[
        list[str] | None,
        typer.Option("--sides", help="top, bottom, least. Default: all three.", show_default=False),
    ] = None,
    scope: Scope = "head",
    target: Target = "predicted",
    curvature: Curvature = None,
    damping: Damping = None,
    spans: Spans = None,
    query_spans: QuerySpans = None,
    span_column: SpanColumn = None,
    retrain: Retrain = "head",
    seeds: Seeds = 5,
    l2: L2 = 0.01,
    budget: Budget = None,
    cache: Cache = None,
    workers: Workers = 1,
    run: RunFolder = None,
    queries: NQueries = 50,
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
    """See REMOVAL_HELP."""
    from forebear.evaluation.removal import measure_removal, removal_report, seeds_of
    from forebear.evaluation.row_choice import amounts_of, sides_of

    asked = _ask(
        index=index, test=test, method=method, scope=scope, target=target, curvature=curvature, damping=damping,
        spans=spans, query_spans=query_spans, span_column=span_column,
        need_labels=False, retrain=retrain, l2=l2, cache=cache, workers=workers, run=run,
        queries=queries, seed=seed, out=out, model=model, text_columns=text_columns, label_column=label_column,
        label_names=label_names, device=device, force=force,
    )  # fmt: skip
    amounts = amounts_of(integers("--remove", remove), listed(share), asked.n_live, ["0.1"])
    chosen_sides = sides_of(listed(sides))
    retrainer = asked.open_retrainer(asked.queries.texts)
    with progress_bar(quiet=quiet) as progress:
        found = measure_removal(
            retrainer,
            asked.scores(),
            amounts,
            seeds_of(retrainer, seeds, seed),
            sides=chosen_sides,
            budget=budget,
            seed=seed,
            progress=progress,
        )
    report = removal_report(found, asked.retriever, asked.queries, asked.spec, retrainer, seed, command_line())
    _warn(retrainer)
    finish(*report, out, json_out, force, quiet)


def deletion_curve(
    index: IndexFolder,
    test: Test,
    method: Methods = None,
    remove: Remove = None,
    share: Share = None,
    no_overlap: Annotated[
        int | None,
        typer.Option(
            "--no-overlap",
            help="Only so many rows of least tf-idf overlap with the test row may be removed.",
            show_default=False,
        ),
    ] = None,
    scope: Scope = "head",
    target: Target = "gold",
    curvature: Curvature = None,
    damping: Damping = None,
    spans: Spans = None,
    query_spans: QuerySpans = None,
    span_column: SpanColumn = None,
    retrain: Retrain = "head",
    seeds: Seeds = 5,
    l2: L2 = 0.01,
    budget: Budget = None,
    cache: Cache = None,
    workers: Workers = 1,
    run: RunFolder = None,
    queries: NQueries = 30,
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
    """See DELETION_HELP."""
    from forebear.evaluation.deletion_curve import deletion_report, measure_deletion
    from forebear.evaluation.removal import seeds_of
    from forebear.evaluation.row_choice import amounts_of, least_overlap

    asked = _ask(
        index=index, test=test, method=method, scope=scope, target=target, curvature=curvature, damping=damping,
        spans=spans, query_spans=query_spans, span_column=span_column,
        need_labels=True, retrain=retrain, l2=l2, cache=cache, workers=workers, run=run,
        queries=queries, seed=seed, out=out, model=model, text_columns=text_columns, label_column=label_column,
        label_names=label_names, device=device, force=force,
    )  # fmt: skip
    assert asked.queries.labels is not None
    candidates = None if no_overlap is None else least_overlap(asked.retriever, asked.queries, no_overlap)
    n_rows = asked.n_live if no_overlap is None else no_overlap
    amounts = amounts_of(integers("--remove", remove), listed(share), n_rows, [str(k) for k in range(10, 101, 10)])
    retrainer = asked.open_retrainer(asked.queries.texts)
    with progress_bar(quiet=quiet) as progress:
        found = measure_deletion(
            retrainer,
            asked.scores(),
            asked.queries.labels,
            amounts,
            seeds_of(retrainer, seeds, seed),
            candidates=candidates,
            budget=budget,
            seed=seed,
            progress=progress,
        )
    report = deletion_report(found, asked.retriever, asked.queries, asked.spec, retrainer, seed, command_line())
    _warn(retrainer)
    finish(*report, out, json_out, force, quiet)


def retraining_loss(
    index: IndexFolder,
    test: Test,
    method: Methods = None,
    remove: Remove = None,
    share: Share = None,
    scope: Scope = "head",
    target: Target = "predicted",
    curvature: Curvature = None,
    damping: Damping = None,
    spans: Spans = None,
    query_spans: QuerySpans = None,
    span_column: SpanColumn = None,
    retrain: Retrain = "head",
    seeds: Seeds = 5,
    l2: L2 = 0.01,
    budget: Budget = None,
    cache: Cache = None,
    workers: Workers = 1,
    run: RunFolder = None,
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
    """See LOSS_HELP."""
    from forebear.evaluation.removal import seeds_of
    from forebear.evaluation.retraining_loss import measure_retraining_loss, retraining_loss_report
    from forebear.evaluation.row_choice import amounts_of

    asked = _ask(
        index=index, test=test, method=method, scope=scope, target=target, curvature=curvature, damping=damping,
        spans=spans, query_spans=query_spans, span_column=span_column,
        need_labels=True, retrain=retrain, l2=l2, cache=cache, workers=workers, run=run,
        queries=queries, seed=seed, out=out, model=model, text_columns=text_columns, label_column=label_column,
        label_names=label_names, device=device, force=force,
    )  # fmt: skip
    assert asked.every.labels is not None
    amounts = amounts_of(integers("--remove", remove), listed(share), asked.n_live, ["0.2", "0.5"])
    retrainer = asked.open_retrainer(asked.every.texts)
    with progress_bar(quiet=quiet) as progress:
        found = measure_retraining_loss(
            retrainer,
            asked.scores(),
            asked.every.labels,
            amounts,
            seeds_of(retrainer, seeds, seed),
            budget=budget,
            seed=seed,
            progress=progress,
        )
    report = retraining_loss_report(found, asked.retriever, asked.queries, asked.spec, retrainer, seed, command_line())
    _warn(retrainer)
    finish(*report, out, json_out, force, quiet)


def lds(
    index: IndexFolder,
    test: Test,
    method: Methods = None,
    subsets: Annotated[int, typer.Option("--subsets", help="Random halves of the rows.")] = 100,
    scope: Scope = "head",
    target: Target = "predicted",
    curvature: Curvature = None,
    damping: Damping = None,
    spans: Spans = None,
    query_spans: QuerySpans = None,
    span_column: SpanColumn = None,
    retrain: Retrain = "head",
    seeds: Seeds = 5,
    l2: L2 = 0.01,
    budget: Budget = None,
    cache: Cache = None,
    workers: Workers = 1,
    run: RunFolder = None,
    queries: NQueries = 100,
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
    """See LDS_HELP."""
    from forebear.evaluation.lds import lds_report, measure_lds
    from forebear.evaluation.removal import seeds_of
    from forebear.evaluation.row_choice import targets_of

    asked = _ask(
        index=index, test=test, method=method, scope=scope, target=target, curvature=curvature, damping=damping,
        spans=spans, query_spans=query_spans, span_column=span_column,
        need_labels=False, retrain=retrain, l2=l2, cache=cache, workers=workers, run=run,
        queries=queries, seed=seed, out=out, model=model, text_columns=text_columns, label_column=label_column,
        label_names=label_names, device=device, force=force,
    )  # fmt: skip
    targets = targets_of(asked.retriever, asked.queries, target)
    retrainer = asked.open_retrainer(asked.queries.texts)
    with progress_bar(quiet=quiet) as progress:
        found = measure_lds(
            retrainer,
            asked.scores(),
            targets,
            seeds_of(retrainer, seeds, seed),
            n_subsets=subsets,
            budget=budget,
            seed=seed,
            progress=progress,
        )
    report = lds_report(found, asked.retriever, asked.queries, asked.spec, retrainer, seed, command_line())
    _warn(retrainer)
    finish(*report, out, json_out, force, quiet)
