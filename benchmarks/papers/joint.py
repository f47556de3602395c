"""Joint (training history and test stimuli) on MiniLM: Table 4 (attack) and Figure 2 (fix).

``python benchmarks/papers/joint.py [--small] [--data sst2,agnews] [--parts attack,fix] [--retrain head|top-K|full]``
(``sst2_1k``: 1,000 rows). The paper retrains all layers; ``head`` is a stand-in. SST-2 stands for its IMDB. Random
changes, as many, stand beside every strategy.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
from setups import asked, dev_rows, parsed, retrainer, source_of, store, test_rows
from tables import cell, table

from forebear import Retriever
from forebear.evaluation.perturb.choice import Chooser
from forebear.evaluation.perturb.experiment import Evaluation, perturb
from forebear.evaluation.perturb.spec import STRATEGIES, PerturbationQueries, PerturbSpec, What, make_queries
from forebear.evaluation.perturb.wordnet import WordNet
from forebear.indexer.rows.sampling import live_sample

# Accuracy in % after 1, 2, 6, 10 and 20 rows were changed for each test row.
ATTACK_ROWS = (1, 2, 6, 10, 20)
ATTACK = {
    "sst2": {
        "unchanged": (93.2,) * 5, "lower-right": (68.1, 52.0, 19.7, 2.1, 0.0),
        "raise-wrong": (75.4, 60.5, 35.3, 8.6, 0.2), "combined": (None, 48.7, 18.4, 1.8, 0.0),
    },
    "agnews": {
        "unchanged": (94.4,) * 5, "lower-right": (76.8, 63.3, 36.2, 18.4, 6.9),
        "raise-wrong": (82.0, 71.5, 49.2, 30.6, 10.3), "combined": (None, 57.5, 34.1, 16.5, 3.9),
    },
}  # fmt: skip


def changed(
    case: str, retriever: Retriever, what: What, queries: PerturbationQueries, evaluation: Evaluation,
    sizes: argparse.Namespace, rows: tuple[int, ...], paper: Mapping[str, tuple[float | None, ...]],
) -> None:  # fmt: skip
    """Accuracy of retrained models in %, on each set of rows: one value a seed."""
    spec = PerturbSpec(what=what, strategies=tuple(STRATEGIES[what]), rows=rows)
    chooser = Chooser(retriever, spec, queries, WordNet(None))
    trainer = retrainer(retriever, sizes.retrain, evaluation.texts)
    found = perturb(retriever, chooser, spec, queries, evaluation, trainer, range(sizes.seeds))
    for name in evaluation.sets:
        accuracies = {"unchanged": np.repeat(found.clean[name].accuracy, len(rows), axis=0)}
        accuracies |= {strategy: measured[name].accuracy for strategy, measured in found.changed.items()}
        figures = paper if rows == ATTACK_ROWS else {}
        lines = {
            strategy: [
                cell(100 * values, number)
                for values, number in zip(accuracy, figures.get(strategy, (None,) * len(rows)), strict=True)
            ]
            for strategy, accuracy in accuracies.items()
        }
        store(
            f"joint_{what}_{case}_{name}_{sizes.retrain}", retriever,
            table("strategy", [f"{n} rows" for n in rows], lines, 1),
            queries=len(queries.numbers), tested=found.sets[name], retrain=sizes.retrain, seeds=sizes.seeds,
        )  # fmt: skip


def attack(name: str, retriever: Retriever, sizes: argparse.Namespace) -> None:
    """Table 4: accuracy on the attacked test rows, and on all."""
    every = test_rows(retriever, dev_rows(name), 0)
    assert every.labels is not None
    at = live_sample(np.arange(len(every)), sizes.queries, 0)
    evaluation = Evaluation(every.texts, every.labels, {"attacked": at, "test": np.arange(len(every))})
    queries = make_queries(retriever, every.texts, every.labels).take(at)
    changed(name, retriever, "attack", queries, evaluation, sizes, sizes.attack_rows, ATTACK[source_of(name)])


def fix(name: str, retriever: Retriever, sizes: argparse.Namespace) -> None:
    """Figure 2: accuracy on test rows after rows were added for the wrong development rows."""
    texts, gold, n_dev = dev_and_test(name, retriever)
    dev, test = np.arange(n_dev), np.arange(n_dev, len(gold))
    asked_about = make_queries(retriever, [column[:n_dev] for column in texts], gold[:n_dev])
    wrong = live_sample(np.flatnonzero(asked_about.predictions != asked_about.right), sizes.fixed, 0)
    evaluation = Evaluation(texts, gold, {"test": test, "dev": dev, "wrong": wrong})
    changed(name, retriever, "fix", asked_about.take(wrong), evaluation, sizes, sizes.fix_rows, {})


def dev_and_test(name: str, retriever: Retriever) -> tuple[list[list[str]], np.ndarray, int]:
    """Texts and labels of development and test rows, one after the other, and how many are of the first kind.

    AG News has no development rows: the first half of its test rows serve.
    """
    files = dict.fromkeys((dev_rows(name), f"{source_of(name)}/test.parquet"))
    parts = [test_rows(retriever, file, 0) for file in files]
    labels = [part.labels for part in parts if part.labels is not None]
    texts = [[text for part in parts for text in part.texts[i]] for i in range(len(parts[0].texts))]
    gold = np.concatenate(labels)
    return texts, gold, len(gold) // 2 if len(parts) == 1 else len(labels[0])


def main() -> None:
    """See the module."""
    sizes = parsed(
        __doc__,
        {
            "data": ("sst2", "agnews"), "parts": ("attack", "fix"), "queries": 50, "fixed": 50,
            "attack_rows": ATTACK_ROWS, "fix_rows": (1, 2, 4, 8, 10), "retrain": "head", "seeds": 3,
        },
        {"data": ("sst2",), "queries": 10, "fixed": 10, "attack_rows": (1, 2, 6), "fix_rows": (1, 2, 4), "seeds": 1},
    )  # fmt: skip
    for name in sizes.data:
        retriever = asked(name)
        if "attack" in sizes.parts:
            attack(name, retriever, sizes)
        if "fix" in sizes.parts:
            fix(name, retriever, sizes)


if __name__ == "__main__":
    main()
