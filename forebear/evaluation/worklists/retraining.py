"""What applied decisions do: the model retrained with and without them, in pairs, and tested on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError, MismatchError
from forebear.evaluation.common.power import compare, no_verdict
from forebear.evaluation.common.statistics import paired_difference
from forebear.evaluation.reports.report import Cell, Report, Table
from forebear.evaluation.retraining.changes import IN_PLACE
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer
from forebear.evaluation.worklists.apply import Change
from forebear.evaluation.worklists.items import Item, text_digest
from forebear.indexer.index import Index
from forebear.indexer.rows.row_format import SINGLE_LABEL

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """Right answers before and after a change of training rows.

    Attributes:
        seeds: Seeds of the retrainings, ``s``.
        before: Whether each test row is right after retraining on the rows as they were, ``(s, q)`` bool.
        after: The same on the changed rows, with the same seeds, ``(s, q)``.
        groups: Test rows by the name of a group, each ``(q,)`` bool.
        n_relabelled: Training rows with another label.
        n_left_out: Training rows that are left out.
    """

    seeds: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    groups: Mapping[str, np.ndarray]
    n_relabelled: int
    n_left_out: int


def check_items(items: Sequence[Item], index: Index) -> None:
    """Refuse items that are of another index, or an index of other labels; before anything is written.

    Args:
        items: Those whose decisions change a row.
        index: The index that is trained again.

    Raises:
        InputError: The index has several labels or numbers a row; or there is no item.
        MismatchError: A row of the index is not the row of the list.
    """
    if index.manifest.spec.problem_type != SINGLE_LABEL:
        raise InputError(
            f"--retrain is for one label a row; {index.folder} has several labels or numbers. Leave it out."
        )
    if not items:
        raise InputError("--retrain: no decision changes a row. Decide on some, or give --accept.")
    rows = np.array([item.row for item in items])
    if outside := sorted(set(rows.tolist()) - set(index.live.tolist())):
        raise MismatchError(
            f"{index.folder} has no live row {outside[0]}, which the list changes. Name the list's index."
        )
    if not index.manifest.without_texts:
        for item, *texts in zip(items, *index.text_lists(rows), strict=True):
            if item.digest is not None and item.digest != text_digest(texts):
                raise MismatchError(
                    f"row {item.row} of {index.folder} has other texts than the list's. Name the list's index."
                )


def job_changes(changes: Sequence[Change], index: Index) -> tuple[np.ndarray, dict[int, int]]:
    """Rows of an index to leave out, ascending, and new class ids by row number.

    Args:
        changes: What became of the rows, which :func:`check_items` has looked at.
        index: The index.

    Raises:
        InputError: The index has no such label.
    """
    names = index.manifest.spec.label_names
    relabels = {}
    for change in changes:
        if change.after is not None:
            if change.after not in names:
                raise InputError(
                    f"row {change.item.row} is to be {change.after!r}; {index.folder} has {', '.join(names)}."
                )
            relabels[change.item.row] = names.index(change.after)
    gone = sorted(change.item.row for change in changes if change.after is None)
    return np.array(gone, np.int64), relabels


def retrain_changes(
    changes: Sequence[Change],
    index: Index,
    retrainer: Retrainer,
    gold: np.ndarray,
    seeds: Sequence[int],
    groups: Mapping[str, np.ndarray],
    *,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Retrained:
    """Retrain on the rows as they were and as they are now, with the same seeds.

    Args:
        changes: What became of the rows.
        index: The index that the list's row numbers are of.
        retrainer: Its evaluation rows are the test rows.
        gold: Gold class ids of the test rows, ``(q,)``.
        seeds: Seeds of the retrainings.
        groups: Test rows by the name of a group, each ``(q,)`` bool.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Raises:
        InputError: The index has no such label.
    """
    gone, relabels = job_changes(changes, index)
    live = retrainer.rows.live
    pairs = [
        (Job(live, seed), Job(live, seed, without=gone if len(gone) else None, relabels=relabels)) for seed in seeds
    ]
    outcomes = retrainer.run([job for pair in pairs for job in pair], progress)
    right = np.array([outcome.predictions == gold for outcome in outcomes])
    return Retrained(
        seeds=tuple(seeds), before=right[::2], after=right[1::2], groups={ALL: np.ones(len(gold), bool), **groups},
        n_relabelled=len(relabels), n_left_out=len(gone),
    )  # fmt: skip


def retrained_report(
    found: Retrained, retrainer: Retrainer, provenance: Mapping[str, str], seed: int
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    before, after = found.before.mean(axis=0), found.after.mean(axis=0)
    rows: list[list[Cell]] = []
    for name, members in found.groups.items():
        d = paired_difference(100 * after[members], 100 * before[members], seed)
        cells: list[Cell] = [name, int(members.sum()), float(100 * before[members].mean())]
        rows.append([*cells, float(100 * after[members].mean()), d.mean, d.low, d.high, d.p])
    by_seed: list[list[Cell]] = [
        [number, float(100 * one.mean()), float(100 * other.mean()), float(100 * (other.mean() - one.mean()))]
        for number, one, other in zip(found.seeds, found.before, found.after, strict=True)
    ]
    difference, needed = compare(100 * after, 100 * before, seed)
    changed = f"{found.n_relabelled:,} training rows relabelled and {found.n_left_out:,} left out"
    means = f"{100 * before.mean():.2f} to {100 * after.mean():.2f}%"
    moved = f"accuracy on {found.before.shape[1]:,} test rows goes from {means}"
    interval = "" if difference.low is None else f" [{difference.low:+.2f}, {difference.high:+.2f}]"
    verdict = ""
    if difference.low is not None and difference.high is not None and difference.low <= 0 <= difference.high:
        verdict = " The interval holds 0. " + no_verdict(needed, "test rows")
    tables = [
        Table(
            "Right answers before and after",
            ["test rows", "number", "before", "after", "after − before", "95% low", "95% high", "p"],
            rows,
            "In percent, means over the seeds. The interval and p of Wilcoxon's signed-rank test are over test rows, "
            "whose seeds are averaged first: what other test rows would say of these retrainings."
            + (IN_PLACE if retrainer.recipe.seeded else ""),
        ),
        Table("By seed", ["seed", "before", "after", "after − before"], by_seed, "In percent, all test rows."),
    ]
    report = Report(
        "What the changed training rows do",
        f"With {changed}, {moved}: {difference.mean:+.2f} points{interval}.{verdict} {retrainer.recipe.note}",
        tables,
        provenance=provenance,
    )
    result = {
        **retrainer.facts(),
        "seeds": found.seeds,
        "n_relabelled": found.n_relabelled,
        "n_left_out": found.n_left_out,
        "groups": {str(row[0]): dict(zip(tables[0].columns[1:], row[1:], strict=True)) for row in rows},
        "by_seed": [dict(zip(tables[1].columns, row, strict=True)) for row in by_seed],
    }
    return report, result
