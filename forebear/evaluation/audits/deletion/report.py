"""The page of ``audit deletion``: the finding, the rows, the test rows, then accuracy by group and the correlations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.deletion.deletion import QUANTITIES, Deletion, Retrained
from forebear.evaluation.audits.deletion.given import SHOWN_MISSING
from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_cells
from forebear.evaluation.common.statistics import mean_of
from forebear.evaluation.reports.charts import scatter_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import IN_PLACE
from forebear.evaluation.retraining.jobs import Recipe
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.index import Index

Groups = dict[str, np.ndarray]
ROW_HEADS = ("row", "label", "prediction", "loss", "rise alone", "rise with all", "rise retrained", "flips")
TEST_HEADS = (
    "test row",
    "label",
    "predicted now",
    "predicted without",
    "change of p",
    "change of the loss",
    "retrained",
)
DEPENDS = (
    "Rise: by how many nats the loss of a row's own label rises when the row is left out, alone or with all of the "
    "set: what the head says of it because of it. Flips: its prediction is another one without the set. The encoder "
    "stays as it is; a rise retrained is that of a model trained again without the set."
)


def deletion_report(
    found: Deletion, groups: Groups, inputs: Inputs, n_listed: int, recipe: Recipe | None
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``.

    Args:
        found: What was found.
        groups: Groups of test rows, as masks ``(q,)`` by name; the first holds all.
        inputs: What the audit was given.
        n_listed: Rows, and test rows, that are listed.
        recipe: How models were trained again, if any were.
    """
    if n_listed < 1:
        raise InputError(f"--top {n_listed}: expected at least 1.")
    tables = [_rows_table(found, inputs, n_listed), _test_table(found, inputs, n_listed)]
    tables += [_group_table(found, groups, inputs.seed)]
    figures: list[Figure] = []
    if found.retrained is not None and recipe is not None:
        tables.append(_fit_table(found, inputs.seed))
        figures.append(_figure(found, found.retrained))
    facts: dict[str, Any] = {"rows_left_out": f"{len(found.named.rows):,}, found {found.named.how}"}
    if found.retrained is not None and recipe is not None:
        facts |= {"retraining": f"{recipe.name}. {recipe.note}{IN_PLACE if recipe.seeded else ''}"}
        facts |= {"seeds": ", ".join(map(str, found.retrained.seeds))}
    lines = provenance(
        inputs.retriever, inputs.question, inputs.command, test_rows=inputs.queries.source,
        queries=len(inputs.queries), seed=inputs.seed, **facts,
    )  # fmt: skip
    title = f"Without {len(found.named.rows):,} training rows"
    return Report(title, _summary(found, inputs, recipe), tables, figures, provenance=lines), _record(found, inputs)


def deletion_list(found: Deletion, index: Index) -> WorkList:
    """The rows that are left out as a work list, those first on which the model depends most."""
    depends = found.depends
    order = np.argsort(-depends.alone, kind="stable")
    evidence = {"loss": depends.losses, "rise alone": depends.alone, "rise with all": depends.together}
    if found.retrained is not None:
        evidence["rise retrained"] = found.retrained.own
    typical = float(np.median(found.compared.alone)) if len(found.compared.alone) else 0.0
    reasons = [
        f"its own loss rises by {rise:.3g} nats when it is left out, that of other rows by {typical:.2g} (median)"
        for rise in depends.alone[order].tolist()
    ]
    figures = {name: values[order] for name, values in evidence.items()}
    return list_rows(index, depends.rows[order], reasons, evidence=figures)


def _summary(found: Deletion, inputs: Inputs, recipe: Recipe | None) -> str:
    n, live = len(found.named.rows), len(inputs.retriever.index.live)
    before, gold = found.predictions.logits.argmax(axis=1), found.predictions.targets
    gain = mean_of((found.best.labels == gold).astype(float) - (before == gold), inputs.seed)
    flips = int((found.best.labels != before).sum())
    parts = [
        f"Without these {n:,} of {live:,} rows ({n / live:.1%}) the model is predicted to be right on "
        f"{(found.best.labels == gold).mean():.1%} of the test rows, now on {(before == gold).mean():.1%} "
        f"({_signed(gain.mean, gain.low, gain.high)}); {flips:,} of {len(gold):,} predictions change."
    ]
    if found.retrained is not None and recipe is not None:
        right_before, right_after = found.retrained.correct(gold)
        real = mean_of(right_after - right_before, inputs.seed)
        one = found.fit(found.best, "loss", inputs.seed)
        said = f"Trained again ({recipe.name}), it is right on {right_after.mean():.1%}, with all rows on "
        parts.append(f"{said}{right_before.mean():.1%} ({_signed(real.mean, real.low, real.high)}).")
        if one.correlation is not None:
            interval = one.correlation_interval
            between = "" if interval is None else f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})"
            parts.append(
                f"Predicted and retrained changes of the loss correlate with r = {one.correlation:.2f}{between}."
            )
    own, others = float(found.depends.alone.mean()), found.compared.alone
    compared = f", that of random other rows by {float(others.mean()):.3g}" if len(others) else ""
    parts.append(f"The loss of a row's own label rises by {own:.3g} nats when it is left out{compared} (means).")
    if found.named.missing:
        shown = "; ".join(f"{text[:60]}" for text in found.named.missing[:SHOWN_MISSING])
        parts.append(f"Not among the live rows are {len(found.named.missing):,} that were named: {shown}.")
    return " ".join(parts)


def _signed(mean: float, low: float | None, high: float | None) -> str:
    between = "" if low is None or high is None else f", 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * mean:+.1f} points{between}"


def _rows_table(found: Deletion, inputs: Inputs, n_listed: int) -> Table:
    index, depends = inputs.retriever.index, found.depends
    order = np.argsort(-depends.alone, kind="stable")[:n_listed]
    rows = depends.rows[order]
    labels, predictions, columns = index.label_texts(rows), index.prediction_texts(rows), row_cells(index, rows)
    lines: list[list[Cell]] = []
    for i, place in enumerate(order.tolist()):
        retrained = None if found.retrained is None else float(found.retrained.own[place])
        cells: list[Cell] = [int(rows[i]), labels[i], predictions[i], float(depends.losses[place])]
        cells += [float(depends.alone[place]), float(depends.together[place]), retrained, bool(depends.flips[place])]
        lines.append([*cells, *(column[i] for column in columns.values())])
    note = f"{len(order):,} of {len(depends.rows):,} rows, those first on which the model depends most. {DEPENDS}"
    return Table("Rows left out", [*ROW_HEADS, *columns], lines, note)


def _test_table(found: Deletion, inputs: Inputs, n_listed: int) -> Table:
    names, queries, best = inputs.retriever.label_names, inputs.queries, found.best
    order = np.argsort(-np.abs(best.losses), kind="stable")[:n_listed]
    before, gold = found.predictions.logits.argmax(axis=1), found.predictions.targets
    truth = None
    if found.retrained is not None:
        truth = found.retrained.changes("loss", gold, found.predictions.loss).mean(axis=0)
    columns = inputs.retriever.index.manifest.spec.text_columns
    lines: list[list[Cell]] = []
    for i in order.tolist():
        cells: list[Cell] = [int(queries.rows[i]), names[gold[i]], names[before[i]], names[best.labels[i]]]
        cells += [float(best.probabilities[i]), float(best.losses[i]), None if truth is None else float(truth[i])]
        lines.append([*cells, *(texts[i] for texts in queries.texts)])
    note = (
        f"The {len(order):,} test rows whose loss is predicted to change most, by the {best.name}. p: probability of "
        "the gold label; changes of the loss in nats, above 0 where the rows that are left out helped."
    )
    return Table("Test rows that change most", [*TEST_HEADS, *(f"text: {c}" for c in columns)], lines, note)


def _group_table(found: Deletion, groups: Groups, seed: int) -> Table:
    gold, loss = found.predictions.targets, found.predictions.loss
    right = (found.predictions.logits.argmax(axis=1) == gold).astype(float)
    moves = [("predicted", right, (found.best.labels == gold).astype(float), found.best.losses)]
    if found.retrained is not None:
        truth = found.retrained.changes("loss", gold, loss).mean(axis=0)
        moves.append(("retrained", *found.retrained.correct(gold), truth))
    lines: list[list[Cell]] = []
    for name, mask in groups.items():
        for kind, before, after, losses in moves:
            gain, rise = mean_of((after - before)[mask], seed), mean_of(losses[mask], seed)
            cells: list[Cell] = [name, int(mask.sum()), kind, float(before[mask].mean()), float(after[mask].mean())]
            lines.append([*cells, gain.mean, gain.low, gain.high, rise.mean, rise.low, rise.high])
    heads = ["group", "test rows", "change", "accuracy with", "accuracy without", "gain", "gain, 95% low"]
    heads += ["gain, 95% high", "rise of the loss", "rise, 95% low", "rise, 95% high"]
    note = f"Predicted by the {found.best.name}. Intervals by a bootstrap over test rows; retrained: means over seeds."
    return Table("Accuracy and loss by group", heads, lines, note)


def _fit_table(found: Deletion, seed: int) -> Table:
    assert found.retrained is not None
    targets, loss = found.predictions.targets, found.predictions.loss
    lines: list[list[Cell]] = []
    for quantity in QUANTITIES:
        agreement = found.retrained.agreement(quantity, targets, loss)
        ceiling = found.retrained.ceiling(quantity, targets, loss)
        for change in found.changes:
            one = found.fit(change, quantity, seed)
            low, high = one.correlation_interval or (None, None)
            cells: list[Cell] = [quantity, change.name, one.slope, one.correlation, low, high, one.rank_correlation]
            lines.append([*cells, ceiling, agreement])
    heads = ["quantity", "predicted by", "slope", "r", "r, 95% low", "r, 95% high", "Spearman", "ceiling of r"]
    heads.append("r of two seeds")
    note = (
        "Over test rows, of the gold label. Slope: of retrained on predicted changes, through the origin. r is with "
        f"the mean change over the seeds ({len(found.retrained.seeds)}); its ceiling is what a prediction without "
        "error would reach. r of two seeds is between single retrainings, and not to be held against r; where it is "
        "low, the set changes less than chance does."
    )
    return Table("Predicted and retrained changes", heads, lines, note)


def _figure(found: Deletion, retrained: Retrained) -> Figure:
    truth = retrained.changes("loss", found.predictions.targets, found.predictions.loss).mean(axis=0)
    points = {found.best.name: (found.best.losses.tolist(), truth.tolist())}
    drawing = scatter_chart(points, xlabel="predicted change of the loss, nats", ylabel="retrained, nats")
    return Figure("Change of each test row's loss", drawing, "A point is a test row; on the line both are equal.")


def _record(found: Deletion, inputs: Inputs) -> dict[str, Any]:
    depends, predictions = found.depends, found.predictions
    record = {
        "question": question_record(inputs.retriever, inputs.question),
        "rows": found.named.rows,
        "missing": list(found.named.missing),
        "test_rows": inputs.queries.rows,
        "gold": predictions.targets,
        "predicted_now": predictions.logits.argmax(axis=1),
        "predicted": {
            change.name: {
                "labels": change.labels, "losses": change.losses, "margins": change.margins,
                "probabilities": change.probabilities,
            }
            for change in found.changes
        },
        "dependence": {
            "losses": depends.losses, "alone": depends.alone, "together": depends.together, "flips": depends.flips,
            "others_alone": found.compared.alone,
        },
        "seed": inputs.seed,
    }  # fmt: skip
    if found.retrained is not None:
        again, loss = found.retrained, predictions.loss
        changes = {name: again.changes(name, predictions.targets, loss) for name in QUANTITIES}
        record["retrained"] = {"seeds": again.seeds, "own": again.own, **changes}
        record["fits"] = {
            name: {change.name: asdict(found.fit(change, name, inputs.seed)) for change in found.changes}
            for name in QUANTITIES
        }
    return record
