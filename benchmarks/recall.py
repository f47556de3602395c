"""Recall: claimed against measured, for every method with candidates, under every solver, damping and scope.

A table a scope, written as it is measured: what the index states (``-``: nothing, for it was not measured) beside the
share of the exact top 10 that held-out queries find at both ends, with all rows scored as the yardstick.
``rif`` under a solver that iterates takes one solution a training row, and is asked by few queries.
``python benchmarks/recall.py [--rows 1500] [--queries 20] [--slow-queries 3] [--scopes top-2,all] [--curvature SOLVERS]
[--train FILE] [--dev FILE] [--model RUN]``
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, ROOT, run, write_result

from forebear import Index, QuerySpec, Retriever
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.measures.recall import ENDS, RetrievalRecall, retrieval_recall
from forebear.indexer.rows.opening import open_rows
from forebear.retriever.answers.coverage import question_facts
from forebear.retriever.deep import search as gradients

FOLDER = ROOT / "runs" / "bench" / "recall"
DAMPINGS = ("0.1x", "1x")  # the first is calibrated, the second is stored, another is neither
PLAIN = ("gd", "gc", "tracin")
WITH_CURVATURE = ("if", "rif")
SOLUTIONS_AT_ONCE = 64
# Few rows and a loose tolerance: what is measured is candidates against exact scores under one and the same H^-1.
ITERATED: dict[str, Any] = {"curvature_rows": 16, "tolerance": 0.2, "lissa": "han20,depth=30"}
SOLVERS: tuple[dict[str, Any], ...] = (
    {"curvature": "ekfac", "damping": DAMPINGS[0]},
    {"curvature": "ekfac", "damping": DAMPINGS[1]},
    {"curvature": "identity"},
    *({"curvature": solver, "damping": damping} for solver in ("cg", "cg-hessian") for damping in (*DAMPINGS, "10x")),
    {"curvature": "lissa"},
)
COLUMNS = (
    "method", "--curvature", "--damping", "queries", "candidates", "recall stated",
    *(f"measured, {end}" for end in ENDS),
)  # fmt: skip


def built(train: Path, dev: Path, model: Path, scope: str, n_rows: int) -> Index:
    """The index, made now or found; so are the rows and the run."""
    rows, folder = FOLDER / f"train-{n_rows}.parquet", FOLDER / f"index-{n_rows}-{scope}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not rows.is_file():
        table = pq.read_table(train)
        chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:n_rows])
        pq.write_table(table.take(chosen), rows)
        shutil.copyfile(train.with_name("dataset.json"), FOLDER / "dataset.json")  # names the labels
    if not model.exists():
        run("train", "--data", rows, "--model", "minilm", "--dev", dev, "--epochs", "1", "--out", model)
    if not (folder / "manifest.json").is_file():
        choices = ["--damping", ",".join(DAMPINGS), "--scope", f"head,{scope}", "--max-length", "128", "--resume"]
        run("index", "--model", model, "--train", rows, "--out", folder, *choices)
    return Index.open(folder)


def measure(retriever: Retriever, dev: Path, n_queries: int, spec: QuerySpec) -> list[list[Any]]:
    """Lines of the table for the methods of one question."""
    queries = sample_queries(retriever, open_rows(dev), n_queries, 1)
    found: RetrievalRecall = retrieval_recall(retriever, queries, spec)
    facts = question_facts(spec.resolve(retriever.index))["methods"]
    solver, damping = ("", "") if not set(spec.methods) & set(WITH_CURVATURE) else (spec.curvature, spec.damping or "")
    return [
        [
            name,
            solver,
            damping,
            n_queries,
            facts[name]["candidates"],
            facts[name]["recall"],
            *found.values[m].mean(axis=1).tolist(),
        ]
        for m, name in enumerate(spec.methods)
    ]


def markdown(scope: str, lines: list[list[Any]]) -> str:
    """A table of one scope."""
    out = [f"Scope `{scope}`", "", "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for line in lines:
        cells = [
            "-" if cell is None else f"{cell:.3f}".lstrip("0") if isinstance(cell, float) else str(cell)
            for cell in line
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path, default=DATA / "sst2" / "train.parquet")
    parser.add_argument("--dev", type=Path, default=DATA / "sst2" / "dev.parquet")
    parser.add_argument("--model", type=Path, default=FOLDER / "run")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--slow-queries", type=int, default=3, help="of rif under solvers that iterate; 0: not at all")
    parser.add_argument("--scopes", default="top-2,all")
    parser.add_argument("--curvature", default="", help="comma-separated solvers; default: every one, and no solver")
    asked = parser.parse_args()
    gradients.SELF_ROWS = SOLUTIONS_AT_ONCE
    chosen = asked.curvature.split(",")
    tables: dict[str, list[list[Any]]] = {}
    build_seconds: dict[str, float] = {}
    for scope in asked.scopes.split(","):
        started = time.perf_counter()
        retriever = Retriever(built(asked.train, asked.dev, asked.model, scope, asked.rows))
        build_seconds[scope] = time.perf_counter() - started
        tables[scope] = []
        for spec, n_queries in questions(scope, asked.queries, asked.slow_queries):
            if asked.curvature and not (set(spec.methods) <= set(WITH_CURVATURE) and spec.curvature in chosen):
                continue
            tables[scope] += measure(retriever, asked.dev, n_queries, spec)
            text = "\n".join(markdown(name, lines) for name, lines in tables.items() if lines)
            (FOLDER / f"table-{asked.rows}.md").write_text(text, encoding="utf-8")
    write_result(
        f"recall_{asked.rows}",
        rows=asked.rows, seconds_of_building=build_seconds, iterated=ITERATED, columns=COLUMNS, tables=tables,
    )  # fmt: skip


def questions(scope: str, n_queries: int, n_slow: int) -> Iterator[tuple[QuerySpec, int]]:
    """What is asked, and by how many queries; the slowest last."""
    yield QuerySpec(methods=PLAIN, scope=scope), n_queries
    slow = []
    for solver in SOLVERS:
        iterates = solver["curvature"] not in ("ekfac", "identity")
        how = solver | (ITERATED if iterates else {})
        if not iterates:
            yield QuerySpec(methods=WITH_CURVATURE, scope=scope, **how), n_queries
            continue
        yield QuerySpec(methods=("if",), scope=scope, **how), n_queries
        slow.append(QuerySpec(methods=("rif",), scope=scope, **how))
    if n_slow:
        yield from ((spec, n_slow) for spec in slow)


if __name__ == "__main__":
    main()
