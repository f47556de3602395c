"""`audit regressions` on real rows: are planted bad rows of a second version first among its changed rows?

AG News: the first version has 3,000 rows, the second the same, 300 more that are right and 66 (2%) stories of Sci/Tech
about large companies that a new annotator labelled Business. MiniLM is fine-tuned on both for two epochs.

    python benchmarks/regressions.py WORK --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import DATA, run, write_result

from forebear import Retriever, audits
from forebear.evaluation.audits.versions.regressions import REGRESSED

NAMES = ("World", "Sports", "Business", "Sci/Tech")
N_BEFORE, N_GOOD, N_BAD, N_TEST = 3000, 300, 66, 2500
COMPANIES = r"(?i)\b(microsoft|google|apple|ibm|intel|yahoo)\b"


def read(split: str, n_rows: int, seed: int) -> pa.Table:
    """Seeded rows of AG News with names of labels; 0: all, in another order."""
    table = pq.read_table(DATA / "agnews" / f"{split}.parquet", columns=["text", "label"])
    table = table.take(pa.array(np.random.default_rng(seed).permutation(len(table))[: n_rows or len(table)]))
    labels = [NAMES[label] for label in table["label"].to_pylist()]
    return pa.table({"text": table["text"], "label": labels})


def write_rows(work: Path, seed: int) -> None:
    """The training rows of both versions, and the test rows."""
    work.mkdir(parents=True, exist_ok=True)
    rows = read("train", 0, seed)
    before, rest = rows.slice(0, N_BEFORE), rows.slice(N_BEFORE)
    about = pc.and_(pc.match_substring_regex(rest["text"], COMPANIES), pc.equal(rest["label"], "Sci/Tech"))
    places = np.flatnonzero(about.to_numpy(zero_copy_only=False))[:N_BAD]
    bad = rest.take(pa.array(places)).set_column(1, "label", pa.array(["Business"] * N_BAD))
    good = rest.take(pa.array(np.setdiff1d(np.arange(len(rest)), places)[:N_GOOD]))
    added = pa.concat_tables([bad, good]).append_column("planted", pa.array([1] * N_BAD + [0] * N_GOOD))
    added = added.take(pa.array(np.random.default_rng(seed).permutation(len(added))))
    before = before.append_column("planted", pa.array([0] * N_BEFORE))
    pq.write_table(before, work / "before.parquet")
    pq.write_table(pa.concat_tables([before, added]), work / "now.parquet")
    pq.write_table(read("test", N_TEST, 1), work / "test.parquet")


def build(work: Path, seed: int) -> None:
    """Train and index both versions, unless that was done."""
    if not (work / "test.parquet").exists():
        write_rows(work, seed)
    for version in ("before", "now"):
        train, folder = work / f"{version}.parquet", work / f"{version}-run"
        if not folder.exists():
            run("train", "--data", train, "--model", "minilm", "--epochs", "2", "--seed", str(seed), "--out", folder)
        if not (work / f"{version}-index").exists():
            run("index", "--model", folder, "--train", train, "--out", work / f"{version}-index")


def measured(work: Path, method: str) -> dict[str, Any]:
    """Share of planted rows among the first k changed rows, and how the versions differ."""
    retriever = Retriever(work / "now-index")
    found = audits.regressions(retriever, work / "before-index", work / "test.parquet", methods=[method])
    index, numbers = retriever.index, found.numbers
    planted = index.columns(numbers.changes.of_changed.rows).column("planted").to_numpy()
    ranked = numbers.ranked(REGRESSED)
    return {
        "regressed": len(numbers.predicted.regressed),
        "improved": len(numbers.predicted.improved),
        "p": round(found.result["accuracy"]["p"], 4),
        "planted among the changed rows": round(float(planted.mean()), 3),
        **{f"precision at {k}": round(float(planted[ranked[:k]].mean()), 3) for k in (10, 20, 33, N_BAD)},
        "largest cause": len(numbers.causes[REGRESSED][0].members),
        "share of the changed rows, regressed": round(float(numbers.shares[REGRESSED].mean()), 3),
        "share of the changed rows, kept": round(float(numbers.shares["kept"].mean()), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    build(given.work, given.seed)
    results = {method: measured(given.work, method) for method in ("if", "gc", "gd")}
    for name, values in results.items():
        print(name, values)
    write_result(f"regressions_{given.seed}", **results)
