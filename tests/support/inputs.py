"""Inputs of a report, without the functions for Python callers that open them; a recipe whose outcomes are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.changes import RetrainingInputs
from forebear.evaluation.retraining.jobs import Job, Retrainer
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever


def inputs_of(retriever: Retriever, queries: QueryRows, spec: QuerySpec) -> Inputs:
    """What a question of some test rows gives to a report; the seed is 0."""
    return Inputs(retriever=retriever, question=retriever.resolve(spec), queries=queries, seed=0, command="forebear")


def retraining_inputs_of(
    retriever: Retriever, retrainer: Retrainer, n_queries: int, spec: QuerySpec, *seeds: int
) -> Any:
    """The same of an evaluation that retrains with these seeds."""
    queries = QueryRows(source="q", rows=np.arange(n_queries), texts=(["a"] * n_queries,), labels=None)
    return RetrainingInputs(
        retriever=retriever, question=retriever.resolve(spec), queries=queries, seed=0, command="forebear",
        retrainer=retrainer, seeds=seeds, evaluated=queries,
    )  # fmt: skip


class Additive:
    """log odds of class 1 for a query: the sum of a weight of each row trained on, and noise of the seed."""

    name, note, facts, seeded = "additive", "", {}, True

    def __init__(self, weights: np.ndarray, noise: float = 0.0) -> None:
        self.weights, self.noise = weights, noise

    def train(self, job: Job) -> np.ndarray:
        """Logits, ``(q, 2)``."""
        rng = np.random.default_rng([job.seed, len(job), int(job.kept.sum())])
        odds = self.weights[:, job.kept].sum(axis=1) + 0.1 * job.seed + self.noise * rng.normal(size=len(self.weights))
        return np.stack([-odds / 2, odds / 2], axis=1)
