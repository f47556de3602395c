"""``forebear apply`` and ``forebear worklist``: decisions of a work list, carried out; and tools to decide in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import MaybeIndexOptions
from forebear.cli.options.question import SampleSeed
from forebear.cli.options.report import OutputOptions, say_written
from forebear.cli.options.retraining import RecipeOptions
from forebear.cli.options.rows import MaybeTestOptions, ProblemType
from forebear.cli.screen.console import OUT, Command, progress_bar, say
from forebear.cli.screen.tables import show_report
from forebear.errors import InputError

APPLY_HELP = """Carry out a work list: write the training file with rows relabelled or left out, and a log of it.

Decisions stand in the list's column decision: relabel (to what stands in suggested), remove, quarantine (to a file of
its own) or keep. Rows without one stay as they are. Each row is found by its number and checked by its texts and its
label; the file keeps its format, order and other columns, and is never overwritten.

Examples:

    forebear apply runs/suspects/worklist.csv --train train.csv --out fixed.csv

    forebear apply runs/suspects --train train.csv --out fixed.csv --accept 0.9

    forebear apply todo.csv --train train.csv --out fixed.csv --index I --retrain full --test dev.csv
"""


OUT_FILE = typer.Option("--out", help="The file to write.", show_default=False)
EXPORT_HELP = """Write a work list for a labelling tool: Label Studio's tasks, Argilla's records, cleanlab's columns.

Label Studio gets a labelling configuration, too: OUT with the ending .xml. What is suggested becomes a prediction.

Examples:

    forebear worklist export runs/suspects --to label-studio --out tasks.json

    forebear worklist export runs/suspects/worklist.csv --to argilla --out records.json
"""
IMPORT_HELP = """Take what people answered in a labelling tool into the work list that it was exported from.

The given label as an answer means keep, another one relabel. Where annotators disagree, nothing is decided and the note
says who said what. Of cleanlab's label issues, labels become suggestions.

Examples:

    forebear worklist import export.json --from label-studio --list runs/suspects --out decided.csv

    forebear apply decided.csv --train train.csv --out fixed.csv
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("apply", help=APPLY_HELP, cls=Command)(apply)
    group = typer.Typer(help="Take work lists to labelling tools, and answers back.", no_args_is_help=True)
    group.command("export", help=EXPORT_HELP, cls=Command)(export)
    group.command("import", help=IMPORT_HELP, cls=Command)(import_)
    app.add_typer(group, name="worklist")


@grouped(
    recipe=Shown("no retraining"),
    index=Shown("none: columns are found by name, and nothing is retrained"),
    test=Shown("none: nothing is retrained"),
)
def apply(
    worklist: Annotated[
        str, typer.Argument(help="The work list: its file, or the folder of an audit.", show_default=False)
    ],
    train: Annotated[
        str,
        typer.Option("--train", help="The training file that the index was built from.", show_default=False),
    ],
    out: Annotated[str, typer.Option("--out", help="The new training file, of the same format.", show_default=False)],
    index: MaybeIndexOptions,
    test: MaybeTestOptions,
    retraining: RecipeOptions,
    output: OutputOptions,
    accept: Annotated[
        float | None,
        typer.Option(
            "--accept",
            help="Relabel as suggested also undecided rows whose label is wrong with this probability or more.",
            show_default="only what was decided",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by", help="Of --retrain: a column of the test rows, besides their label.", show_default=False
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option("--report", help="Of --retrain: folder for its report.", show_default=False),
    ] = None,
    problem_type: ProblemType = None,
    seed: SampleSeed = 0,
) -> None:
    """Apply a work list to its training file."""
    from forebear.evaluation.python import worklists
    from forebear.evaluation.python.retrainings import Retraining
    from forebear.evaluation.reports.report import check_folder
    from forebear.indexer.rows.row_format import problem_type_of
    from forebear.indexer.rows.targets.label_column import DROP_MARKED

    recipe, chosen = retraining.recipe, index.given
    if recipe is None and (test.test is not None or group_by is not None or report is not None):
        raise InputError("--test, --group-by and --report are of --retrain. Give it, or leave them out.")
    if recipe is not None and (chosen is None or test.rows is None):
        raise InputError("--retrain needs --index, the index that the list is of, and --test, labelled test rows.")
    if report is not None:
        check_folder(Path(report), force=output.force)
    todo = worklists.read(worklist)
    retriever = None if chosen is None else chosen.open()
    manifest = None if retriever is None else retriever.index.manifest
    source = test.open(
        train, like=worklists.format_of(todo) if manifest is None else manifest.row_format, unlabelled=DROP_MARKED,
        classes=() if manifest is None else manifest.spec.label_names,
        problem_type=None if problem_type is None else problem_type_of(problem_type),
    )  # fmt: skip
    retraining_of = None
    if recipe is not None and chosen is not None and retriever is not None and test.rows is not None:
        how = Retraining(
            recipe=recipe, n_seeds=retraining.n_seeds, run=retraining.run, cache=retraining.cache,
            device=chosen.first_device(),
        )  # fmt: skip
        retraining_of = worklists.begin_retraining(  # what is wrong with it is said before a file is written
            worklists.changed_by(todo, accept), retriever, test.rows, group_by=group_by, how=how, seed=seed
        )
    applied = worklists.apply(todo, source, out, accept=accept, force=output.force)
    counts = [f"{applied.count(d):,} {done}" for d, done in _DONE.items()]
    OUT.print(f"{', '.join(counts)}, {applied.n_kept:,} kept, {applied.n_undecided:,} undecided and kept", markup=False)
    if applied.n_elsewhere:
        say(f"note: {applied.n_elsewhere:,} rows of the list came from other files: apply it to each of these, too")
    say(f"wrote {out} ({applied.n_written:,} of {applied.n_rows:,} rows), {', '.join(map(str, applied.files[1:]))}")
    if retraining_of is None:
        return
    with progress_bar() as progress:
        found = retraining_of(applied, progress)
    show_report(found.report)
    if report is not None:
        say_written(found.write(report, force=output.force))


@grouped()
def export(
    worklist: Annotated[
        str, typer.Argument(help="The work list: its file, or the folder of an audit.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="label-studio, argilla or cleanlab; or csv, parquet or jsonl: the list.", show_default=False
        ),
    ],
    out: Annotated[str, OUT_FILE],
    output: OutputOptions,
) -> None:
    """Write a work list for a labelling tool."""
    from forebear.evaluation.python import worklists

    written = worklists.export(worklist, to, out, force=output.force)
    say(f"wrote {' and '.join(map(str, written))}")


@grouped()
def import_(
    answers: Annotated[str, typer.Argument(help="What the tool exported.", show_default=False)],
    tool: Annotated[str, typer.Option("--from", help="label-studio, argilla or cleanlab.", show_default=False)],
    listed: Annotated[
        str, typer.Option("--list", help="The work list that was exported to the tool.", show_default=False)
    ],
    out: Annotated[str, OUT_FILE],
    output: OutputOptions,
) -> None:
    """Take answers into a work list."""
    from forebear.evaluation.python import worklists

    found = worklists.answers(listed, tool, answers, out, force=output.force)
    OUT.print(
        f"{found.n_answered:,} of {len(found.work_list):,} rows answered, {found.n_disagreed:,} with disagreement",
        markup=False,
    )
    if found.n_unknown:
        say(f"note: {found.n_unknown:,} rows of {answers} are not on the list")
    say(f"wrote {out}")


_DONE = {"relabel": "relabelled", "remove": "removed", "quarantine": "put apart"}
