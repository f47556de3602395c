"""`audit hans` on real rows: models side by side, and retraining without the shortcut's rows.

MiniLM is fine-tuned on rows of MNLI (entailment or not), once for each seed; HANS rows are a seeded sample.

    python benchmarks/hans.py WORK --seeds 0,1 --retrain top-2 --retrainings 3
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

from forebear import audits
from forebear.evaluation.audits.artifacts.hans_indexes import Hans
from forebear.evaluation.audits.artifacts.hans_retrained import ALL_ROWS, HansRetrained
from forebear.evaluation.audits.artifacts.hans_retrained_report import MAIN, noise_of
from forebear.evaluation.python.retrainings import Retraining

LABELS = {"mnli10k": ("entailment", "neutral", "contradiction"), "hans": ("entailment", "non-entailment")}
METHODS = ("nn-cos", "gd", "gc", "if", "rif")


def write_rows(name: str, split: str, n_rows: int, path: Path) -> None:
    """Some rows of a data set with names of labels: the first to train, a seeded sample to test."""
    table = pq.read_table(DATA / name / f"{split}.parquet")
    wanted = [c for c in ("premise", "hypothesis", "label", "heuristic", "subcase") if c in table.column_names]
    drawn = np.sort(np.random.default_rng(0).permutation(len(table))[:n_rows])
    table = table.select(wanted).take(pa.array(np.arange(n_rows) if split == "train" else drawn))
    labels = pa.array([LABELS[name][label] for label in table["label"].to_pylist()])
    pq.write_table(table.set_column(wanted.index("label"), "label", labels), path)


def build(work: Path, seeds: Sequence[int], n_rows: int, epochs: int, n_hans: int) -> list[Path]:
    """Rows, models and indexes, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    for name, split, size in (("mnli10k", "train", n_rows), ("mnli10k", "dev", 2000), ("hans", "test", n_hans)):
        if not (path := work / f"{split}.parquet").exists():
            write_rows(name, split, size, path)
    train, binary = work / "train.parquet", ("--labels", "binary-nli")
    indexes = [work / f"seed-{seed}" for seed in seeds]
    for seed, index in zip(seeds, indexes, strict=True):
        folder = work / f"run-{seed}"
        if not folder.exists():
            options = ("--epochs", str(epochs), "--lr", "1e-4", "--seed", str(seed))
            run("train", "--data", train, "--model", "minilm", *binary, *options, "--out", folder)
        if not index.exists():
            run("index", "--model", folder, "--train", train, *binary, "--damping", "1%", "--out", index)
    return indexes


def gains(found: HansRetrained) -> dict[str, Any]:
    """Percentage points over all rows and beyond the control, with what is said of them over seeds."""
    facts: dict[str, Any] = {"rows": len(found.rows), "seeds": list(found.seeds)}
    for change in found.changes:
        for group in MAIN:
            for against, other in (("all rows", ALL_ROWS), ("control", change.control.name)):
                difference = found.difference(change.name, other, group)
                said = noise_of(found.over_seeds(change.name, other, group)) if len(found.seeds) > 1 else "one seed"
                facts[f"{change.name}: {group} over {against}"] = [*np.round(100 * difference, 2).tolist(), said]
    return facts


def measured(found: Hans) -> dict[str, Any]:
    """Accuracy, overlap of the top 10, and what retraining does, by index."""
    return {
        name: {
            "right": [None if share is None else round(share, 4) for share in audit.accuracy],
            "wrong entailments": audit.n_queries,
            "overlap": {"all rows": round(audit.all_rows_overlap, 3)}
            | dict(zip(audit.methods, np.round(audit.mean_overlap(10).mean(axis=0), 3).tolist(), strict=True)),
            "retrained": gains(found.retrained[name]),
        }
        for name, audit in found.audits.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", default="0,1", help="Seeds of the models.")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hans", type=int, default=3000)
    parser.add_argument("--retrain", default="top-2")
    parser.add_argument("--retrainings", type=int, default=3, help="Seeds of each retraining.")
    parser.add_argument("--shortcut", default=None)
    given = parser.parse_args()
    folders = build(given.work, [int(s) for s in given.seeds.split(",")], given.rows, given.epochs, given.hans)
    finding = audits.hans(
        folders, given.work / "test.parquet", METHODS, how=Retraining(recipe=given.retrain, n_seeds=given.retrainings),
        dev=given.work / "dev.parquet", shortcut=given.shortcut,
    )  # fmt: skip
    finding.write(given.work / f"page-{given.retrain}", force=True)
    print(finding.report.summary)
    write_result(f"hans_{given.retrain}", **measured(finding.numbers))
