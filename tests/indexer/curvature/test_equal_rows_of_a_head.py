"""Rows with the same feature and residual share the number of the first, also where hashes of others are the same."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from forebear.indexer.curvature import stored_head
from forebear.indexer.curvature.stored_head import StoredHead
from forebear.indexer.storage.arrow import RowMatrix

N, SHARD = 700, 64


@pytest.fixture
def factors() -> tuple[np.ndarray, np.ndarray]:
    """Rows of which a third repeat others, some with another residual, some with another zero."""
    rng = np.random.default_rng(3)
    f, r = rng.normal(size=(N, 5)).astype(np.float32), rng.normal(size=(N, 2)).astype(np.float32)
    copies, of = rng.integers(N, size=N // 3), rng.integers(N, size=N // 3)
    f[copies], r[copies] = f[of], r[of]
    r[copies[::5], 0] += 1
    f[10], r[10] = 0.0, 1.0
    f[400], r[400] = 0.0, 1.0
    f[401], r[401] = -0.0, 1.0
    return f, r


def found(factors: tuple[np.ndarray, np.ndarray]) -> list[int]:
    f, r = (RowMatrix([values[start : start + SHARD] for start in range(0, N, SHARD)]) for values in factors)
    unused = cast(Any, None)
    return StoredHead(unused, f, r, unused, np.arange(N), unused).first_equal_rows().tolist()


def by_python(factors: tuple[np.ndarray, np.ndarray]) -> list[int]:
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(f.tobytes() + r.tobytes(), row) for row, (f, r) in enumerate(zip(*factors, strict=True))]


@pytest.mark.parametrize("kinds", [None, 1, 9])
def test_each_row_has_the_number_of_the_first_equal_one(
    factors: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, kinds: int | None
) -> None:
    """``kinds``: so few different hashes that rows which differ share one."""
    wanted = by_python(factors)
    assert 0.7 * N < len(set(wanted)) < 0.9 * N
    assert (wanted[400], wanted[401]) == (10, 401)
    monkeypatch.setattr(stored_head, "_COMPARED_ROWS", 50)
    if kinds is not None:
        hashes = stored_head._hashes
        monkeypatch.setattr(stored_head, "_hashes", lambda values: hashes(values) % np.uint64(kinds))
    assert found(factors) == wanted
