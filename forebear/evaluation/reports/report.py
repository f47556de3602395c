"""Report folders: a page to read, a table to compute with, and the result as JSON.

``report.html`` stands alone: no script, no network, no other file. ``table.csv`` holds the tables,
``result.json`` the numbers, ``report.json`` what `forebear report` puts side by side. The figures are SVG that takes
its text colour from the page, so that one file serves light screens, dark screens and paper.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from forebear.errors import InputError, NonFiniteError, OutputExistsError, StorageError

REPORT_FILES: Final = ("report.html", "table.csv", "result.json", "report.json")
Cell = str | float | int | bool | None
Series = Mapping[str, Sequence[float]]
Errors = Mapping[str, Sequence[float | None]]

_TEMPLATES = Path(__file__).with_name("templates")
_INK = "#010203"  # stands for the page's text colour until the SVG is written
MAX_SERIES = 6  # of a chart
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 3)))
_INKED = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
_RC: Final[dict[Any, Any]] = {
    **dict.fromkeys(_INKED, _INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 10.0, "hatch.linewidth": 0.7},
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "forebear",  # the same ids each time
    "text.parse_math": False,  # a dollar sign is a dollar sign
}


@dataclass(frozen=True)
class Table:
    """A table of the report; None is a missing value, NaN is refused."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, from `bar_chart`, `line_chart` or `heat_map`."""

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


@dataclass(frozen=True)
class Report:
    """All that a report says: figures first, then tables, then data rows."""

    title: str
    summary: str  # the finding, in one or two plain sentences
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    groups: Sequence[Group] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)  # index digest, methods, the command to repeat it


def write_report(report: Report, folder: Path, *, result: Mapping[str, Any], force: bool = False) -> Path:
    """Write the four files, each under a temporary name that is then renamed; return the page's path.

    Args:
        report: What the page and the table show.
        folder: Made if missing; other files in it are left alone.
        result: The numbers, for programs. The report's provenance is added unless it has its own.
        force: Overwrite the four files.

    Raises:
        OutputExistsError: The folder holds a report and ``force`` is not given.
        NonFiniteError: A number of the tables, facts or result is NaN or infinite.
        InputError: A table has a row of the wrong length, or a figure is not plain SVG.
        StorageError: The folder cannot be written.
    """
    check_folder(folder, force=force)
    contents = {
        "report.html": render_html(report),
        "table.csv": render_csv(report.tables),
        "result.json": render_json({"provenance": dict(report.provenance), **result}),
        "report.json": render_json(_shown(report)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            _write_whole(folder / name, text)
    except OSError as error:
        raise StorageError(f"cannot write the report to {folder}: {error}. Name a folder you may write.") from error
    return folder / "report.html"


def check_folder(folder: Path, *, force: bool = False) -> None:
    """Raise OutputExistsError if a report could not be written there; for asking before long work."""
    present = [name for name in REPORT_FILES if (folder / name).exists()]
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


def render_html(report: Report) -> str:
    """The whole page, as one self-contained HTML document."""
    from markupsafe import Markup

    for table in report.tables:
        _check_table(table)
    figures = [
        (figure, Markup(_inline_svg(figure.svg, prefix=f"f{i}-", label=figure.title)))
        for i, figure in enumerate(report.figures, start=1)
    ]
    page = page_template("report.html.j2", marked=_marked)
    decimals = [_decimals(table) for table in report.tables]
    return str(page.render(report=report, figures=figures, decimals=decimals))


def render_csv(tables: Sequence[Table]) -> str:
    """All tables as one CSV text; several are stacked, with their title in a first column ``table``."""
    for table in tables:
        _check_table(table)
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    head = ["table"] if len(tables) > 1 else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *columns])
    for table in tables:
        for row in table.rows:
            cells = dict(zip(table.columns, row, strict=True))
            values = [cells.get(column) for column in columns]
            writer.writerow([*([table.title] if head else []), *("" if v is None else v for v in values)])
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
        ValueError, KeyError, TypeError: It is not what `write_report` writes.
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


def bar_chart(
    labels: Sequence[str],
    series: Series,
    *,
    xlabel: str,
    errors: Errors | None = None,
    reference: tuple[str, float] | None = None,
    digits: int = 2,
) -> str:
    """Horizontal bars in groups, each with its value written beside it.

    Args:
        labels: One per group, ``g`` of them, drawn from top to bottom.
        series: Values by series name, ``(g,)`` each; at most six series.
        xlabel: What the axis measures, with its unit.
        errors: Half-widths of the error bars by series name, ``(g,)`` each; None draws no bar.
        reference: A labelled vertical line, such as ("all rows", 0.44).
        digits: Decimals of the written values.

    Returns SVG, the same bytes for the same input. Raises InputError for no groups, no or too many series, or
    values that do not fit the labels, and NonFiniteError for NaN and infinity.
    """
    halves = _half_widths(labels, series, errors)
    n_series, n_groups = len(series), len(labels)
    thickness = 0.8 / n_series
    every = [value for values in series.values() for value in values] + ([reference[1]] if reference else [])
    spread = (max(0.0, *every) - min(0.0, *every)) or 1.0
    with _canvas(height=0.75 + 0.06 * n_series + n_groups * (0.17 + 0.21 * n_series)) as (figure, axes):
        for i, (name, values) in enumerate(series.items()):
            places = np.arange(n_groups) + (i - (n_series - 1) / 2) * thickness
            look = {"color": _COLOURS[i], "edgecolor": _INK, "hatch": _HATCHES[i], "linewidth": 0.8}
            axes.barh(places, values, height=thickness * 0.86, label=name, **look)
            for place, value, half in zip(places, values, halves[name], strict=True):
                if half:
                    axes.errorbar(value, place, xerr=half, color=_INK, capsize=2.5, linewidth=1.0)
                side, align = (-1, "right") if value < 0 else (1, "left")
                shown = f"{value:.{digits}f}".replace("-", "\u2212")
                place_x = value + side * (half + 0.012 * spread)
                axes.text(place_x, place, shown, va="center", ha=align, fontsize=9)
        if reference is not None:
            axes.axvline(reference[1], color=_INK, linestyle=(0, (4, 3)), linewidth=1.1)
            at = axes.get_xaxis_transform()  # x in data, y as a share of the axes' height
            axes.text(reference[1], 1.01, reference[0], transform=at, ha="center", va="bottom", fontsize=9)
        if min(every) < 0:
            axes.axvline(0.0, color=_INK, linewidth=0.8)
        axes.set_yticks(range(n_groups), labels)
        axes.set_ylim(n_groups - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        if n_series > 1:
            figure.legend(loc="outside upper left", ncols=min(n_series, 3), frameon=False, fontsize=9)
        return _to_svg(figure)


def line_chart(
    x: Sequence[float],
    series: Series,
    *,
    xlabel: str,
    ylabel: str,
    errors: Errors | None = None,
) -> str:
    """Lines over a common axis ``x``, told apart by marker, dash and colour, each named at its end.

    Arguments, result and errors are those of `bar_chart`, with points in place of bars.
    """
    halves = _half_widths(x, series, errors)
    with _canvas(height=3.2) as (figure, axes):
        for i, (name, values) in enumerate(series.items()):
            look = {"color": _COLOURS[i], "marker": _MARKERS[i], "linestyle": _DASHES[i], "linewidth": 1.6}
            axes.plot(x, values, markersize=5, markeredgecolor=_INK, markeredgewidth=0.6, **look)
            if any(halves[name]):
                axes.errorbar(x, values, yerr=halves[name], fmt="none", color=_COLOURS[i], capsize=2.5)
        low, high = axes.get_ylim()
        height = -math.inf
        for value, name in sorted((float(values[-1]), name) for name, values in series.items()):
            height = max(value, height + 0.065 * (high - low))  # at least a line above the name below
            colour = _COLOURS[list(series).index(name)]
            axes.annotate(
                name, (x[-1], value), (16, height), textcoords=("offset points", "data"), va="center", fontsize=9,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkB": 4},
            )  # fmt: skip
        if low < 0 < high:
            axes.axhline(0.0, color=_INK, linestyle=(0, (4, 3)), linewidth=0.8)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return _to_svg(figure)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    low: float,
    high: float,
    digits: int = 2,
) -> str:
    """A matrix as coloured cells, each with its value written in it; the brighter, the larger.

    Args:
        rows: Names from top to bottom, ``r``.
        columns: Names from left to right, ``c``.
        values: ``(r, c)``; None leaves a cell empty.
        low: Value of the darkest colour.
        high: Value of the brightest.
        digits: Decimals of the written values.

    Returns SVG, the same bytes for the same input. Raises InputError for an empty matrix or one that does not fit its
    names, and NonFiniteError for NaN and infinity.
    """
    if not len(rows) or not len(columns) or [len(row) for row in values] != [len(columns)] * len(rows):
        raise InputError(f"a heat map of {len(rows)} x {len(columns)} names takes as many values, at least 1 x 1.")
    if not all(math.isfinite(value) for row in values for value in row if value is not None):
        raise NonFiniteError("a heat map holds NaN or infinity; expected numbers, or None for none.")
    import matplotlib
    from matplotlib.patches import Rectangle

    colours = matplotlib.colormaps["cividis"]
    with _canvas(height=1.1 + 0.32 * len(rows)) as (figure, axes):
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                share = None if value is None else min(1.0, max(0.0, (value - low) / (high - low)))
                fill = "none" if share is None else colours(share)
                cell = Rectangle((j - 0.5, i - 0.5), 1.0, 1.0, facecolor=fill, edgecolor=_INK, linewidth=0.5)
                axes.add_patch(cell)
                if value is not None and share is not None:
                    shown = f"{value:.{digits}f}".replace("-", "\u2212")
                    ink = "black" if share > 0.5 else "white"
                    size = 8 * min(1.0, 12 / len(columns))
                    axes.text(j, i, shown, va="center", ha="center", fontsize=size, color=ink)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        return _to_svg(figure)


@contextmanager
def _canvas(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of the page's width, without pyplot and its global state; drawn on within our settings."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_RC):
        figure = Canvas(figsize=(7.2, max(1.3, height)), layout="constrained")
        yield figure, figure.add_subplot()


def _to_svg(figure: Any) -> str:
    """Draw; take date, tool name and fixed ink out."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _inline_svg(svg: str, prefix: str, label: str) -> str:
    """Check that the SVG holds no code and reaches for nothing outside; make its ids unique on the page."""
    from xml.etree import ElementTree

    from markupsafe import escape

    try:
        if not svg.startswith("<svg"):  # nor a document type, whose entities could grow without end
            raise ElementTree.ParseError("it does not begin with <svg")
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InputError(f"figure {label!r} is no SVG: {error}; expected what bar_chart returns.") from error
    for element in root.iter():
        names = {name.rpartition("}")[2].lower(): value for name, value in element.attrib.items()}
        code = [name for name in names if name.startswith("on")]
        outside = [value for name, value in names.items() if name == "href" and not value.startswith("#")]
        tag = element.tag.rpartition("}")[2]
        if tag in {"script", "foreignObject", "image", "a"} or code or outside:
            raise InputError(f"figure {label!r} holds {[tag, *code, *outside]}; expected no code and no links.")
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _half_widths(labels: Sequence[Any], series: Series, errors: Errors | None) -> dict[str, list[float]]:
    """Check that the series can be drawn; return their error bars, 0.0 where there is none."""
    if not len(labels) or not 1 <= len(series) <= len(_COLOURS):
        raise InputError(f"{len(series)} series of {len(labels)} values; a chart takes 1 to 6 series, 1 value or more.")
    halves = {name: [half or 0.0 for half in (errors or {}).get(name, [0.0] * len(labels))] for name in series}
    for name, values in series.items():
        if not len(values) == len(halves[name]) == len(labels):
            raise InputError(
                f"series {name!r} has {len(values)} values and {len(halves[name])} errors; expected {len(labels)}."
            )
        if not np.all(np.isfinite(np.asarray([*values, *halves[name]], dtype=np.float64))):
            raise NonFiniteError(f"series {name!r} holds NaN or infinity; expected numbers. Leave such values out.")
    return halves


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
    """Cut a text into pieces, and say which of them are words to mark."""
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
    """What JSON has no word for: NumPy values, sets, paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path | Set):
        return sorted(value) if isinstance(value, Set) else str(value)
    raise TypeError(f"a result of type {type(value).__name__} cannot be written as JSON")


def _write_whole(path: Path, text: str) -> None:
    """Write beside the target, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
