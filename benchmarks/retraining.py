"""Paired retraining beside fresh retraining: how much of a change is chance, how much is foretold by influence.

A paired retraining leaves rows out in place (``Job.without``); a fresh one trains on the others as if they were all.
MiniLM on 1,000 rows of SST-2, random rows removed. ``python benchmarks/retraining.py [--amounts 10,100] [--draws 8]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "papers"))

from common import write_result
from scipy.stats import pearsonr
from setups import asked, retrainer, test_rows

from forebear import QuerySpec
from forebear.evaluation.common.statistics import mean_of
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.row_choice import row_scores


def compared(changes: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Of changes and what was predicted of them, ``(seeds, draws, q)`` each, seen over the draws of a seed."""
    centred = changes - changes.mean(axis=1, keepdims=True)
    correlations = np.array([
        [pearsonr(changes[s, :, i], predicted[s, :, i]).statistic for i in range(changes.shape[2])]
        for s in range(len(changes))
    ]).mean(axis=0)  # fmt: skip
    found = mean_of(correlations, 0)
    return {
        "mean change": float(changes.mean()),
        "spread over draws": float(np.sqrt((centred**2).sum() / (changes[:, 1:].size))),
        "correlation with influence": [found.mean, found.low, found.high],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amounts", default="10,100")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--retrain", default="top-2")
    options = parser.parse_args()
    retriever = asked("sst2_1k")
    queries = test_rows(retriever, "sst2/dev.parquet", options.queries)
    assert queries.labels is not None
    spec = retriever.resolve(QuerySpec(methods=("if",), target="gold"))
    scores = row_scores(retriever, queries, spec)["if"]
    trainer = retrainer(retriever, options.retrain, queries.texts)
    live, seeds = trainer.rows.live, range(options.seeds)
    result: dict[str, Any] = {"retrain": options.retrain, "queries": len(queries), "draws": options.draws}
    for amount in map(int, options.amounts.split(",")):
        drawn = {
            (s, d): np.sort(np.random.default_rng([s, d, amount]).permutation(len(live))[:amount])
            for s in seeds
            for d in range(options.draws)
        }
        predicted = np.array([
            [-scores[:, drawn[s, d]].sum(axis=1) for d in range(options.draws)] for s in seeds
        ])  # fmt: skip
        for kind in ("paired", "fresh"):
            jobs = [Job(live, s) for s in seeds]
            for (s, _), at in drawn.items():
                jobs.append(Job(live, s, without=live[at]) if kind == "paired" else Job(np.delete(live, at), s))
            found = [outcome.probability(queries.labels) for outcome in trainer.run(jobs)]
            whole, removed = np.array(found[: len(seeds)]), np.array(found[len(seeds) :])
            changes = removed.reshape(len(seeds), options.draws, -1) - whole[:, None]
            result[f"{kind}, {amount} rows"] = compared(changes, predicted)
            print(f"{kind}, {amount} rows", result[f"{kind}, {amount} rows"], flush=True)
    write_result(f"retraining_{options.retrain}", **result)


if __name__ == "__main__":
    main()
