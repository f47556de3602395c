"""``audit sources``: influence on the test rows' loss, summed by a column of the training rows.

Scores are those of ``if`` at the head about the gold label, means over the test rows: a row of score s raises their
mean loss by s / N nats when it is left out, to first order. Sources are told apart by the mean score of their rows, and
by the head that is refitted without all of a source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.sources.worth import Chance, Worth, chance, worth
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import Mean, mean_of
from forebear.indexer.curvature.head import HeadInverse
from forebear.indexer.model.forward import Forward, run_forward
from forebear.progress import Progress
from forebear.retriever.answers.groups import Grouping
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

ALL, WRONG = "all", "wrong"
WORTH, ERRORS = "worth", "errors"  # questions by which a source is the worst
PROPONENTS = 10  # of each wrong prediction, among which the sources' shares are counted
BLOCK_ROWS = 8192
BLOCK_NUMBERS = 1 << 22  # products of rows and matrices that are held at once
LEAST_ROWS = 2  # of a source, on the average: with fewer the column names rows, not sources


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What the refitted head says without a whole source, of all test rows.

    Attributes:
        rise: Of the mean loss, in nats, with its interval over the test rows.
        gain: Of the accuracy.
    """

    rise: Mean
    gain: Mean


@dataclass(frozen=True, eq=False)
class BehindErrors:
    """Sources among the first proponents of wrong predictions.

    Attributes:
        shares: Share of each source among them, ``(m,)``.
        chance: p of a share that is not that of the source's rows.
        chance_in_labels: The same where rows are shuffled among those of the same label.
    """

    shares: list[Mean]
    chance: Chance
    chance_in_labels: Chance


@dataclass(frozen=True)
class Worst:
    """The source to look at first.

    Attributes:
        number: Its number.
        p: The larger of p among all rows and p among rows of the same label, corrected for the number of sources and,
            where there are errors, for the two questions.
        by: The question that has this p: ``worth`` or ``errors``.
    """

    number: int
    p: float
    by: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """What each source is worth.

    Attributes:
        grouping: The rows by source, ``m`` of them.
        sizes: Rows of each source, ``(m,)``.
        n_test: Number of test rows, by name of the part: ``all``, ``wrong`` (mispredicted), ``label: NAME``.
        worths: Worth to each part.
        chance: p for all test rows.
        chance_in_labels: The same where rows are shuffled among those of the same label.
        scores: Scores of the live rows for all test rows, ``(n,)``.
        errors: Sources behind wrong predictions; None: no prediction is wrong.
        left_out: By number of the source; None where the rows that stay say too little of the head.
    """

    grouping: Grouping
    sizes: np.ndarray
    n_test: dict[str, int]
    worths: dict[str, Worth]
    chance: Chance
    chance_in_labels: Chance
    scores: np.ndarray
    errors: BehindErrors | None
    left_out: dict[int, LeftOut | None]

    @property
    def worst(self) -> Worst:
        """The source to look at first.

        Of the sources that are worth less than the others, or stand behind more errors than their share of rows, the
        one of the least p; by ties and where there is none the first of ``order``. A source is less or more, and its p
        small, only where it is so both among all rows and among rows of the same labels: no source is blamed for the
        labels that it drew.
        """
        order = self.order
        tests = {WORTH: _p_of_both(self.chance, self.chance_in_labels, -1)}
        if self.errors is not None:
            tests[ERRORS] = _p_of_both(self.errors.chance, self.errors.chance_in_labels, 1)
        p = np.stack(list(tests.values()))
        first = int(order[np.argmin(p.min(axis=0)[order])])
        by = list(tests)[int(np.argmin(p[:, first]))]
        return Worst(first, min(1.0, len(tests) * float(p[:, first].min())), by)

    @property
    def best(self) -> int:
        """Number of the source whose rows are worth most on the average."""
        return int(np.argmax(self.worths[ALL].means))

    @property
    def order(self) -> np.ndarray:
        """Numbers of the sources, the worst first: by the difference in units of what chance gives at their size."""
        n = self.sizes.sum()
        unusual = self.worths[ALL].differences * np.sqrt(self.sizes * (1 - self.sizes / n))
        return np.argsort(unusual, kind="stable")


def _p_of_both(among_all: Chance, in_labels: Chance, sign: int) -> np.ndarray:
    """The larger p of the two, corrected for the number of sources; 1 where either points the other way, ``(m,)``."""
    points = np.minimum(sign * among_all.unusual, sign * in_labels.unusual) > 0
    return np.where(points, np.maximum(among_all.p_of_all, in_labels.p_of_all), 1.0)


def check_sources(grouping: Grouping) -> None:
    """Refuse a column that does not part the rows into sources.

    Raises:
        InputError: It has one value, or nearly as many as there are rows.
    """
    n, m = len(grouping.live), len(grouping)
    if m < 2:
        raise InputError(f"--column {grouping.column}: one value in all {n:,} rows; expected two sources or more.")
    if n < LEAST_ROWS * m:
        raise InputError(
            f"--column {grouping.column}: {m:,} values in {n:,} rows. Expected a column whose values are shared, such "
            "as an annotator or a year."
        )


def measure_sources(
    retriever: Retriever,
    grouping: Grouping,
    queries: QueryRows,
    question: Question,
    *,
    n_left_out: int,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Sources:
    """What each source is worth to the test rows.

    Args:
        retriever: Over an index of one label a row.
        grouping: The live rows by source.
        queries: Test rows with gold labels.
        question: Of ``if`` at the head; its damping counts.
        n_left_out: Sources that are left out whole: half of them the worst, half the best.
        seed: Seed of bootstrap and shuffles.
        progress: Called with the stage, what is done of it, and all of it.

    Raises:
        InputError: The column does not part the rows into sources.
    """
    assert queries.labels is not None
    check_sources(grouping)
    index, gold = retriever.index, queries.labels
    refits = HeadRefits(retriever.models, question.curvature.damping)
    forward = run_forward(retriever.classifier(), queries.texts)
    parts = _parts(forward, gold, retriever.label_names)
    by_test_row = _by_test_row(refits, grouping, forward, gold)
    scores = _scores(refits, forward, gold, parts)
    worths = {name: worth(by_test_row[parts[name]], scores[name], grouping.numbers, seed) for name in parts}
    found = Sources(
        grouping=grouping,
        sizes=np.bincount(grouping.numbers),
        n_test={name: int(mask.sum()) for name, mask in parts.items()},
        worths=worths,
        chance=chance(scores[ALL], grouping.numbers, None, seed),
        chance_in_labels=chance(scores[ALL], grouping.numbers, index.labels[index.live], seed),
        scores=scores[ALL],
        errors=_errors(retriever, grouping, queries, parts[WRONG], question, seed) if WRONG in parts else None,
        left_out={},
    )
    order, half = found.order, -(-n_left_out // 2)
    chosen = order if len(order) <= n_left_out else np.r_[order[:half], order[len(order) - n_left_out // 2 :]]
    predictions = Predictions.of(forward, gold)
    for done, number in enumerate(chosen.tolist()):
        progress("sources left out", done, len(chosen))
        found.left_out[number] = _without(refits, predictions, grouping.rows(number), seed)
    return found


def _parts(forward: Forward, gold: np.ndarray, label_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Test rows whose mean loss is looked at, as masks ``(q,)``; those that hold any."""
    masks = {ALL: np.ones(len(gold), bool), WRONG: forward.predictions != gold}
    masks |= {f"label: {name}": gold == i for i, name in enumerate(label_names)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _in_basis(inverse: HeadInverse, residuals: np.ndarray) -> np.ndarray:
    return np.asarray(residuals.astype(np.float64) @ inverse.loss.basis(inverse.n_classes).T)


def _by_test_row(refits: HeadRefits, grouping: Grouping, forward: Forward, gold: np.ndarray) -> np.ndarray:
    """Mean score of each source's rows for each test row, ``(q, m)``."""
    inverse, index = refits.inverse, refits.index
    means = np.empty((len(grouping), len(inverse.loss.basis(inverse.n_classes)), index.features().width))
    for number in range(len(grouping)):
        rows, total = grouping.rows(number), 0.0
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            total = total + _in_basis(inverse, index.residuals().take(block)).T @ index.features().take(block)
        means[number] = total / len(rows)
    solved = inverse.solve_matrix(means)
    asked = _in_basis(inverse, forward.residuals_and_losses(gold)[0])
    return _products(asked, forward.features, solved)


def _products(residuals: np.ndarray, features: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """<r_n outer f_n, M_s> of rows and matrices ``(s, a, h)``: ``(n, s)``."""
    s, a, h = matrices.shape
    flat, found = matrices.reshape(s * a, h).T, np.empty((len(features), s))
    step = max(1, BLOCK_NUMBERS // (s * a))
    for start in range(0, len(features), step):
        block = slice(start, start + step)
        at_logits = (features[block].astype(np.float64) @ flat).reshape(-1, s, a)
        found[block] = np.einsum("nsa,na->ns", at_logits, residuals[block])
    return found


def _scores(
    refits: HeadRefits, forward: Forward, gold: np.ndarray, parts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores of the live rows, means over each part of the test rows, ``(n,)`` by its name."""
    inverse, index = refits.inverse, refits.index
    asked = _in_basis(inverse, forward.residuals_and_losses(gold)[0])
    means = [asked[mask].T @ forward.features[mask] / mask.sum() for mask in parts.values()]
    solved = inverse.solve_matrix(np.stack(means))
    live, found = index.live, np.empty((len(index.live), len(parts)))
    for start in range(0, len(live), BLOCK_ROWS):
        block = live[start : start + BLOCK_ROWS]
        residuals = _in_basis(inverse, index.residuals().take(block))
        found[start : start + BLOCK_ROWS] = _products(residuals, index.features().take(block), solved)
    return dict(zip(parts, found.T, strict=True))


def _errors(
    retriever: Retriever, grouping: Grouping, queries: QueryRows, wrong: np.ndarray, question: Question, seed: int
) -> BehindErrors:
    top = min(PROPONENTS, len(grouping.live))
    asked = retriever.resolve(QuerySpec.of(question.spec, methods=("if",), target="predicted", top=top))
    counts, of_rows = [], np.zeros(len(grouping.live))
    for block in queries.take(np.flatnonzero(wrong)).blocks():
        rows = retriever.answer_block(0, block.texts, block.labels, asked).rankings["if"][0].rows
        places = np.searchsorted(grouping.live, rows)
        counts.append((grouping.numbers[places][:, :, None] == np.arange(len(grouping))).mean(axis=1))
        np.add.at(of_rows, places, 1.0)
    shares = [mean_of(values, seed) for values in np.concatenate(counts).T]
    labels = retriever.index.labels[grouping.live]
    tests = [chance(of_rows, grouping.numbers, strata, seed) for strata in (None, labels)]
    return BehindErrors(shares, *tests)


def _without(refits: HeadRefits, predictions: Predictions, rows: np.ndarray, seed: int) -> LeftOut | None:
    change = refits.of_group(rows)
    if change is None:
        return None
    moved = refits.logit_changes(change[None], predictions.features)
    right = [
        (logits.argmax(axis=1) == predictions.targets).astype(float)
        for logits in (predictions.logits, predictions.logits + moved[:, 0])
    ]
    return LeftOut(mean_of(predictions.changes(moved)[0][:, 0], seed), mean_of(right[1] - right[0], seed))
