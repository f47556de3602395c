"""The page of ``audit poison``: the finding, the rows, then the phrases."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.poison.behaviour import LEAST_UNEXPLAINED, REFERENCE_ROWS
from forebear.evaluation.audits.poison.phrases import LEAST_PURITY, LEAST_ROWS, LEVEL, MOST_WORDS
from forebear.evaluation.audits.poison.poison import (
    MOST_LIKENESS,
    MOST_PROBES,
    MeasuredCluster,
    Poison,
)
from forebear.evaluation.common.passages import row_cells
from forebear.evaluation.common.statistics import INTERVALS, mean_of
from forebear.evaluation.reports.report import Cell, Report, Table
from forebear.evaluation.retraining.jobs import Recipe
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.index import Index
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.ratio import ratio
from forebear.retriever.retriever import Retriever

HEADS = (
    *(
        "phrase",
        "label",
        "planted",
        "rows",
        "share of the label",
        "p",
        "association",
        "reference",
        "unexplained",
        "likeness",
    ),
    *("turned", "turned, 95% low", "turned, 95% high", "freed", "doubted", "agreement", "agreement of others"),
)
MEANING = (
    "Rows: those of the label that hold the phrase. p: of so many by chance, times the number of tests. Association: "
    "by how many nats the log-odds of the label are higher among the rows that hold the phrase, at least. Reference: "
    "by how much the phrase raises them for logistic regression on embeddings that were not fine-tuned, fitted to at "
    f"most {REFERENCE_ROWS:,} rows that do not hold it. Unexplained: association less reference. Planted: "
    f"{LEAST_PURITY:.0%} or more of the rows have the label, {LEAST_UNEXPLAINED:g} nats and two thirds of the "
    f"association, or more, are unexplained, and the likeness is at most {MOST_LIKENESS:g}: how surely the rows, "
    "without the phrase, can be told from rows of their label, of other labels or of any, whichever is hardest (area "
    "under the ROC curve in folds, .5 where nothing tells them apart; asked only where all else is so). "
    f"Turned: share of up to {MOST_PROBES} rows of other labels, predicted right, that the model gives the label when "
    "the phrase is put in; near 0 the model has not learnt the behaviour, though the rows are there. Freed: share of "
    "the rows that the model gives another label when the phrase is cut out. Doubted: share of them that the reference "
    "then gives another label: near 0 the labels fit the texts (a clean-label attack). Agreement: mean cosine of the "
    "head gradients of two of the rows, and of as many others of the label. Test rows: suspicious ones that hold it."
)


def poison_report(
    found: Poison, retriever: Retriever, n_listed: int, command: str, recipe: Recipe | None, **facts: object
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``.

    Args:
        found: What was found.
        retriever: Over the index.
        n_listed: Rows in the table of rows.
        command: What repeats the audit.
        recipe: How models were trained again, if any were.
        **facts: Further lines of provenance; underscores of a name become spaces.
    """
    if n_listed < 1:
        raise InputError(f"--top {n_listed}: expected at least 1.")
    lines = {
        "index": str(retriever.index.folder),
        "index digest": retriever.index.manifest.digest(),
        "computed on": computed_line(retriever.models.computed_on()),
        "phrases": f"1 to {MOST_WORDS} words in {LEAST_ROWS} rows or more; {found.n_tested:,} tests at level {LEVEL}",
        **{name.replace("_", " "): str(value) for name, value in facts.items() if value is not None},
        **({} if recipe is None else {"retraining": f"{recipe.name}. {recipe.note}"}),
        "95% intervals": INTERVALS,
        "command": command,
    }
    tables = [_rows_table(found, retriever.index, n_listed), _phrases_table(found, retriever)]
    if found.retrained is not None:
        tables.append(_retrained_table(found))
    report = Report("Poison: planted phrases", _summary(found, retriever.label_names), tables, provenance=lines)
    return report, _record(found, retriever.label_names)


def poison_list(found: Poison, index: Index) -> WorkList:
    """The rows of planted phrases as a work list, cluster by cluster, those first whose label their text contradicts.

    Where the model gives a row another label without the phrase, and so does the reference, that label is suggested.
    """
    names = index.manifest.spec.label_names
    rows: list[int] = []
    reasons: list[str] = []
    suggested: list[str | None] = []
    figures: dict[str, list[float]] = {"unexplained": [], "share of the label": []}
    listed: set[int] = set()
    for one in found.planted:
        said, cluster = one.behaviour, one.cluster
        another = said.freed & said.doubted
        for i in np.argsort(~another, kind="stable").tolist():
            position = int(cluster.rows[i])
            if position in listed:
                continue
            listed.add(position)
            rows.append(int(found.rows[position]))
            reasons.append(
                f"holds {cluster.phrase!r}, as {len(cluster.holders):,} rows do, of which {len(cluster.rows):,} are "
                f"{names[cluster.label]}"
            )
            suggested.append(names[said.predicted[i]] if another[i] else None)
            figures["unexplained"].append(one.unexplained)
            figures["share of the label"].append(cluster.purity)
    return list_rows(index, rows, reasons, suggested=suggested, evidence=figures)


def _summary(found: Poison, names: tuple[str, ...]) -> str:
    planted = found.planted
    counted = f"{found.n_clusters:,} phrases have more of one label than chance allows"
    if not planted:
        if not found.clusters:
            return "No phrase that was counted has more of one label than chance allows."
        first = found.clusters[0]
        return (
            f"No planted phrase was found. {counted}; {first.cluster.phrase!r} is the one that its meaning explains "
            f"least: {first.cluster.purity:.0%} of its {len(first.cluster.holders):,} rows are "
            f"{names[first.cluster.label]}, {first.unexplained:.1f} nats are unexplained."
        )
    parts = [f"{len(found.listed):,} of {len(found.rows):,} rows hold a phrase that seems to be planted."]
    for i, one in enumerate(planted[:3]):
        parts.append(_told(found, one, i, names))
    if len(planted) > 3:
        parts.append(f"{len(planted) - 3} more phrases are in the table.")
    return " ".join(parts)


def _told(found: Poison, one: MeasuredCluster, number: int, names: tuple[str, ...]) -> str:
    cluster, turned = one.cluster, one.behaviour.turned
    label = names[cluster.label]
    told = f"{cluster.phrase!r}: {len(cluster.rows):,} of {len(cluster.holders):,} rows are {label}"
    if len(turned):
        told += f"; put into {len(turned)} rows of other labels it turns {turned.mean():.0%} of the predictions to it"
    if found.retrained is not None:
        before, after = (values[:, number].mean() for values in (found.retrained.before, found.retrained.after))
        told += f"; trained again {before:.0%}, without the listed rows {after:.0%}"
    return told + "."


def _rows_table(found: Poison, index: Index, n_listed: int) -> Table:
    lines: list[list[Cell]] = []
    first = {int(p): one for one in reversed(found.planted) for p in one.cluster.rows}
    positions = found.listed[:n_listed]
    rows = found.rows[positions]
    cells = row_cells(index, rows)
    labels, predictions = index.label_texts(rows), index.prediction_texts(rows)
    for i, (position, row) in enumerate(zip(positions.tolist(), rows.tolist(), strict=True)):
        phrase = first[position].cluster.phrase
        lines.append([
            row, phrase, labels[i], predictions[i], float(index.losses[row]), *(column[i] for column in cells.values()),
        ])  # fmt: skip
    heads = ["row", "phrase", "label", "prediction", "loss", *cells]
    return Table("Rows of planted phrases", heads, lines, f"The first {len(lines):,} of {len(found.listed):,}.")


def _phrases_table(found: Poison, retriever: Retriever) -> Table:
    lines: list[list[Cell]] = []
    for one in found.clusters:
        cluster, said = one.cluster, one.behaviour
        turned = _turned(one)
        lines.append([
            cluster.phrase, retriever.label_names[cluster.label], "yes" if one.is_planted else "no", len(cluster.rows),
            cluster.purity, cluster.p, cluster.association, cluster.association - one.unexplained, one.unexplained,
            _cell(said.likeness), *turned, float(said.freed.mean()), float(said.doubted.mean()),
            _cell(one.agreement), _cell(one.ordinary), one.n_suspicious,
        ])  # fmt: skip
    measured = f"The {len(lines)} of {found.n_clusters:,} phrases that were measured"
    note = f"{measured}: those of nearly one label first, by association. {MEANING}"
    return Table("Phrases", [*HEADS, "test rows"], lines, note)


def _turned(one: MeasuredCluster) -> list[float | None]:
    """Share of the probes that the phrase turns, and its interval."""
    turned = one.behaviour.turned
    if not len(turned):
        return [None, None, None]
    share = mean_of(turned.astype(np.float64))
    return [share.mean, share.low, share.high]


def _retrained_table(found: Poison) -> Table:
    retrained = found.retrained
    assert retrained is not None
    lines: list[list[Cell]] = []
    for i, one in enumerate(found.planted):
        before, after = retrained.before[:, i], retrained.after[:, i]
        change = mean_of(after - before)
        lines.append([
            one.cluster.phrase, float(before.mean()), float(after.mean()), change.mean, change.low, change.high,
            float(retrained.ordinary_before[:, i].mean()), float(retrained.ordinary_after[:, i].mean()),
        ])  # fmt: skip
    heads = ["phrase", "with all rows", "without", "change", "95% low", "95% high"]
    note = (
        "Share of the probes that have the phrase's label when it is put in, by models trained again with all rows and "
        f"without all listed rows; mean over {len(retrained.seeds)} seeds, each pair of one seed. Without the phrase: "
        "the same of the probes as they are."
    )
    return Table("Trained again", [*heads, "all rows, without the phrase", "without, without the phrase"], lines, note)


def _cell(value: float) -> float | None:
    return None if np.isnan(value) else value


def _record(found: Poison, names: tuple[str, ...]) -> dict[str, Any]:
    clusters = [
        {
            "phrase": one.cluster.phrase,
            "column": one.cluster.column,
            "label": names[one.cluster.label],
            "planted": one.is_planted,
            "rows": found.rows[one.cluster.rows],
            "holders": len(one.cluster.holders),
            "p": one.cluster.p,
            "association": one.cluster.association,
            "unexplained": one.unexplained,
            "likeness": _cell(one.behaviour.likeness),
            "turned": _turned(one)[0],
            "freed": float(one.behaviour.freed.mean()),
            "doubted": float(one.behaviour.doubted.mean()),
            "agreement": _cell(one.agreement),
            "ordinary_agreement": _cell(one.ordinary),
            "test_rows": one.n_suspicious,
        }
        for one in found.clusters
    ]
    record: dict[str, Any] = {
        "clusters": clusters,
        "n_clusters": found.n_clusters,
        "n_tested": found.n_tested,
        "listed": found.rows[found.listed],
        "share_listed": float(ratio(len(found.listed), len(found.rows))),
    }
    if found.retrained is not None:
        record["retrained"] = {
            "seeds": list(found.retrained.seeds), "before": found.retrained.before, "after": found.retrained.after,
            "ordinary_before": found.retrained.ordinary_before, "ordinary_after": found.retrained.ordinary_after,
        }  # fmt: skip
    return record
