"""`audit deletion` and `audit sources` on real rows: do predicted changes come true, and is a planted source found?

SST-2's first 2,000 training rows, shared out among ten made-up annotators of unequal sizes, of whom one turns 40% of
his labels over. MiniLM is fine-tuned on them for two epochs. Sets of 1, 2 and 5% of the rows (random; of one annotator;
the rows whose influence lowers, or raises, the mean loss of the development rows most) are left out, and what the
audit predicts stands beside what a refit of the head (`proximal-head`) and full retraining give.

    python benchmarks/leaving_out.py WORK
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, run, write_result

from forebear import Retriever, RowSource, audits, open_rows
from forebear.evaluation.audits.deletion.deletion import QUANTITIES, Deletion, Retrained
from forebear.evaluation.audits.deletion.given import named_rows
from forebear.evaluation.audits.deletion.predicted import changes_without, dependence
from forebear.evaluation.audits.sources.worth import chance
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.evaluation.retraining.row_choice import random_rows, rows_at
from forebear.indexer.model.forward import run_forward
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.refits import HeadRefits

N_ROWS, EPOCHS = 2000, 2
SHARES = (0.22, 0.18, 0.14, 0.12, 0.10, 0.08, 0.06, 0.04, 0.03, 0.03)  # of the annotators
BAD, FLIPPED = 5, 0.4  # the annotator of 8% of the rows, and the share of his labels that are turned over


def write_rows(work: Path) -> Path:
    """The training rows with their annotators."""
    table = pq.read_table(DATA / "sst2" / "train.parquet", columns=["text", "label"]).slice(0, 20_000)
    rng = np.random.default_rng(0)
    table = table.take(pa.array(np.sort(rng.permutation(len(table))[:N_ROWS])))
    annotators = rng.choice(len(SHARES), N_ROWS, p=SHARES)
    labels = table["label"].to_numpy().astype(np.int64)
    turned = (annotators == BAD) & (rng.random(N_ROWS) < FLIPPED)
    columns = {
        "text": table["text"], "label": np.where(turned, 1 - labels, labels), "turned": turned,
        "annotator": [f"annotator {a}" for a in annotators], "id": [f"row-{i}" for i in range(N_ROWS)],
    }  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), work / "train.parquet")
    return work / "train.parquet"


def build(work: Path) -> Path:
    """Train and index, unless that was done; the index."""
    index = work / "index"
    if not (work / "run").exists():
        rows = write_rows(work)
        run("train", "--data", rows, "--model", "minilm", "--out", work / "run", "--epochs", str(EPOCHS))
    if not index.exists():
        run("index", "--model", work / "run", "--train", work / "train.parquet", "--out", index)
    return index


def dev_rows() -> RowSource:
    """SST-2's development rows, with the class numbers that the training rows have."""
    return open_rows(str(DATA / "sst2" / "dev.parquet"), label_names=("0", "1"))


def sets_of(retriever: Retriever) -> dict[str, np.ndarray]:
    """Rows that are left out together: random ones, both ends of the summed influence, the worst annotator's."""
    index = retriever.index
    scores = retriever.scores(dev_rows(), "if", target="gold").sum(axis=0)
    annotators = np.array(index.columns(index.live).column("annotator").to_pylist())
    sets = {}
    for share, draws in ((0.01, 3), (0.02, 1), (0.05, 1)):
        k = round(share * len(index.live))
        for i in range(draws):
            sets[f"random {share:.0%}, {i + 1}"] = random_rows(index.live, k, 0, k, i)
        sets[f"most helpful {share:.0%}"] = rows_at(scores, index.live, k, "top")
        sets[f"most harmful {share:.0%}"] = rows_at(scores, index.live, k, "bottom")
    sets[f"annotator {BAD}"] = index.live[annotators == f"annotator {BAD}"]
    return sets


# Sets that are left out with a second seed, too: how far do retrainings agree with each other?
TWICE = ("most harmful 5%", f"annotator {BAD}")


def truth(
    retriever: Retriever, work: Path, recipe: str, sets: dict[str, np.ndarray], twice: Sequence[str]
) -> dict[str, np.ndarray]:
    """Logits of models trained again, with all rows and without each set, ``(seeds, 2, q, c)`` by name of the set."""
    queries = sample_queries(retriever, dev_rows(), 0, 0, need_labels=True)
    retrainer = open_retrainer(retriever, recipe, queries.texts, work / "retrainings")
    live = retrainer.rows.live
    seeds = {name: (0, 1) if name in twice else (0,) for name in sets}
    whole = {s: Job(live, s) for s in sorted({s for some in seeds.values() for s in some})}
    jobs = {(name, s): Job(live, s, without=sets[name]) for name in sets for s in seeds[name]}
    outcomes = retrainer.run(
        [*whole.values(), *jobs.values()], lambda stage, done, total: print(stage, done, total, flush=True)
    )
    logits = dict(zip([*whole, *jobs], [outcome.logits.astype(np.float64) for outcome in outcomes], strict=True))
    return {name: np.stack([np.stack([logits[s], logits[name, s]]) for s in seeds[name]]) for name in sets}


def compared(found: Deletion) -> dict[str, Any]:
    """How one set's predictions fit what came true, over the development rows."""
    gold, again = found.predictions.targets, found.retrained
    assert again is not None
    before, after = again.correct(gold)
    now = found.predictions.logits.argmax(axis=1)
    fits = {f"r of {q}, {c.name}": found.fit(c, q, 0) for q in QUANTITIES for c in found.changes}
    return {
        "rows": len(found.named.rows),
        **{name: round(fit.correlation or 0.0, 3) for name, fit in fits.items()},
        "slope of loss": round(found.fit(found.best, "loss", 0).slope or 0.0, 3),
        "r of two seeds": again.agreement("loss", gold, found.predictions.loss),
        "ceiling of r": again.ceiling("loss", gold, found.predictions.loss),
        "predicted gain": round(float((found.best.labels == gold).mean() - (now == gold).mean()), 4),
        "retrained gain": round(float(after.mean() - before.mean()), 4),
        "predicted rise": round(float(found.best.losses.mean()), 5),
        "retrained rise": round(float(again.changes("loss", gold, found.predictions.loss).mean()), 5),
    }


def deletions(retriever: Retriever, work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Every set, predicted, and trained again by each recipe."""
    sets = sets_of(retriever)
    recipes = {
        "head": truth(retriever, work, "proximal-head", sets, ()),
        "full": truth(retriever, work, "full", sets, TWICE),
    }
    queries = sample_queries(retriever, dev_rows(), 0, 0, need_labels=True)
    out: dict[str, dict[str, dict[str, Any]]] = {recipe: {} for recipe in recipes}
    predictions = Predictions.of(run_forward(retriever.classifier(), queries.texts), queries.labels)
    refits = HeadRefits(retriever.models)
    for name, rows in sets.items():
        changes, weight = changes_without(refits, predictions, rows)
        depends = dependence(refits, rows, weight)
        named = named_rows(retriever.index, rows)
        for recipe, logits in recipes.items():
            seeds = tuple(range(len(logits[name])))
            again = Retrained(seeds, logits[name][:, 0], logits[name][:, 1], np.empty(0))
            found = Deletion(
                named=named, predictions=predictions, changes=tuple(changes), depends=depends, compared=depends,
                retrained=again,
            )  # fmt: skip
            out[recipe][name] = compared(found)
            print(recipe, name, out[recipe][name], flush=True)
    return out


def planted(retriever: Retriever) -> dict[str, Any]:
    """Where the annotator who turns labels over stands, and the least p of shuffled columns."""
    found = audits.sources(retriever, dev_rows(), "annotator").numbers
    names, bad = found.grouping.names, found.grouping.names.index(f"annotator {BAD}")
    assert found.errors is not None
    rng = np.random.default_rng(0)
    shuffled = [chance(found.scores, rng.permutation(found.grouping.numbers), None, i) for i in range(100)]
    turned = retriever.index.columns(retriever.index.live).column("turned").to_numpy(zero_copy_only=False)
    harmful = np.argsort(found.scores, kind="stable")
    own = harmful[found.grouping.numbers[harmful] == bad]
    return {
        "place by standardised difference": int(np.flatnonzero(found.order == bad)[0]) + 1,
        "place by worth of a row": int((found.worths["all"].means < found.worths["all"].means[bad]).sum()) + 1,
        "first to look at": names[found.worst.number],
        "by": found.worst.by,
        "p of the first": found.worst.p,
        "p of worth, of all": float(found.chance.p_of_all[bad]),
        "p of worth, of all, in labels": float(found.chance_in_labels.p_of_all[bad]),
        "p of errors, of all": float(found.errors.chance.p_of_all[bad]),
        "p of errors, of all, in labels": float(found.errors.chance_in_labels.p_of_all[bad]),
        "share of rows": round(float(found.sizes[bad] / found.sizes.sum()), 3),
        "share of errors": round(found.errors.shares[bad].mean, 3),
        "turned among its 50 most harmful rows": round(float(turned[own[:50]].mean()), 3),
        "turned among all its rows": round(float(turned[own].mean()), 3),
        "shuffled columns, share of p of all below .05": float(np.mean([c.p_of_all.min() < 0.05 for c in shuffled])),
        "shuffled columns, share of p below .05": float(np.mean([c.p[0] < 0.05 for c in shuffled])),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    given = parser.parse_args()
    asked = Retriever(str(build(given.work)))
    write_result("leaving_out", sources=planted(asked), **deletions(asked, given.work))
