"""The exact scan of factored head gradients, against scoring every row.

393k rows x 768 features x 3 labels (MNLI's size under a BERT-base), residual norms log-normal as measured on
fine-tuned heads (sigma 0.86), features in three clusters. Recall is against float64 scores of every row. One thread,
processor seconds.
``python benchmarks/head_scan.py [ROWS] [WIDTH] [CLASSES]``
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import by_turns, count_processor_seconds, ratio, write_result

from forebear.indexer.curvature.head import HeadCurvature, factorise, head_hessian, mean_eigenvalue
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import by_falling, read_scan_table, row_norms, write_scan_table
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_full, search_scan
from forebear.retriever.question.methods import METHODS

TOP = 100
BATCH = 64
SCANNED = ("gd", "gc", "if", "rif")
SPEED_UPS = ("speed_up_one_query", "speed_up_batch")


def make_rows(n_rows: int, width: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in clusters by class, probabilities with log-normal confidence, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_rows)
    centres = rng.normal(size=(n_classes, width)).astype(np.float32)
    features = np.tanh(centres[labels] + 0.5 * rng.normal(size=(n_rows, width)).astype(np.float32))
    wrong = np.minimum(np.exp(rng.normal(-4.0, 0.86 * 1.5, n_rows)), 0.9)  # 1 - p_y
    split = rng.dirichlet(np.ones(n_classes - 1), n_rows) * wrong[:, None]
    residuals = np.empty((n_rows, n_classes))
    mask = np.ones_like(residuals, bool)
    mask[np.arange(n_rows), labels] = False
    residuals[mask] = split.reshape(-1)
    residuals[~mask] = -split.sum(axis=1)
    return features, residuals.astype(np.float32), labels


class Problem:
    """Made rows, their scan table, and queries of the same make."""

    def __init__(self, n_rows: int, width: int, n_classes: int) -> None:
        features, residuals, labels = make_rows(n_rows + BATCH, width, n_classes)
        self.asked = features[n_rows:], residuals[n_rows:]
        self.flat_f, self.flat_r = features[:n_rows], residuals[:n_rows]
        shards = [slice(i, min(i + 4096, n_rows)) for i in range(0, n_rows, 4096)]
        f, r = RowMatrix([features[i] for i in shards]), RowMatrix([residuals[i] for i in shards])
        p = self.flat_r.astype(np.float64)
        p[np.arange(n_rows), labels[:n_rows]] += 1
        hessian = head_hessian(((b, p[s : s + len(b)]) for s, b in f.blocks()), width, n_classes)
        damping = 0.1 * mean_eigenvalue(hessian, n_classes)
        self.curvature = HeadCurvature(factorise(hessian, damping), n_classes, damping)
        own = [self.curvature.self_influence(r.take(np.arange(s, s + len(b))), b) for s, b in f.blocks()]
        self.own = np.concatenate(own)
        self.factors = RowFactors((f,), (r,), np.arange(n_rows))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.arrow"
            write_scan_table(path, by_falling(row_norms(f) * row_norms(r), self.factors.live), [f], [r])
            self.table = read_scan_table(path)  # stays mapped

    def queries(self, name: str, n: int) -> Query:
        """The first of the queries, as a method compares them."""
        f, r = (part[:n].astype(np.float64) for part in self.asked)
        method, basis = METHODS[name], CROSS_ENTROPY.basis(self.flat_r.shape[1])
        if method.query == "preconditioned":
            norms = np.sqrt(self.curvature.self_influence(r, f))
            return Query(method, (Term(1.0, None, matrix=self.curvature.solve(r, f), basis=basis),), norms, self.own)
        return Query(method, (Term(1.0, f, r, basis=basis),), np.linalg.norm(r, axis=1) * np.linalg.norm(f, axis=1))

    def scan(self, query: Query) -> Any:
        """Both ends, exact."""
        return search_scan(query, self.table, self.factors, TOP)

    def brute(self, query: Query) -> None:
        """The plain float32 way: every score by matrix products, then a partial sort."""
        (term,) = query.terms
        if term.matrix is None:
            scores = (term.right.astype(np.float32) @ self.flat_f.T) * (term.left.astype(np.float32) @ self.flat_r.T)
        else:
            reduced = (self.flat_r @ term.basis.T).astype(np.float32)
            parts = range(reduced.shape[1])
            scores = sum((term.matrix[:, a].astype(np.float32) @ self.flat_f.T) * reduced[:, a] for a in parts)
        np.argpartition(scores, -TOP, axis=1)


def measure(problem: Problem, name: str, rounds: int = 5) -> dict[str, Any]:
    """The scan of one method beside the plain way, one query and a batch of them."""
    one, many = problem.queries(name, 1), problem.queries(name, BATCH)
    found, truth = problem.scan(many), search_full(many.take(np.arange(4)), problem.factors, TOP)
    pairs = [pair for e in (0, 1) for pair in zip(found[e].rows, truth[e].rows, strict=False)]
    of_one = by_turns({"ours": lambda: problem.scan(one), "brute": lambda: problem.brute(one)}, rounds)
    of_many = by_turns({"ours": lambda: problem.scan(many), "brute": lambda: problem.brute(many)}, 3)
    return {
        "rows": len(problem.flat_f), "width": problem.flat_f.shape[1], "classes": problem.flat_r.shape[1], "top": TOP,
        "ends": 2, "batch": BATCH, "rows_scored_exactly": float(np.median(found[0].n_scored)),
        "recall": float(np.mean([len(np.intersect1d(a, b)) / TOP for a, b in pairs])),
        "one_query_ms": {way: 1e3 * float(np.median(taken)) for way, taken in of_one.items()},
        "batch_ms_a_query": {way: 1e3 * float(np.median(taken)) / BATCH for way, taken in of_many.items()},
        "speed_up_one_query": ratio(of_one["brute"], of_one["ours"]),
        "speed_up_batch": ratio(of_many["brute"], of_many["ours"]),
    }  # fmt: skip


def main(n_rows: int = 393_000, width: int = 768, n_classes: int = 3) -> None:
    torch.set_num_threads(1)
    count_processor_seconds()
    problem = Problem(n_rows, width, n_classes)
    for name in SCANNED:
        write_result(f"head_scan_{name}", larger=SPEED_UPS, recalls=("recall",), **measure(problem, name))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
