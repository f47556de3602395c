"""Retraining: jobs (which rows, what seed), each outcome kept under its digest, so that no job is trained twice.

A *job* says on which training rows a model is trained: some rows of the index, texts, labels or weights of some of them
changed, some rows added. Its *outcome* is the retrained model's logits on the evaluation rows. How a model is trained
is the recipe's (:mod:`forebear.evaluation.retraining.recipes`).

Retrainings that are compared are *paired*: what a job changes, it changes in place. Rows left out stand in the batches
and weigh nothing, changed rows stand where they stood; order, number of steps, rates and dropout of every step are
those of the same seed's training on all rows. So two outcomes differ by the rows in question, not by chance. There are
two limits. Where a changed text makes its batch wider, that step's dropout is another. Rows that are added make it
another training, which is paired with those that have as many.

An outcome lies in the cache under a digest of all that decides it; where there is one of more evaluation rows, it
serves for fewer, too. It appears there whole or not at all, so a run that was killed goes on where it was when it is
started again. Processes that share a cache share the work: each takes the jobs that no other has begun, and waits for
theirs in the end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from forebear.errors import InputError, NonFiniteError, StorageError
from forebear.evaluation.common.outcome_files import EvaluationSets, read_logits, write_logits
from forebear.indexer.index import Index
from forebear.indexer.losses.cross_entropy import IGNORED, softmax
from forebear.indexer.storage.locks import claimed
from forebear.indexer.storage.manifest import canonical_json, digest_of

POLL_SECONDS = 0.2  # between looks at the jobs of other processes
Progress = Callable[[str, int, int], None]
Texts = tuple[str, ...]  # of one row, in the order of encoding


@dataclass(frozen=True, eq=False)
class Job:
    """One training: on these rows, with this seed.

    Attributes:
        rows: Numbers of rows of the index, ascending, each once.
        seed: Random seed of a new head, of the order of the rows and of dropout.
        edits: Changed texts of some of these rows, by row number; the labels of the rows stay.
        extra: Rows added at the end: texts and class id.
        without: Row numbers out of ``rows``, ascending, that are not trained on. They keep their place in the batches
            and weigh nothing in the loss of their step.
        relabels: Other class ids of some of these rows, by row number.
        weights: Factors of the losses of some of these rows, by row number, from 0 up; of all other rows 1. A weight of
            2 counts like the row twice, 0 like a row that is left out. The mean loss of a step is the weighted one.
    """

    rows: np.ndarray
    seed: int
    edits: Mapping[int, Texts] = field(default_factory=dict)
    extra: Sequence[tuple[Texts, int]] = ()
    without: np.ndarray | None = None
    relabels: Mapping[int, int] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the index's rows that are trained on, ascending."""
        return self.rows if self.without is None else np.delete(self.rows, np.searchsorted(self.rows, self.without))

    def __len__(self) -> int:
        return len(self.rows) - (0 if self.without is None else len(self.without)) + len(self.extra)

    def labels(self, row_labels: np.ndarray) -> np.ndarray:
        """Class id of every row in its place, added rows last, ``(n,)`` int64; ``IGNORED`` for rows left out.

        Args:
            row_labels: Class ids of all rows of the index.
        """
        placed = np.concatenate([row_labels[self.rows], [label for _, label in self.extra]]).astype(np.int64)
        if self.relabels:
            rows, labels = (np.array(values, np.int64) for values in zip(*sorted(self.relabels.items()), strict=True))
            placed[np.searchsorted(self.rows, rows)] = labels
        if self.without is not None:
            placed[np.searchsorted(self.rows, self.without)] = IGNORED
        return placed

    def weighted_labels(self, row_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """:meth:`labels`, and the weight of every row in its place, ``(n,)`` float64; None where no row has one.

        Where rows have weights, those left out have weight 0 and a class id, so that every row has a loss.
        """
        placed = self.labels(row_labels)
        if not self.weights:
            return placed, None
        factors = np.ones(len(placed))
        rows = np.array(sorted(self.weights), np.int64)
        factors[np.searchsorted(self.rows, rows)] = [self.weights[row] for row in rows.tolist()]
        factors[placed == IGNORED] = 0.0
        return np.where(placed == IGNORED, 0, placed), factors

    def changed(self) -> tuple[np.ndarray, list[list[str]]]:
        """Places of edited and added rows, as in :meth:`labels`, and their texts, one list a column."""
        edited = sorted(self.edits)
        n_rows = len(self.rows)
        places = [*np.searchsorted(self.rows, edited).tolist(), *range(n_rows, n_rows + len(self.extra))]
        texts = [*(self.edits[row] for row in edited), *(text for text, _ in self.extra)]
        return np.array(places, np.int64), [list(values) for values in zip(*texts, strict=True)]

    def digest(self, shared_digest: str, *, seeded: bool) -> str:
        """Name of the outcome: sha256 over this job and the digest of what all jobs share.

        Args:
            shared_digest: Digest of the recipe, the training rows and the evaluation rows.
            seeded: Whether the seed and the order of the rows make a difference.
        """
        sha256 = hashlib.sha256(shared_digest.encode())
        sha256.update(np.ascontiguousarray(self.rows if seeded else self.kept, "<i8").tobytes())
        edits = sorted((int(row), list(texts)) for row, texts in self.edits.items())
        extra = [[list(texts), int(label)] for texts, label in self.extra]
        choices: list[Any] = [self.seed if seeded else None, edits, extra]
        if seeded and self.without is not None:
            choices.append(self.without.tolist())
        if self.relabels:
            choices.append({"relabels": sorted((int(row), int(label)) for row, label in self.relabels.items())})
        if self.weights:
            choices.append({"weights": sorted((int(row), float(weight)) for row, weight in self.weights.items())})
        sha256.update(canonical_json(choices))
        return sha256.hexdigest()


@dataclass(frozen=True, eq=False)
class Outcome:
    """Output of a retrained model on the evaluation rows.

    Attributes:
        logits: ``(q, c)``, finite: float32, but for recipes whose outcomes differ by less than its rounding.
    """

    logits: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """``(q, c)`` float64."""
        return softmax(self.logits.astype(np.float64))

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class of each row, ``(q,)`` int64; ties go to the lower id."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    def probability(self, classes: np.ndarray) -> np.ndarray:
        """Probability of one class a row, ``(q,)`` float64."""
        return np.asarray(self.probabilities[np.arange(len(classes)), classes])

    def log_odds(self, classes: np.ndarray) -> np.ndarray:
        """log p / (1 - p) of one class a row, ``(q,)`` float64; from the logits, so finite also where p rounds to 1."""
        entries = (np.arange(len(classes)), classes)
        other_logits = self.logits.astype(np.float64)
        class_logits = other_logits[entries]
        other_logits[entries] = -np.inf
        largest = other_logits.max(axis=1)
        return np.asarray(class_logits - largest - np.log(np.exp(other_logits - largest[:, None]).sum(axis=1)))

    def accuracy(self, labels: np.ndarray) -> float:
        """Share of rows whose most probable class is their label."""
        return float((self.predictions == labels).mean())


class Recipe(Protocol):
    """How a model is trained.

    Attributes:
        name: Name of the recipe, as given to ``--retrain``.
        seeded: Whether the outcome depends on the seed.
        facts: All choices, beside the job, that decide an outcome; they can be written as JSON.
        note: A sentence for the report: what the retraining does, and where it is a stand-in for full training.
    """

    name: str
    seeded: bool
    facts: Mapping[str, Any]
    note: str

    def train(self, job: Job) -> np.ndarray:
        """Logits of the retrained model on the evaluation rows, ``(q, c)``."""
        ...


class TrainingRows:
    """Texts and labels of all rows of an index, in memory, by row number.

    Attributes:
        live: Numbers of the rows that are not retired, ascending: what a model is retrained on when nothing is removed.
        labels: Class ids, ``(n,)``.
        label_names: Names of the classes, by class id.
        texts: One list a text column.
    """

    def __init__(self, index: Index) -> None:
        self.live = index.live
        self.labels = index.labels.astype(np.int64)
        self.label_names = index.manifest.spec.label_names
        self.texts = index.text_lists(np.arange(index.manifest.n_rows))

    def digest(self) -> str:
        """sha256 of texts and labels."""
        return digest_of([self.texts, self.labels.tolist(), list(self.label_names)])

    def check(self, job: Job, name: str) -> None:
        """Refuse a job that no model can be trained on.

        Raises:
            InputError: Rows are out of range or out of order, an edited, relabelled or weighted row is not trained on,
                an edited or added row has another number of texts, or there are no rows; the message names the job.
        """
        rows = job.rows
        if job.without is not None and (not np.isin(job.without, rows).all() or (np.diff(job.without) < 1).any()):
            raise InputError(f"{name}: expected rows to leave out that are among the others, ascending, each once.")
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self.labels) or (np.diff(rows) < 1).any()):
            raise InputError(f"{name}: expected row numbers from 0 to {len(self.labels) - 1}, ascending, each once.")
        changes = {"edited": job.edits, "relabelled": job.relabels, "weighted": job.weights}
        what = {"edited": "the edit", "relabelled": "its label", "weighted": "its weight"}
        for change, changed in changes.items():
            if changed and (foreign := sorted(set(changed) - set(job.kept.tolist()))):
                raise InputError(f"{name}: row {foreign[0]} is {change} but not trained on. Leave {what[change]} out.")
        if wrong := [row for row, weight in job.weights.items() if not 0 <= weight < math.inf]:
            raise InputError(f"{name}: row {wrong[0]} has the weight {job.weights[wrong[0]]}; expected 0 or more.")
        if any(not 0 <= label < len(self.label_names) for label in job.relabels.values()):
            raise InputError(f"{name}: a row's new class id is outside of 0 to {len(self.label_names) - 1}.")
        texts = [*job.edits.values(), *(texts for texts, _ in job.extra)]
        if any(len(row_texts) != len(self.texts) for row_texts in texts):
            raise InputError(f"{name}: an edited or added row has not {len(self.texts)} text(s), as the index's rows.")
        if any(not 0 <= label < len(self.label_names) for _, label in job.extra):
            raise InputError(f"{name}: an added row has a class id outside of 0 to {len(self.label_names) - 1}.")
        if not len(job) - sum(weight == 0 for weight in job.weights.values()):
            raise InputError(f"{name} would train on no rows. Remove fewer rows.")


class Retrainer:
    """Runs jobs, each at most once.

    Attributes:
        rows: The index's rows, from which jobs choose.
        recipe: How a model is trained.
        n_trained: Number of jobs that this object trained, because the cache held no outcome of them.
        warnings: One line for each damaged file of the cache, whose job was trained again; and a line on retrainings
            that had no row left of some class: their models give that class little probability.
    """

    def __init__(
        self, recipe: Recipe, rows: TrainingRows, evaluation: Sequence[Sequence[str]], cache: str | Path
    ) -> None:
        """Open the cache of outcomes for one recipe and one set of evaluation rows.

        Args:
            recipe: How models are trained, over the same training and evaluation rows.
            rows: The index's rows.
            evaluation: Texts of the evaluation rows, one list a text column.
            cache: Folder of outcomes; made if missing. Several evaluations, indexes and recipes may share one.
        """
        self.rows, self.recipe, self._cache = rows, recipe, Path(cache)
        self._shape = (len(evaluation[0]), len(rows.label_names))
        training = [recipe.name, dict(recipe.facts), rows.digest()]
        self._digest = digest_of([*training, [list(c) for c in evaluation]])
        self._evaluations = EvaluationSets(self._cache / "evaluations" / digest_of(training), self._digest, evaluation)
        self._logits_type = getattr(recipe, "logits_type", np.float32)
        self.n_trained = 0
        self.warnings: list[str] = []

    def run(self, jobs: Sequence[Job], progress: Progress = lambda _stage, _done, _total: None) -> list[Outcome]:
        """Outcomes in the order of the jobs; equal jobs are trained once. Jobs of one seed should be neighbours:
        the start model of a seed is then loaded once.

        Args:
            jobs: The trainings.
            progress: Called with ``retraining``, jobs done and jobs in all; jobs in the cache count as done.

        Raises:
            InputError: No model can be trained on a job; it is raised before any job is begun.
            NonFiniteError: A retrained model gives NaN or infinity.
            StorageError: The cache cannot be written.
        """
        for i, job in enumerate(jobs):
            self.rows.check(job, f"retraining {i + 1} of {len(jobs)} (seed {job.seed})")
        self._warn_of_classes(jobs)
        digests = [self.digest(job) for job in jobs]
        waiting = dict(zip(digests, jobs, strict=True))
        with suppress(StorageError):  # of a cache that is only read
            self._evaluations.keep()
        done = {digest: found for digest, job in waiting.items() if (found := self._find(digest, job)) is not None}
        for digest in done:
            if self._lock(digest).exists():  # of a process that was killed between its outcome and its end
                with suppress(StorageError), claimed(self._lock(digest)):  # a cache that is only read keeps it
                    pass
        progress("retraining", len(done), len(waiting))
        remaining = [digest for digest in waiting if digest not in done]
        while remaining:
            claimed_elsewhere = []
            for digest in remaining:
                with claimed(self._lock(digest)) as owner:
                    if owner is not None:
                        claimed_elsewhere.append(digest)
                        continue
                    outcome = self._find(digest, waiting[digest])  # another process may just have made it
                    done[digest] = self._train(digest, waiting[digest]) if outcome is None else outcome
                progress("retraining", len(done), len(waiting))
            if len(claimed_elsewhere) == len(remaining):
                time.sleep(POLL_SECONDS)
            remaining = claimed_elsewhere
        return [done[digest] for digest in digests]

    def _warn_of_classes(self, jobs: Sequence[Job]) -> None:
        classes = np.unique(self.rows.labels[self.rows.live])
        lacking = sum(not np.isin(classes, job.labels(self.rows.labels)).all() for job in jobs)
        if lacking:
            self.warnings.append(
                f"{lacking} of {len(jobs)} retrainings had no row left of some class, which the model then gives "
                "little probability. Remove fewer rows to leave some of each."
            )

    def digest(self, job: Job) -> str:
        """The name of a job's outcome."""
        return job.digest(self._digest, seeded=self.recipe.seeded)

    def facts(self) -> dict[str, Any]:
        """How models were retrained, for ``result.json``: recipe, note, choices and digest."""
        recipe = self.recipe
        return {"retrain": recipe.name, "note": recipe.note, "recipe": dict(recipe.facts), "digest": self._digest}

    def _train(self, digest: str, job: Job) -> Outcome:
        logits = np.asarray(self.recipe.train(job), dtype=self._logits_type)
        if not np.isfinite(logits).all():
            row = int(np.argmin(np.isfinite(logits).all(axis=1)))
            raise NonFiniteError(
                f"the model retrained on {len(job)} rows with seed {job.seed} gives NaN or infinity for evaluation row "
                f"{row}. Lower the learning rate of the run."
            )
        assert logits.shape == self._shape
        write_logits(self._path(digest), digest, logits)
        self.n_trained += 1
        return Outcome(logits)

    def _path(self, digest: str) -> Path:
        return self._cache / digest[:2] / f"{digest}.arrow"

    def _lock(self, digest: str) -> Path:
        return self._path(digest).with_suffix(".lock")

    def _find(self, digest: str, job: Job) -> Outcome | None:
        """The outcome of a job, of these evaluation rows or of more; None when there is none, or a damaged one."""
        found = self._read(digest)
        if found is not None:
            return found
        for evaluation_digest, places, n_rows in self._evaluations.larger:
            more = self._read(job.digest(evaluation_digest, seeded=self.recipe.seeded), n_rows)
            if more is not None:
                return Outcome(more.logits[places])
        return None

    def _read(self, digest: str, n_rows: int | None = None) -> Outcome | None:
        """An outcome of the cache over ``n_rows`` rows (None: its own); None when there is none, or a damaged one."""
        path = self._path(digest)
        if not path.exists():
            return None
        shape = (self._shape[0] if n_rows is None else n_rows, self._shape[1])
        logits = read_logits(path, digest, shape, self._logits_type)
        if logits is not None:
            return Outcome(logits)
        line = f"{path} is damaged; that model was trained again."
        if line not in self.warnings:
            self.warnings.append(line)
        return None
