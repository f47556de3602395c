"""One query's ``if`` over the top 5 layers: the index against LiSSA, and both against converged cg.

SST-2 with MiniLM; the run of end_to_end.py. LiSSA with Han20 settings takes 2,500 steps of 8 rows; it is timed on
fewer steps and stated per step. cg takes hours over many rows: it has curvature rows of its own, 0 for none.
``python benchmarks/influence.py [rows] [lissa steps] [curvature rows] [queries] [cg's curvature rows]``
"""

from __future__ import annotations

import sys
import time

import numpy as np
from common import DATA, ROOT, write_result
from scipy.stats import spearmanr

from forebear import BuildOptions, Index, Retriever, build_index
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.training.model_choice import choose_model

SCOPE = "top-5"
RUN = ROOT / "runs" / "bench" / "sst2"


def main(n_rows: int = 800, steps: int = 60, curvature_rows: int = 200, n_queries: int = 3, cg_rows: int = 200) -> None:
    """See the module."""
    folder = ROOT / "runs" / "bench" / f"sst2-{SCOPE}-{n_rows}"
    if not (folder / "manifest.json").is_file():
        block = next(open_rows(DATA / "sst2" / "train.parquet", need_labels=True).blocks(n_rows))
        source = rows_from_texts(block.texts[0], block.labels, label_names=("negative", "positive"))
        options = BuildOptions(scopes=("head", SCOPE), max_length=128, calibration_queries=0, dampings=("0.1x",))
        build_index(source, folder, choose_model(str(RUN)).checkpoints, options)
    retriever = Retriever(Index.open(folder))
    queries = next(open_rows(DATA / "sst2" / "dev.parquet").blocks(n_queries)).texts[0]
    retriever.retrieve(queries[:1], methods=["if"], scope=SCOPE)  # models and files loaded
    scores, seconds = {}, {}

    def timed(name: str, **choices: object) -> None:
        started = time.perf_counter()
        scores[name] = retriever.scores(queries, "if", scope=SCOPE, **choices)
        seconds[name] = time.perf_counter() - started

    timed("ekfac")
    timed("gd", curvature="identity")
    if cg_rows:
        timed("cg", curvature="cg", curvature_rows=cg_rows, tolerance=1e-2)
    timed("lissa", curvature="lissa", curvature_rows=curvature_rows, lissa=f"han20,depth={steps}")
    started = time.perf_counter()
    for text in queries:
        retriever.retrieve([text], methods=["if"], scope=SCOPE, top=10)
    one = (time.perf_counter() - started) / len(queries)
    solving = (seconds["lissa"] - seconds["gd"]) / steps
    write_result(
        "influence",
        rows=n_rows, queries=len(queries), curvature_rows=curvature_rows, cg_rows=cg_rows, scope=SCOPE,
        index_one_query_seconds=one,
        lissa_seconds_a_step=solving,
        lissa_2500_steps_seconds=2500 * solving,
        seconds_with_scoring_all_rows=seconds,
        spearman_with_cg={
            name: float(np.mean([spearmanr(a, b).statistic for a, b in zip(found, scores["cg"], strict=True)]))
            for name, found in scores.items()
            if cg_rows
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
