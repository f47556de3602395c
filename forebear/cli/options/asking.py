"""What the commands of ``evaluate``, ``audit`` and ``perturb`` share: options, opening, and the report at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.rows import open_rows_aloud
from forebear.cli.options.shared import (
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
    Unlabelled,
)
from forebear.cli.screen.console import listed, note, progress_bar, say, warn
from forebear.cli.screen.tables import show_report
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.evaluation.common.queries import Queries
    from forebear.evaluation.reports.report import Report
    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.question.spec import Question
    from forebear.retriever.retriever import Retriever

Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Methods. Default: all that score rows from this index.", show_default=False),
]
Test = Annotated[str, typer.Option("--test", help="Test rows: a file, folder or hub name.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Of samples and intervals.", min=0)]
Curvature = Annotated[
    str | None,
    typer.Option("--curvature", help="Of methods with H^-1: exact, ekfac, cg, lissa or identity.", show_default=False),
]
QuerySpans = Annotated[
    str | None,
    typer.Option(
        "--query-spans",
        help="Of test rows; also columns:FROM,TO or clause-of:FROM,TO. Default: as --spans.",
        show_default=False,
    ),
]
NRows = Annotated[int, typer.Option("--rows", help="Training rows, a seeded sample; 0: all.")]


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The index, and its model."""

    index: IndexFolder
    model: MovedModel = None
    device: Device = "auto"

    def open(self) -> Retriever:
        """The index's retriever."""
        from forebear.retriever.retriever import Retriever

        return Retriever(self.index, model=self.model, device=self.device)


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which columns of files of rows are meant."""

    text_columns: TextColumns = None
    label_column: LabelColumn = None
    label_names: LabelNames = None
    unlabelled: Unlabelled = "refuse"

    def open(self, path: str, retriever: Retriever, *, need_labels: bool = False) -> RowSource:
        """The rows of a file, folder or hub name; what the index's model has as a class is one."""
        return open_rows_aloud(
            path,
            text_columns=self.text_columns,
            label_column=self.label_column,
            label_names=self.label_names,
            unlabelled=self.unlabelled,
            need_labels=need_labels,
            classes=retriever.label_names,
        )


@dataclass(frozen=True, kw_only=True)
class TestOptions(ColumnOptions):
    """Test rows."""

    test: Test


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How many test rows are asked about."""

    queries: Annotated[int, typer.Option("--queries", help="Rows asked about, a seeded sample; 0: all.")] = 100
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class ScopeOptions:
    """Whose gradients, and their curvature."""

    scope: Scope = "head"
    curvature: Curvature = None
    damping: Damping = None


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(ScopeOptions):
    """What is asked, beside the methods."""

    target: Annotated[str, typer.Option("--target", help="Whose loss: predicted, gold, or a label's name.")] = (
        "predicted"
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(QuestionOptions):
    """What is asked of a search for the top rows."""

    exact: Annotated[str, typer.Option("--exact", help="rerank or full.")] = "rerank"
    recall: Recall = 0.98


@dataclass(frozen=True, kw_only=True)
class SpanOptions:
    """Which spans methods by spans compare."""

    spans: Annotated[
        str | None,
        typer.Option(
            "--spans",
            help="clauses, sentences, words, aspect, reader:MODEL or FILE.py:function. Default: those that the index "
            "stores, else clauses.",
            show_default=False,
        ),
    ] = None
    query_spans: QuerySpans = None
    span_column: Annotated[
        str | None,
        typer.Option(
            "--span-column", help="The text column that spans are in. Default: the first.", show_default=False
        ),
    ] = None

    def choices(self, retriever: Retriever) -> dict[str, Any]:
        """As a question takes them."""
        column = None if self.span_column is None else retriever.index.text_column(self.span_column)
        return {"spans": self.spans, "query_spans": self.query_spans, "span_column": column}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the report goes."""

    out: Annotated[str | None, typer.Option("--out", help="Folder for report.html, table.csv and result.json.")] = None
    json_out: JsonOut = False
    force: Force = False
    quiet: Quiet = False

    def check(self) -> None:
        """See that the report can be written, before any work."""
        from forebear.evaluation.reports.report import check_folder

        if self.out is not None:
            check_folder(Path(self.out), force=self.force)

    def progress(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """A bar on the screen, if it is wanted."""
        return progress_bar(quiet=self.quiet)

    def finish(self, report: Report, result: dict[str, Any], shown: Report | None = None) -> None:
        """Write the report where it is asked for, and show it, or what is shown of it on a screen."""
        from forebear.evaluation.reports.report import render_json, write_report

        if self.out is not None:
            page = write_report(report, Path(self.out), result=result, force=self.force)
        if self.json_out:
            sys.stdout.write(render_json({"provenance": dict(report.provenance), **result}))
        else:
            show_report(shown or report)
        if self.out is not None:
            say(f"wrote {page}, table.csv and result.json", quiet=self.quiet)


def open_retriever(options: IndexOptions, report: ReportOptions) -> Retriever:
    """The index's retriever, after seeing that the report can be written."""
    report.check()
    return options.open()


def make_question(
    retriever: Retriever, method: Sequence[str] | None, asked: ScopeOptions, *, quiet: bool, **choices: Any
) -> Question:
    """The question, checked."""
    from forebear.retriever.question.methods import pick_methods
    from forebear.retriever.question.spec import QuerySpec

    names = tuple(m.name for m in pick_methods(listed(method))) if method else retriever.row_methods()
    question = retriever.resolve(QuerySpec(methods=names, **asdict(asked), **choices))
    say_what_was_fitted(question, quiet=quiet)
    return question


def default_methods(retriever: Retriever, names: Sequence[str], asked: ScopeOptions) -> list[str]:
    """A command's own methods without those that take H^-1 where the index holds no curvature, and that is said.

    Where none is left, ``gd``.
    """
    from forebear.retriever.question.methods import METHODS

    index, scope = retriever.index, asked.scope
    held = index.manifest.spec.whitened if scope != "head" else "exact" in index.manifest.curvature["head"]
    if held or asked.curvature not in (None, "exact", "ekfac"):
        return list(names)
    lacking = [name for name in names if METHODS[name].query == "preconditioned"]
    kept = [name for name in names if name not in lacking] or ["gd"]
    if lacking:
        warn(
            f"{index.folder} holds no curvature of scope {scope}: taken by default is {', '.join(kept)}, without "
            f"{', '.join(lacking)}. For {lacking[0]} build the index with a --damping."
        )
    return kept


def say_what_was_fitted(question: Question, *, quiet: bool) -> None:
    """Say of a question beyond the head on how many rows its index was fitted, where others came or went since."""
    from forebear.retriever.coverage import fit_age

    age = fit_age(question)
    if age is not None and age.is_stale:
        warn(f"{question.index.folder}: {age}.")
    elif age is not None and not age.is_current:
        note(str(question.index.folder), f"{age}.", quiet=quiet)


def open_queries(retriever: Retriever, tested: TestOptions, sample: SampleOptions, question: Question) -> Queries:
    """The test rows that are asked about."""
    from forebear.evaluation.common.queries import sample_queries

    gold = question.spec.target == "gold"
    source = tested.open(tested.test, retriever, need_labels=gold)
    warn_of_labels(retriever, source, required=gold)
    return sample_queries(retriever, source, sample.queries, sample.seed, need_labels=gold)


def warn_of_labels(retriever: Retriever, source: RowSource, *, required: bool) -> None:
    """Say which test rows have a label that is not the model's."""
    if source.label_column is None:
        return
    labels = retriever.query_labels(source, required=required)
    warn(
        f"{source.name}: its labels are not the model's, so query_label stays empty"
        if labels is None
        else labels.remark
    )


def integers(option: str, values: Sequence[str] | None) -> list[int]:
    """Whole numbers of a list option."""
    given = listed(values)
    if not all(value.isascii() and value.isdigit() for value in given):
        raise InputError(f"{option} {','.join(given)}: expected whole numbers, such as 10,50.")
    return [int(value) for value in given]


def command_line() -> str:
    """What repeats the report."""
    return shlex.join(["forebear", *sys.argv[1:]])
