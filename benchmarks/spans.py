"""Spans on MAMS with MiniLM: a query by spans beside one by rows, and the recall of stored spans' candidates.

Uses the run and index of papers/span.py.
``python benchmarks/spans.py [--queries 8] [--timed 3] [--rows 0] [--scopes head,top-2]``
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "papers"))

from common import DATA, write_result
from span import SPANS, built

from forebear import Index, Retriever
from forebear.indexer.rows.opening import open_rows, rows_from_texts

ROW_METHODS = ("gd", "if", "tracin-f")
SPAN_METHODS = ("if+", "if++", "tracin+", "tracin++")
BESIDE = {"if+": "if", "if++": "if", "tracin+": "tracin-f", "tracin++": "tracin-f"}  # the row method of each
SALIENCY = ("saliency-if", "saliency-if-token")


def one_query_seconds(retriever: Retriever, queries: list[Any], method: str, **choices: Any) -> float:
    """Median over the queries, each asked alone; the first, uncounted, loads what is needed."""
    found = []
    for query in [queries[0], *queries]:
        started = time.perf_counter()
        retriever.retrieve([query], methods=[method], top=10, **choices)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def recalls(retriever: Retriever, queries: list[Any], method: str, **choices: Any) -> dict[str, float]:
    """Of the exact top 10 spans, by side."""
    tables = [
        retriever.retrieve(rows_from_texts(queries), methods=[method], top=10, exact=exact, **choices).to_pylist()
        for exact in ("full", "rerank")
    ]
    keys = [{(r["query"], r["side"], r["row"], r["span_start"]) for r in table} for table in tables]
    return {
        side: float(
            np.mean([sum(k in keys[1] for k in keys[0] if k[:2] == (q, side)) / 10 for q in range(len(queries))])
        )
        for side in ("proponent", "opponent")
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--scopes", default="head,top-2")
    asked = parser.parse_args()
    block = next(open_rows(DATA / "mams" / "test.parquet", text_columns=["text", "term"]).blocks(asked.queries))
    queries = list(zip(*block.texts, strict=True))
    for scope in asked.scopes.split(","):
        index = Index.open(built(scope, asked.rows))
        retriever, store = Retriever(index), index.spans()
        files = {name: facts["bytes"] for name, facts in index.manifest.files.items() if "spans" in name}
        spans = {"scope": scope, "spans": SPANS, "query_spans": "aspect"}
        timed = queries[: asked.timed]
        seconds = {m: one_query_seconds(retriever, timed, m, scope=scope) for m in ROW_METHODS}
        seconds |= {m: one_query_seconds(retriever, timed, m, **spans) for m in SPAN_METHODS}
        unstored = {"scope": scope, "spans": "aspect"}
        seconds |= {
            f"{m}, not stored": one_query_seconds(retriever, timed, m, **unstored) for m in ("if++", "tracin++")
        }
        seconds |= {m: one_query_seconds(retriever, timed, m, scope=scope) for m in SALIENCY}
        write_result(
            f"spans_mams_{scope}",
            rows=index.manifest.n_rows, spans=len(store.rows), cut=store.n_cut,
            bytes_a_span={k: n / len(store.rows) for k, n in _by_folder(files).items()},
            candidates={
                m: None if (found := index.calibrated(scope, m)) is None else found["candidates"] for m in SPAN_METHODS
            },
            one_query_seconds=seconds,
            over_row_query={m: seconds[m] / seconds[row] for m, row in BESIDE.items()}
            | {m: seconds[m] / seconds["if"] for m in SALIENCY},
            recall={m: recalls(retriever, queries, m, **spans) for m in SPAN_METHODS},
            queries=len(queries),
        )  # fmt: skip


def _by_folder(files: dict[str, int]) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, size in files.items():
        folder = str(Path(name).parent)
        out[folder] = out.get(folder, 0) + size
    return out


if __name__ == "__main__":
    main()
