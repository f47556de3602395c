"""Flip sets of many test rows: their sizes, beside other orders of removal, and how many flip a retrained model.

MiniLM on 1,000 rows of SST-2 and of binary MNLI. For each test row: the flip set at the head; the fewest first rows
that flip it in other orders, each verified by the same refit of the head: random, nearest neighbours of the predicted
label, and the influence of a single row (never updated). Of some, paired retraining of the last layers.

    python benchmarks/flips.py [--data sst2_1k,mnli10k_1k] [--damping 0.3%] [--queries 100] [--retrained 10]
                               [--recipe top-2]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "papers"))

from common import write_result
from setups import asked, dev_rows, retrainer, test_rows

from forebear import QuerySpec, Retriever
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.flips.flipping import WITHIN, flip_sets
from forebear.evaluation.flips.head import HeadProblem
from forebear.evaluation.flips.search import FlipSearch
from forebear.evaluation.retraining.row_choice import row_scores
from forebear.indexer.model.forward import run_forward
from forebear.indexer.storage.choices import DEFAULT_DAMPING
from forebear.retriever.effects.refits import HeadRefits


def sizes_of(retriever: Retriever, queries: QueryRows, limit: int, damping: str) -> dict[str, np.ndarray]:
    """Rows that flip each test row by each order, ``(q,)``; infinity where no beginning of the order does."""
    problem = HeadProblem(HeadRefits(retriever.models, damping), relabels=False)
    search, forward = FlipSearch(problem, limit), run_forward(retriever.classifier(), queries.texts)
    spec = retriever.resolve(QuerySpec(methods=("if", "nn-cos"), damping=damping))
    scores = row_scores(retriever, queries, spec)
    rng = np.random.default_rng(0)
    sizes: dict[str, list[float]] = {
        name: [] for name in ("if, not updated", "nn-cos", "random, of the label", "random")
    }
    for i in range(len(queries)):
        feature, logits = forward.features[i], forward.logits[i]
        same = problem.labels == logits.argmax()
        shuffled = rng.permutation(len(problem.rows))
        orders = {
            "if, not updated": np.argsort(-scores["if"][i], kind="stable"),
            "nn-cos": np.argsort(np.where(same, -scores["nn-cos"][i], np.inf), kind="stable")[: int(same.sum())],
            "random, of the label": shuffled[same[shuffled]],
            "random": shuffled,
        }
        for name, order in orders.items():
            found = search.shortest_beginning(feature, logits, order)
            sizes[name].append(len(found) if found.flipped else np.inf)
    return {name: np.array(values) for name, values in sizes.items()}


def described(sizes: np.ndarray) -> dict[str, Any]:
    """How many flip, and by how many rows."""
    flipped = sizes[np.isfinite(sizes)]
    middle = float(np.median(sizes))
    return {
        "flipped": len(flipped),
        "median": None if np.isinf(middle) else middle,
        **{f"within {k}": int((sizes <= k).sum()) for k in WITHIN},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sst2_1k,mnli10k_1k")
    parser.add_argument("--damping", default=DEFAULT_DAMPING, help="default: the package's")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--retrained", type=int, default=10)
    parser.add_argument("--recipe", default="top-2")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.data.split(","):
        retriever = asked(name)
        queries = test_rows(retriever, dev_rows(name), options.queries)
        limit = len(retriever.index.live) // 2
        choices: dict[str, Any] = {"to": None, "limit": limit, "damping": options.damping}
        found = {}
        for label, relabels in (("removed", False), ("relabelled", True)):
            started = time.perf_counter()
            flips = flip_sets(retriever, queries, relabels=relabels, **choices)
            found[label] = described(flips.sizes) | {"seconds a row": (time.perf_counter() - started) / len(queries)}
        found |= {
            order: described(sizes) for order, sizes in sizes_of(retriever, queries, limit, options.damping).items()
        }
        facts: dict[str, Any] = {"damping": options.damping, "queries": len(queries)}
        facts |= {"rows": len(retriever.index.live), "at the head": found}
        if options.retrained:
            few = queries.take(np.arange(options.retrained))
            trainer = retrainer(retriever, options.recipe, few.texts)
            for label, relabels in (("removed", False), ("relabelled", True)):
                flips = flip_sets(
                    retriever, few, relabels=relabels, **choices, retrainer=trainer, seeds=range(options.seeds)
                )
                firsts = [next(iter(r.flipped.values()), None) for r in flips.retrained]
                facts[f"retrained ({options.recipe}), {label}"] = {
                    "head's set flips most seeds": sum(share is not None and share > 0.5 for share in firsts),
                    "of": len(firsts),
                    **described(flips.sizes),
                }
        write_result(f"flips_{name}_{options.damping}", **facts)


if __name__ == "__main__":
    main()
