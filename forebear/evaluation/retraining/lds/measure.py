"""``lds``: the linear datamodeling score. Do summed scores foretell the output of a model trained on some of the rows?

Models are retrained on random draws of the rows, by default halves. For each query: Spearman's correlation, over the
draws, between the sum of the kept rows' scores and the retrained log-odds of the class that the scores explain (Ilyas
et al., 2022; Park et al., 2023). 1 is perfect, 0 is chance; noise of the retraining itself sets a ceiling below 1.
Beside it, the same correlation with the class balance of the kept rows taken out of both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import partial_spearman, spearman
from forebear.evaluation.retraining.changes import within_budget
from forebear.evaluation.retraining.jobs import Progress, Retrainer
from forebear.evaluation.retraining.lds.draws import HALVES, Draws, class_counts
from forebear.retriever.scores import residuals_of

MIN_SUBSETS = 3
Blocks = Iterable[Mapping[str, np.ndarray]]  # scores (q, n) by name, a few names at a time


@dataclass(frozen=True, kw_only=True)
class Lds:
    """Linear datamodeling scores.

    Attributes:
        methods: ``m`` names.
        baselines: ``b`` names.
        values: Spearman's correlation for each query, of the methods and then of the baselines, ``(m + b, q)``; NaN
            where sums or outputs are all equal.
        balance_out: The same with the class balance of the draws taken out; NaN where the balance explains all of it.
        class_counts: Rows of each class that each draw keeps, ``(subsets, c)``.
        outputs: Log-odds of the target class, ``(subsets, seeds, q)``.
        agreement: Mean correlation of two seeds' outputs for each query, ``(q,)``; None with one seed.
        agreement_balance_out: The same with the class balance taken out.
        draws: How rows are drawn.
        subsets: Numbers of the draws that were sampled.
        seeds: Seeds of the retrainings; outputs are averaged over them.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    baselines: tuple[str, ...]
    values: np.ndarray
    balance_out: np.ndarray
    class_counts: np.ndarray
    outputs: np.ndarray
    agreement: np.ndarray | None
    agreement_balance_out: np.ndarray | None
    draws: Draws
    subsets: np.ndarray
    seeds: tuple[int, ...]
    sampled: str
    residuals: dict[str, float]

    @property
    def is_balanced(self) -> bool:
        """Whether all draws keep equally many rows of each class, so that there is no balance to take out."""
        return bool((self.class_counts == self.class_counts[0]).all())

    @property
    def ceiling(self) -> np.ndarray | None:
        """Value that scores without error would reach, ``(q,)``, by Spearman and Brown's formula; None with one seed.

        sqrt(s r / (1 + (s - 1) r)) for s seeds that agree by r; 0 where r is not positive.
        """
        return self._ceiling(self.agreement)

    @property
    def ceiling_balance_out(self) -> np.ndarray | None:
        """The same with the class balance taken out."""
        return self._ceiling(self.agreement_balance_out)

    def _ceiling(self, agreement: np.ndarray | None) -> np.ndarray | None:
        if agreement is None:
            return None
        r, s = np.maximum(agreement, 0.0), len(self.seeds)
        return np.asarray(np.sqrt(s * r / (1 + (s - 1) * r)))


def measure_lds(
    retrainer: Retrainer,
    scores: Blocks,
    targets: np.ndarray,
    seeds: Sequence[int],
    *,
    baselines: Blocks = (),
    draws: Draws = HALVES,
    n_subsets: int = 100,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Lds:
    """Retrain on random draws of the live rows.

    Args:
        retrainer: Its evaluation rows are the queries.
        scores: Scores of all live rows, ``(q, n)`` by name; larger = proponent. The score -inf of a row without a span
            adds nothing. Each block is summed and let go before the next one is made.
        targets: The class whose loss the scores explain, ``(q,)``.
        seeds: Seeds of the retrainings, the same for each draw.
        baselines: The same of the baselines.
        draws: How rows are drawn.
        n_subsets: Number of draws.
        budget: Models to train at most; draws are sampled.
        seed: Seed of the draws.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Raises:
        InputError: Fewer than three draws, or a share by which nothing is left out.
    """
    if n_subsets < MIN_SUBSETS:
        raise InputError(f"--subsets {n_subsets}: expected at least {MIN_SUBSETS}, better 100.")
    live, labels = retrainer.rows.live, retrainer.rows.labels
    every = draws.rows(live, labels[live], n_subsets, seed)
    units = [[draws.job(live, kept, s) for s in seeds] for kept in every]
    chosen, sampled = within_budget(retrainer, units, budget, seed)
    if len(chosen) < MIN_SUBSETS:
        raise InputError(f"--budget {budget}: {len(chosen)} subsets; a correlation takes {MIN_SUBSETS} or more.")
    kept = np.array([np.isin(live, every[i]) for i in chosen], dtype=np.float64)
    residuals: dict[str, float] = {}
    sums_of_methods, sums_of_baselines = (_sums_by_name(blocks, kept, residuals) for blocks in (scores, baselines))
    sums = [*sums_of_methods.values(), *sums_of_baselines.values()]
    jobs = [units[i][s] for s in range(len(seeds)) for i in chosen]  # by seed: each start model is loaded once
    odds = np.array([outcome.log_odds(targets) for outcome in retrainer.run(jobs, progress)])
    outputs = odds.reshape(len(seeds), len(chosen), -1).transpose(1, 0, 2)
    counts = class_counts([every[i] for i in chosen], labels)
    covariates = np.delete(counts, counts.sum(axis=0).argmax(), axis=1)  # the others say how many the largest has
    mean = outputs.mean(axis=1).T
    return Lds(
        methods=tuple(sums_of_methods),
        baselines=tuple(sums_of_baselines),
        values=np.array([spearman(one, mean) for one in sums]),
        balance_out=np.array([partial_spearman(one, mean, covariates) for one in sums]),
        class_counts=counts,
        outputs=outputs,
        agreement=_agreement(outputs, covariates[:, :0]),
        agreement_balance_out=_agreement(outputs, covariates),
        draws=draws,
        subsets=chosen,
        seeds=tuple(seeds),
        sampled=sampled,
        residuals=residuals,
    )


def _agreement(outputs: np.ndarray, covariates: np.ndarray) -> np.ndarray | None:
    """Mean correlation of two seeds' outputs, covariates ``(subsets, k)`` taken out, ``(q,)``; None with one seed."""
    pairs = [(outputs[:, a].T, outputs[:, b].T) for a, b in combinations(range(outputs.shape[1]), 2)]
    return np.mean([partial_spearman(*pair, covariates) for pair in pairs], axis=0) if pairs else None


def _sums_by_name(blocks: Blocks, kept: np.ndarray, residuals: dict[str, float]) -> dict[str, np.ndarray]:
    """Summed scores of the kept rows, ``(q, subsets)`` by name; residuals of H^-1 are added to ``residuals``."""
    sums: dict[str, np.ndarray] = {}
    for block in blocks:
        residuals |= residuals_of(block)
        sums |= {name: _sums(values, kept) for name, values in block.items()}
    return sums


def _sums(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Summed scores of the kept rows ``(q, subsets)``, less the same number for each subset of a query.

    All draws keep equally many rows, so a shift of a query's scores leaves the order of their sums; it makes sums of
    equal scores exactly equal.
    """
    finite = np.where(np.isneginf(scores), 0.0, scores)
    return np.asarray((finite - finite[:, :1]) @ kept.T)
