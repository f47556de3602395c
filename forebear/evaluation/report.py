"""Report folders: a page to read, a table to compute with, and the result as JSON.

``report.html`` stands alone: no script, no network, no other file. ``table.csv`` holds the tables,
``result.json`` the numbers. The figures are SVG that takes its text colour from the page, so that one
file serves light screens, dark screens and paper.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from forebear.errors import InputError, NonFiniteError, OutputExistsError, StorageError

REPORT_FILES: Final = ("report.html", "table.csv", "result.json")
Cell = str | float | int | bool | None

N_OPEN_ROWS: Final = 40  # a longer table is folded away
N_OPEN_PASSAGES: Final = 4  # a longer list of passages is folded after these

_TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 3)))
_RC: Final[dict[Any, Any]] = {
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "forebear",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "hatch.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{name}.color": _INK for name in ("text", "xtick", "ytick")},
    **{f"axes.{name}": _INK for name in ("edgecolor", "labelcolor", "titlecolor")},
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
    """A drawing, from `bar_chart` or `line_chart`."""

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
    provenance: Mapping[str, str] = field(
        default_factory=dict
    )  # index digest, methods, the command to repeat it


def write_report(report: Report, folder: Path, *, result: Mapping[str, Any], force: bool = False) -> Path:
    """Write ``report.html``, ``table.csv`` and ``result.json`` into a folder.

    Each file is written under a temporary name and renamed, so that it is whole or absent.

    Args:
        report: What the page and the table show.
        folder: Made if missing; other files in it are left alone.
        result: The numbers, for programs. NumPy values are written as plain ones. The report's
            provenance is added under ``provenance`` unless the result has its own.
        force: Overwrite the three files.

    Returns:
        The path of ``report.html``.

    Raises:
        OutputExistsError: The folder holds a report and ``force`` is not given.
        NonFiniteError: A number of the tables, facts or result is NaN or infinite.
        InputError: A table has a row of the wrong length, or a figure is not plain SVG.
        StorageError: The folder cannot be written.
    """
    folder = Path(folder)
    present = [name for name in REPORT_FILES if (folder / name).exists()]
    if present and not force:
        raise OutputExistsError(
            f"{folder} already holds {', '.join(present)}; expected no report there. "
            "Name another folder, or give --force to overwrite the report."
        )
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; expected a folder to write the report into.")
    contents = {
        "report.html": render_html(report),
        "table.csv": render_csv(report.tables),
        "result.json": _render_json({"provenance": dict(report.provenance), **result}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            _write_whole(folder / name, text)
    except OSError as error:
        raise StorageError(
            f"cannot write the report to {folder}: {error}. Free space, or name another folder."
        ) from error
    return folder / "report.html"


def render_html(report: Report) -> str:
    """The whole page, as one self-contained HTML document."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    for table in report.tables:
        _check_table(table)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=format_cell, marked=_marked)
    figures = [
        (figure, Markup(_inline_svg(figure.svg, prefix=f"f{i}-", label=figure.title)))
        for i, figure in enumerate(report.figures, start=1)
    ]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return page.render(
        report=report,
        figures=figures,
        decimals=[_decimals(table) for table in report.tables],
        n_open_rows=N_OPEN_ROWS,
        n_open_passages=N_OPEN_PASSAGES,
    )


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


def format_cell(value: Cell, decimals: int | None = None) -> str:
    """A cell as the reader sees it: a true minus sign, thousands apart, a dash for None.

    Args:
        value: What the cell holds.
        decimals: For floats; by default, and where so few would hide the value, four significant digits.
    """
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        text = f"{value:,}".replace(",", "\u202f")
    elif isinstance(value, float | np.floating):
        size = abs(value)
        if decimals is not None and (size == 0 or size >= 5 * 10.0 ** (-decimals)):
            text = f"{value:.{decimals}f}"
        else:
            text = f"{value:.4g}" if size == 0 or 1e-4 <= size < 1e5 else f"{value:.3e}"
    else:
        return str(value)
    return text.replace("-", "\u2212")


def bar_chart(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    errors: Mapping[str, Sequence[float | None]] | None = None,
    reference: tuple[str, float] | None = None,
    digits: int = 2,
) -> str:
    """Horizontal bars in groups, each with its value written beside it.

    Args:
        labels: One per group, ``g`` of them, drawn from top to bottom.
        series: Values by series name, ``(g,)`` each; at most six series.
        xlabel: What the axis measures, with its unit.
        errors: Half-widths of the error bars by series name; None draws no bar.
        reference: A labelled vertical line, such as ("all rows", 0.44).
        digits: Decimals of the written values.

    Returns:
        SVG, the same bytes for the same input.

    Raises:
        InputError: No groups, no or too many series, or values that do not fit the labels.
        NonFiniteError: A value is NaN or infinite.
    """
    _check_series(labels, series, "bars")
    n_series, n_groups = len(series), len(labels)
    figure, axes = _new_figure(height=0.75 + 0.06 * n_series + n_groups * (0.17 + 0.21 * n_series))
    thickness = 0.8 / n_series
    every = [value for values in series.values() for value in values] + ([reference[1]] if reference else [])
    spread = (max(0.0, *every) - min(0.0, *every)) or 1.0
    for i, (name, values) in enumerate(series.items()):
        places = np.arange(n_groups) + (i - (n_series - 1) / 2) * thickness
        axes.barh(
            places, values, height=thickness * 0.86, label=name, linewidth=0.8,
            color=_COLOURS[i], edgecolor=_INK, hatch=_HATCHES[i],
        )  # fmt: skip
        halves = [0.0 if half is None else half for half in (errors or {}).get(name, [0.0] * n_groups)]
        for place, value, half in zip(places, values, halves, strict=True):
            if half:
                axes.errorbar(value, place, xerr=half, color=_INK, capsize=2.5, linewidth=1.0, capthick=1.0)
            side = -1 if value < 0 else 1
            shown = f"{value:.{digits}f}".replace("-", "\u2212")
            axes.text(value + side * (half + 0.012 * spread), place, shown, va="center", fontsize=9,
                      ha="left" if side > 0 else "right")  # fmt: skip
    if reference is not None:
        axes.axvline(reference[1], color=_INK, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.annotate(reference[0], (reference[1], 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", ha="center", va="bottom", fontsize=9)  # fmt: skip
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
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    errors: Mapping[str, Sequence[float | None]] | None = None,
) -> str:
    """Lines over a common axis ``x``, told apart by marker, dash and colour, each named at its end.

    Arguments, result and errors are those of `bar_chart`, with points in place of bars.
    """
    _check_series(x, series, "points")
    figure, axes = _new_figure(height=3.2)
    for i, (name, values) in enumerate(series.items()):
        halves = [0.0 if half is None else half for half in (errors or {}).get(name, [0.0] * len(x))]
        axes.errorbar(
            x, values, yerr=halves if any(halves) else None, color=_COLOURS[i], marker=_MARKERS[i], capsize=2.5,
            linestyle=_DASHES[i], linewidth=1.6, elinewidth=1.0, markersize=5, markeredgecolor=_INK,
            markeredgewidth=0.6,
        )  # fmt: skip
    low, high = axes.get_ylim()
    height = -math.inf
    for value, name in sorted((float(values[-1]), name) for name, values in series.items()):
        height = max(value, height + 0.065 * (high - low))  # at least a line above the name below
        axes.annotate(name, (x[-1], height), xytext=(8, 0), textcoords="offset points", va="center",
                      fontsize=9, annotation_clip=False)  # fmt: skip
    if low < 0 < high:
        axes.axhline(0.0, color=_INK, linestyle=(0, (4, 3)), linewidth=0.8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _to_svg(figure)


def _new_figure(height: float) -> tuple[Any, Any]:
    """A figure of the page's width, without pyplot and its global state."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_RC):
        figure = Canvas(figsize=(7.2, max(1.3, height)), layout="constrained")
        return figure, figure.add_subplot()


def _to_svg(figure: Any) -> str:
    """Draw; take dates, tool names and fixed text colours out."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_RC):
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
            raise InputError(
                f"figure {label!r} holds {[tag, *code, *outside]}; expected no code and no links."
            )
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _check_series(labels: Sequence[Any], series: Mapping[str, Sequence[float]], what: str) -> None:
    if not len(labels) or not 1 <= len(series) <= len(_COLOURS):
        raise InputError(
            f"{len(labels)} {what} of {len(series)} series; a chart needs at least one of each and can tell "
            f"{len(_COLOURS)} series apart. Split the chart."
        )
    for name, values in series.items():
        if len(values) != len(labels):
            raise InputError(
                f"series {name!r} has {len(values)} values for {len(labels)} {what}; expected as many."
            )
        if not np.all(np.isfinite(np.asarray(values, dtype=np.float64))):
            raise NonFiniteError(f"series {name!r} holds NaN or infinity; leave those {what} out.")


def _check_table(table: Table) -> None:
    for i, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise InputError(
                f"row {i} of table {table.title!r} has {len(row)} cells for {len(table.columns)} columns; "
                "expected one a column (None where there is no value)."
            )
        for column, cell in zip(table.columns, row, strict=True):
            if isinstance(cell, float | np.floating) and not math.isfinite(cell):
                raise NonFiniteError(
                    f"row {i}, column {column!r} of table {table.title!r} is {cell}; "
                    "expected a number, or None where there is none."
                )


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
    wanted = {word.lower() for word in words}
    pieces = re.findall(r"\w+(?:['’-]\w+)*|\W+", text) if wanted else [text]
    return [(piece, piece.lower() in wanted) for piece in pieces]


def _render_json(result: Mapping[str, Any]) -> str:
    try:
        return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise NonFiniteError(
            f"the result holds NaN or infinity ({error}); expected numbers, or None."
        ) from error


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy values, paths, sets."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
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
