"""Searches at 10,000 to a million rows: the package's scan, FAISS' types and plain products, each at its own settings.

    python benchmarks/ann.py [INDEX] [--rows 10000,100000] [--methods scan SQfp16 ...] [--cache FILE]

INDEX is an index of real texts; without one rows are clustered at random. Its features are tiled
(``tiled_rows.py``), some are held out as queries. Cosines, top 10, one thread. Each method's settings are the cheapest
that reach a recall of .99 after exact re-ranking for 128 queries; the recall that is written is that of 256 others,
with its standard error. ``scan`` needs no setting: its answer is proven, it is at both ends, and its scores are exact.
All others give one end. Times are processor milliseconds a query, the median of rounds in which the methods take turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, by_turns, count_processor_seconds, machine, now
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
SLOW_MS = 40  # a query of a batch: what takes longer is not asked larger ones
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


def by_product(rows: np.ndarray, dtype: torch.dtype) -> Callable[[int, int], Search]:
    """All products at once in a number type, the best of them re-ranked."""
    stored = torch.from_numpy(rows).to(dtype)

    def at(_effort: int, widen: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            parts = [(torch.from_numpy(q).to(dtype) @ stored.T).topk(widen * TOP, dim=1).indices.numpy()
                     for q in np.array_split(queries, -(-len(queries) // 64))]  # fmt: skip
            return reranked(rows, queries, np.concatenate(parts))

        return search

    return at


def by_faiss(rows: np.ndarray, name: str) -> tuple[Callable[[int, int], Search], list[int], float]:
    """A FAISS index: how to search at an effort and a widening, efforts to try, and seconds to build."""
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

    return at, efforts, took


def chosen(
    at: Callable[[int, int], Search],
    efforts: Sequence[int],
    widenings: Sequence[int],
    queries: np.ndarray,
    right: np.ndarray,
) -> tuple[int, int]:
    """The cheapest effort and widening that reach the recall wanted, else those of the best recall."""
    best = (-1.0, 0.0, 0, 0)
    for effort in efforts:
        for widen in widenings:
            begun = now()
            reached = recalls(at(effort, widen)(queries), right).mean()
            best = max(best, (min(reached, WANTED), begun - now(), effort, widen))
            if reached >= WANTED:
                break
    return best[2], best[3]


def prepared(name: str, rows: np.ndarray, queries: np.ndarray, right: np.ndarray) -> tuple[Search, dict[str, object]]:
    """How a method searches at its settings, and what it costs to build and finds."""
    facts: dict[str, object] = {}
    if name == "scan":
        search, took, n_bytes = by_scan(rows)
        facts |= {"build_seconds": took, "bytes_a_row": n_bytes}
    else:
        efforts = [1]
        if name in ("bf16", "fp32"):
            at = by_product(rows, torch.bfloat16 if name == "bf16" else torch.float32)
        else:
            at, efforts, took = by_faiss(rows, name)
            facts["build_seconds"] = took
        widenings = (1,) if name == "fp32" else (1, 4) if "HNSW" in name else WIDENINGS
        effort, widen = chosen(at, efforts, widenings, queries[CHOOSING], right[CHOOSING])
        search = at(effort, widen)
        facts |= {"effort": effort, "widen": widen}
    found = recalls(search(queries[STATING]), right[STATING])
    return search, facts | {"recall": float(found.mean()), "standard_error": float(found.std() / np.sqrt(len(found)))}


def floors(n_rows: int, width: int) -> dict[str, float]:
    """What reading a byte a number costs, and multiplying it: nanoseconds a row, and a (row, query) pair."""
    codes = torch.randint(-127, 128, (n_rows, width), dtype=torch.int8)
    whole, queries = codes.view(-1).view(torch.int64), torch.randint(-127, 128, (width, 128), dtype=torch.int8)

    def multiply(n_queries: int) -> None:
        for start in range(0, n_rows, 2048):
            torch._int_mm(codes[start : start + 2048], queries[:, :n_queries].contiguous())

    ways = {"read": lambda: whole.sum()} | {f"multiply_{q}": partial(multiply, q) for q in (1, 64, 128)}
    taken = by_turns(ways, 5)
    return {name: 1e9 * float(np.median(t)) / n_rows / int(name.split("_")[-1] if "_" in name else 1)
            for name, t in taken.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", nargs="?")
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--methods", nargs="+", default=["scan", "fp32", "bf16", "SQfp16"])
    parser.add_argument("--batches", default="1:7,64:3,1000:1", help="queries at once, and how often that is timed")
    parser.add_argument("--cache", type=Path, help="a .npy file that keeps the tiled rows")
    parser.add_argument("--kind", default="real", choices=("real", "clustered"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    count_processor_seconds()
    sizes = [int(size) for size in options.rows.split(",")]
    if options.kind == "real" and options.index is not None:
        real, queries = real_features(options.index)
        features = tiled(real, max(sizes), cache=options.cache)
    else:
        features = clustered(max(sizes) + 1000, 384)
        features, queries = features[:-1000], features[-1000:]
    queries = unit_rows(queries)
    for start in range(0, len(features), 65_536):
        features[start : start + 65_536] = unit_rows(features[start : start + 65_536])
    path = RESULTS / f"ann_{'clustered' if options.index is None else options.kind}.json"
    for size in sizes:
        rows = features[:size]
        right = truth(rows, queries[: STATING.stop])
        searches: dict[str, Search] = {}
        facts: dict[str, dict[str, object]] = {}
        for name in options.methods:
            searches[name], facts[name] = prepared(name, rows, queries, right)
            print(size, name, facts[name], flush=True)
        for part in options.batches.split(","):
            batch, rounds = map(int, part.split(":"))
            asked = {name: partial(search, queries[:batch]) for name, search in searches.items()}
            for name, taken in by_turns(asked, rounds, warm=batch < len(queries)).items():
                facts[name][f"batch_{batch}_ms"] = ms = 1e3 * float(np.median(taken)) / batch
                print(size, name, batch, round(ms, 3), "ms a query", flush=True)
                if ms > SLOW_MS and batch > 1:
                    del searches[name]
        found = json.loads(path.read_text())["found"] if path.exists() else {}
        for name in options.methods:
            found.setdefault(name, {})[str(size)] = facts[name]
        content = {"case": f"ann_{options.kind}", "machine": machine(), "top": TOP, "found": found}
        content["floor_nanoseconds"] = floors(min(max(sizes), 500_000), features.shape[1])
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
