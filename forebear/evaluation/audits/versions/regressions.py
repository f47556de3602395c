"""``audit regressions``: test rows that a model has wrong and the version before it had right, and the rows behind.

Every live training row is scored for the prediction of each regressed test row, and the scores are summed over groups
of test rows that the same changed rows drive. Among the rows that were added, relabelled or copied since the version
before, those of the largest sums are the first to look at.

A row that drives every prediction of a label is no cause of a regression. What it does to rows that kept that right
prediction is therefore taken off. Scores for a sure prediction are small, so this is reckoned in units of the mean
absolute score that all rows have for a test row: of each score the mean over the kept rows, in their units, times the
regressed row's own unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from forebear.errors import DataError, InputError
from forebear.evaluation.audits.rows.near_words import words_of
from forebear.evaluation.audits.versions.row_changes import RowChanges
from forebear.evaluation.common.queries import QueryRows
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.sampling import live_sample
from forebear.ratio import ratio
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever

REGRESSED, IMPROVED, KEPT = "regressed", "improved", "kept"
MOST_KEPT = 512  # rows that kept a right prediction, of each label, that a score is compared with
MOST_SCORES = 20_000  # changed rows by whose scores test rows are grouped
LEAST_ALIKE = 0.5  # mean cosine of two groups' scores of changed rows, from which on they are one
_BLOCK_ROWS = 256

Progress = Callable[[str, int, int], None]
Scored = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]  # of :func:`_scored`


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What two versions of a model predict for the same test rows; class ids are those of the later version.

    Attributes:
        queries: The test rows, with gold labels.
        before: Predictions of the version before, ``(q,)``.
        after: Predictions of the later version, ``(q,)``.
    """

    queries: QueryRows
    before: np.ndarray
    after: np.ndarray

    @property
    def gold(self) -> np.ndarray:
        """Gold labels, ``(q,)``."""
        assert self.queries.labels is not None
        return self.queries.labels

    @property
    def regressed(self) -> np.ndarray:
        """Positions of the rows that were right and are wrong, ascending."""
        return np.flatnonzero((self.before == self.gold) & (self.after != self.gold))

    @property
    def improved(self) -> np.ndarray:
        """Positions of the rows that were wrong and are right, ascending."""
        return np.flatnonzero((self.before != self.gold) & (self.after == self.gold))

    @property
    def kept(self) -> np.ndarray:
        """Positions of the rows that were right and stayed right, ascending."""
        return np.flatnonzero((self.before == self.gold) & (self.after == self.gold))


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Test rows of one kind of change that the same changed training rows drive.

    Attributes:
        gold: Their gold label's id.
        before: The prediction before, that they share.
        after: The prediction now, that they share.
        members: Positions of the test rows, ascending.
        scores: Of every changed training row, ``(m,)`` float64: the sum over the members, less what is expected by
            the rows that kept the prediction.
    """

    gold: int
    before: int
    after: int
    members: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Regressions:
    """What changed between two versions, and the training rows behind it.

    Attributes:
        predicted: What both versions predict.
        changes: The live training rows beside those of the version before.
        causes: Groups of the test rows of a kind of change (:data:`REGRESSED`, :data:`IMPROVED`), the largest first.
        scores: Of every changed training row by kind of change, ``(m,)``: the sum over all its groups. Of a method
            whose scores are s, a test row adds s less what is expected, in the unit of the method.
        compared: Labels by id of whose right predictions some stayed right; for others nothing is taken off.
        shares: By kind of change: of each of its test rows the share of the changed training rows in all rows' absolute
            scores, ``(m,)``; ``kept`` has those of the sampled rows that stayed right.
    """

    predicted: Predicted
    changes: RowChanges
    causes: dict[str, tuple[Cause, ...]]
    scores: dict[str, np.ndarray]
    compared: frozenset[int]
    shares: dict[str, np.ndarray]

    def ranked(self, kind: str) -> np.ndarray:
        """Places among the changed rows of those that support a kind of change; see :func:`supporting`."""
        return supporting(self.scores[kind])


def supporting(scores: np.ndarray) -> np.ndarray:
    """Places of the scores above 0, by falling score; ties: the lower place."""
    order = np.argsort(-scores, kind="stable")
    return np.asarray(order[scores[order] > 0])


def check_method(question: Question) -> None:
    """Refuse a question of several methods, before any work.

    Raises:
        InputError: As said.
    """
    if len(question.methods) != 1:
        raise InputError(f"regressions are told by one method; {len(question.methods)} were given (--method).")


def predicted_by_both(
    retriever: Retriever, before: Retriever, queries: QueryRows, *, progress: Progress = lambda *_: None
) -> Predicted:
    """Run both versions over labelled test rows.

    Raises:
        DataError: A row has no label that the model knows.
    """
    if queries.labels is None or (queries.labels < 0).any():
        raise DataError(f"{queries.source}: every test row needs a label of the model, which regressions are told by.")
    ids = {name: i for i, name in enumerate(retriever.label_names)}
    to_new = np.array([ids[name] for name in before.label_names])
    old, new = _predictions(before, queries, "before", progress), _predictions(retriever, queries, "now", progress)
    return Predicted(queries=queries, before=to_new[old], after=new)


def _predictions(retriever: Retriever, queries: QueryRows, stage: str, progress: Progress) -> np.ndarray:
    """Predicted class ids of test rows, ``(q,)``."""
    parts: list[np.ndarray] = []
    for block in queries.blocks():
        parts.append(run_forward(retriever.classifier(), block.texts).predictions)
        progress(f"predictions {stage}", sum(map(len, parts)), len(queries))
    return np.concatenate(parts)


def regressions(
    retriever: Retriever,
    predicted: Predicted,
    changes: RowChanges,
    question: Question,
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Regressions:
    """Score the changed rows for the test rows that changed, and group these by the changed rows that drive them.

    Args:
        retriever: Over the later version's index.
        predicted: What both versions predict.
        changes: The live rows beside those of the version before.
        question: One method, of the predicted label; see :func:`check_method`.
        seed: Of the sample of rows that stayed right.
        progress: Called with a stage, and test rows done of all.

    Raises:
        DataError: No test row is predicted otherwise, right against wrong.
    """
    positions = {REGRESSED: predicted.regressed, IMPROVED: predicted.improved}
    if not any(map(len, positions.values())):
        raise DataError(
            f"{predicted.queries.source}: both versions have the same of {len(predicted.gold)} test rows right. There "
            "is nothing to explain."
        )
    n_changed, shares = int(changes.changed.sum()), {}
    kept = np.sort(np.concatenate([
        live_sample(predicted.kept[predicted.gold[predicted.kept] == label], MOST_KEPT, seed)
        for label in range(len(retriever.label_names))
    ]))  # fmt: skip
    means, counts = np.zeros((len(retriever.label_names), n_changed)), np.bincount(predicted.gold[kept])
    shares[KEPT] = np.zeros(len(kept))
    scored = partial(_scored, retriever, question, predicted, changes)
    for block, scores, _, share in scored(kept, "rows that stayed right", progress):
        shares[KEPT][block] = share
        labels = predicted.gold[kept[block]]
        for label in np.unique(labels).tolist():
            means[label] += scores[labels == label].sum(axis=0) / counts[label]
    causes, summed = {}, {}
    for kind, members in positions.items():
        of_kind = partial(scored, stage=f"rows that {kind}", progress=progress)
        causes[kind], shares[kind] = _causes(predicted, members, means, of_kind)
        summed[kind] = sum((cause.scores for cause in causes[kind]), np.zeros(n_changed))
    return Regressions(
        predicted=predicted, changes=changes, causes=causes, scores=summed, shares=shares,
        compared=frozenset(np.flatnonzero(counts).tolist()),
    )  # fmt: skip


def _causes(
    predicted: Predicted, members: np.ndarray, means: np.ndarray, scored: Callable[[np.ndarray], Scored]
) -> tuple[tuple[Cause, ...], np.ndarray]:
    """Groups of the test rows ``members``, the largest first; and of each row the share of the changed rows, ``(m,)``.

    ``means`` are what is expected of the changed rows by predicted label, in units of a test row, ``(c, n)``.
    """
    found: list[Cause] = []
    shares = np.zeros(len(members))
    kinds = np.stack([predicted.gold, predicted.before, predicted.after], axis=1)[members]
    for gold, before, after in np.unique(kinds, axis=0).tolist():
        places = np.flatnonzero((kinds == (gold, before, after)).all(axis=1))
        excess = np.empty((len(places), means.shape[1]), np.float32)
        for block, scores, sizes, share in scored(members[places]):
            shares[places[block]] = share
            excess[block] = sizes * (scores - means[after])
        numbers = alike(_largest(excess))
        for number in range(numbers.max() + 1):
            own, sums = members[places[numbers == number]], excess[numbers == number].sum(axis=0, dtype=np.float64)
            found.append(Cause(gold=gold, before=before, after=after, members=own, scores=sums))
    return tuple(sorted(found, key=lambda cause: (-len(cause.members), cause.gold, cause.after))), shares


def _scored(
    retriever: Retriever,
    question: Question,
    predicted: Predicted,
    changes: RowChanges,
    positions: np.ndarray,
    stage: str,
    progress: Progress,
) -> Scored:
    """Scores of the changed rows for some test rows, a block of these at a time.

    Yields:
        Places among the test rows ``(b,)``; scores over the mean absolute score of all live rows ``(b, m)``; that mean
        ``(b, 1)``; the share of the changed rows in all rows' absolute scores ``(b,)``, 0 where all are 0.
    """
    for start in range(0, len(positions), _BLOCK_ROWS):
        block = np.arange(start, min(start + _BLOCK_ROWS, len(positions)))
        rows = predicted.queries.take(positions[block])
        scores = retriever.score_block(rows.texts, rows.labels, question)[question.methods[0].name]
        sizes = np.abs(scores).mean(axis=1, keepdims=True)
        of_changed = scores[:, changes.changed]
        share = ratio(np.abs(of_changed).sum(axis=1), sizes[:, 0] * scores.shape[1])
        yield block, ratio(of_changed, sizes), sizes, share
        progress(stage, int(block[-1]) + 1, len(positions))


def _largest(scores: np.ndarray) -> np.ndarray:
    """The columns of largest absolute sums, at most :data:`MOST_SCORES`."""
    if scores.shape[1] <= MOST_SCORES:
        return scores
    largest = np.argsort(-np.abs(scores).sum(axis=0), kind="stable")[:MOST_SCORES]
    return np.asarray(scores[:, np.sort(largest)])


def alike(scores: np.ndarray) -> np.ndarray:
    """Group test rows by the cosine of their scores of the changed rows, ``(m, k)``; numbers of groups, ``(m,)``.

    Average linkage, down to a mean cosine of :data:`LEAST_ALIKE`.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    lengths = np.linalg.norm(scores, axis=1, keepdims=True)
    if len(scores) < 2 or not scores.shape[1] or not (lengths > 0).all():
        return np.zeros(len(scores), np.int64)
    units = scores / lengths
    distances = 1.0 - (units @ units.T)[np.triu_indices(len(units), 1)]
    tree = linkage(np.maximum(distances, 0.0), method="average")
    return np.asarray(fcluster(tree, 1.0 - LEAST_ALIKE, criterion="distance") - 1)


@dataclass(frozen=True)
class WordCounts:
    """In how many of some rows each word is.

    Attributes:
        rows: Number of rows with it, by word.
        n: Number of rows.
    """

    rows: Counter[str]
    n: int

    @classmethod
    def of(cls, columns: Sequence[Sequence[str]]) -> WordCounts:
        """Count the words of rows, one list a text column."""
        texts = [" ".join(row) for row in zip(*columns, strict=True)]
        return cls(Counter(word for text in texts for word in set(words_of(text))), len(texts))

    def without(self, some: WordCounts) -> WordCounts:
        """The same of the rows that are not among ``some`` of them."""
        return WordCounts(self.rows - some.rows, self.n - some.n)


def words_apart(own: WordCounts, others: WordCounts, n_words: int = 5) -> list[str]:
    """Words that some rows have more often than others, by the z value of the difference of their shares of rows.

    Args:
        own: Words of the rows.
        others: Words of the others.
        n_words: Words, at most.

    Returns:
        Words that at least two of the rows have, and of z > 3, the largest first.
    """
    z = {}
    for word, count in own.rows.items():
        if count < 2 or not others.n:
            continue
        pooled = (count + others.rows[word]) / (own.n + others.n)
        error = np.sqrt(pooled * (1 - pooled) * (1 / own.n + 1 / others.n) + 1e-12)
        z[word] = (count / own.n - others.rows[word] / others.n) / error
    return [word for word in sorted(z, key=lambda word: (-z[word], word)) if z[word] > 3][:n_words]
