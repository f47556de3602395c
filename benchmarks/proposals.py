"""Proposing candidates from stored sketches on the CPU: processor seconds for a dozen test rows at a time, and for 48.

``python benchmarks/proposals.py [ROWS]``; ``PYTHONPATH=OTHER_CHECKOUT`` measures another version beside it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from common import write_result

from forebear.indexer.sketches.candidates import propose
from forebear.indexer.sketches.reduction import Reduction
from forebear.indexer.sketches.sketch import SketchRows
from forebear.indexer.storage.arrow import RowMatrix

try:
    from forebear.indexer.sketches.estimates import GradientStore, Part, Proposal
except ImportError:  # a version before they had a module of their own
    from forebear.indexer.sketches.candidates import GradientStore, Part, Proposal  # type: ignore[attr-defined,no-redef]

WIDTH, BITS, N_QUERIES, N_CANDIDATES = 128, 4096, 48, 200


def main() -> None:
    torch.set_num_threads(1)
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    rng = np.random.default_rng(0)
    lengths, half = np.exp(rng.normal(size=n)).astype(np.float32), np.full(n, 0.5, np.float32)
    store = GradientStore(
        sketches=RowMatrix(np.array_split(rng.normal(size=(n, WIDTH)).astype(np.float16), 37)),
        codes=RowMatrix(np.array_split(rng.integers(0, 256, (n, BITS // 8), dtype=np.uint8), 37)),
        code_factors=half / 64, shares=half, lengths=lengths, norms=lengths, residual_lengths=lengths,
        reduction=Reduction(np.eye(WIDTH, 4 * WIDTH).astype(np.float16), np.ones(4 * WIDTH, np.float32), BITS, 0),
    )  # fmt: skip
    coordinates = rng.normal(size=(N_QUERIES, WIDTH)).astype(np.float32) / 16
    codes, ones = rng.normal(size=(N_QUERIES, BITS)).astype(np.float32) / 64, np.ones(N_QUERIES)
    queries, live, found = SketchRows(coordinates, codes, ones, ones), np.arange(n), {}
    for name, proposal in (("cosines", Proposal(True, 0.8)), ("dots", Proposal(False, 0.8, 0.1))):
        for size in (12, 48):
            began = time.process_time()
            for start in range(0, N_QUERIES, size):
                some = queries.take(np.arange(start, start + size))
                propose([Part(1.0, some, store)], live, N_CANDIDATES, proposal)
            found[f"{name}, {size} test rows at a time"] = round(time.process_time() - began, 2)
    write_result("proposals", n_rows=n, n_queries=N_QUERIES, processor_seconds=found)


if __name__ == "__main__":
    main()
