"""Linear datamodeling scores of every method, at every scope and damping: what a score foretells of a retrained model.

MiniLM on 1,000 rows of SST-2, binary MNLI and AG News, retrained whole on 50 halves of the rows with two seeds each. A
killed run goes on where it was; ``--parts`` does one step at a time (retraining takes hours).

    python benchmarks/lds.py [--data sst2,mnli,agnews] [--parts retrain,table] [--subsets 50] [--queries 100]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, ROOT, run, write_result

RUNS = ROOT / "runs" / "bench" / "lds"
N_ROWS = 1000
LABELS: dict[str, tuple[str, ...]] = {
    "sst2": ("--label-names", "negative,positive"),
    "mnli": ("--label-names", "entailment,neutral,contradiction", "--labels", "binary-nli"),
    "agnews": ("--label-names", "World,Sports,Business,Sci/Tech"),
}
TEST = {"sst2": "dev", "mnli": "dev", "agnews": "test"}
DAMPINGS = "0.01x,0.1x,1x,10x,100x,1000x,10000x,100000x"


def rows_of(name: str) -> tuple[Path, Path]:
    """Files of the training rows, a sample in their order, and of the test rows."""
    folder = RUNS / name
    train, test = folder / "train.parquet", DATA / name / f"{TEST[name]}.parquet"
    if not train.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = pq.read_table(DATA / name / "train.parquet")
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:N_ROWS])
        pq.write_table(rows.take(chosen), train)
    return train, test


def built(name: str, scopes: str) -> Path:
    """Folder of the index of a data set's run; both are made where missing."""
    train, test = rows_of(name)
    model, index = RUNS / name / "run", RUNS / name / f"index-{scopes.replace(',', '-')}"
    if not (model / "run.json").is_file():
        run("train", "--data", train, "--model", "minilm", "--out", model, "--dev", test, *LABELS[name], "-q")
    if not (index / "manifest.json").is_file():
        stores = (
            ("--store", "features") if scopes == "head" else ("--store", "features,sbert,words", "--words-top", "0,10")
        )
        run("index", "--model", model, "--train", train, "--out", index, "--checkpoints", "all", *stores,
            "--scope", scopes, "--calibrate", 0, "--resume", "-q")  # fmt: skip
    return index


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sst2,mnli,agnews")
    parser.add_argument("--parts", default="retrain,table")
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--scopes", default="head,top-2,all")
    parser.add_argument("--dampings", default=DAMPINGS)
    options = parser.parse_args()
    for name in options.data.split(","):
        _, test = rows_of(name)
        asked: list[Any] = ["--test", test, *LABELS[name][:2], "--retrain", "full", "--subsets", options.subsets,
                            "--seeds", options.seeds, "--queries", options.queries,
                            "--cache", RUNS / name / "retrained", "-q", "--force"]  # fmt: skip
        if "retrain" in options.parts.split(","):
            index = built(name, "head")
            run("evaluate", "lds", "--index", index, *asked, "--method", "gd", "--out", RUNS / name / "retrain")
        if "table" in options.parts.split(","):
            index = built(name, options.scopes)
            out = RUNS / name / "table"
            run("evaluate", "lds", "--index", index, *asked, "--scope", options.scopes, "--damping", options.dampings,
                "--out", out)  # fmt: skip
            result = json.loads((out / "result.json").read_text())
            means = {
                method: float(np.nanmean(np.array(values, dtype=np.float64)))
                for method, values in result["lds"].items()
            }
            ceiling = np.nanmean(np.array(result["ceiling"], dtype=np.float64)) if result["ceiling"] else None
            write_result(
                f"lds_{name}",
                lds=dict(sorted(means.items(), key=lambda item: -item[1])),
                ceiling=None if ceiling is None else float(ceiling),
                subsets=options.subsets, seeds=options.seeds, queries=options.queries,
            )  # fmt: skip


if __name__ == "__main__":
    main()
