"""The exact scan of factored head gradients, against scoring every row.

393k rows x 768 features x 3 labels (MNLI's size under a BERT-base), residual norms log-normal as measured on
fine-tuned heads (sigma 0.86), features in three clusters. Recall is against float64 scores of every row.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import seconds, write_result

from forebear.indexer.curvature.head import HeadCurvature, factorise, head_hessian, mean_eigenvalue
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import by_falling, read_scan_table, row_norms, write_scan_table
from forebear.retriever.head.scan import Scan
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_full, search_scan
from forebear.retriever.question.methods import METHODS

TOP = 100
BATCH = 64


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


def queries(name: str, f: np.ndarray, r: np.ndarray, curvature: HeadCurvature, own: np.ndarray) -> Query:
    f64, r64 = f.astype(np.float64), r.astype(np.float64)
    method = METHODS[name]
    if method.query == "preconditioned":
        norms = np.sqrt(curvature.self_influence(r64, f64))
        return Query(method, (Term(1.0, None, matrix=curvature.solve(r64, f64)),), norms, own)
    norms = np.linalg.norm(r64, axis=1) * np.linalg.norm(f64, axis=1)
    return Query(method, (Term(1.0, f64, r64),), norms)


def main(n_rows: int = 393_000, width: int = 768, n_classes: int = 3) -> None:
    features, residuals, labels = make_rows(n_rows + BATCH, width, n_classes)
    ask_f, ask_r = features[n_rows:], residuals[n_rows:]
    shards = range(0, n_rows, 4096)
    f = RowMatrix([features[i : min(i + 4096, n_rows)] for i in shards])
    r = RowMatrix([residuals[i : min(i + 4096, n_rows)] for i in shards])
    p = residuals[:n_rows].astype(np.float64)
    p[np.arange(n_rows), labels[:n_rows]] += 1
    hessian = head_hessian(((b, p[s : s + len(b)]) for s, b in f.blocks()), width, n_classes)
    damping = 0.1 * mean_eigenvalue(hessian, n_classes)
    curvature = HeadCurvature(factorise(hessian, damping), n_classes, damping)
    own = np.concatenate([curvature.self_influence(r.take(np.arange(s, s + len(b))), b) for s, b in f.blocks()])
    factors = RowFactors((f,), (r,), np.arange(n_rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.arrow"
        write_scan_table(path, by_falling(row_norms(f) * row_norms(r), factors.live), [f], [r])
        table = read_scan_table(path)
        for name in ("gd", "gc", "if", "rif"):
            one = queries(name, ask_f[:1], ask_r[:1], curvature, own)
            many = queries(name, ask_f, ask_r, curvature, own)
            flat_f, flat_r = features[:n_rows], residuals[:n_rows]

            def brute(query: Query, flat_f: np.ndarray = flat_f, flat_r: np.ndarray = flat_r) -> None:
                """The plain float32 way: every score by matrix products, then a partial sort."""
                t = query.terms[0]
                if t.matrix is None:
                    scores = (t.right.astype(np.float32) @ flat_f.T) * (t.left.astype(np.float32) @ flat_r.T)
                else:
                    from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY

                    reduced = (flat_r @ CROSS_ENTROPY.basis(n_classes).T).astype(np.float32)
                    scores = sum(
                        (t.matrix[:, a].astype(np.float32) @ flat_f.T) * reduced[:, a] for a in range(n_classes - 1)
                    )
                np.argpartition(scores, -TOP, axis=1)

            found = search_scan(many, table, factors, TOP, rerank=True)
            truth = search_full(many.take(np.arange(4)), factors, TOP)
            recall = np.mean(
                [
                    len(np.intersect1d(a, b)) / TOP
                    for e in (0, 1)
                    for a, b in zip(found[e].rows, truth[e].rows, strict=False)
                ]
            )
            visited = [Scan(many.take(np.array([i])), table).run(TOP)[0].shape[1] / n_rows for i in range(8)]
            brute_one, brute_many = seconds(lambda one=one: brute(one)), seconds(lambda many=many: brute(many), 3)
            ours_one = seconds(lambda one=one: search_scan(one, table, factors, TOP, rerank=True))
            ours_many = seconds(lambda many=many: search_scan(many, table, factors, TOP, rerank=True), 3)
            write_result(
                f"head_scan_{name}",
                rows=n_rows, width=width, classes=n_classes, top=TOP, ends=2, batch=BATCH,
                recall=float(recall), rows_visited_one_query=float(np.median(visited)),
                one_query_ms=1e3 * ours_one, batch_ms_a_query=1e3 * ours_many / BATCH,
                brute_one_ms=1e3 * brute_one, brute_batch_ms_a_query=1e3 * brute_many / BATCH,
                ratio_one=brute_one / ours_one, ratio_batch=brute_many / ours_many,
            )  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
