"""The page of ``audit sources``: the finding, the rows of the worst source, then the sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.sources.sources import ALL, ERRORS, PROPONENTS, Sources
from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_cells
from forebear.evaluation.common.statistics import FEW_VALUES
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.index import Index

LEVEL = 0.05
PER = 100  # rows, of which the worth is stated
SMALL = 1000  # tables and figure state the worth in thousandths of a nat
MOST_BARS = 12
HEADS = (
    *("source", "rows", "share of rows"),
    *("worth", "worth, 95% low", "worth, 95% high", "difference", "difference, 95% low", "difference, 95% high"),
    *("p", "p of all", "p in labels", "share of errors", "errors, 95% low", "errors, 95% high", "errors, p of all"),
    "errors, p in labels",
    *("rise without", "rise, 95% low", "rise, 95% high", "gain without", "gain, 95% low", "gain, 95% high"),
)
MEANING = (
    f"Worth: by how many thousandths of a nat the mean loss of the test rows rises without {PER} average rows of the "
    "source, to first order; below 0 it falls: they harm. Difference: the worth less that of as many others, which "
    "does not grow with the source. p: of the difference where rows are shuffled among the sources; p of all: "
    "corrected for their number; p in labels: the same, shuffled among rows of the same label, so that a source is not "
    "blamed for its mix of labels. p takes the test rows as they are; intervals are of other test rows, too, and may "
    f"hold 0 where p is small; sources of fewer than {FEW_VALUES} rows have none. Share of errors: of the source among "
    f"the first {PROPONENTS} proponents of wrong predictions, to be held against its share of rows, with p of that. "
    "Rise, gain: of the test rows' mean loss, in nats, and of their accuracy when the head is refitted without the "
    "whole source."
)


def sources_report(found: Sources, inputs: Inputs, n_listed: int) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``.

    Args:
        found: What was found.
        inputs: What the audit was given.
        n_listed: Rows of the worst source that are listed.
    """
    if n_listed < 1:
        raise InputError(f"--top {n_listed}: expected at least 1.")
    facts: dict[str, Any] = {"column": found.grouping.column, "shuffles": found.chance.n_shuffles}
    lines = provenance(
        inputs.retriever, inputs.question, inputs.command, test_rows=inputs.queries.source,
        queries=len(inputs.queries), seed=inputs.seed, **facts,
    )  # fmt: skip
    tables = [_rows_table(found, inputs.retriever.index, n_listed), _sources_table(found, inputs)]
    tables.append(_parts_table(found, len(found.scores)))
    report = Report(f"Sources: {found.grouping.column}", _summary(found), tables, [_figure(found)], provenance=lines)
    return report, _record(found, inputs)


def sources_list(found: Sources, index: Index, n_listed: int) -> WorkList:
    """The rows of the worst source that harm most, as a work list; empty where chance or its labels may explain it."""
    worst = found.worst
    name, places = found.grouping.names[worst.number], _harmful(found, n_listed if worst.p <= LEVEL else 0)
    rises = found.scores[places] / len(found.scores)
    reasons = [
        f"of {found.grouping.column} = {name}; without the row the mean test loss falls by {-rise:.2g} nats"
        for rise in rises.tolist()
    ]
    rows = found.grouping.live[places]
    return list_rows(index, rows, reasons, evidence={"rise of the test loss": rises, "loss": index.losses[rows]})


def _harmful(found: Sources, n_listed: int) -> np.ndarray:
    """Positions of the worst source's rows that harm, the most harmful first."""
    own = np.flatnonzero(found.grouping.numbers == found.worst.number)
    order = own[np.argsort(found.scores[own], kind="stable")]
    return np.asarray(order[found.scores[order] < 0][:n_listed])


def _summary(found: Sources) -> str:
    n, one, column = len(found.scores), found.worths[ALL], found.grouping.column
    first = found.worst
    worst, name, size = first.number, found.grouping.names[first.number], int(found.sizes[first.number])
    by = "share of what is behind errors" if first.by == ERRORS else "worth"
    tests = f"{len(found.sizes):,} sources" + ("" if found.errors is None else " and two questions")
    stated = f"{first.p:.2g}, of its {by}, beside all rows and beside rows of its labels, corrected for {tests}"
    parts = [f"Look first at {column} = {name}: p = {stated}."]
    if first.p > LEVEL:
        parts = [
            f"No {column} differs from the others by more than chance and its mix of labels; the least p has {name}: "
            f"{stated}."
        ]
    n_rows, of = min(PER, size), f"{PER} of its {size:,} rows are" if size > PER else f"Its {size} rows are"
    low, high = one.intervals[:, worst] * n_rows / n
    between = "" if np.isnan(low) else f" (95% interval {low:+.2g} to {high:+.2g})"
    parts.append(
        f"{of if size > 1 else 'Its one row is'} worth {one.differences[worst] * n_rows / n:+.2g} nats of the mean "
        f"test loss beside as many others{between}."
    )
    if found.errors is not None:
        share = found.errors.shares[worst].mean
        parts.append(f"It has {size / n:.1%} of the rows, and {share:.1%} of those behind wrong predictions.")
    out = found.left_out.get(worst)
    if out is not None:
        parts.append(
            f"Without all of it the accuracy is predicted to change by {100 * out.gain.mean:+.1f} points, the mean "
            f"loss by {out.rise.mean:+.3g} nats."
        )
    return f"{' '.join(parts)} On the average a row is worth most of {found.grouping.names[found.best]}."


def _rows_table(found: Sources, index: Index, n_listed: int) -> Table:
    places = _harmful(found, n_listed)
    rows = found.grouping.live[places]
    columns = row_cells(index, rows)
    labels, predictions = index.label_texts(rows), index.prediction_texts(rows)
    lines: list[list[Cell]] = [
        [
            int(row), labels[i], predictions[i], float(found.scores[places[i]] / len(found.scores)),
            float(index.losses[row]), *(column[i] for column in columns.values()),
        ]
        for i, row in enumerate(rows.tolist())
    ]  # fmt: skip
    name = found.grouping.names[found.worst.number]
    note = "Rise: of the test rows' mean loss, in nats, when the row is left out; below 0 the row harms."
    heads = ["row", "label", "prediction", "rise", "loss", *columns]
    return Table(f"Rows of {name} that harm most", heads, lines, note)


def _sources_table(found: Sources, inputs: Inputs) -> Table:
    n, one = len(found.scores), found.worths[ALL]
    scale = SMALL * PER / n
    lines: list[list[Cell]] = []
    for m in found.order.tolist():
        cells: list[Cell] = [found.grouping.names[m], int(found.sizes[m]), float(found.sizes[m] / n)]
        for value, interval in ((one.means, one.mean_intervals), (one.differences, one.intervals)):
            cells += [float(value[m] * scale), *_ends(interval[:, m] * scale)]
        cells += [float(found.chance.p[m]), float(found.chance.p_of_all[m]), float(found.chance_in_labels.p_of_all[m])]
        if found.errors is None:
            cells += [None] * 5
        else:
            share, both = found.errors.shares[m], (found.errors.chance, found.errors.chance_in_labels)
            cells += [share.mean, share.low, share.high, *(float(test.p_of_all[m]) for test in both)]
        out = found.left_out.get(m)
        for mean in (None if out is None else out.rise, None if out is None else out.gain):
            cells += [None] * 3 if mean is None else [mean.mean, mean.low, mean.high]
        lines.append(cells)
    note = MEANING
    if len(found.left_out) < len(lines):
        note += f" Left out whole were {len(found.left_out):,} of {len(lines):,} sources, at both ends."
    return Table(f"Sources by {found.grouping.column}", HEADS, lines, f"{note} Test rows: {len(inputs.queries):,}.")


def _ends(interval: np.ndarray) -> list[float | None]:
    return [None if np.isnan(end) else float(end) for end in interval]


def _parts_table(found: Sources, n: int) -> Table:
    scale = SMALL * PER / n
    lines: list[list[Cell]] = []
    for name, one in found.worths.items():
        for m in found.order.tolist():
            ends = _ends(one.intervals[:, m] * scale)
            cells: list[Cell] = [
                name,
                found.n_test[name],
                found.grouping.names[m],
                float(found.sizes[m] * one.means[m] / n),
            ]
            lines.append([*cells, float(one.means[m] * scale), float(one.differences[m] * scale), *ends])
    heads = ["test rows", "their number", "source", "sum", "worth", "difference", "difference, 95% low"]
    note = (
        "Sum: by how many nats the mean loss of these test rows rises without all rows of the source, to first order; "
        "worth and difference in thousandths of a nat, as above. Wrong: rows that the model mispredicts."
    )
    return Table("Worth to parts of the test rows", [*heads, "difference, 95% high"], lines, note)


def _figure(found: Sources) -> Figure:
    one, n = found.worths[ALL], len(found.scores)
    order = found.order
    if len(order) > MOST_BARS:
        order = np.r_[order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]]
    values = one.differences[order] * SMALL * PER / n
    ends = one.intervals[:, order].T * SMALL * PER / n
    bars = [
        None if np.isnan(low) else (max(0.0, value - low), max(0.0, high - value))
        for value, (low, high) in zip(values.tolist(), ends.tolist(), strict=True)
    ]
    drawing = bar_chart(
        [found.grouping.names[m] for m in order.tolist()], {"difference": values.tolist()},
        xlabel=f"worth of {PER} rows beside {PER} others, thousandths of a nat", digits=2,
        errors={"difference": bars},
    )  # fmt: skip
    return Figure("Worth of sources", drawing, "Below 0: rows that are worse than the others. Bars: 95% intervals.")


def _record(found: Sources, inputs: Inputs) -> dict[str, Any]:
    return {
        "question": question_record(inputs.retriever, inputs.question),
        "column": found.grouping.column,
        "sources": found.grouping.names,
        "order": found.order,
        "sizes": found.sizes,
        "n_test": found.n_test,
        "worths": {
            name: vars(one) | {of: [_ends(ends) for ends in vars(one)[of]] for of in ("mean_intervals", "intervals")}
            for name, one in found.worths.items()
        },
        "p": found.chance.p,
        "p_of_all": found.chance.p_of_all,
        "p_in_labels": found.chance_in_labels.p,
        "p_of_all_in_labels": found.chance_in_labels.p_of_all,
        "worst": vars(found.worst),
        "n_shuffles": found.chance.n_shuffles,
        "errors": None
        if found.errors is None
        else {
            "shares": [vars(mean) for mean in found.errors.shares],
            "p_of_all": found.errors.chance.p_of_all,
            "p_of_all_in_labels": found.errors.chance_in_labels.p_of_all,
        },
        "left_out": {
            found.grouping.names[m]: None if out is None else {"rise": vars(out.rise), "gain": vars(out.gain)}
            for m, out in found.left_out.items()
        },
        "seed": inputs.seed,
    }
