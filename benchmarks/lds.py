"""Linear datamodeling scores of every method, at every scope and damping: what a score foretells of a retrained model.

MiniLM on 1,000 rows of SST-2 and AG News and 1,500 of binary MNLI, retrained whole on 50 halves of the rows with two
seeds each; Yeh22's convolutional network on 2,000 rows of AG News, on 100 halves. A killed run goes on where it was;
``--parts`` does one step at a time (retraining takes an hour or more): ``retrain``; ``table``, of all methods;
``astra`` beside EK-FAC at scope all; ``magic`` beside the others, .95 of the rows kept, in pairs with the run in fp32.

    python benchmarks/lds.py [--data sst2,agnews,mnli,cnn] [--parts retrain,table] [--subsets 50] [--queries 100]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, ROOT, write_result

PAPERS = Path(__file__).parent / "papers"
sys.path.insert(0, str(PAPERS))
from yeh22_cnn import random_start  # noqa: E402  the network of the benchmark of that paper

RUNS = ROOT / "runs" / "bench" / "lds"
DAMPINGS = "0.1x,10x,0.1%,0.3%,1%,10%"


@dataclass(frozen=True)
class Case:
    """One data set and the training on it.

    Attributes:
        data: Folder of the data set.
        test: Split of the test rows.
        n_rows: Training rows, a random sample in their order.
        labels: Names of the labels, and how they are merged.
        training: Further options of ``forebear train``.
        subsets: Halves of the rows.
        scopes: Scopes of the table.
    """

    data: str
    test: str
    n_rows: int
    labels: tuple[str, ...]
    training: tuple[str, ...] = ()
    subsets: int = 50
    scopes: str = "head,top-2,all"


NEWS = ("--label-names", "World,Sports,Business,Sci/Tech")
NLI = ("--label-names", "entailment,neutral,contradiction", "--labels", "binary-nli")
CASES = {
    "sst2": Case("sst2", "dev", 1000, ("--label-names", "negative,positive")),
    "agnews": Case("agnews", "test", 1000, NEWS),
    "mnli": Case("mnli", "dev", 1500, NLI, ("--epochs", "5", "--lr", "1e-4")),
    "cnn": Case("agnews", "test", 2000, NEWS, ("--epochs", "5", "--lr", "5e-3"), 100, "head,all"),
}


def run(*args: str | Path | int) -> None:
    """Run a forebear command in a process that knows the convolutional network."""
    program = (
        f"import sys; sys.path.insert(0, {str(PAPERS)!r}); import yeh22_cnn; from forebear.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, args)]
    print(f"forebear {shlex.join(command[3:])}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def rows_of(name: str) -> tuple[Path, Path]:
    """Files of the training rows and of the test rows."""
    case, train = CASES[name], RUNS / name / "train.parquet"
    if not train.is_file():
        train.parent.mkdir(parents=True, exist_ok=True)
        rows = pq.read_table(DATA / case.data / "train.parquet")
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: case.n_rows])
        pq.write_table(rows.take(chosen), train)
    return train, DATA / case.data / f"{case.test}.parquet"


def start_of(name: str) -> str | Path:
    """The model that training starts from."""
    if name != "cnn":
        return "minilm"
    start = RUNS / name / "start"
    if not (start / "config.json").is_file():
        texts = pq.read_table(rows_of(name)[0])["text"].to_pylist()
        random_start(start, texts, tuple(NEWS[1].split(",")))
    return start


def built(name: str, scopes: str, precision: str = "auto") -> Path:
    """Folder of the index of a data set's run; both are made where missing."""
    (train, _), case = rows_of(name), CASES[name]
    suffix = "" if precision == "auto" else f"-{precision}"
    model, index = RUNS / name / f"run{suffix}", RUNS / name / f"index-{scopes.replace(',', '-')}{suffix}"
    if not (model / "run.json").is_file():
        run("train", "--data", train, "--model", start_of(name), "--out", model, "--precision", precision,
            *case.labels, *case.training, "-q")  # fmt: skip
    if not (index / "manifest.json").is_file():
        stores = (
            ("--store", "features") if scopes == "head" else ("--store", "features,sbert,words", "--words-top", "0,10")
        )
        run("index", "--model", model, "--train", train, "--out", index, "--checkpoints", "all", *stores,
            "--scope", scopes, "--calibrate", 0, "--resume", "-q")  # fmt: skip
    return index


def measured(name: str, part: str, index: Path, options: argparse.Namespace, *more: Any, **facts: Any) -> None:
    """Run ``evaluate lds`` with what all parts share, and write its means."""
    case, out = CASES[name], RUNS / name / part
    n_subsets = options.subsets or case.subsets
    started = time.perf_counter()
    run("evaluate", "lds", "--index", index, "--test", rows_of(name)[1], *case.labels[:2], "--retrain", "full",
        "--subsets", n_subsets, "--cache", RUNS / name / "retrained", "-q", "--force", "--out", out, *more)  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    values = {method: np.array(of, dtype=np.float64) for method, of in result["lds"].items()}
    means = {method: float(of[~np.isnan(of)].mean()) for method, of in values.items() if not np.isnan(of).all()}
    ceiling = float(np.nanmean(np.array(result["ceiling"], dtype=np.float64))) if result["ceiling"] else None
    write_result(
        f"lds_{name}_{part}", lds=dict(sorted(means.items(), key=lambda item: -item[1])), ceiling=ceiling,
        subsets=n_subsets, queries=len(result["queries"]), seeds=len(result["seeds"]),
        seconds=time.perf_counter() - started, **facts,
    )  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(CASES))
    parser.add_argument("--parts", default="retrain,table")
    parser.add_argument("--subsets", type=int, help="default: 50, of the convolutional network 100")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--scopes", help="default: head,top-2,all, of the convolutional network head,all")
    parser.add_argument("--dampings", default=DAMPINGS)
    parser.add_argument("--refined-queries", type=int, default=30, help="of the part astra")
    parser.add_argument("--magic-queries", type=int, default=10, help="of the part magic")
    options = parser.parse_args()
    parts = options.parts.split(",")
    for name in options.data.split(","):
        scopes = options.scopes or CASES[name].scopes
        halves = ("--seeds", options.seeds, "--queries", options.queries)
        if "retrain" in parts:
            measured(name, "retrain", built(name, "head"), options, *halves, "--method", "gd")
        if "table" in parts:
            index = built(name, scopes)
            measured(name, "table", index, options, *halves, "--scope", scopes, "--damping", options.dampings)
        if "astra" in parts:
            index, asked = built(name, scopes), ("--seeds", options.seeds, "--queries", options.refined_queries)
            for solver in ("ekfac", "astra"):
                measured(
                    name, solver, index, options, *asked, "--scope", "all", "--method", "if,rif", "--curvature", solver
                )
        if "magic" in parts:
            index = built(name, "head", precision="fp32")
            asked = ("--seeds", 1, "--paired", "--rows-share", 0.95, "--queries", options.magic_queries)
            measured(name, "magic", index, options, *asked)


if __name__ == "__main__":
    main()
