"""Options that name files of rows and their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Options
from forebear.cli.screen.console import listed, say, warn

if TYPE_CHECKING:
    from forebear.indexer.rows.row_format import RowFormat
    from forebear.indexer.rows.row_source import RowSource

TEST = typer.Option(
    "--test",
    help="Test rows: a file, a save_to_disk folder or a hub name. Cut at the index's --max-length.",
    show_default=False,
)
LabelNames = Annotated[
    list[str] | None,
    typer.Option(
        "--label-names", help="Names that integer labels stand for, in the order of the numbers.", show_default=False
    ),
]
TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text-columns",
        help="Text columns, one or two, in order of encoding.",
        show_default="the run's or the index's, else found by name",
    ),
]
ProblemType = Annotated[
    str | None,
    typer.Option(
        "--problem-type",
        help="What a row's target is: single-label, multi-label (lists of labels, or several --label-column of 0 "
        "and 1) or regression (numbers).",
        show_default="multi-label where there are lists or several columns, else single-label",
        rich_help_panel="Rows",
    ),
]
Unlabelled = Annotated[
    str | None,
    typer.Option(
        "--unlabelled",
        help="Rows without a gold label, where labels are needed: refuse; drop, and number the rows that are kept; "
        "drop-marked: drop those marked by '-' or -1, refuse null; keep '-' or -1 as a class. What the model has as a "
        "class is one.",
        show_default="as the run did, else drop-marked of training rows and refuse of test rows",
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        "--train", help="The rows that the model was trained on, labelled.", show_default=False, rich_help_panel="Rows"
    ),
]
TEXT = typer.Option(
    "--text",
    help="One text to explain (with --pair: the first of two).",
    show_default=False,
    rich_help_panel="Rows",
)
Pair = Annotated[
    str | None,
    typer.Option("--pair", help="The second text, where rows are pairs.", show_default=False, rich_help_panel="Rows"),
]


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(Options, panel="Rows"):
    """Names of the columns of files of rows, and the treatment of unlabelled rows."""

    text_columns: TextColumns = None
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column",
            help="The column of gold labels; several, a,b,c, where each holds one label's 0 and 1.",
            show_default="the run's or the index's, else found by name",
        ),
    ] = None
    label_names: LabelNames = None
    unlabelled: Unlabelled = None
    delimiter: Annotated[
        str | None,
        typer.Option(
            "--delimiter",
            help="What parts the values of a CSV or TSV file: a character, or tab, semicolon, bar.",
            show_default="the run's or the index's, else a comma, of .tsv a tab",
        ),
    ] = None
    encoding: Annotated[
        str | None,
        typer.Option(
            "--encoding",
            help="Encoding of a text file, such as latin-1 or cp1252.",
            show_default="UTF-8, else the run's or the index's",
        ),
    ] = None

    def open(
        self,
        path: str,
        *,
        classes: Sequence[str] = (),
        need_labels: bool = True,
        like: RowFormat | None = None,
        unlabelled: str = "refuse",
        problem_type: str | None = None,
    ) -> RowSource:
        """Open rows, say what was taken without an option, and warn of rows left out or without label or words.

        Args:
            path: A file, folder or hub name.
            classes: The model's class names, where the model is known.
            need_labels: Whether rows without a label are refused, or left out.
            like: How the run or the index read its rows.
            unlabelled: What becomes of rows without a label where ``--unlabelled`` is not given.
            problem_type: What a row's target is; None: as the run or the index says, else by the columns.
        """
        from forebear.indexer.rows.opening import open_rows

        source = open_rows(
            path,
            text_columns=listed(self.text_columns) or None,
            label_column=self.label_column,
            label_names=listed(self.label_names) or None,
            need_labels=need_labels,
            unlabelled=self.unlabelled or unlabelled,
            classes=classes,
            delimiter=self.delimiter,
            encoding=self.encoding,
            like=like,
            problem_type=problem_type,
        )
        if source.taken is not None:
            say(f"note: {source.taken}")
        for remark in source.remarks():
            warn(remark)
        return source


@dataclass(frozen=True, kw_only=True)
class TestOptions(ColumnOptions):
    """Test rows."""

    test: Annotated[str, TEST]

    @property
    def rows(self) -> Callable[..., RowSource]:
        """Opens the test rows, for a function that knows the model's classes, and whether it needs labels."""
        return partial(self.open, self.test)


@dataclass(frozen=True, kw_only=True)
class MaybeTestOptions(ColumnOptions):
    """Test rows, which may be left out."""

    test: Annotated[str | None, TEST] = None

    @property
    def rows(self) -> Callable[..., RowSource] | None:
        """Opens the test rows, if there are any; see :class:`TestOptions`."""
        return None if self.test is None else partial(self.open, self.test)
