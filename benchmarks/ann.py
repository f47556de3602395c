"""Direction indexes at a million rows: the FAISS type that is chosen by size, against flat scans of the same vectors.

Clustered unit vectors, 384 wide; recall@10 against exact inner products in float32; with exact re-ranking.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import seconds, write_result

from forebear.indexer.storage.ann import Vectors, build_ann, import_faiss
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable, norms_of
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_ann
from forebear.retriever.question.methods import METHODS

TOP = 10
BATCH = 100


def clustered(n_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 1,000 centres, as sentence-like features lie."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1000, width)).astype(np.float32)
    out = np.empty((n_rows, width), np.float32)
    for start in range(0, n_rows, 65_536):
        n = min(65_536, n_rows - start)
        out[start : start + n] = centres[rng.integers(0, 1000, n)] + rng.normal(size=(n, width)).astype(np.float32)
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out


def main(n_rows: int = 1_000_000, width: int = 384, factory: str | None = None) -> None:
    vectors = clustered(n_rows + BATCH, width)
    rows, asked = vectors[:n_rows], vectors[n_rows:]
    matrix = RowMatrix([rows[i : i + 65_536] for i in range(0, n_rows, 65_536)])
    live = np.arange(n_rows)
    started = seconds_once()
    ann, facts = build_ann(Vectors(matrix, live, "cos"), "cos", factory, 0)
    built = seconds_once() - started
    factors = RowFactors((matrix,), (), live)
    table = ScanTable(
        tuple(ScanBlock(live, (b,), (), (norms_of(b).astype(np.float32),), ()) for _, b in matrix.blocks())
    )
    query = Query(
        METHODS["nn-cos"], (Term(1.0, asked.astype(np.float64)),), np.linalg.norm(asked.astype(np.float64), axis=1)
    )

    faiss = import_faiss()
    flat = faiss.index_factory(width, "SQfp16", faiss.METRIC_INNER_PRODUCT)
    flat.train(rows[:1000])
    flat.add(rows)
    truth = np.argsort(-(asked @ rows.T), axis=1)[:, :TOP]
    half = torch.from_numpy(rows).bfloat16()
    asked_half = torch.from_numpy(asked).bfloat16()

    def ours(which: np.ndarray) -> np.ndarray:
        return search_ann(query.take(which), ann, table, factors, TOP, rerank=True)[0].rows

    everyone, one = np.arange(BATCH), np.arange(1)
    found = ours(everyone)
    recall = float(np.mean([len(np.intersect1d(a, b)) / TOP for a, b in zip(found, truth, strict=True)]))
    batch, single = seconds(lambda: ours(everyone), 3), seconds(lambda: ours(one), 3)
    flat_batch = seconds(lambda: flat.search(asked, TOP), 1)
    bf16_batch = seconds(lambda: (asked_half @ half.T).topk(4 * TOP, dim=1), 3)
    write_result(
        f"ann_{facts['factory'].replace(',', '_')}",
        rows=n_rows, width=width, batch=BATCH, build_seconds=built, **{k: facts[k] for k in ("widen", "n_probe")},
        recall_calibrated=facts["recall"], recall_at_10=recall, both_ends=True,
        batch_ms_a_query=1e3 * batch / BATCH, one_query_ms=1e3 * single,
        flat_sqfp16_batch_ms_a_query=1e3 * flat_batch / BATCH, bf16_matmul_batch_ms_a_query=1e3 * bf16_batch / BATCH,
        ratio_to_flat_sqfp16=flat_batch / batch, ratio_to_bf16_matmul=bf16_batch / batch,
    )  # fmt: skip


def seconds_once() -> float:
    import time

    return time.perf_counter()


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))  # type: ignore[arg-type]
