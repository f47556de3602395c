"""Shards divided among writers by claims, each written once; equal rows get the numbers of the earliest shard."""

from __future__ import annotations

import fcntl
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruptions import hashes
from tiny import labels, sentences

from forebear import DataError, InputError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.building.options import Work
from forebear.indexer.building.shards import ShardWriter
from forebear.indexer.building.sharing.beginning import load_checked
from forebear.indexer.building.sharing.claims import Claims, claims_folder
from forebear.indexer.building.sharing.shard_rows import SourceRows
from forebear.indexer.rows.labels import label_map
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage import locks
from forebear.indexer.training.model_choice import choose_model

SHARD_ROWS = 8
TEXTS, LABELS = sentences(20, seed=21, low=3), labels(20, 2, seed=22)
TEXTS[10:12], LABELS[10:12] = TEXTS[3:5], [LABELS[3], 1 - LABELS[4]]  # the second shard repeats rows of the first
TEXTS += TEXTS[2:9]  # and so do the others; the last three with the other label
LABELS += LABELS[2:6] + [1 - label for label in LABELS[6:9]]


def source() -> Any:
    return rows_from_texts(TEXTS, LABELS)


class TestClaims:
    def test_a_shard_is_taken_once(self, tmp_path: Path) -> None:
        file = tmp_path / "0.arrow"
        with claims_folder(tmp_path):
            one, other = Claims(tmp_path), Claims(tmp_path)
            with one.take("features/c", 0, file.is_file) as first, other.take("features/c", 0, file.is_file) as second:
                assert (first, second) == (True, False)
                with other.take("features/c", 1, file.is_file) as of_next, other.take("spans", 0, file.is_file) as late:
                    assert of_next and late
            file.touch()
            with other.take("features/c", 0, file.is_file) as written:
                assert not written
        assert [path.name for path in tmp_path.iterdir()] == [file.name]

    def test_a_shard_written_between_a_look_and_the_claim_is_not_written_again(self, tmp_path: Path) -> None:
        looks = iter((False, True))
        with claims_folder(tmp_path), Claims(tmp_path).take("spans", 0, lambda: next(looks)) as is_ours:
            assert not is_ours

    def test_who_writes_alone_claims_nothing(self, tmp_path: Path) -> None:
        with Claims().take("spans", 0, lambda: False) as first, Claims().take("spans", 1, lambda: True) as second:
            assert (first, second) == (True, False)

    def test_a_file_system_without_locks_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_lock(*_arguments: Any) -> None:
            raise OSError

        monkeypatch.setattr(locks.fcntl, "flock", no_lock)
        with pytest.raises(InputError, match="has no locks"), claims_folder(tmp_path):
            pass
        assert fcntl.flock is no_lock
        assert not list(tmp_path.iterdir())


class TestSourceRows:
    def rows(self, n_kept: int = 0) -> SourceRows:
        return SourceRows(source(), label_map(source(), ("a", "b"), None), SHARD_ROWS, n_kept)

    @pytest.mark.parametrize("n_kept", [0, 2])
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 3, 2), (3, 3, 0), (2, 1, 2, 0)])
    def test_any_order_gives_the_same_rows(self, order: tuple[int, ...], n_kept: int) -> None:
        rows = self.rows(n_kept)
        for number in order:
            block, gold = rows.block(number)
            start = number * SHARD_ROWS
            assert block.start == start
            assert block.texts == (TEXTS[start : start + SHARD_ROWS],)
            assert gold.tolist() == LABELS[start : start + SHARD_ROWS]

    def test_shards_that_are_kept_are_not_read_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = self.rows(n_kept=2)
        starts = []
        blocks = rows.source.blocks
        monkeypatch.setattr(rows.source, "blocks", lambda n, start=0: starts.append(start) or blocks(n, start))
        for number in (0, 2, 1, 3, 2):
            rows.block(number)
        assert starts == [0]

    def test_a_source_that_has_grown_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = self.rows()
        monkeypatch.setattr(rows.source, "n_rows", len(TEXTS) - len(TEXTS) % SHARD_ROWS)
        with pytest.raises(DataError, match="has more than"):
            rows.block(2)


class _HeldRows(SourceRows):
    """Rows of which the first shard comes only when it is let go."""

    def __init__(self) -> None:
        super().__init__(source(), label_map(source(), ("a", "b"), None), SHARD_ROWS)
        self.is_asked, self.let_go = threading.Event(), threading.Event()

    def block(self, number: int) -> tuple[Any, np.ndarray]:
        if number == 0:
            self.is_asked.set()
            assert self.let_go.wait(60)
        return super().block(number)


@pytest.mark.slow
def test_a_shard_that_repeats_rows_of_one_under_way_does_not_wait_for_it(
    tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    chosen = choose_model(None, [tiny_model("bert", 2, 0), tiny_model("bert", 2, 1)], (1.0, 1.0)).checkpoints
    options = BuildOptions(
        stores=("features", "words", "sbert"), words_tops=(3,), sentence_model=tiny_model("bert", 2, 9),
        scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=0,
        shard_rows=SHARD_ROWS, batch_tokens=64,
    )  # fmt: skip
    built = build_index(source(), tmp_path / "built", chosen, options)
    manifest, folder = built.manifest, tmp_path / "shared"
    checkpoints = tuple(replace(c, path=str(p.path)) for c, p in zip(manifest.checkpoints, chosen, strict=True))

    def writer(claims: Claims, rows: Any) -> ShardWriter:
        return ShardWriter(
            folder=folder, manifest=manifest, checkpoints=checkpoints, rows=rows, first_shard=0,
            work=Work(device="cpu"), claims=claims,
        )  # fmt: skip

    def models() -> dict[str, Any]:
        return {c.name: load_checked(c, manifest.spec, "cpu") for c in checkpoints}

    held, free = _HeldRows(), SourceRows(source(), label_map(source(), ("a", "b"), None), SHARD_ROWS)
    writer(Claims(), free).fit(models())
    failures: list[BaseException] = []

    def write(rows: SourceRows, loaded: dict[str, Any]) -> None:
        try:
            writer(Claims(folder), rows).write(loaded)
        except BaseException as error:
            failures.append(error)

    with claims_folder(folder):
        slow, quick = (threading.Thread(target=write, args=(rows, models())) for rows in (held, free))
        slow.start()
        assert held.is_asked.wait(30)
        quick.start()
        quick.join(60)
        assert not quick.is_alive()
        of_first = sorted(path.name for path in (folder / "features" / checkpoints[0].name).iterdir())
        assert of_first == ["00001.arrow", "00002.arrow", "00003.arrow"]  # they repeat rows of the shard before them
        held.let_go.set()
        slow.join(60)
    assert not failures
    writer(Claims(), free).overwrite_equal_rows(models())
    shards = {name: sha for name, sha in hashes(built.folder).items() if re.search(r"/\d{5}[.]arrow", name)}
    assert len(shards) == 4 * 8  # rows, tokens, sentences; features and sketches twice; whitened sketches
    assert hashes(folder).items() >= shards.items()
