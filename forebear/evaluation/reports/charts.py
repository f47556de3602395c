"""Charts as SVG, in the ink of the page that they stand on."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from forebear.errors import InputError, NonFiniteError

INK = "#010203"  # stands for the page's text colour until the SVG is written
MAX_SERIES = 6  # series in one chart
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 3)))
_INKED = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
_RC: Final[dict[Any, Any]] = {
    **dict.fromkeys(_INKED, INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 10.0, "hatch.linewidth": 0.7},
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "forebear",  # the same ids each time
    "text.parse_math": False,  # a dollar sign is a dollar sign
}

Series = Mapping[str, Sequence[float]]
Errors = Mapping[str, Sequence[float | tuple[float, float] | None]]


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
        xlabel: The quantity on the axis, with its unit.
        errors: Half-widths of the error bars by series name, or pairs of those below and above, ``(g,)`` each; None
            draws no bar.
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
            style = {"color": _COLOURS[i], "edgecolor": INK, "hatch": _HATCHES[i], "linewidth": 0.8}
            axes.barh(places, values, height=thickness * 0.86, label=name, **style)
            for place, value, half in zip(places, values, halves[name], strict=True):
                if half.any():
                    axes.errorbar(value, place, xerr=half[:, None], color=INK, capsize=2.5, linewidth=1.0)
                side, align = (-1, "right") if value < 0 else (1, "left")
                shown = f"{value:.{digits}f}".replace("-", "\u2212")
                place_x = value + side * (half[int(value >= 0)] + 0.012 * spread)
                axes.text(place_x, place, shown, va="center", ha=align, fontsize=9)
        if reference is not None:
            axes.axvline(reference[1], color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
            transform = axes.get_xaxis_transform()  # x in data, y as a share of the axes' height
            axes.text(reference[1], 1.01, reference[0], transform=transform, ha="center", va="bottom", fontsize=9)
        if min(every) < 0:
            axes.axvline(0.0, color=INK, linewidth=0.8)
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
            style = {"color": _COLOURS[i], "marker": _MARKERS[i], "linestyle": _DASHES[i], "linewidth": 1.6}
            axes.plot(x, values, markersize=5, markeredgecolor=INK, markeredgewidth=0.6, **style)
            if halves[name].any():
                axes.errorbar(x, values, yerr=halves[name].T, fmt="none", color=_COLOURS[i], capsize=2.5)
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
            axes.axhline(0.0, color=INK, linestyle=(0, (4, 3)), linewidth=0.8)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return _to_svg(figure)


def scatter_chart(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str) -> str:
    """Points by series, over a common range of both axes, with the line on which both are equal.

    Args:
        points: x and y by series name, ``(n,)`` each; at most six series.
        xlabel: The quantity on the horizontal axis, with its unit.
        ylabel: That on the vertical one, in the same unit.

    Result and errors are those of `bar_chart`.
    """
    for name, (x, y) in points.items():
        _half_widths(x, {name: y}, None)
        _half_widths(y, {name: x}, None)
    if not 1 <= len(points) <= len(_COLOURS):
        raise InputError(f"{len(points)} series; a chart takes 1 to 6 series.")
    with _canvas(height=4.6) as (figure, axes):
        for i, (name, (x, y)) in enumerate(points.items()):
            axes.scatter(x, y, s=14, color=_COLOURS[i], marker=_MARKERS[i], linewidths=0, alpha=0.7, label=name)
        low = min(axes.get_xlim()[0], axes.get_ylim()[0])
        high = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], color=INK, linestyle=(0, (4, 3)), linewidth=0.9)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(points) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(points), 3), frameon=False, fontsize=9)
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
                cell = Rectangle((j - 0.5, i - 0.5), 1.0, 1.0, facecolor=fill, edgecolor=INK, linewidth=0.5)
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
    """Write the figure as SVG without date and tool name, in the text colour of the page (``currentColor``)."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def inline_svg(svg: str, prefix: str, label: str) -> str:
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


def _half_widths(labels: Sequence[Any], series: Series, errors: Errors | None) -> dict[str, np.ndarray]:
    """Check that the series can be drawn; return error bars below and above, ``(g, 2)``, 0 where there is none."""
    if not len(labels) or not 1 <= len(series) <= len(_COLOURS):
        raise InputError(f"{len(series)} series of {len(labels)} values; a chart takes 1 to 6 series, 1 value or more.")
    given = {name: (errors or {}).get(name, [None] * len(labels)) for name in series}
    halves = {
        name: np.array([half if isinstance(half, tuple) else (half or 0.0,) * 2 for half in some], np.float64)
        for name, some in given.items()
    }
    for name, values in series.items():
        if not len(values) == len(halves[name]) == len(labels):
            raise InputError(
                f"series {name!r} has {len(values)} values and {len(halves[name])} errors; expected {len(labels)}."
            )
        if not np.all(np.isfinite(np.r_[np.asarray(values, np.float64), halves[name].ravel()])):
            raise NonFiniteError(f"series {name!r} holds NaN or infinity; expected numbers. Leave such values out.")
    return halves
