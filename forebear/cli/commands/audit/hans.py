"""``forebear audit``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.commands.audit import artifact as audit_artifact
from forebear.cli.commands.audit import rows as audit_rows
from forebear.cli.options.asking import ColumnOptions, IndexOptions, command_line
from forebear.cli.options.groups import grouped
from forebear.cli.options.shared import Force, Quiet
from forebear.cli.screen.console import Variadic, listed, progress_bar, say
from forebear.cli.screen.tables import show_report

HANS_HELP = """Do the training rows behind a wrong "entailment" share the lexical-overlap shortcut?

For every non-entailment row that the model takes for entailment: the mean lexical overlap of the top training rows,
for each method, beside that of all training rows; also by heuristic, subcase and template, where the rows have such
columns. Writes report.html, table.csv and result.json.

Examples:

    forebear audit hans --index runs/nli-index --test hans.parquet --out runs/hans-audit

    forebear audit hans --index I --test hans.csv --method gc,rif,nn-cos --out A
"""

SHOWN_TABLES = 3  # overlap, accuracy and heuristics; the page has the subcases and templates too


def register(app: typer.Typer) -> None:
    """Add the commands."""
    audits = typer.Typer(help="Audit a model for artifacts, with a report.", no_args_is_help=True)
    audits.command("hans", help=HANS_HELP, cls=Variadic)(hans)
    audit_artifact.register(audits)
    audit_rows.register(audits)
    app.add_typer(audits, name="audit")


@grouped()
def hans(
    at: IndexOptions,
    columns: ColumnOptions,
    test: Annotated[str, typer.Option("--test", help="HANS: pairs labelled entailment or non-entailment.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the report.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Methods. Default: all that score rows.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Training rows looked at for each test row.")] = 10,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See HANS_HELP."""
    from forebear.evaluation.audits.artifacts.hans import audit_hans, hans_report
    from forebear.evaluation.reports.report import check_folder, write_report

    check_folder(Path(out), force=force)
    retriever = at.open()
    source = columns.open(test, retriever, need_labels=True)
    with progress_bar(quiet=quiet) as progress:
        audit = audit_hans(retriever, source, listed(method) or None, top=top, progress=progress)
    report, result = hans_report(audit, retriever, source, command_line())
    page = write_report(report, Path(out), result=result, force=force)
    show_report(replace(report, tables=report.tables[:SHOWN_TABLES]))
    say(f"wrote {page}, table.csv and result.json", quiet=quiet)
