"""The Span paper's Tables 3 (Sag and Lag) and 4 (faithfulness) on MAMS, with MiniLM instead of RoBERTa-large.

Trains a classifier on text and aspect term, indexes it with the clause that holds each term as its span, and asks 200
test rows. ``python benchmarks/papers/span.py [--scope head|top-2] [--rows 0] [--queries 200] [--faithful-rows 400]``
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet as pq
from common import DATA, ROOT, run, write_result

from forebear import Index, QuerySpec, Retriever
from forebear.evaluation.common.span_queries import sample_span_queries
from forebear.evaluation.measures.agreement import measure_agreement
from forebear.evaluation.measures.faithfulness import measure_faithfulness
from forebear.indexer.rows.opening import open_rows
from forebear.retriever.answers.results import Answers

METHODS = ("if", "if+", "if++", "tracin-f", "tracin+", "tracin++")
AT = (10, 100)
PAPER = {
    "Sag": {"if": (14.22, 14.65), "if+": (17.17, 15.10), "if++": (21.74, 19.83), "tracin-f": (15.89, 15.97),
            "tracin+": (22.65, 19.54), "tracin++": (23.92, 21.32)},
    "Lag": {"if": (21.63, 26.07), "if+": (25.66, 25.66), "if++": (65.41, 62.52), "tracin-f": (38.20, 43.19),
            "tracin+": (8.60, 6.27), "tracin++": (78.03, 75.02)},
}  # fmt: skip
SPANS = "clause-of:from,to"


class Remembering(Retriever):
    """Answers each block once: both measures look at the same rows."""

    _answered: tuple[Any, Answers] | None = None

    def answer_block(self, start: int, texts: Any, *args: Any, **kwargs: Any) -> Answers:
        if self._answered is None or self._answered[0] != texts:
            self._answered = texts, super().answer_block(start, texts, *args, **kwargs)
        return self._answered[1]


def built(scope: str, n_rows: int = 0) -> Path:
    """The index of a scope: of all checkpoints at the head, for the control of Table 4; of the last one beyond it.

    Args:
        scope: Of the gradients.
        n_rows: Training rows that are indexed, the first ones; 0: all. The model was trained on all.
    """
    bench, train, dev = ROOT / "runs" / "bench", DATA / "mams" / "train.parquet", DATA / "mams" / "dev.parquet"
    folder, out = bench / "mams", bench / (f"mams-{scope}-{n_rows}" if n_rows else f"mams-{scope}")
    if not (folder / "run.json").is_file():
        run("train", "--model", "minilm", "--data", train, "--dev", dev,
            "--text-columns", "text,term", "--precision", "fp32", "--out", folder, "--force")  # fmt: skip
    if not (out / "manifest.json").is_file():
        if n_rows:
            (bench / f"mams-{n_rows}").mkdir(exist_ok=True)
            shutil.copy(DATA / "mams" / "dataset.json", bench / f"mams-{n_rows}")
            pq.write_table(pq.read_table(train).slice(0, n_rows), bench / f"mams-{n_rows}" / "train.parquet")
            train = bench / f"mams-{n_rows}" / "train.parquet"
        checkpoints = ["--checkpoints", "all"] if scope == "head" else []
        run("index", "--model", folder, *checkpoints, "--train", train, "--out", out, "--scope", scope,
            "--store", "features,spans", "--spans", SPANS, "--damping", "0.1x")  # fmt: skip
    return out


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scope", default="head")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--recall", type=float, default=0.9)
    parser.add_argument("--faithful-rows", type=int, default=400)
    parser.add_argument("--faithful-queries", type=int, default=50)
    asked = parser.parse_args()
    retriever = Remembering(Index.open(built(asked.scope, asked.rows)))
    source = open_rows(DATA / "mams" / "test.parquet", text_columns=["text", "term"])
    spec = retriever.resolve(QuerySpec(methods=METHODS, top=AT[-1], scope=asked.scope, recall=asked.recall))
    queries = sample_span_queries(retriever, source, spec, asked.queries, 0)
    found = {m: measure_agreement(retriever, queries, spec, AT, m) for m in ("semantic", "label")}
    ours = {
        one.name: {
            name: {
                "mean": values.mean(axis=0).tolist(),
                "error": (values.std(axis=0, ddof=1) / len(values) ** 0.5).tolist(),
            }
            for name, values in (one.controls | {name: one.values[:, i] for i, name in enumerate(one.methods)}).items()
        }
        for one in found.values()
    }
    write_result(
        f"papers_span_t3_{asked.scope}",
        queries=len(queries),
        rows=len(retriever.index.live),
        scope=asked.scope,
        recall=asked.recall,
        ours=ours,
        paper=PAPER,
    )
    few = sample_span_queries(retriever, source, spec, asked.faithful_queries, 0)
    faithful = measure_faithfulness(
        retriever, few, replace(spec, methods=("tracin++", "if++")), n_rows=asked.faithful_rows
    )
    per_query, per_run = 100 * faithful.values.mean(axis=0), 100 * faithful.values.mean(axis=1)
    write_result(
        f"papers_span_t4_{asked.scope}",
        queries=len(few), rows=asked.faithful_rows, runs=len(faithful.values), checkpoints=faithful.n_control,
        mean=dict(zip(faithful.names, per_query.mean(axis=0).tolist(), strict=True)),
        variance_over_queries=dict(zip(faithful.names, per_query.var(axis=0).tolist(), strict=True)),
        variance_over_runs=dict(zip(faithful.names, per_run.var(axis=0).tolist(), strict=True)),
        paper={"(last checkpoints)": 55.11, "tracin++": 60.14, "if++": 59.37},
    )  # fmt: skip


if __name__ == "__main__":
    main()
