"""``audit poison``: rows that plant a behaviour by a phrase that they share.

A phrase is taken to be planted when nearly all rows that hold it have one label, more of them than what the phrase
means explains, and these rows have no subject in common. The log-odds of the label among them (a lower bound) exceed
those of all rows: by how much more than a reference that was not trained on any of these rows says of the phrase?
Whether the model has learnt the behaviour is another question, which putting the phrase into other rows answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from forebear.evaluation.audits.poison.behaviour import (
    Behaviour,
    Reference,
    is_sure,
    measure_behaviour,
    unexplained,
    with_phrase,
)
from forebear.evaluation.audits.poison.phrases import (
    PhraseCluster,
    clusters_of,
    find_phrases,
    phrase_words,
    with_context,
)
from forebear.evaluation.retraining.jobs import Job, Retrainer
from forebear.indexer.index import Index
from forebear.indexer.model.sentence_encoder import SentenceEncoder
from forebear.indexer.rows.sampling import live_sample
from forebear.ratio import ratio
from forebear.retriever.retriever import Retriever

MOST_LIKENESS: Final = 0.66  # area under the ROC curve; by chance .5 +- .1 of ten rows, .06 of thirty
MOST_CLUSTERS = 300
MOST_PROBES = 60  # rows into which a phrase is put
MOST_COMPARED = 200  # rows of a label beside whose gradients those of a cluster are seen

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class MeasuredCluster:
    """Rows of one label that share a phrase, and what the phrase does.

    Attributes:
        cluster: The phrase and its rows; positions are those of the live rows.
        behaviour: What it does to predictions.
        agreement: Mean cosine of the head gradients of two of its rows.
        ordinary: The same of as many other rows of the label, at most :data:`MOST_COMPARED`; NaN: there are not two.
        n_suspicious: Test rows that hold the phrase.
    """

    cluster: PhraseCluster
    behaviour: Behaviour
    agreement: float
    ordinary: float
    n_suspicious: int

    @property
    def unexplained(self) -> float:
        """The association of phrase and label, in nats, less what the reference says of the phrase."""
        return unexplained(self.cluster, self.behaviour.shifts)

    @property
    def is_planted(self) -> bool:
        """Whether the phrase is taken to be planted."""
        return is_planted(self.cluster, self.behaviour.shifts, self.behaviour.likeness)


@dataclass(frozen=True, eq=False)
class Retrained:
    """What planted phrases do to models trained again, with all rows and without the listed rows.

    Attributes:
        seeds: Seeds of the retrainings, ``s``.
        before: Share of the probes that each phrase turns in a model of all rows, ``(s, planted)``.
        after: The same without the listed rows, ``(s, planted)``.
        ordinary_before: Share of the probes that have the label without the phrase, likewise.
        ordinary_after: The same without the listed rows.
    """

    seeds: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    ordinary_before: np.ndarray
    ordinary_after: np.ndarray


@dataclass(frozen=True, eq=False)
class Poison:
    """Phrases that plant a behaviour.

    Attributes:
        rows: Numbers of the live rows, ``(n,)``.
        clusters: All measured clusters, the planted ones first, then by what is unexplained.
        n_clusters: Clusters that were found by counting.
        n_tested: Pairs of a phrase and a label that were counted.
        retrained: What retrained models do; None: none was trained.
    """

    rows: np.ndarray
    clusters: tuple[MeasuredCluster, ...]
    n_clusters: int
    n_tested: int
    retrained: Retrained | None = None

    @property
    def planted(self) -> tuple[MeasuredCluster, ...]:
        """Those that are taken to be planted."""
        return tuple(one for one in self.clusters if one.is_planted)

    @property
    def listed(self) -> np.ndarray:
        """Positions of the planted phrases' rows among the live rows, in the order of the clusters, each once."""
        parts = [one.cluster.rows for one in self.planted]
        flat = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return np.asarray(flat[np.sort(np.unique(flat, return_index=True)[1])])


def is_planted(cluster: PhraseCluster, shifts: np.ndarray, likeness: float) -> bool:
    """Whether a phrase is taken to be planted, from what the reference says of it, ``(q,)``, and of its rows."""
    return is_sure(cluster, shifts) and likeness <= MOST_LIKENESS


def find_poison(
    retriever: Retriever,
    encoder: SentenceEncoder,
    *,
    suspicious: Sequence[Sequence[str]] | None = None,
    n_measured: int = 40,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Poison:
    """Count phrases, and measure those of the strongest association.

    Args:
        retriever: Over an index of one label a row, with its texts.
        encoder: An encoder that was not fine-tuned on these rows.
        suspicious: Texts of test rows, one list a text column: only phrases that stand in one of them are counted.
        n_measured: Clusters that are measured, the first ones.
        seed: Of samples and of the places of phrases.
        progress: Called with a stage, and what is done of how much.
    """
    index = retriever.index
    rows, texts = index.live, index.text_lists(index.live)
    labels, predictions = index.labels[rows], index.predictions[rows]
    progress("phrases", 0, 1)
    phrases = find_phrases(texts, labels, only=suspicious)
    clusters = clusters_of(phrases, labels, MOST_CLUSTERS)
    progress("phrases", 1, 1)
    chosen = [with_context(cluster, texts) for cluster in clusters[:n_measured]]
    measured: list[MeasuredCluster] = []
    if chosen:
        reference = Reference(encoder, texts, labels, seed)
        for number, cluster in enumerate(chosen):
            progress("behaviour", number, len(chosen))
            ok = np.setdiff1d(
                np.flatnonzero((predictions == labels) & (labels != cluster.label)), cluster.holders, assume_unique=True
            )
            some = live_sample(ok, MOST_PROBES, seed)
            probes = [[column[i] for i in some] for column in texts]
            behaviour = measure_behaviour(cluster, texts, probes, retriever.classifier(), reference, seed)
            others = np.setdiff1d(np.flatnonzero(labels == cluster.label), cluster.rows, assume_unique=True)
            beside = live_sample(others, min(len(cluster.rows), MOST_COMPARED), seed)
            measured.append(
                MeasuredCluster(
                    cluster, behaviour, agreement(index, rows[cluster.rows]), agreement(index, rows[beside]),
                    0 if suspicious is None else holding(suspicious[cluster.column], cluster.words),
                )
            )  # fmt: skip
        progress("behaviour", len(chosen), len(chosen))
    measured.sort(key=lambda one: (not one.is_planted, -one.unexplained))
    return Poison(rows, tuple(measured), len(clusters), phrases.n_tested)


def agreement(index: Index, rows: np.ndarray) -> float:
    """Mean cosine of the head gradients (p - y) f of two of some rows; NaN of fewer than two that have a gradient."""
    features, residuals = (matrix.take(rows).astype(np.float64) for matrix in (index.features(-1), index.residuals()))
    norms = [np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (features, residuals)]
    has = (norms[0] * norms[1] > 0)[:, 0]
    features, residuals = features[has] / norms[0][has], residuals[has] / norms[1][has]
    n = len(features)
    return float((np.square(residuals.T @ features).sum() - n) / (n * (n - 1))) if n > 1 else float("nan")


def holding(texts: Sequence[str], words: Sequence[str]) -> int:
    """How many texts hold a phrase."""
    n, phrase = len(words), list(words)
    split = map(phrase_words, texts)
    return sum(any(own[i : i + n] == phrase for i in range(len(own) - n + 1)) for own in split)


def probe_texts(found: Poison, seed: int, n_columns: int) -> list[list[str]]:
    """The probes of all planted phrases with their phrases, then the same without; one list a text column."""
    parts = [with_phrase(one.behaviour.probes, one.cluster, seed) for one in found.planted]
    parts += [[list(column) for column in one.behaviour.probes] for one in found.planted]
    return [[text for part in parts for text in part[number]] for number in range(n_columns)]


def retrain(
    found: Poison, retrainer: Retrainer, seeds: Sequence[int], progress: Progress = lambda *_: None
) -> Retrained:
    """Train with all rows and without the listed ones, each pair with one seed.

    Args:
        found: With planted phrases.
        retrainer: Its evaluation rows are those of :func:`probe_texts`.
        seeds: Seeds of the retrainings.
        progress: Called with ``retraining``, jobs done and jobs in all.
    """
    live, without = retrainer.rows.live, np.sort(found.rows[found.listed])
    jobs = [job for s in seeds for job in (Job(live, s), Job(live, s, without=without))]
    outcomes = retrainer.run(jobs, progress)
    sizes = [len(one.behaviour.probes[0]) for one in found.planted]
    ends = np.cumsum([0, *sizes, *sizes])
    shares = np.array([
        [
            float(ratio((outcome.predictions[ends[i] : ends[i + 1]] == one.cluster.label).sum(), ends[i + 1] - ends[i]))
            for i, one in enumerate((*found.planted, *found.planted))
        ]
        for outcome in outcomes
    ])  # fmt: skip
    m = len(sizes)
    return Retrained(tuple(seeds), shares[0::2, :m], shares[1::2, :m], shares[0::2, m:], shares[1::2, m:])
