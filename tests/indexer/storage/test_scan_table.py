"""The table that dot-product searches scan: the same bytes however rows are gathered, each row beside what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forebear.indexer.storage import scan_table
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import by_falling, read_scan_table, row_norms, write_scan_table

N, BLOCK = 530, 64


@pytest.mark.parametrize("n_checkpoints", [1, 2])
def test_rows_stand_beside_their_own_numbers_however_many_blocks_are_gathered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_checkpoints: int
) -> None:
    monkeypatch.setattr(scan_table, "SCAN_BLOCK_ROWS", BLOCK)
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(N, 40)).astype(np.float32) for _ in range(n_checkpoints)]
    residuals = [rng.normal(size=(N, 3)).astype(np.float32) for _ in range(n_checkpoints)]
    f, r = ([RowMatrix(np.array_split(values, 7)) for values in matrices] for matrices in (features, residuals))
    order = by_falling(row_norms(f[0]), np.flatnonzero(rng.random(N) < 0.9))
    written = set()
    for gathered in (1, 3 * BLOCK * 4 * 43 * n_checkpoints, 1 << 30):
        monkeypatch.setattr(scan_table, "_GATHERED_BYTES", gathered)
        write_scan_table(tmp_path / "table.arrow", order, f, r)
        written.add((tmp_path / "table.arrow").read_bytes())
    assert len(written) == 1
    blocks = read_scan_table(tmp_path / "table.arrow").blocks
    for number, block in enumerate(blocks):
        assert sorted(block.rows) == sorted(order[number * BLOCK : (number + 1) * BLOCK])
        for i, vectors in enumerate(block.features):
            truth = features[i][block.rows].astype(np.float64)
            shown = vectors.coordinates.astype(np.float64) @ vectors.basis
            shown += vectors.codes * vectors.scales[:, None].astype(np.float64)
            lost = np.linalg.norm(truth - shown, axis=1)
            assert (lost <= vectors.errors).all()
            assert (vectors.errors < 0.05 * np.linalg.norm(truth, axis=1)).all()
            np.testing.assert_allclose(block.feature_norms[i], np.linalg.norm(truth, axis=1), rtol=1e-6)
            np.testing.assert_array_equal(block.residuals[i], residuals[i][block.rows])
    assert sum(len(block.rows) for block in blocks) == len(order)
