"""``forebear audit``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.commands.audit import artifact as audit_artifact
from forebear.cli.commands.audit import leaving_out as audit_leaving_out
from forebear.cli.commands.audit import poison as audit_poison
from forebear.cli.commands.audit import rows as audit_rows
from forebear.cli.commands.audit import versions as audit_versions
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import ComparedOptions
from forebear.cli.options.question import Methods, SampleSeed, Top
from forebear.cli.options.report import FolderOptions
from forebear.cli.options.retraining import RetrainOptions
from forebear.cli.options.rows import ColumnOptions, TestOptions
from forebear.cli.screen.console import Command
from forebear.cli.workers import start_workers

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Report

HANS_HELP = """Do the training rows behind a wrong "entailment" share the lexical-overlap shortcut?

For every non-entailment row that the model takes for entailment: the mean lexical overlap of the top training rows,
for each method, beside that of all training rows; also by heuristic, subcase and template, where the rows have such
columns. Several indexes stand side by side. With --retrain each model is trained again without the shortcut's rows,
with less weight on them, and without as many random ones: does non-entailment rise, what does it cost?

Examples:

    forebear audit hans --index runs/nli-index --test jhu-cogsci/hans:validation --out runs/hans-audit

    forebear audit hans --index A --index B --test hans.csv --retrain top-2 --seeds 3 --dev dev.csv --out runs/hans
"""

SHOWN_TABLES = 3  # the page has all


def register(app: typer.Typer) -> None:
    """Add the commands."""
    audits = typer.Typer(help="Audit a model for artifacts, with a report.", no_args_is_help=True)
    audits.command("hans", help=HANS_HELP, cls=Command)(hans)
    audit_artifact.register(audits)
    audit_rows.register(audits)
    audit_versions.register(audits)
    audit_leaving_out.register(audits)
    audit_poison.register(audits)
    app.add_typer(audits, name="audit")


@grouped(methods=Shown("all that score rows"), recipe=Shown("nothing is trained"))
def hans(
    index: ComparedOptions,
    test: TestOptions,
    retraining: RetrainOptions,
    output: FolderOptions,
    methods: Methods = None,
    top: Top = 10,
    dev: Annotated[
        str | None,
        typer.Option(
            "--dev",
            help="With --retrain: labelled rows like the training rows; what the change costs is measured on them.",
            rich_help_panel="Retraining",
            show_default=False,
        ),
    ] = None,
    shortcut: Annotated[
        str | None,
        typer.Option(
            "--shortcut",
            help="With --retrain: rows taken for the shortcut's, a number or a share of the training rows as 0.05; the "
            "first of the work list.",
            rich_help_panel="Retraining",
            show_default="all that the audit names",
        ),
    ] = None,
    weight: Annotated[
        float,
        typer.Option(
            "--weight",
            help="With --retrain: weight of the shortcut's rows in the loss where they are reweighted; 0: never.",
            rich_help_panel="Retraining",
        ),
    ] = 0.2,
    seed: SampleSeed = 0,
) -> None:
    """Audit wrong "entailment" answers for the lexical-overlap shortcut."""
    from forebear.evaluation.python.hans import hans

    how = retraining.how(index.each()[0].first_device(), start_workers)
    own = {"how": how, "dev": None if dev is None else partial(ColumnOptions().open, dev), "shortcut": shortcut}
    given = own | {"methods": methods, "top": top, "weight": weight, "seed": seed}
    output.call(hans, index.open(), shown=_first_tables, rows=test.rows, **given)


def _first_tables(report: Report) -> Report:
    return replace(report, tables=report.tables[:SHOWN_TABLES])
