"""``forebear audit``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from forebear.cli.commands.audit import artifact as audit_artifact
from forebear.cli.commands.audit import leaving_out as audit_leaving_out
from forebear.cli.commands.audit import rows as audit_rows
from forebear.cli.commands.audit import versions as audit_versions
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, Top
from forebear.cli.options.report import FolderOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Report

HANS_HELP = """Do the training rows behind a wrong "entailment" share the lexical-overlap shortcut?

For every non-entailment row that the model takes for entailment: the mean lexical overlap of the top training rows,
for each method, beside that of all training rows; also by heuristic, subcase and template, where the rows have such
columns. Test rows are pairs labelled entailment or non-entailment. Writes report.html, table.csv, result.json and
report.json.

Examples:

    forebear audit hans --index runs/nli-index --test hans.parquet --out runs/hans-audit

    forebear audit hans --index I --test hans.csv --method gc,rif,nn-cos --out A
"""

SHOWN_TABLES = 3  # overlap, accuracy and heuristics; the page has the subcases and templates too


def register(app: typer.Typer) -> None:
    """Add the commands."""
    audits = typer.Typer(help="Audit a model for artifacts, with a report.", no_args_is_help=True)
    audits.command("hans", help=HANS_HELP, cls=Command)(hans)
    audit_artifact.register(audits)
    audit_rows.register(audits)
    audit_versions.register(audits)
    audit_leaving_out.register(audits)
    app.add_typer(audits, name="audit")


@grouped(methods=Shown("all that score rows"))
def hans(
    index: IndexOptions,
    test: TestOptions,
    output: FolderOptions,
    methods: Methods = None,
    top: Top = 10,
) -> None:
    """Audit wrong "entailment" answers for the lexical-overlap shortcut."""
    from forebear.evaluation.python.audits import hans

    output.call(hans, index.open(), shown=_first_tables, rows=test.rows, methods=methods, top=top)


def _first_tables(report: Report) -> Report:
    return replace(report, tables=report.tables[:SHOWN_TABLES])
