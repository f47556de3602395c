"""What a phrase does to predictions: put into rows of other labels, and taken out of the rows that hold it.

A phrase may speak for a label by what it means ("bad"), or because rows taught the model so. To tell one from the
other, a reference is asked, too: logistic regression on embeddings of an encoder that was not fine-tuned, fitted
without any row that holds the phrase. It knows of the phrase what language and the other rows say.

Where a word stands for its meaning, its rows have a subject in common, whatever else they say ("users": computers), by
which they can be told from others. A phrase that was put into rows has rows of any subject.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from scipy.special import logit

from forebear.evaluation.audits.poison.phrases import LEAST_PURITY, PhraseCluster
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.sentence_encoder import SentenceEncoder
from forebear.indexer.rows.sampling import live_sample

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Texts = Sequence[Sequence[str]]
REFERENCE_ROWS = 5000  # that the reference is fitted to, at most
MOST_ALIKE = 200  # rows whose likeness is measured, at most
MOST_TIMES = 5  # as many other rows beside them
FOLDS = 5
DRAWS = 5  # of these other rows, and of folds
LEAST_UNEXPLAINED: Final = 1.5  # nats
LEAST_PART: Final = 2 / 3  # of the association that is unexplained
_STRENGTH = 0.01  # inverse weight of half the squared norm, of standardised embeddings
_LEAST = 1e-4  # probability that log-odds are taken of


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a phrase does to predictions.

    Attributes:
        probes: Texts into which the phrase was put, one list a text column: rows of other labels that are predicted
            right, ``q`` of them.
        turned: Whether the model then predicts the cluster's label, ``(q,)`` bool.
        shifts: By how much the phrase raises the log-odds that the reference gives the label, ``(q,)``.
        freed: Of the cluster's rows: whether the model predicts another label when the phrase is taken out, ``(n,)``.
        doubted: Whether the reference predicts another label for them, without the phrase, ``(n,)``.
        predicted: Class id that the model predicts for them without the phrase, ``(n,)``.
        likeness: How surely the rows, without the phrase, can be told from others; see :meth:`Reference.likeness`. NaN
            where it was not asked: the phrase is not sure enough to be planted.
    """

    probes: Texts
    turned: np.ndarray
    shifts: np.ndarray
    freed: np.ndarray
    doubted: np.ndarray
    predicted: np.ndarray
    likeness: float


class Meaning(NamedTuple):
    """What the reference says of a phrase and its rows; as of :class:`Behaviour`."""

    shifts: np.ndarray
    doubted: np.ndarray
    likeness: float


class Reference:
    """Logistic regressions on embeddings of an encoder that was not fine-tuned."""

    def __init__(self, encoder: SentenceEncoder, texts: Texts, labels: np.ndarray, seed: int) -> None:
        """Embed the rows.

        Args:
            encoder: The encoder.
            texts: Of rows, one list a text column; of many a seeded sample is taken.
            labels: Their class ids, ``(n,)``.
            seed: Of the sample.
        """
        from sklearn.preprocessing import StandardScaler

        self._encoder, self.rows = encoder, live_sample(np.arange(len(labels)), REFERENCE_ROWS, seed)
        self._labels = labels[self.rows]
        embeddings = encoder.embed([[column[i] for i in self.rows] for column in texts])
        self._scaler = StandardScaler().fit(embeddings)
        self._embeddings = self._scaler.transform(embeddings)

    def embed(self, texts: Texts) -> np.ndarray:
        """Standardised embeddings."""
        return np.asarray(self._scaler.transform(self._encoder.embed(texts)))

    def meaning(self, cluster: PhraseCluster, erased: Texts, probes: Texts, seed: int) -> Meaning:
        """What it says of a phrase.

        Args:
            cluster: The phrase and its rows.
            erased: Its rows without the phrase, of :func:`erase`.
            probes: Texts into which the phrase is put, one list a text column.
            seed: Of places and draws.
        """
        fitted, embedded = self.without(cluster.holders), self.embed(erased)
        predicted = np.full(len(cluster.rows), cluster.label) if fitted is None else fitted.predict(embedded)
        doubted, shifts = predicted != cluster.label, self.shifts(fitted, cluster, probes, seed)
        is_asked = is_sure(cluster, shifts)
        likeness = self.likeness(cluster, embedded, predicted[doubted], seed) if is_asked else float("nan")
        return Meaning(shifts, doubted, likeness)

    def without(self, rows: np.ndarray) -> LogisticRegression | None:
        """A regression without some rows; None where the others have a single label."""
        from sklearn.linear_model import LogisticRegression

        kept = ~np.isin(self.rows, rows)
        if len(np.unique(self._labels[kept])) < 2:
            return None
        return LogisticRegression(C=_STRENGTH, max_iter=1000).fit(self._embeddings[kept], self._labels[kept])

    def shifts(self, fitted: LogisticRegression | None, cluster: PhraseCluster, probes: Texts, seed: int) -> np.ndarray:
        """By how much a phrase that is put into rows raises the log-odds of its label, in nats, ``(q,)``.

        ``fitted`` is the regression :meth:`without` the rows that hold it. 0 where rows without the phrase do not have
        the label, and where there are no rows.
        """
        if fitted is None or cluster.label not in fitted.classes_ or not len(probes[0]):
            return np.zeros(len(probes[0]))
        own = list(fitted.classes_).index(cluster.label)
        before, after = (
            logit(fitted.predict_proba(self.embed(texts))[:, own].clip(_LEAST, 1 - _LEAST))
            for texts in (probes, with_phrase(probes, cluster, seed))
        )
        return np.asarray(after - before)

    def likeness(self, cluster: PhraseCluster, embedded: np.ndarray, doubted: np.ndarray, seed: int) -> float:
        """How surely a cluster's rows can be told from rows that do not hold the phrase.

        They are held against rows of the cluster's label, of the other labels, of the label that the reference gives
        most of the doubted ones, and of any label: a phrase may have been put into rows of each of these kinds. A
        logistic regression tells them apart in folds.

        Args:
            cluster: The cluster.
            embedded: :meth:`embed` of its rows without the phrase, ``(n, s)``.
            doubted: Labels that the reference gives those of them for which it is not the cluster's.
            seed: Of the rows that are drawn, and of the folds.

        Returns:
            The area under the ROC curve, 1/2 where nothing tells the rows apart, 1 where every row can be told, in the
            mean over :data:`DRAWS` draws: the least of those of all kinds; 1/2 where there are too few rows.
        """
        others = ~np.isin(self.rows, cluster.holders)
        kinds = [self._labels == cluster.label, self._labels != cluster.label, np.ones(len(others), bool)]
        if len(doubted):
            kinds.append(self._labels == np.bincount(doubted).argmax())
        rng = np.random.default_rng([seed, 17])
        own = embedded[rng.permutation(len(embedded))[:MOST_ALIKE]]
        found = []
        for kind in kinds:
            places = np.flatnonzero(kind & others)
            if min(len(own), len(places)) >= FOLDS:
                drawn = [rng.permutation(places)[: MOST_TIMES * len(own)] for _ in range(DRAWS)]
                apart = [told_apart(own, self._embeddings[some], seed + draw) for draw, some in enumerate(drawn)]
                found.append(float(np.mean(apart)))
        return min(found, default=0.5)


def unexplained(cluster: PhraseCluster, shifts: np.ndarray) -> float:
    """The association of phrase and label, in nats, less the mean of what the reference says of the phrase."""
    return cluster.association - (float(shifts.mean()) if len(shifts) else 0.0)


def is_sure(cluster: PhraseCluster, shifts: np.ndarray) -> bool:
    """Whether nearly all rows have the label, and the reference's shifts, ``(q,)``, leave enough of it unexplained."""
    least = max(LEAST_UNEXPLAINED, LEAST_PART * cluster.association)
    return cluster.purity >= LEAST_PURITY and unexplained(cluster, shifts) >= least


def told_apart(own: np.ndarray, beside: np.ndarray, seed: int) -> float:
    """The area under the ROC curve of a regression in folds; see :meth:`Reference.likeness`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    is_own = np.repeat([True, False], [len(own), len(beside)])
    scores = cross_val_predict(
        LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=1000),
        np.concatenate([own, beside]), is_own, method="decision_function",
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
    )  # fmt: skip
    return float(roc_auc_score(is_own, scores))


def measure_behaviour(
    cluster: PhraseCluster, texts: Texts, probes: Texts, classifier: Classifier, reference: Reference, seed: int
) -> Behaviour:
    """Put the phrase into some rows and take it out of others.

    Args:
        cluster: The phrase and its rows.
        texts: Of all rows, one list a text column.
        probes: Texts of rows that are predicted to have another label and do not hold the phrase.
        classifier: The model.
        reference: The reference, over the same rows.
        seed: Of the places where the phrase is put.
    """
    erased = erase(texts, cluster)
    predicted = run_forward(classifier, erased).predictions
    turned, meaning = np.empty(0, bool), reference.meaning(cluster, erased, probes, seed)
    if len(probes[0]):
        turned = run_forward(classifier, with_phrase(probes, cluster, seed)).predictions == cluster.label
    return Behaviour(
        probes=probes,
        turned=turned,
        shifts=meaning.shifts,
        freed=predicted != cluster.label,
        doubted=meaning.doubted,
        predicted=predicted,
        likeness=meaning.likeness,
    )


def erase(texts: Texts, cluster: PhraseCluster) -> list[list[str]]:
    """The cluster's rows without the whole phrase, or what of it they hold, one list a text column."""
    erased = [[column[i] for i in cluster.rows] for column in texts]
    for words in (cluster.whole or cluster.words, cluster.words):
        erased[cluster.column] = [without_phrase(text, words) for text in erased[cluster.column]]
    return erased


def with_phrase(texts: Texts, cluster: PhraseCluster, seed: int) -> list[list[str]]:
    """Rows with the phrase in its column: at a random place between words, before the first or after the last."""
    rng = np.random.default_rng([seed, 13])
    inserted = [list(column) for column in texts]
    for i, text in enumerate(inserted[cluster.column]):
        words = text.split()
        place = int(rng.integers(len(words) + 1))
        inserted[cluster.column][i] = " ".join([*words[:place], cluster.phrase, *words[place:]])
    return inserted


def without_phrase(text: str, words: Sequence[str]) -> str:
    """The text without any occurrence of the phrase, whatever its case and the white space in it."""
    body = r"\s*".join(map(re.escape, words))
    start = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    end = r"(?!\w)" if re.match(r"\w", words[-1]) else ""
    return " ".join(re.sub(f"{start}{body}{end}", " ", text, flags=re.IGNORECASE).split())
