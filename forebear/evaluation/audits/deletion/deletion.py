"""``audit deletion``: what leaving rows out would change, beside what training again without them does change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.evaluation.audits.deletion.given import Named
from forebear.evaluation.audits.deletion.predicted import Change, Dependence, changes_without, dependence
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.effects.fit import Fit, fit
from forebear.evaluation.retraining.jobs import Job, Outcome, Progress, Retrainer
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.sampling import live_sample
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.retriever import Retriever

QUANTITIES = ("loss", "margin", "probability")  # of the gold label
MOST_COMPARED = 500  # other rows beside which the dependence is seen


@dataclass(frozen=True, eq=False)
class Retrained:
    """What models say that were trained again, with all rows and without the set; pairs share their seed.

    Attributes:
        seeds: Seeds of the retrainings, ``s`` of them.
        before: Logits of the test rows with all rows, ``(s, q, c)``.
        after: Without the set, ``(s, q, c)``.
        own: Rise of the own loss of each row that was left out, mean over the seeds, ``(n,)``.
    """

    seeds: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    own: np.ndarray

    def changes(self, quantity: str, targets: np.ndarray, loss: Loss) -> np.ndarray:
        """Changes of the gold label's loss, margin or probability, ``(s, q)``."""
        pairs = zip(self.before, self.after, strict=True)
        return np.stack([_value(quantity, b, targets, loss) - _value(quantity, a, targets, loss) for a, b in pairs])

    def correct(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Share of the seeds by which each test row is predicted right, before and after, ``(q,)`` each."""
        before, after = ((logits.argmax(axis=2) == targets).mean(axis=0) for logits in (self.before, self.after))
        return before, after

    def agreement(self, quantity: str, targets: np.ndarray, loss: Loss) -> float | None:
        """Mean Pearson's r of the changes of two seeds; None of a single seed."""
        changes = self.changes(quantity, targets, loss)
        pairs = [(a, b) for i, a in enumerate(changes) for b in changes[:i] if np.ptp(a) > 0 and np.ptp(b) > 0]
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])) if pairs else None

    def ceiling(self, quantity: str, targets: np.ndarray, loss: Loss) -> float | None:
        """Pearson's r of the mean change over the seeds with what it would be over very many, from the agreement rho.

        With s seeds sqrt(s rho / (1 + (s - 1) rho)), after Spearman and Brown: what a prediction without error would
        reach. None where seeds do not agree, or there is one alone.
        """
        rho, s = self.agreement(quantity, targets, loss), len(self.seeds)
        return None if rho is None or rho <= 0 else float(np.sqrt(s * rho / (1 + (s - 1) * rho)))


def _value(quantity: str, logits: np.ndarray, targets: np.ndarray, loss: Loss) -> np.ndarray:
    if quantity == "loss":
        return loss.residual_and_loss(logits, targets)[1]
    outcome = Outcome(logits)
    return outcome.log_odds(targets) if quantity == "margin" else outcome.probability(targets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Deletion:
    """What leaving out some rows would change.

    Attributes:
        named: The rows.
        predictions: The test rows as the model sees them now; targets are their gold labels.
        changes: Predicted changes, the best prediction last.
        depends: How strongly the model depends on each row.
        compared: The same of as many random other rows, each left out alone.
        retrained: What retrained models say; None: none was trained.
    """

    named: Named
    predictions: Predictions
    changes: tuple[Change, ...]
    depends: Dependence
    compared: Dependence
    retrained: Retrained | None

    @property
    def best(self) -> Change:
        """The best prediction."""
        return self.changes[-1]

    def fit(self, change: Change, quantity: str, seed: int) -> Fit:
        """How well one prediction fits the retrained changes, over the test rows."""
        assert self.retrained is not None
        predicted = {"loss": change.losses, "margin": change.margins, "probability": change.probabilities}[quantity]
        truth = self.retrained.changes(quantity, self.predictions.targets, self.predictions.loss).mean(axis=0)
        return fit(predicted, truth, np.arange(len(truth)), seed)


def measure_deletion(
    retriever: Retriever,
    named: Named,
    queries: QueryRows,
    damping: str | None,
    *,
    retrainer: Retrainer | None = None,
    seeds: tuple[int, ...] = (),
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Deletion:
    """Predict what leaving rows out changes at the head; and train again without them, if there is a retrainer.

    Args:
        retriever: Over an index of one label a row.
        named: The rows.
        queries: Test rows with gold labels.
        damping: As a question names it; None: the index's first.
        retrainer: Its evaluation rows are the test rows, and after them the rows that are left out.
        seeds: Seeds of the retrainings.
        seed: Seed of the random rows that are compared.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Raises:
        InputError: The rows that stay say too little of the head.
    """
    assert queries.labels is not None
    predictions = Predictions.of(run_forward(retriever.classifier(), queries.texts), queries.labels)
    refits = HeadRefits(retriever.models, damping)
    changes, weight = changes_without(refits, predictions, named.rows)
    others = np.setdiff1d(retriever.index.live, named.rows, assume_unique=True)
    some = live_sample(others, min(MOST_COMPARED, len(named.rows)), seed)
    retrained = None
    if retrainer is not None:
        retrained = _retrain(retrainer, named.rows, predictions, seeds, progress)
    return Deletion(
        named=named,
        predictions=predictions,
        changes=tuple(changes),
        depends=dependence(refits, named.rows, weight),
        compared=dependence(refits, some),
        retrained=retrained,
    )


def _retrain(
    retrainer: Retrainer, rows: np.ndarray, predictions: Predictions, seeds: tuple[int, ...], progress: Progress
) -> Retrained:
    live, n_queries = retrainer.rows.live, len(predictions.targets)
    jobs = [job for s in seeds for job in (Job(live, s), Job(live, s, without=rows))]
    logits = np.stack([outcome.logits.astype(np.float64) for outcome in retrainer.run(jobs, progress)])
    before, after = logits[0::2], logits[1::2]
    of_rows = Retrained(seeds, before[:, n_queries:], after[:, n_queries:], np.empty(0))
    own = of_rows.changes("loss", retrainer.rows.labels[rows], predictions.loss).mean(axis=0)
    return Retrained(seeds, before[:, :n_queries], after[:, :n_queries], own)


def groups_of(queries: QueryRows, label_names: tuple[str, ...], column: str | None) -> dict[str, np.ndarray]:
    """Groups of test rows, as masks ``(q,)`` by name: all, those of each gold label, those of each value of a column.

    Raises:
        InputError: The test rows have no such column, or it has too many values.
    """
    assert queries.labels is not None
    groups = {"all": np.ones(len(queries), bool)}
    groups |= {f"label: {name}": queries.labels == i for i, name in enumerate(label_names)}
    if column is not None:
        groups |= {f"{column}: {value}": mask for value, mask in sorted(queries.by_value(column).items())}
    return {name: mask for name, mask in groups.items() if mask.any()}
