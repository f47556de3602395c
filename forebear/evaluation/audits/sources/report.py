"""The page of ``audit sources``: the finding, the rows of the worst source, then the sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.sources.sources import ALL, PROPONENTS, Sources
from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_cells
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
    *("rise without", "rise, 95% low", "rise, 95% high", "gain without", "gain, 95% low", "gain, 95% high"),
)
MEANING = (
    f"Worth: by how many thousandths of a nat the mean loss of the test rows rises without {PER} average rows of the "
    "source, to first order; below 0 it falls: they harm. Difference: the worth less that of as many others, which "
    "does not grow with the source. p: of the difference where rows are shuffled among the sources; p of all: "
    "corrected for their number; p in labels: shuffled among rows of the same label, so that a source is not blamed "
    "for its mix of labels. p takes the test rows as they are; intervals are of other test rows, too, and may hold 0 "
    f"where p is small. Share of errors: of the source among the first {PROPONENTS} proponents of wrong predictions, "
    "to be held against its share of rows, with p of that. Rise, gain: of the test rows' mean loss, in nats, and of "
    "their accuracy when the head is refitted without the whole source."
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
    """The rows of the worst source that harm most, as a work list; empty where it is worse by chance alone."""
    worst, p = found.worst
    name, places = found.grouping.names[worst], _harmful(found, n_listed if p <= LEVEL else 0)
    rises = found.scores[places] / len(found.scores)
    reasons = [
        f"of {found.grouping.column} = {name}; without the row the mean test loss falls by {-rise:.2g} nats"
        for rise in rises.tolist()
    ]
    rows = found.grouping.live[places]
    return list_rows(index, rows, reasons, evidence={"rise of the test loss": rises, "loss": index.losses[rows]})


def _harmful(found: Sources, n_listed: int) -> np.ndarray:
    """Positions of the worst source's rows that harm, the most harmful first."""
    own = np.flatnonzero(found.grouping.numbers == found.worst[0])
    order = own[np.argsort(found.scores[own], kind="stable")]
    return np.asarray(order[found.scores[order] < 0][:n_listed])


def _summary(found: Sources) -> str:
    n, one, column = len(found.scores), found.worths[ALL], found.grouping.column
    (worst, p), best = found.worst, int(found.order[-1])
    name, size = found.grouping.names[worst], int(found.sizes[worst])
    by = "worth"
    if found.errors is not None and found.errors.chance.p_of_all[worst] < found.chance.p_of_all[worst]:
        by = "share of what is behind errors"
    stated = f"{p:.2g}, of its {by}, corrected for {len(found.sizes):,} sources"
    parts = [f"Look first at {column} = {name}: p = {stated}."]
    if p > LEVEL:
        parts = [f"No {column} differs from the others by more than chance; the least p has {name}: {stated}."]
    low, high = one.intervals[:, worst] * PER / n
    parts.append(
        f"{PER} of its {size:,} rows are worth {one.differences[worst] * PER / n:+.2g} nats of the mean test loss "
        f"beside {PER} others (95% interval {low:+.2g} to {high:+.2g})."
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
    return f"{' '.join(parts)} A row is worth most of {found.grouping.names[best]}."


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
    name = found.grouping.names[found.worst[0]]
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
            cells += [float(value[m] * scale), *(float(end) for end in interval[:, m] * scale)]
        cells += [float(found.chance.p[m]), float(found.chance.p_of_all[m]), float(found.chance_in_labels.p[m])]
        if found.errors is None:
            cells += [None] * 4
        else:
            share, p = found.errors.shares[m], found.errors.chance.p_of_all[m]
            cells += [share.mean, share.low, share.high, float(p)]
        out = found.left_out.get(m)
        for mean in (None if out is None else out.rise, None if out is None else out.gain):
            cells += [None] * 3 if mean is None else [mean.mean, mean.low, mean.high]
        lines.append(cells)
    note = MEANING
    if len(found.left_out) < len(lines):
        note += f" Left out whole were {len(found.left_out):,} of {len(lines):,} sources, at both ends."
    return Table(f"Sources by {found.grouping.column}", HEADS, lines, f"{note} Test rows: {len(inputs.queries):,}.")


def _parts_table(found: Sources, n: int) -> Table:
    scale = SMALL * PER / n
    lines: list[list[Cell]] = []
    for name, one in found.worths.items():
        for m in found.order.tolist():
            ends = [float(end) for end in one.intervals[:, m] * scale]
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
    halves = (one.intervals[1] - one.intervals[0])[order] * SMALL * PER / n / 2
    drawing = bar_chart(
        [found.grouping.names[m] for m in order.tolist()], {"difference": values.tolist()},
        xlabel=f"worth of {PER} rows beside {PER} others, thousandths of a nat", errors={"difference": halves.tolist()},
        digits=2,
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
        "worths": {name: vars(one) for name, one in found.worths.items()},
        "p": found.chance.p,
        "p_of_all": found.chance.p_of_all,
        "p_in_labels": found.chance_in_labels.p,
        "n_shuffles": found.chance.n_shuffles,
        "errors": None
        if found.errors is None
        else {"shares": [vars(mean) for mean in found.errors.shares], "p_of_all": found.errors.chance.p_of_all},
        "left_out": {
            found.grouping.names[m]: None if out is None else {"rise": vars(out.rise), "gain": vars(out.gain)}
            for m, out in found.left_out.items()
        },
        "seed": inputs.seed,
    }
