"""Report folders: a page to read, tables to compute with, and the result as JSON.

``report.html`` stands alone: no script, no network, no other file. ``table.csv`` holds the first table, and each
further one has a file of its own, named after its title (``table-accuracy.csv``); ``result.json`` holds the numbers,
``report.json`` what `forebear report` puts side by side. The figures are SVG that takes its text colour from the page,
so that one file serves light screens, dark screens and paper.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from forebear.display import framed
from forebear.errors import InputError, NonFiniteError, OutputExistsError
from forebear.evaluation.reports.charts import inline_svg
from forebear.evaluation.reports.csv_cells import as_cell
from forebear.indexer.storage.atomic import write_together

REPORT_FILES: Final = ("report.html", "table.csv", "result.json", "report.json")
Cell = str | float | int | bool | None

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Table:
    """A table of the report; None is a missing value, NaN is refused."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, from `bar_chart`, `line_chart`, `scatter_chart` or `heat_map`."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Passage:
    """One data row, shown as it is."""

    heading: str  # such as "rank 1 · row 123 · score 0.42"
    texts: Mapping[str, str]  # the text columns by name
    highlighted: Set[str] = frozenset()  # words to mark in the texts, in any case
    facts: Mapping[str, Cell] = field(default_factory=dict)  # label, prediction, loss and the like
    note: str = ""  # a remark, such as "planted"


@dataclass(frozen=True)
class Group:
    """Passages that belong together: a query and its proponents, say."""

    title: str
    passages: Sequence[Passage]
    intro: str = ""
    query: Passage | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """All that a report says: figures, tables and data rows; or, of an audit, rows to decide on and why, then these."""

    title: str
    summary: str  # the finding, in one or two plain sentences
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    groups: Sequence[Group] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)  # index digest, methods, the command to repeat it
    listed: Sequence[Passage] = ()  # the first rows of a work list, which then stand first on the page
    n_listed: int = 0  # all rows of the list

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {self.summary}>"

    def _repr_html_(self) -> str:
        return framed(render_html(self), self.title)


def write_report(
    report: Report,
    folder: Path,
    *,
    result: Mapping[str, Any],
    force: bool = False,
    beside: Mapping[str, str | bytes] = MappingProxyType({}),
) -> Path:
    """Write the files of a report together, and return the page's path.

    The folder holds the files of one report even if the process is killed: the old ones, or all of the new ones.

    Args:
        report: The report that the page and the table show.
        folder: Folder of the report, made if missing. Files of a report that is replaced go, others are left alone.
        result: The numbers, for programs. The report's provenance is added unless ``result`` has a provenance.
        force: Overwrite the files.
        beside: Further files that belong to this report: texts or bytes by name.

    Raises:
        OutputExistsError: The folder holds a report and ``force`` is not given.
        NonFiniteError: A number of the tables, facts or result is NaN or infinite.
        InputError: A table has a row of the wrong length, or a figure is not plain SVG.
        StorageError: The folder cannot be written.
    """
    tables = dict(zip(table_files(report), report.tables, strict=True))
    check_folder(folder, force=force, beside=beside)
    contents: dict[str, str | bytes] = {
        "report.html": render_html(report),
        "table.csv": "",
        **{name: render_csv(table) for name, table in tables.items()},
        "result.json": render_json({"provenance": dict(report.provenance), **result}),
        "report.json": render_json({**_shown(report), "beside": list(beside)}),
    }
    contents |= beside
    written = {name: c.encode() if isinstance(c, str) else c for name, c in contents.items()}
    write_together(folder, written, instead_of=_further_files(folder))
    return folder / "report.html"


def table_files(report: Report) -> list[str]:
    """Names of the files of a report's tables: ``table.csv``, and the others by their titles."""
    names: list[str] = []
    for table in report.tables:
        slug = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")[:60].rstrip("-") or "more"
        name = f"table-{slug}.csv" if names else REPORT_FILES[1]
        while name in names:
            name = f"{name.removesuffix('.csv')}-{len(names) + 1}.csv"
        names.append(name)
    return names


def _further_files(folder: Path) -> list[str]:
    """Tables of the report that a folder holds, and files beside it, as its ``report.json`` names them."""
    try:
        text = (folder / "report.json").read_text(encoding="utf-8")
        names = [*table_files(report_from_json(text)), *json.loads(text).get("beside", ())]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not of a report
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def check_folder(folder: Path, *, force: bool = False, beside: Iterable[str] = ()) -> None:
    """Raise OutputExistsError if no report, with files ``beside`` it, could be written to the folder.

    Which tables a report has is known only after the work, so that any file named like one counts.
    """
    tables = sorted(path.name for path in folder.glob("table-*.csv")) if folder.is_dir() else []
    present = [*(name for name in (*REPORT_FILES, *beside) if (folder / name).exists()), *tables]
    if (present and not force) or folder.is_file():
        raise OutputExistsError(
            f"{folder} already holds {', '.join(present) or 'other data'}; expected a folder without a report. "
            "Name another folder, or give --force to overwrite a report."
        )


def page_template(name: str, **filters: Callable[..., Any]) -> Any:
    """A template that shares the style sheet and the ``cell`` filter."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(cell=format_cell, **filters)
    return environment.get_template(name)


def page_style() -> str:
    """The style sheet of all pages, and the one of marked texts."""
    return "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "marks.css"))


def render_html(report: Report) -> str:
    """The whole page, as one self-contained HTML document."""
    from markupsafe import Markup

    for table in report.tables:
        _check_table(table)
    figures = [
        (figure, Markup(inline_svg(figure.svg, prefix=f"f{i}-", label=figure.title)))
        for i, figure in enumerate(report.figures, start=1)
    ]
    page = page_template("report.html.j2", marked=_marked)
    decimals = [_decimals(table) for table in report.tables]
    return str(page.render(report=report, figures=figures, decimals=decimals))


def render_csv(table: Table) -> str:
    """A table as CSV text.

    Texts that a spreadsheet would take for formulas are guarded; numbers stay numbers, also those written as text.
    """
    _check_table(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(map(as_cell, row) for row in table.rows)
    return text.getvalue()


def _shown(report: Report) -> dict[str, Any]:
    """A report without its data rows, for ``report.json``."""
    return {
        "title": report.title,
        "summary": report.summary,
        "tables": [vars(table) for table in report.tables],
        "figures": [vars(figure) for figure in report.figures],
        "provenance": dict(report.provenance),
    }


def report_from_json(text: str) -> Report:
    """The report, without its data rows, that ``report.json`` holds.

    Raises:
        ValueError, KeyError, TypeError: The text is not a ``report.json`` of `write_report`.
    """
    found = json.loads(text)
    tables = [Table(**table) for table in found["tables"]]
    figures = [Figure(**figure) for figure in found["figures"]]
    return Report(found["title"], found["summary"], tables, figures, (), found["provenance"])


def format_cell(value: Cell, decimals: int | None = None) -> str:
    """A cell as the reader sees it: a true minus sign, thousands apart, a dash for None.

    Floats get ``decimals``; without it, and where so few would hide the value, four significant digits.
    """
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        text = f"{value:,}".replace(",", "\u202f")
    elif isinstance(value, float | np.floating):
        size = abs(value)
        if not math.isfinite(size):
            raise NonFiniteError(f"the report shows a value {value}; expected a number, or None for none.")
        if decimals is not None and (size == 0 or size >= 5 * 10.0 ** (-decimals)):
            text = f"{value:.{decimals}f}"
        else:
            text = f"{value:.4g}" if size == 0 or 1e-4 <= size < 1e5 else f"{value:.3e}"
    else:
        return str(value)
    return text.replace("-", "\u2212")


def _check_table(table: Table) -> None:
    for i, row in enumerate(table.rows):
        where = f"row {i} of table {table.title!r}"
        if len(row) != len(table.columns):
            raise InputError(f"{where} has {len(row)} cells; expected {len(table.columns)}, None where empty.")
        for column, cell in zip(table.columns, row, strict=True):
            if isinstance(cell, float | np.floating) and not math.isfinite(cell):
                raise NonFiniteError(f"{where} has {cell} under {column!r}; expected a number, or None.")


def _decimals(table: Table) -> list[int | None]:
    """Decimals for each column of numbers, so that its largest shows four digits; None for a text column."""
    decimals: list[int | None] = []
    for i in range(len(table.columns)):
        cells = [row[i] for row in table.rows if row[i] is not None]
        numbers = [c for c in cells if isinstance(c, int | float | np.number) and not isinstance(c, bool)]
        largest = max((abs(float(number)) for number in numbers), default=0.0)
        digits = 3 - math.floor(math.log10(largest)) if largest else 0
        decimals.append(min(4, max(0, digits)) if numbers and len(numbers) == len(cells) else None)
    return decimals


def _marked(text: str, words: Set[str]) -> list[tuple[str, bool]]:
    """A text cut into pieces, each with whether it is a word to mark."""
    wanted = {re.sub(r"^\W+|\W+$", "", word.lower()) for word in words} - {""}
    pieces = re.findall(r"\w+(?:['’-]\w+)*|\W+", text) if wanted else [text]
    return [(piece, piece.lower() in wanted) for piece in pieces]


def render_json(result: Mapping[str, Any]) -> str:
    """A result as JSON text; NaN and infinity are refused."""
    try:
        return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise NonFiniteError(f"the result holds NaN or infinity ({error}); expected numbers, or None.") from error


def _plain(value: Any) -> Any:
    """A value that JSON cannot write (of NumPy, a set, a path) as one that it can."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path | Set):
        return sorted(value) if isinstance(value, Set) else str(value)
    raise TypeError(f"a result of type {type(value).__name__} cannot be written as JSON")
