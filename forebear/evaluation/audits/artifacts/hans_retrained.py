"""``audit hans --retrain``: the model trained again without the shortcut's rows, or with less weight on them.

Each change has a control, the same change of as many random other rows of the same labels, drawn anew for each seed.
All retrainings of a seed are paired: they differ by the rows in question alone. What is measured is the share of right
answers on HANS rows that are entailed, on those that are not, by heuristic, and on in-domain rows, which is the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.artifacts.hans import BLOCK_ROWS, ENTAILMENT, NON_ENTAILMENT, gold_entailment
from forebear.evaluation.audits.artifacts.hans_kinds import NAMELESS
from forebear.evaluation.common.amounts import rows_of_share
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import Mean, mean_of
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer
from forebear.evaluation.retraining.row_choice import label_matched_rows
from forebear.indexer.rows.row_source import RowSource

KINDS = {ENTAILMENT: "entailment", NON_ENTAILMENT: "non-entailment"}
IN_DOMAIN = "in-domain"
BY = "heuristic"  # the column of HANS by whose values groups are made
ALL_ROWS = "all rows"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the training rows: to the shortcut's rows, or, as its control, to random ones.

    Attributes:
        weight: Weight of the changed rows in the loss; 0 leaves them out.
        is_control: Whether random rows are changed.
    """

    weight: float
    is_control: bool

    @property
    def name(self) -> str:
        """As tables have it, such as ``without the shortcut's rows``."""
        rows = "random rows" if self.is_control else "the shortcut's rows"
        return f"{rows} at weight {self.weight:g}" if self.weight else f"without {rows}"

    @property
    def control(self) -> Change:
        """The same change of random rows."""
        return Change(weight=self.weight, is_control=True)

    def job(self, live: np.ndarray, seed: int, rows: np.ndarray) -> Job:
        """The training on all live rows, some of them changed."""
        if self.weight:
            return Job(live, seed, weights=dict.fromkeys(np.sort(rows).tolist(), self.weight))
        return Job(live, seed, without=np.sort(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class TestedRows:
    """The rows that retrained models are tested on: those of HANS, and in-domain rows after them.

    Attributes:
        texts: One list a text column, ``q`` texts each.
        gold: Of HANS rows 0 (entailment) or 1, of in-domain rows the class id, ``(q,)``.
        n_hans: Number of HANS rows.
        groups: Masks of rows by name, ``(q,)`` each: ``entailment``, ``non-entailment``, these by heuristic,
            ``in-domain``; none is empty.
    """

    texts: list[list[str]]
    gold: np.ndarray
    n_hans: int
    groups: Mapping[str, np.ndarray]

    def right(self, predictions: np.ndarray, merge: np.ndarray) -> np.ndarray:
        """Which rows a model answers rightly, ``(q,)`` bool.

        Args:
            predictions: Class ids, ``(q,)``.
            merge: Whether each class is entailment (0) or not (1).
        """
        said = predictions.copy()
        said[: self.n_hans] = merge[predictions[: self.n_hans]]
        return np.asarray(said == self.gold)


def tested_rows_of(source: RowSource, dev: QueryRows | None) -> TestedRows:
    """HANS rows, and in-domain rows with labels, to test retrained models on."""
    texts: list[list[str]] = [[] for _ in source.text_columns]
    gold, kinds = [], list[str]()
    for block in source.blocks(BLOCK_ROWS):
        gold.append(gold_entailment(source, block))
        for column, values in zip(texts, block.texts, strict=True):
            column += values
        if BY in block.table.column_names:
            kinds += [NAMELESS if v is None else str(v) for v in block.table.column(BY).to_pylist()]
    of_hans = np.concatenate(gold)
    n_hans, n_dev = len(of_hans), 0 if dev is None else len(dev)
    groups = {name: of_hans == kind for kind, name in KINDS.items()}
    for value in dict.fromkeys(kinds):
        groups |= {f"{name}, {value}": groups[name] & (np.array(kinds) == value) for name in KINDS.values()}
    groups = {name: np.concatenate([mask, np.zeros(n_dev, bool)]) for name, mask in groups.items()}
    if dev is not None:
        assert dev.labels is not None
        groups[IN_DOMAIN] = np.arange(n_hans + n_dev) >= n_hans
        texts = [[*own, *more] for own, more in zip(texts, dev.texts, strict=True)]
        of_hans = np.concatenate([of_hans, dev.labels])
    groups = {name: mask for name, mask in groups.items() if mask.any()}
    return TestedRows(texts=texts, gold=of_hans, n_hans=n_hans, groups=groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class HansRetrained:
    """Right answers of retrained models.

    Attributes:
        rows: The shortcut's rows that are changed, in the order of the work list, ``(r,)``.
        drawn: The random rows of the control, ascending, for each seed, ``(r,)`` each.
        n_named: Number of rows that the audit names for it.
        n_asked: Number of rows that were asked for; None: all that are named.
        seeds: Seeds of the retrainings and of the random rows, ``s`` of them.
        is_seeded: Whether the retraining depends on the seed; else only the random rows do.
        changes: Changes to the shortcut's rows; the control of each was measured, too.
        right: Whether each test row is right, ``(s, q)`` bool, by the name of a change, and of :data:`ALL_ROWS`.
        groups: See :class:`TestedRows`.
    """

    rows: np.ndarray
    drawn: tuple[np.ndarray, ...]
    n_named: int
    n_asked: int | None
    seeds: tuple[int, ...]
    is_seeded: bool
    changes: tuple[Change, ...]
    right: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]

    def accuracy(self, name: str, group: str) -> float:
        """Share of right answers of a group, mean over the seeds."""
        return float(self.right[name][:, self.groups[group]].mean())

    def difference(self, name: str, other: str, group: str) -> np.ndarray:
        """Accuracy by one change less that by another, with the same seed, ``(s,)``."""
        first, second = (self.right[n][:, self.groups[group]].mean(axis=1) for n in (name, other))
        return np.asarray(first - second)

    def over_seeds(self, name: str, other: str, group: str, seed: int = 0) -> Mean | None:
        """The mean difference with its interval over seeds; None where nothing in it depends on the seed, or one is
        all there is."""
        varies = self.is_seeded or any(change.control.name in (name, other) for change in self.changes)
        return mean_of(self.difference(name, other, group), seed) if varies and len(self.seeds) > 1 else None

    def over_rows(self, name: str, other: str, group: str, seed: int = 0) -> Mean:
        """The mean difference with its interval over test rows, whose seeds are averaged first."""
        first, second = (self.right[n][:, self.groups[group]].mean(axis=0) for n in (name, other))
        return mean_of(first - second, seed)


def n_shortcut_rows(shortcut: str | int | float | None, labels: np.ndarray, merge: np.ndarray) -> int | None:
    """The number of rows that are taken for the shortcut's at most; None: all that the audit names.

    Args:
        shortcut: A number of rows, or a share of the live rows such as 0.05.
        labels: Class ids of the live rows, ``(n,)``.
        merge: Whether each class is entailment (0) or not (1).

    Raises:
        InputError: It is no such number, or the random rows of the control would not be others.
    """
    if shortcut is None:
        return None
    text = str(shortcut)
    n_rows = int(text) if text.isdigit() else rows_of_share(text, len(labels))
    most = int((merge[labels] == ENTAILMENT).sum()) // 2
    if not 1 <= n_rows <= most:
        raise InputError(
            f"--shortcut {text} takes {n_rows:,} rows; expected 1 to {most:,}, half of the rows labelled entailment, "
            "so that as many others can be drawn for the control."
        )
    return n_rows


def check_weight(weight: float) -> None:
    """Refuse a weight that says nothing.

    Raises:
        InputError: It is below 0, or changes nothing.
    """
    if not 0 <= weight < np.inf or weight == 1:
        raise InputError(
            f"--weight {weight:g}: expected 0 or more, and not 1, which changes nothing; 0: no rows are reweighted."
        )


def retrain_hans(
    retrainer: Retrainer,
    named: np.ndarray,
    n_rows: int | None,
    weight: float,
    tested: TestedRows,
    merge: np.ndarray,
    seeds: Sequence[int],
    progress: Progress = lambda _stage, _done, _total: None,
) -> HansRetrained:
    """Train again on all rows, without the shortcut's rows, with another weight of them, and the controls of both.

    Args:
        retrainer: Its evaluation rows are the tested ones.
        named: The shortcut's rows as the audit names them, the first ones first.
        n_rows: How many of them are changed at most; None: all.
        weight: Weight of reweighted rows; 0: none are reweighted.
        tested: The rows that models are tested on.
        merge: Whether each class is entailment (0) or not (1).
        seeds: Seeds of the retrainings and of the random rows.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Raises:
        InputError: There are too few other rows of the same labels.
    """
    rows, live, labels = named[:n_rows], retrainer.rows.live, retrainer.rows.labels
    others = np.setdiff1d(live, rows)
    lacking = np.bincount(labels[rows], minlength=len(merge)) > np.bincount(labels[others], minlength=len(merge))
    if lacking.any():
        raise InputError(
            f"the audit names {len(rows):,} rows of the shortcut, of which the control needs as many others of the "
            "same labels. Name a smaller number by --shortcut."
        )
    changes = tuple(Change(weight=w, is_control=False) for w in dict.fromkeys((0.0, float(weight))))
    jobs, names = list[Job](), [ALL_ROWS, *(n for c in changes for n in (c.name, c.control.name))]
    drawn = tuple(label_matched_rows(others, labels, rows, seed) for seed in seeds)
    for seed, random_rows in zip(seeds, drawn, strict=True):
        jobs.append(Job(live, seed))
        for change in changes:
            jobs += [change.job(live, seed, rows), change.control.job(live, seed, random_rows)]
    outcomes = retrainer.run(jobs, progress)
    right = np.stack([tested.right(outcome.predictions, merge) for outcome in outcomes])
    return HansRetrained(
        rows=rows, drawn=drawn, n_named=len(named), n_asked=n_rows, seeds=tuple(seeds),
        is_seeded=retrainer.recipe.seeded, changes=changes, groups=tested.groups,
        right={name: right[i :: len(names)] for i, name in enumerate(names)},
    )  # fmt: skip
