"""``forebear evaluate``: the evaluations that retrain the model without some of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.asking import command_line, open_retriever, say_what_was_fitted
from forebear.cli.options.groups import Options, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, QuestionOptions, SampleOptions, SpanOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.retraining import AmountOptions, BudgetOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command, listed, warn
from forebear.cli.workers import start_workers

if TYPE_CHECKING:
    from forebear.evaluation.common.queries import QueryRows
    from forebear.evaluation.reports.report import Report
    from forebear.evaluation.retraining.jobs import Retrainer
    from forebear.retriever.question.spec import Question
    from forebear.retriever.retriever import Retriever
    from forebear.retriever.scores import Scores

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


@dataclass(frozen=True, kw_only=True)
class AskOptions(Options):
    """The options that all four commands have."""

    index: IndexOptions
    test_rows: TestOptions
    method: Methods = None
    question: QuestionOptions
    spans: SpanOptions
    retraining: BudgetOptions
    sample: SampleOptions
    report: ReportOptions

    def open(self, *, need_labels: bool = False) -> _Opened:
        """Open index, question and test rows, after a check that the report can be written."""
        from forebear.evaluation.common.queries import sample_queries
        from forebear.evaluation.common.span_queries import sample_span_queries
        from forebear.evaluation.retraining.row_choice import removal_methods
        from forebear.retriever.question.spec import QuerySpec

        retriever, seed = open_retriever(self.index, self.report), self.sample.seed
        methods = removal_methods(retriever, listed(self.method))
        spec = QuerySpec(methods=methods, **asdict(self.question), **self.spans.choices(retriever))
        question = retriever.resolve(spec)
        say_what_was_fitted(question, quiet=self.report.quiet)
        labelled = need_labels or self.question.target == "gold"
        source = self.test_rows.open(self.test_rows.test, retriever, need_labels=labelled)
        start_workers(self.retraining.workers, self.cache)
        return _Opened(
            options=self,
            retriever=retriever,
            question=question,
            queries=sample_span_queries(retriever, source, question, self.sample.queries, seed, need_labels=labelled),
            all_rows=sample_queries(retriever, source, 0, seed, need_labels=labelled),
        )

    @property
    def cache(self) -> Path:
        """Folder of finished retrainings."""
        return (
            Path(self.retraining.cache)
            if self.retraining.cache is not None
            else Path(f"{Path(self.index.index).resolve()}-retraining")
        )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Index, question and test rows that a command's options name.

    Attributes:
        options: The options.
        retriever: The retriever of the index.
        question: The question, resolved against the index.
        queries: Sampled test rows, for which scores are computed.
        all_rows: All test rows.
    """

    options: AskOptions
    retriever: Retriever
    question: Question
    queries: QueryRows
    all_rows: QueryRows

    @property
    def n_live(self) -> int:
        """Rows of the index that are not retired."""
        return len(self.retriever.index.live)

    def scores(self) -> Scores:
        """Scores of all live rows, by method."""
        from forebear.evaluation.retraining.row_choice import row_scores

        return row_scores(self.retriever, self.queries, self.question)

    def open_retrainer(self, rows: QueryRows) -> Retrainer:
        """A retrainer whose models are asked about some test rows."""
        from forebear.evaluation.retraining.recipes import open_retrainer

        retraining, device = self.options.retraining, self.options.index.device
        return open_retrainer(
            self.retriever,
            retraining.retrain,
            rows.texts,
            self.options.cache,
            run=retraining.run,
            l2=retraining.l2,
            device=device,
        )

    def seeds(self, retrainer: Retrainer) -> tuple[int, ...]:
        """Random seeds of the retrainings."""
        from forebear.evaluation.retraining.changes import seeds_of

        return seeds_of(retrainer, self.options.retraining.seeds, self.options.sample.seed)

    def finish(
        self, make_report: Callable[..., tuple[Report, dict[str, Any]]], found: Any, retrainer: Retrainer
    ) -> None:
        """Warn of damaged files of the cache; write and show the report."""
        for line in retrainer.warnings:
            warn(line)
        seed = self.options.sample.seed
        page = make_report(found, self.retriever, self.queries, self.question, retrainer, seed, command_line())
        self.options.report.finish(*page)


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("removal", REMOVAL_HELP, removal),
        ("deletion-curve", DELETION_HELP, deletion_curve),
        ("retraining-loss", LOSS_HELP, retraining_loss),
        ("lds", LDS_HELP, lds),
    ):
        evaluations.command(name, help=help_text, cls=Command)(command)


@grouped(queries=50)
def removal(
    options: AskOptions,
    amounts: AmountOptions,
    sides: Annotated[
        list[str] | None,
        typer.Option("--sides", help="Which rows are removed: top, bottom, least.", show_default="all three"),
    ] = None,
) -> None:
    """Report how predictions change when the rows of a ranking are removed."""
    from forebear.evaluation.retraining.removal import measure_removal, removal_report
    from forebear.evaluation.retraining.row_choice import sides_of

    opened = options.open()
    remove, chosen_sides = amounts.of(opened.n_live, ["0.1"]), sides_of(listed(sides))
    retrainer = opened.open_retrainer(opened.queries)
    with options.report.progress() as progress:
        found = measure_removal(
            retrainer,
            opened.scores(),
            remove,
            opened.seeds(retrainer),
            sides=chosen_sides,
            budget=options.retraining.budget,
            seed=options.sample.seed,
            progress=progress,
        )
    opened.finish(removal_report, found, retrainer)


@grouped(queries=30, target="gold")
def deletion_curve(
    options: AskOptions,
    amounts: AmountOptions,
    no_overlap: Annotated[
        int | None,
        typer.Option(
            "--no-overlap",
            help="Only so many rows of least tf-idf overlap with the test row may be removed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Report the gold class's probability as more of the top rows are removed."""
    from forebear.evaluation.retraining.deletion_curve import deletion_report, measure_deletion
    from forebear.evaluation.retraining.row_choice import least_overlap

    opened = options.open(need_labels=True)
    assert opened.queries.labels is not None
    candidates = None if no_overlap is None else least_overlap(opened.retriever, opened.queries, no_overlap)
    n_rows = opened.n_live if no_overlap is None else no_overlap
    remove = amounts.of(n_rows, [str(k) for k in range(10, 101, 10)])
    retrainer = opened.open_retrainer(opened.queries)
    with options.report.progress() as progress:
        found = measure_deletion(
            retrainer,
            opened.scores(),
            opened.queries.labels,
            remove,
            opened.seeds(retrainer),
            candidates=candidates,
            budget=options.retraining.budget,
            seed=options.sample.seed,
            progress=progress,
        )
    opened.finish(deletion_report, found, retrainer)


@grouped(queries=200)
def retraining_loss(options: AskOptions, amounts: AmountOptions) -> None:
    """Report the accuracy that is lost without the rows of largest summed score."""
    from forebear.evaluation.retraining.retraining_loss import measure_retraining_loss, retraining_loss_report

    opened = options.open(need_labels=True)
    assert opened.all_rows.labels is not None
    remove = amounts.of(opened.n_live, ["0.2", "0.5"])
    retrainer = opened.open_retrainer(opened.all_rows)
    with options.report.progress() as progress:
        found = measure_retraining_loss(
            retrainer,
            opened.scores(),
            opened.all_rows.labels,
            remove,
            opened.seeds(retrainer),
            budget=options.retraining.budget,
            seed=options.sample.seed,
            progress=progress,
        )
    opened.finish(retraining_loss_report, found, retrainer)


@grouped(queries=100)
def lds(
    options: AskOptions,
    subsets: Annotated[
        int, typer.Option("--subsets", help="Random halves of the training rows; a model is trained on each.")
    ] = 100,
) -> None:
    """Report how well summed scores foretell models trained on random halves."""
    from forebear.evaluation.retraining.lds import lds_report, measure_lds
    from forebear.evaluation.retraining.row_choice import targets_of

    opened = options.open()
    targets = targets_of(opened.retriever, opened.queries, options.question.target)
    retrainer = opened.open_retrainer(opened.queries)
    with options.report.progress() as progress:
        found = measure_lds(
            retrainer,
            opened.scores(),
            targets,
            opened.seeds(retrainer),
            n_subsets=subsets,
            budget=options.retraining.budget,
            seed=options.sample.seed,
            progress=progress,
        )
    opened.finish(lds_report, found, retrainer)
