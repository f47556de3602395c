"""Files that appear whole or not at all; reading what an index says of itself is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from forebear.errors import StorageError
from forebear.indexer.storage.atomic import atomic_file, write_bytes
from forebear.ratio import ratio


def test_a_manifest_is_read_without_torch() -> None:
    modules = ("arrow", "atomic", "choices", "journal", "layout", "locks", "manifest", "scan_table")
    code = f"import sys, {', '.join(f'forebear.indexer.storage.{name}' for name in modules)}"
    code = f"{code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_bytes(path, b"old")
    with pytest.raises(ValueError, match="stop"), atomic_file(path) as handle:
        handle.write(b"new")
        raise ValueError("stop")
    assert path.read_bytes() == b"old"
    assert [found.name for found in path.parent.iterdir()] == ["file"]
    with pytest.raises(StorageError, match="cannot write"):
        write_bytes(path / "below", b"new")


def test_a_ratio_is_of_its_numerators_type_and_has_a_value_beside_zero() -> None:
    found = ratio(np.array([[1, 2], [3, 4]], np.float32), np.array([[2.0], [0.0]]))
    assert found.dtype == np.float32
    assert found.tolist() == [[0.5, 1.0], [0.0, 0.0]]
    assert ratio(np.array([1, 1, 1]), np.array([4, 0, -1]), 7.0).tolist() == [0.25, 7.0, 7.0]
    assert np.isnan(ratio(1.0, np.array([0.0, np.nan]), np.nan)).all()
