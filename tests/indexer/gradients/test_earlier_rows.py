"""Rows that an earlier shard has, against a dictionary of all rows."""

from __future__ import annotations

import numpy as np
import pytest

from forebear.indexer.gradients.earlier_rows import EarlierRows


def digests_of(numbers: np.ndarray) -> np.ndarray:
    """Digests of texts by number: in no order, equal for equal numbers."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([mixed, mixed ^ np.uint64(0xFFFF)], axis=1)


@pytest.mark.parametrize(("n_texts", "seed"), [(40, 0), (1000, 1), (100_000, 2)])
def test_each_repeat_is_found_at_the_first_place(n_texts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    earlier, places = EarlierRows(), dict[int, tuple[int, int]]()
    for shard in range(70):
        texts = rng.integers(0, n_texts, rng.integers(0, 90))
        earlier.add(digests_of(texts))
        known = [(i, places[text]) for i, text in enumerate(texts.tolist()) if text in places]
        found, at = earlier.repeats(shard)
        assert found.tolist() == [i for i, _ in known]
        assert [tuple(place) for place in at.tolist()] == [place for _, place in known]
        for i, text in enumerate(texts.tolist()):
            places.setdefault(text, (shard, i))
    assert earlier.n_shards == 70


def test_rows_are_moved_as_often_as_their_number_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of many shards costs no more a row than one of few."""
    moved: list[int] = []
    concatenate = np.concatenate

    def counted(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        joined = concatenate(arrays)
        moved.append(len(joined))
        return joined

    monkeypatch.setattr(np, "concatenate", counted)
    earlier, n_shards, n_rows = EarlierRows(), 512, 16
    for shard in range(n_shards):
        earlier.add(digests_of(np.arange(shard * n_rows, (shard + 1) * n_rows)))
    assert sum(moved) <= 3 * n_shards * n_rows * np.log2(n_shards)  # three arrays a run
