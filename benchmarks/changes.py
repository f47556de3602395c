"""What a change of a large index spends its time on, against plain ways of the same, which give the same bytes.

    python benchmarks/changes.py [--folder runs/bench/sizes] [--rows 1000000] [--shard-rows 4096] [--rounds 2]

The index is that of ``sizes.py``. Rows are retired ten at a time, by turns as the package does it, and with the scan
table gathered a block at a time (each row read twice, once for its place in the block) and equal rows looked up by
their bytes in a dictionary. One thread, processor
seconds. With 410 rows a file a million rows have as many files as ten million have with 4,096.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from common import DATA, ROOT, by_turns, count_processor_seconds, ratio, run, write_result
from million import make_index
from sizes import trained_model

from forebear.indexer.building.build import retire_rows
from forebear.indexer.curvature.stored_head import StoredHead
from forebear.indexer.index import Index
from forebear.indexer.storage import scan_table
from forebear.indexer.storage.arrow import RowMatrix, write_table
from forebear.indexer.storage.scan_table import SCAN_BLOCK_ROWS, main_directions, norms_of, round_vectors
from forebear.ratio import ratio as quotient

RETIRED = 10


def write_by_blocks(path: Path, order: np.ndarray, features: list[RowMatrix], residuals: list[RowMatrix]) -> None:
    """A scan table, each block gathered by itself."""
    bases = [main_directions(matrix, np.sort(order)) for matrix in features]
    metadata = {f"basis_{i}": basis.astype("<f4").tobytes() for i, basis in enumerate(bases)}
    blocks = (order[start : start + SCAN_BLOCK_ROWS] for start in range(0, len(order), SCAN_BLOCK_ROWS))

    def batch(rows: np.ndarray) -> object:
        last = features[-1].take(rows)
        rows = rows[np.argsort(quotient(round_vectors(last, bases[-1]).errors, norms_of(last)), kind="stable")]
        values = ([matrix.take(rows) for matrix in matrices] for matrices in (features, residuals))
        found = scan_table._scan_batch(rows, *values, bases)
        return found.replace_schema_metadata(metadata)

    first = batch(next(blocks))
    write_table(path, itertools.chain([first], map(batch, blocks)), first.schema)


def first_equal_by_dictionary(head: StoredHead) -> np.ndarray:
    """For each row the number of the first equal one."""
    numbers: dict[bytes, int] = {}
    first = np.empty(len(head.features), np.int64)
    for (start, f), (_, r) in zip(head.features.blocks(), head.residuals.blocks(), strict=True):
        for row, pair in enumerate(zip(f, r, strict=True), start):
            digest = blake2b(b"".join(part.tobytes() for part in pair), digest_size=16).digest()
            first[row] = numbers.setdefault(digest, row)
    return first


@contextmanager
def plain_ways() -> Iterator[None]:
    """In place of the package's."""
    kept = scan_table.write_scan_table, StoredHead.first_equal_rows
    scan_table.write_scan_table, StoredHead.first_equal_rows = write_by_blocks, first_equal_by_dictionary
    try:
        yield
    finally:
        scan_table.write_scan_table, StoredHead.first_equal_rows = kept


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "sizes")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shard-rows", type=int, default=4096)
    given = parser.parse_args()
    count_processor_seconds()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    model, base = trained_model(given.folder), given.folder / f"base-{given.shard_rows}"
    if not base.is_dir():
        how = ("--shard-rows", str(given.shard_rows), "-q")
        run("index", "--model", model, "--train", DATA / "sst2" / "train.parquet", "--out", base, *how)
    source, folder = given.folder / f"index-{given.rows}-{given.shard_rows}", given.folder / "changed"
    if not source.is_dir():
        make_index(Index.open(base), source, given.rows)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    numbers = itertools.count(5, RETIRED)

    def retire() -> None:
        start = next(numbers)
        retire_rows(folder, range(start, start + RETIRED))

    def retire_plainly() -> None:
        with plain_ways():
            retire()

    def table() -> bytes:
        facts = Index.open(folder).manifest
        return (folder / facts.derived["head"]["file"]).read_bytes()

    taken = by_turns({"now": retire, "plainly": retire_plainly}, given.rounds, warm=False)
    after = table()  # of the last turn, which was one or the other
    retired = Index.open(folder).retired
    again = shutil.copytree(source, given.folder / "again", dirs_exist_ok=True)
    retire_rows(again, retired)
    same = (Path(again) / Index.open(again).manifest.derived["head"]["file"]).read_bytes() == after
    for copy in (folder, again):
        shutil.rmtree(copy)
    write_result(
        f"changes_{given.rows}_{given.shard_rows}", rows=given.rows,
        files_of_rows=len(Index.open(source).manifest.shards),
        retire_seconds=min(taken["now"]), plainly_seconds=min(taken["plainly"]),
        now_over_plainly=ratio(taken["now"], taken["plainly"]),
        same_bytes=same,
    )  # fmt: skip


if __name__ == "__main__":
    main()
