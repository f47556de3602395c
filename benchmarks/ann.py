"""Searches at 10,000 to a million rows: the package's scan, FAISS' types and plain products, each at its own settings.

    python benchmarks/ann.py [INDEX] [--rows 10000,100000] [--methods scan SQfp16 ...] [--cache FILE]

INDEX is an index of real texts; without one rows are clustered at random. Its features are tiled
(``tiled_rows.py``), some are held out as queries. Cosines, top 10, one thread. Each method's settings are the cheapest
that reach a recall of .99 after exact re-ranking for 128 queries; the recall that is written is that of 256 others,
with its standard error. ``scan`` needs no setting: its answer is proven, it is at both ends, and its scores are exact.
All others give one end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine, seconds
from tiled_rows import clustered, real_features, tiled

from forebear.indexer.storage.ann import import_faiss, unit_rows
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import by_falling, read_scan_table, row_norms, write_scan_table
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_scan
from forebear.retriever.question.methods import METHODS

TOP = 10
WANTED = 0.99
CHOOSING, STATING = slice(0, 128), slice(128, 384)
WIDENINGS = (1, 4, 16, 64, 256)
Search = Callable[[np.ndarray], np.ndarray]  # of queries (q, h): rows (q, k)


def truth(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The ten rows of largest cosine in float64, of unit vectors, ``(q, 10)``."""
    near = torch.cat([(torch.from_numpy(q) @ torch.from_numpy(rows).T).topk(2 * TOP, dim=1).indices
                      for q in np.array_split(queries, 16)]).numpy()  # fmt: skip
    return reranked(rows, queries, near)


def reranked(rows: np.ndarray, queries: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The ten best of candidates ``(q, k)``, by cosines in float64 (float32 rows are of length 1 to 6e-8 only)."""
    wide = rows[near].astype(np.float64)
    products = np.einsum("qh,qkh->qk", queries.astype(np.float64), wide) / np.linalg.norm(wide, axis=2)
    products[near < 0] = -np.inf
    return np.take_along_axis(near, np.argsort(-products, axis=1)[:, :TOP], axis=1)


def recalls(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.array([len(np.intersect1d(a, b)) / TOP for a, b in zip(found, right, strict=True)])


def by_scan(rows: np.ndarray) -> tuple[Search, float, int]:
    """The package's scan of these rows: how to search, seconds to build, bytes a row."""
    started = time.perf_counter()
    matrix = RowMatrix([rows[i : i + 4096] for i in range(0, len(rows), 4096)])
    factors = RowFactors((matrix,), (), np.arange(len(rows)))
    path = Path(tempfile.mkdtemp()) / "table.arrow"
    write_scan_table(path, by_falling(row_norms(matrix), factors.live), [matrix], [])
    table, took = read_scan_table(path), time.perf_counter() - started

    def search(queries: np.ndarray) -> np.ndarray:
        wide = queries.astype(np.float64)
        query = Query(METHODS["nn-cos"], (Term(1.0, wide),), np.linalg.norm(wide, axis=1))
        return search_scan(query, table, factors, TOP)[0].rows

    return search, took, path.stat().st_size // len(rows)


def by_product(rows: np.ndarray, dtype: torch.dtype, widen: int) -> Search:
    """All products at once in a number type, the best of them re-ranked."""
    stored = torch.from_numpy(rows).to(dtype)

    def search(queries: np.ndarray) -> np.ndarray:
        near = (torch.from_numpy(queries).to(dtype) @ stored.T).topk(widen * TOP, dim=1).indices.numpy()
        return reranked(rows, queries, near)

    return search


def by_faiss(rows: np.ndarray, name: str, queries: np.ndarray, right: np.ndarray) -> tuple[Search, dict[str, object]]:
    """A FAISS index at the cheapest of its settings that reaches the recall wanted, else at the best of them."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    index = faiss.index_factory(rows.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(rows[np.random.default_rng(0).permutation(len(rows))[:100_000]])
    for start in range(0, len(rows), 65_536):
        index.add(rows[start : start + 65_536])
    took = time.perf_counter() - started
    lists = faiss.extract_index_ivf(index) if "IVF" in name else None
    efforts = [1] if lists is None else [p for p in (8, 16, 32, 64, 128, 256, 512) if p <= lists.nlist]
    if "HNSW" in name:
        efforts = [64, 256, 1024, 4096]

    def at(effort: int, widen: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            if lists is not None:
                lists.nprobe = effort
            if "HNSW" in name:
                index.hnsw.efSearch = effort
            return reranked(rows, queries, index.search(queries, widen * TOP)[1])

        return search

    best = (-1.0, 0.0, 0, 0)
    for effort in efforts:
        for widen in (1, 4) if "HNSW" in name else WIDENINGS:
            begun = time.perf_counter()
            reached = recalls(at(effort, widen)(queries), right).mean()
            best = max(best, (min(reached, WANTED), begun - time.perf_counter(), effort, widen))
            if reached >= WANTED:
                break
    return at(best[2], best[3]), {"build_seconds": took, "effort": best[2], "widen": best[3]}


def measure(name: str, rows: np.ndarray, queries: np.ndarray, right: np.ndarray) -> dict[str, object]:
    facts: dict[str, object] = {}
    if name == "scan":
        search, took, n_bytes = by_scan(rows)
        facts |= {"build_seconds": took, "bytes_a_row": n_bytes}
    elif name in ("bf16", "fp32"):
        search = by_product(rows, torch.bfloat16 if name == "bf16" else torch.float32, 4 if name == "bf16" else 1)
    else:
        search, facts = by_faiss(rows, name, queries[CHOOSING], right[CHOOSING])
    found = recalls(search(queries[STATING]), right[STATING])
    facts |= {"recall": float(found.mean()), "standard_error": float(found.std() / np.sqrt(len(found)))}
    for size, repeats in ((1, 11), (64, 3)):
        facts[f"batch_{size}_ms"] = 1e3 * seconds(lambda size=size: search(queries[:size]), repeats) / size
    if facts["batch_64_ms"] < 40:  # type: ignore[operator]
        facts["batch_1000_ms"] = seconds(lambda: search(queries), 1)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", nargs="?")
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--methods", nargs="+", default=["scan", "fp32", "bf16", "SQfp16"])
    parser.add_argument("--cache", type=Path, help="a .npy file that keeps the tiled rows")
    parser.add_argument("--kind", default="real", choices=("real", "clustered"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in options.rows.split(",")]
    if options.kind == "real" and options.index is not None:
        real, queries = real_features(options.index)
        features = tiled(real, max(sizes), cache=options.cache)
    else:
        features = clustered(max(sizes) + 1000, 384)
        features, queries = features[:-1000], features[-1000:]
    queries = unit_rows(queries)
    path = RESULTS / f"ann_{'clustered' if options.index is None else options.kind}.json"
    found = json.loads(path.read_text())["found"] if path.exists() else {}
    for size in sizes:
        rows = unit_rows(features[:size])
        right = truth(rows, queries[: STATING.stop])
        for name in options.methods:
            facts = measure(name, rows, queries, right)
            found.setdefault(name, {})[str(size)] = facts
            print(size, name, {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}, flush=True)
            content = {"case": f"ann_{options.kind}", "machine": machine(), "top": TOP, "found": found}
            path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
