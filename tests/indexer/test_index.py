"""The index on disk: same bytes, resumed, appended to, retired from, damaged, misused, on a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROW_METHODS, World, error
from interruptions import Interrupted, hashes, interrupt_at
from places import GOLDEN
from tiny import labels as make_labels
from tiny import make_tiny_model, sentences
from warm import start_program

from forebear.errors import (
    CorruptIndexError,
    ForebearError,
    InputError,
    MismatchError,
    MissingStoreError,
    NonFiniteError,
    OutputExistsError,
    StorageError,
)
from forebear.indexer.building import finish as finish_module
from forebear.indexer.building.build import BuildOptions, append_rows, build_index, rebuild_ann, retire_rows
from forebear.indexer.building.verify import verify_index
from forebear.indexer.index import Index
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage.layout import PARTS
from forebear.indexer.storage.manifest import read_manifest
from forebear.indexer.training.model_choice import CheckpointPath, choose_model
from forebear.indexer.training.run import Run, RunCheckpoint
from forebear.retriever.retriever import Retriever

TEXTS, LABELS = sentences(40, seed=21), make_labels(40, seed=22)
QUERIES = sentences(4, seed=23)
TOLERANCE = 1e-5


def rows(start: int = 0, stop: int = 40, texts: list[str] = TEXTS) -> RowSource:
    return rows_from_texts(texts[start:stop], LABELS[start:stop])


@pytest.fixture(scope="session")
def choices(tiny_model: Callable[..., str]) -> dict[str, Any]:
    """Two checkpoints and every kind of file."""
    options = BuildOptions(
        ann="Flat",
        stores=("features", "sbert", "words"), words_tops=(0, 3), sentence_model=tiny_model("bert", 2, 9),
        dampings=("0.1x", "0.01"), rep_refit=True, shard_rows=8, batch_tokens=64,
    )  # fmt: skip
    models = [tiny_model("bert", 2, seed) for seed in (0, 1)]
    return {"checkpoints": choose_model(None, models, (0.5, 0.25)).checkpoints, "options": options}


@pytest.fixture(scope="session")
def pristine(choices: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 40 in one undisturbed build."""
    return build_index(rows(), tmp_path_factory.mktemp("pristine") / "index", **choices).folder


@pytest.fixture(scope="session")
def short(choices: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 30 only: the last shard is not full."""
    return build_index(rows(0, 30), tmp_path_factory.mktemp("short") / "index", **choices).folder


@pytest.fixture
def whole(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "whole"))


@pytest.fixture
def partial(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "partial"))


def scores(folder: Path) -> dict[str, np.ndarray]:
    retriever = Retriever(Index.open(folder))
    return {name: retriever.scores(QUERIES, name) for name in ROW_METHODS}


def assert_same_scores(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    errors = {name: error(found[name], wanted[name]) for name in ROW_METHODS}
    assert max(errors.values()) <= TOLERANCE, errors


def answers(folder: Path) -> list[dict[str, Any]]:
    retriever = Retriever(Index.open(folder))
    table = retriever.retrieve(QUERIES, methods=list(ROW_METHODS), top=5)
    return table.select(["query", "method", "side", "rank", "row", "label", "prediction", "text"]).to_pylist()


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- same input, same bytes ---


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(pristine: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    again = build_index(rows(), tmp_path / "again", **choices)
    assert hashes(again.folder) == hashes(pristine)
    assert set(hashes(pristine)) == {"manifest.json", *again.manifest.files}


def test_the_manifest_lists_every_file_with_its_sha256(pristine: Path) -> None:
    found = hashes(pristine)
    listed = json.loads((pristine / "manifest.json").read_text())["files"]
    for name, facts in listed.items():
        assert (facts["sha256"], facts["bytes"]) == (found[name], (pristine / name).stat().st_size)


def test_every_row_is_stored_once_in_order(pristine: Path) -> None:
    index = Index.open(pristine)
    assert index.texts(np.arange(40))["text"].to_pylist() == TEXTS
    assert index.labels.tolist() == LABELS
    assert index.texts(np.array([39, 0, 17, 17]))["text"].to_pylist() == [TEXTS[i] for i in (39, 0, 17, 17)]
    assert index.losses.shape == index.predictions.shape == (40,)


CHILD = """
import json, sys, time
import torch
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import CheckpointPath

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])

def progress(stage, done, total):
    if stage == "features checkpoint-2" and done > 16:  # the third shard of the last checkpoint is being made
        time.sleep(600)

options = {k: tuple(v) if isinstance(v, list) else v for k, v in task["options"].items()}
build_index(
    rows_from_texts(task["texts"], task["labels"]), task["out"],
    [CheckpointPath(**c) for c in task["checkpoints"]], BuildOptions(**options), progress=progress,
)
"""


@pytest.mark.slow
def test_a_killed_build_is_resumed_to_the_same_bytes(pristine: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    task = {
        "threads": torch.get_num_threads(), "options": vars(choices["options"]), "texts": TEXTS, "labels": LABELS,
        "out": str(out), "checkpoints": [vars(c) for c in choices["checkpoints"]],
    }  # fmt: skip
    child = start_program(CHILD, [json.dumps(task)])
    try:
        second_shard = out / "features/checkpoint-2/00001.arrow"
        deadline = time.monotonic() + 120
        while not second_shard.is_file() and child.runs() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert second_shard.is_file(), "the build did not get that far"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert not (out / "features/checkpoint-2/00003.arrow").exists()
    (out / "features/checkpoint-2/00002.arrow.partial").write_bytes(b"half a shard")
    with pytest.raises(InputError, match=r"unfinished build.*resume=True"):
        Index.open(out)
    with pytest.raises(OutputExistsError, match=r"unfinished build.*resume=True"):
        build_index(rows(), out, **choices)
    before = (out / "features/checkpoint-2/00000.arrow").stat().st_mtime_ns
    build_index(rows(), out, resume=True, **choices)
    assert (out / "features/checkpoint-2/00000.arrow").stat().st_mtime_ns == before
    assert hashes(out) == hashes(pristine)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 15, 25, 31, 34])
def test_a_build_interrupted_anywhere_is_resumed_to_the_same_bytes(
    number: int, pristine: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        build_index(rows(), tmp_path / "index", progress=interrupt_at(number), **choices)
    build_index(rows(), tmp_path / "index", resume=True, **choices)
    assert hashes(tmp_path / "index") == hashes(pristine)


def test_resume_without_anything_to_resume_builds(pristine: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    build_index(rows(), tmp_path / "index", resume=True, **choices)
    assert hashes(tmp_path / "index") == hashes(pristine)


def test_resuming_with_other_rows_or_choices_is_refused_with_both_values(
    choices: dict[str, Any], tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "index"
    with pytest.raises(Interrupted):
        build_index(rows(), out, progress=interrupt_at(6), **choices)
    begun = hashes(out)
    other = rows(texts=[*TEXTS[:-1], "a different text"])
    with pytest.raises(MismatchError) as caught:
        build_index(other, out, resume=True, **choices)
    assert rows().sha256() in one_line(caught)
    assert other.sha256() in one_line(caught)
    for change, found, asked in (
        ({"seed": 1}, "seed=0", "seed=1"),
        ({"max_length": 12}, "max_length=40", "max_length=12"),
        ({"shard_rows": 9}, "shard_rows=8", "shard_rows=9"),
    ):
        options = BuildOptions(**(vars(choices["options"]) | change))
        with pytest.raises(MismatchError) as caught:
            build_index(rows(), out, choices["checkpoints"], options, resume=True)
        assert found in one_line(caught)
        assert asked in one_line(caught)
    models = [choices["checkpoints"][0], CheckpointPath(name="checkpoint-2", path=tiny_model("bert", 2, 2), eta=0.25)]
    with pytest.raises(MismatchError, match="checkpoint_sha256"):
        build_index(rows(), out, models, choices["options"], resume=True)
    assert hashes(out) == begun


def test_resuming_a_finished_build_with_other_rows_or_choices_is_refused(whole: Path, choices: dict[str, Any]) -> None:
    assert build_index(rows(), whole, resume=True, **choices).manifest.n_rows == 40  # the same: nothing to do
    options = BuildOptions(**(vars(choices["options"]) | {"seed": 1}))
    with pytest.raises(MismatchError, match=r"seed=0.*seed=1"):
        build_index(rows(), whole, choices["checkpoints"], options, resume=True)
    other = rows(texts=[*TEXTS[:-1], "a different text"])
    with pytest.raises(MismatchError) as caught:
        build_index(other, whole, resume=True, **choices)
    assert other.sha256() in one_line(caught)


def die_before_tidying(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """The manifest is in force, the journal is still there: a crash between the two."""

    def die(*_args: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(finish_module, "tidy", die)
        work()


def test_a_build_that_died_after_its_manifest_is_resumed_to_the_same_bytes(
    pristine: Path, choices: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_before_tidying(monkeypatch, lambda: build_index(rows(), tmp_path / "index", **choices))
    build_index(rows(), tmp_path / "index", resume=True, **choices)
    assert hashes(tmp_path / "index") == hashes(pristine)
    retire_rows(tmp_path / "index", [3])


def test_an_append_that_died_after_its_manifest_does_not_add_its_rows_twice(
    partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_before_tidying(monkeypatch, lambda: append_rows(partial, rows(30, 40)))
    index = append_rows(partial, rows(30, 40), resume=True)
    assert index.manifest.n_rows == 40
    assert set(hashes(partial)) == {"manifest.json", *index.manifest.files}


def test_the_same_append_again_after_a_kill_never_adds_its_rows_twice(
    partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any other moment, the same command says "unfinished append"; here it says that it is done."""
    die_before_tidying(monkeypatch, lambda: append_rows(partial, rows(30, 40)))
    told: list[str] = []
    assert append_rows(partial, rows(30, 40), tell=told.append).manifest.n_rows == 40
    assert "nothing is left to do" in told[0]
    with pytest.raises(InputError):  # no journal says any longer that this is the append that was killed
        append_rows(partial, rows(30, 40))
    assert Index.open(partial).manifest.n_rows == 40


# --- append and retire ---


@pytest.mark.slow
def test_append_equals_a_build_from_scratch(pristine: Path, partial: Path) -> None:
    index = append_rows(partial, rows(30, 40))
    assert (index.manifest.n_rows, index.manifest.generation, len(index.manifest.segments)) == (40, 1, 2)
    assert_same_scores(scores(partial), scores(pristine))
    assert answers(partial) == answers(pristine)
    assert set(hashes(partial)) == {"manifest.json", *index.manifest.files}


@pytest.mark.slow
def test_append_twice_equals_a_build_from_scratch(pristine: Path, partial: Path) -> None:
    append_rows(partial, rows(30, 31))
    index = append_rows(partial, rows(31, 40))
    assert index.manifest.generation == 2
    assert_same_scores(scores(partial), scores(pristine))
    assert answers(partial) == answers(pristine)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 6, 13, 14, 16])
def test_an_interrupted_append_leaves_the_index_in_force_and_is_resumed_to_the_same_bytes(
    number: int, partial: Path, short: Path, tmp_path: Path
) -> None:
    undisturbed = Path(shutil.copytree(short, tmp_path / "undisturbed"))
    append_rows(undisturbed, rows(30, 40))
    before = hashes(partial)
    with pytest.raises(Interrupted):
        append_rows(partial, rows(30, 40), progress=interrupt_at(number))
    assert before.items() <= hashes(partial).items()
    assert Index.open(partial).manifest.n_rows == 30
    with pytest.raises(OutputExistsError, match=r"unfinished append.*resume=True.*force=True"):
        append_rows(partial, rows(30, 40))
    with pytest.raises(InputError, match="unfinished append"):
        retire_rows(partial, [0])
    append_rows(partial, rows(30, 40), resume=True)
    assert hashes(partial) == hashes(undisturbed)


def test_resuming_an_append_with_other_rows_is_refused_and_force_discards_it(
    partial: Path, short: Path, tmp_path: Path
) -> None:
    undisturbed = Path(shutil.copytree(short, tmp_path / "undisturbed"))
    append_rows(undisturbed, rows(20, 30))
    with pytest.raises(Interrupted):
        append_rows(partial, rows(30, 40), progress=interrupt_at(10))
    with pytest.raises(MismatchError) as caught:
        append_rows(partial, rows(20, 30), resume=True)
    assert rows(20, 30).sha256() in one_line(caught)
    assert rows(30, 40).sha256() in one_line(caught)
    with pytest.raises(MismatchError, match=r"n_rows=10.*n_rows=5"):
        append_rows(partial, rows(35, 40), resume=True)
    append_rows(partial, rows(20, 30), force=True)
    assert hashes(partial) == hashes(undisturbed)


def test_a_resumed_build_may_take_another_damping(
    choices: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damping that turns out to be too small is found after the pass; the pass is not lost."""
    too_small = BuildOptions(**(vars(choices["options"]) | {"dampings": ("1e-30",)}))
    with monkeypatch.context() as strict:
        strict.setattr("forebear.indexer.curvature.head.MIN_RECIPROCAL_CONDITION", 0.5)
        with pytest.raises(InputError, match="too small"):
            build_index(rows(), tmp_path / "index", choices["checkpoints"], too_small)
    shard = tmp_path / "index" / "rows" / "00000.arrow"
    written = shard.stat().st_mtime_ns
    index = build_index(rows(), tmp_path / "index", resume=True, **choices)
    assert shard.stat().st_mtime_ns == written
    assert index.head.damping("0.01")["damping"] == 0.01


@pytest.mark.slow
def test_a_run_that_has_moved_is_found_by_its_checkpoints_names(choices: dict[str, Any], tmp_path: Path) -> None:
    names = ("epoch-1", "epoch-2")
    old, new = tmp_path / "run", tmp_path / "moved"
    for name, checkpoint in zip(names, choices["checkpoints"], strict=True):
        shutil.copytree(checkpoint.path, old / "checkpoints" / name)
    Run(
        base_model="tiny",
        data="rows",
        data_sha256="",
        text_columns=("text",),
        label_names=("LABEL_0", "LABEL_1"),
        label_mode=None,
        max_length=40,
        settings={},
        checkpoints=tuple(
            RunCheckpoint(name=n, path=f"checkpoints/{n}", step=1, eta=0.1, train_loss=0.5) for n in names
        ),
    ).write(old)
    chosen = choose_model(str(old), ["all"]).checkpoints
    index = build_index(rows(0, 30), tmp_path / "index", chosen, choices["options"])
    before = Retriever(index).scores(QUERIES, "tracin")
    old.rename(new)
    with pytest.raises(ForebearError):
        Retriever(index).scores(QUERIES, "tracin")
    np.testing.assert_array_equal(Retriever(index, model=str(new)).scores(QUERIES, "tracin"), before)
    assert append_rows(tmp_path / "index", rows(30, 40), model=str(new)).manifest.n_rows == 40
    assert not verify_index(tmp_path / "index", model=str(new)).problems


def test_a_failed_append_leaves_every_byte_as_it_was(
    partial: Path, choices: dict[str, Any], tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    before = hashes(partial)
    pairs = rows_from_texts([("a film", "a plot")], [1])
    with pytest.raises(MismatchError, match="2 text column"):
        append_rows(partial, pairs)
    with pytest.raises(InputError):
        append_rows(partial, rows_from_texts(["a good film"], [7]))
    with pytest.raises(InputError):
        append_rows(partial, rows_from_texts(["a good film"]))
    with pytest.raises(MismatchError, match="sha256"):
        append_rows(partial, rows(30, 40), model=tiny_model("bert", 2, 2))
    assert hashes(partial) == before


@pytest.mark.slow
def test_retire_equals_a_build_from_scratch_without_those_rows(
    whole: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    gone = [0, 7, 8, 33, 39]
    kept = np.setdiff1d(np.arange(40), gone)
    scratch = build_index(
        rows_from_texts([TEXTS[i] for i in kept], [LABELS[i] for i in kept]), tmp_path / "scratch", **choices
    )
    retire_rows(whole, gone[:2])
    index = retire_rows(whole, gone[2:])
    np.testing.assert_array_equal(index.live, kept)
    np.testing.assert_array_equal(index.retired, gone)
    assert (index.manifest.n_rows, index.manifest.n_live) == (40, 35)
    assert_same_scores(scores(whole), scores(scratch.folder))
    mapped = [row | {"row": kept[row["row"]]} for row in answers(scratch.folder)]
    assert answers(whole) == mapped
    assert set(hashes(whole)) == {"manifest.json", *index.manifest.files}


@pytest.mark.slow
def test_rows_appended_after_retiring_get_the_next_numbers(
    partial: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    retire_rows(partial, [29, 2])
    index = append_rows(partial, rows(30, 40))
    kept = np.setdiff1d(np.arange(40), [2, 29])
    np.testing.assert_array_equal(index.live, kept)
    scratch = build_index(
        rows_from_texts([TEXTS[i] for i in kept], [LABELS[i] for i in kept]), tmp_path / "scratch", **choices
    )
    assert_same_scores(scores(partial), scores(scratch.folder))
    assert answers(partial) == [row | {"row": kept[row["row"]]} for row in answers(scratch.folder)]


def test_retiring_what_is_not_there_is_refused(whole: Path) -> None:
    retire_rows(whole, [5])
    before = hashes(whole)
    for gone, message in (([40], "row 40 is not in"), ([-1], "row -1 is not in"), ([5], "row 5 .* was retired before")):
        with pytest.raises(InputError, match=message):
            retire_rows(whole, gone)
    with pytest.raises(InputError, match="would leave none"):
        retire_rows(whole, np.setdiff1d(np.arange(40), [5]))
    assert hashes(whole) == before


@pytest.mark.slow
def test_search_structures_can_be_made_again_after_damage(whole: Path, pristine: Path) -> None:
    for path in (whole / "ann").iterdir():
        path.unlink()
    with pytest.raises(CorruptIndexError):
        Index.open(whole)
    rebuild_ann(whole, "Flat")
    assert answers(whole) == answers(pristine)
    index = rebuild_ann(whole, "SQ8")
    assert {f["factory"] for f in index.manifest.derived.values() if f["kind"] == "faiss"} == {"SQ8"}
    assert_same_scores(scores(whole), scores(pristine))


def test_an_open_retriever_outlives_an_append_or_says_what_happened(partial: Path) -> None:
    retriever = Retriever(Index.open(partial))
    append_rows(partial, rows(30, 40))
    try:
        table = retriever.retrieve(QUERIES, methods=list(ROW_METHODS), top=3)
    except ForebearError as told:
        assert str(partial) in str(told)
    else:
        assert max(table["row"].to_pylist()) < 30


# --- damage ---


def use(folder: Path, methods: tuple[str, ...] = ROW_METHODS, damping: str = "0.1x") -> None:
    """Ask one question."""
    Retriever(Index.open(folder)).retrieve(QUERIES[:1], methods=methods, top=3, damping=damping)


# A question that reads the file.
KINDS: dict[str, dict[str, Any]] = {
    "rows/00001.arrow": {"methods": ("nn-dot",)},
    "features/checkpoint-1/00002.arrow": {"methods": ("tracin",)},
    "features/checkpoint-2/00000.arrow": {"methods": ("gd",)},
    "sentence/00004.arrow": {"methods": ("sbert-dot",)},
    "curvature/head/cholesky-0-0000.arrow": {"methods": ("if",)},
    "curvature/head/cholesky-1-0000.arrow": {"methods": ("if",), "damping": "0.01"},
    "curvature/head/self-influence-1-0000.arrow": {"methods": ("rif",), "damping": "0.01"},
    "curvature/head/representer-0000.arrow": {"methods": ("rep",)},
    "ann/head-0000.arrow": {"methods": ("gc",)},
    "ann/head-tracin-0000.arrow": {"methods": ("tracin-last",)},
    "ann/sentence-0000.arrow": {"methods": ("sbert-dot",)},
    "ann/feature-cos-0000.faiss": {"methods": ("nn-cos",)},
    "ann/feature-euc-0000.faiss": {"methods": ("nn-euc",)},
    "ann/sentence-cos-0000.faiss": {"methods": ("sbert-cos",)},
    "ann/sentence-euc-0000.faiss": {"methods": ("sbert-euc",)},
    "tokens/00003.arrow": {"methods": ("tracin-tfidf",)},
    **{f"words/checkpoint-1/all/{part}-0000.arrow": {"methods": ("tracin-we",)} for part in PARTS},
    **{f"words/checkpoint-2/top-3/{part}-0000.arrow": {"methods": ("tracin-we-topk",)} for part in PARTS},
}


def test_the_kinds_of_files_below_are_all_there_are(pristine: Path) -> None:
    def stem(name: str) -> str:
        return "".join(c for c in name if not c.isdigit())

    assert {stem(name) for name in hashes(pristine)} - {"manifest.json"} == {stem(name) for name in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_named_before_it_is_used(name: str, whole: Path) -> None:
    path = whole / name
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(CorruptIndexError) as caught:
            use(whole, **KINDS[name])
        assert name in one_line(caught)
    for damaged in (content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptIndexError) as caught:
            Index.open(whole)
        assert name in one_line(caught)
    path.unlink()
    with pytest.raises(CorruptIndexError) as caught:
        Index.open(whole)
    assert name in one_line(caught)
    assert "missing" in one_line(caught)


def test_a_damaged_manifest_is_refused_whatever_byte_was_hit(whole: Path) -> None:
    path = whole / "manifest.json"
    content = path.read_bytes()
    for at in [*range(0, len(content) - 1, 97), len(content) - 2]:
        flipped = bytearray(content)
        flipped[at] ^= 0x01
        path.write_bytes(flipped)
        with pytest.raises(CorruptIndexError) as caught:
            Index.open(whole)
        assert "manifest.json" in one_line(caught)
    for cut in (0, 1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:cut])
        with pytest.raises(CorruptIndexError, match=r"manifest\.json"):
            Index.open(whole)
    for other in (b"[]", b"{}", b"null", b'{"format": 3}'):
        path.write_bytes(other)
        with pytest.raises(CorruptIndexError, match="format"):
            Index.open(whole)
    path.unlink()
    with pytest.raises(InputError, match="is no index"):
        Index.open(whole)


def test_a_file_that_vanishes_after_opening_is_named(whole: Path) -> None:
    index = Index.open(whole)
    (whole / "features/checkpoint-2/00001.arrow").unlink()
    with pytest.raises(CorruptIndexError, match="features/checkpoint-2/00001"):
        index.features()


# --- the wrong model ---


def changed_model(path: str, folder: Path, file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    shutil.copytree(path, folder)
    (folder / file).write_text(json.dumps(change(json.loads((folder / file).read_text()))))
    return str(folder)


def assert_refused(folder: Path, model: str, what: str, wanted: str) -> None:
    with pytest.raises(MismatchError) as caught:
        Retriever(folder, model=model).retrieve(QUERIES[:1])
    message = one_line(caught)
    assert what in message
    assert wanted[:12] in message
    assert len({word.strip(",.") for word in message.split() if len(word.strip(",.")) == 12}) >= 2


def test_another_model_is_refused_with_both_fingerprints(pristine: Path, tiny_model: Callable[..., str]) -> None:
    sha = read_manifest(pristine).checkpoints[-1].sha256
    assert_refused(pristine, tiny_model("bert", 2, 0), "model", sha)
    assert_refused(pristine, tiny_model("bert", 3, 0), "model", sha)
    assert_refused(pristine, tiny_model("distilbert", 2, 0), "model", sha)


def test_the_same_model_elsewhere_is_taken(pristine: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    moved = str(shutil.copytree(choices["checkpoints"][-1].path, tmp_path / "moved"))
    found = Retriever(pristine, model=moved).scores(QUERIES, "gd")
    np.testing.assert_array_equal(found, Retriever(pristine).scores(QUERIES, "gd"))


def test_a_changed_tokenizer_is_refused_with_both_fingerprints(
    pristine: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    def swap(tokenizer: dict[str, Any]) -> dict[str, Any]:
        vocab = tokenizer["model"]["vocab"]
        vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
        return tokenizer

    other = changed_model(choices["checkpoints"][-1].path, tmp_path / "m", "tokenizer.json", swap)
    assert_refused(pristine, other, "tokenizer", read_manifest(pristine).spec.tokenizer_sha256)


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "relu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 0.1}, {"id2label": {"0": "b", "1": "a"}}],
    ids=["activation", "heads", "epsilon", "labels"],
)
def test_a_changed_configuration_is_another_model(
    change: dict[str, Any], pristine: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights under another configuration compute other logits."""
    other = changed_model(choices["checkpoints"][-1].path, tmp_path / "m", "config.json", lambda c: c | change)
    assert_refused(pristine, other, "model", read_manifest(pristine).checkpoints[-1].sha256)


def test_a_tokenizer_without_segment_ids_is_another_tokenizer(make_world: Callable[..., World], tmp_path: Path) -> None:
    """BERT reads a pair's second text by its segment: without those ids it sees another input."""
    world = make_world("electra", 2, True, 2)
    other = changed_model(
        world.models[-1], tmp_path / "m", "tokenizer_config.json",
        lambda c: c | {"model_input_names": ["input_ids", "attention_mask"]},
    )  # fmt: skip
    try:
        found = Retriever(world.index.folder, model=other).scores(world.queries, "nn-dot")
    except MismatchError:
        return
    assert error(found, world.retriever.scores(world.queries, "nn-dot")) <= TOLERANCE


def test_nan_in_the_weights_is_refused_by_the_tensors_name(
    choices: dict[str, Any], pristine: Path, tmp_path: Path
) -> None:
    path = choices["checkpoints"][-1].path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] = float("nan")
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    model.save_pretrained(broken)
    with pytest.raises(NonFiniteError) as caught:
        build_index(rows(), tmp_path / "index", choose_model(str(broken)).checkpoints, BuildOptions())
    assert "bert.encoder.layer.1.output.dense.weight" in one_line(caught)
    assert not (tmp_path / "index").exists()
    with pytest.raises(NonFiniteError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        Retriever(pristine, model=str(broken)).scores(QUERIES, "gd")


def test_overflow_is_refused_by_the_rows_number(choices: dict[str, Any], tmp_path: Path) -> None:
    path = choices["checkpoints"][-1].path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():  # "red" alone overflows to infinity
        table = model.bert.embeddings.word_embeddings.weight
        table[tokenizer.convert_tokens_to_ids("red")] = 3e38
    broken = Path(shutil.copytree(path, tmp_path / "broken"))
    model.save_pretrained(broken)
    texts = ["a good film"] * 11 + ["a red film"] + ["a bad film"] * 3
    source = rows_from_texts(texts, make_labels(15))
    with pytest.raises(NonFiniteError, match="row 11 "):
        build_index(source, tmp_path / "index", choose_model(str(broken)).checkpoints, BuildOptions(shard_rows=4))


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert"])
def test_a_sentence_model_has_one_fingerprint_also_without_a_pooler(kind: str, tiny_model: Callable[..., str]) -> None:
    """A pooler that the folder does not store is drawn at random at each load; it takes no part in mean pooling."""
    first, second = (load_sentence_encoder(tiny_model(kind, 2, 0)) for _ in range(2))
    assert first.sha256 == second.sha256


def test_checkpoints_of_different_shape_or_kind_are_refused(
    tiny_model: Callable[..., str], choices: dict[str, Any], tmp_path: Path
) -> None:
    last = choices["checkpoints"][-1].path
    narrow = Path(shutil.copytree(last, tmp_path / "narrow"))
    config = transformers.AutoConfig.from_pretrained(narrow)
    config.hidden_size, config.intermediate_size = 8, 8
    transformers.BertForSequenceClassification(config).save_pretrained(narrow)
    for other in (str(narrow), tiny_model("bert", 3, 0), tiny_model("roberta", 2, 0)):
        for paths in ([other, last], [last, other]):
            with pytest.raises(MismatchError, match="Checkpoints must come from one run"):
                build_index(rows(), tmp_path / "index", choose_model(None, paths).checkpoints, BuildOptions())
    assert not (tmp_path / "index").exists()


def test_a_wholly_confident_model_can_be_indexed(tmp_path: Path) -> None:
    """1 - p_y near 1e-20 on every row: curvature is tiny, relative damping follows it."""
    path = str(make_tiny_model(tmp_path / "model", scale=6.0))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([50.0, 0.0]))
    model.save_pretrained(path)
    source = rows_from_texts(TEXTS, [0] * 40, label_names=["LABEL_0", "LABEL_1"])
    index = build_index(source, tmp_path / "index", choose_model(path).checkpoints, BuildOptions())
    retriever = Retriever(index)
    for name in ("gd", "gc", "rif"):
        assert np.isfinite(retriever.scores(QUERIES, name)).all()
        assert (retriever.scores(QUERIES, name) > 0).any()


def test_identity_curvature_needs_no_stored_curvature(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    chosen = choose_model(tiny_model("bert", 2, 0)).checkpoints
    retriever = Retriever(build_index(rows(), tmp_path / "index", chosen, BuildOptions(dampings=())))
    for name in ("if", "rif"):
        with pytest.raises(MissingStoreError, match=r"dampings=\(\)"):
            retriever.scores(QUERIES, name)
    np.testing.assert_allclose(
        retriever.scores(QUERIES, "if", curvature="identity"), retriever.scores(QUERIES, "gd"), rtol=1e-12
    )


# --- outputs that exist ---


def test_an_existing_output_is_refused(whole: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    before = hashes(whole)
    with pytest.raises(OutputExistsError, match="holds an index"):
        build_index(rows(0, 30), whole, **choices)
    assert hashes(whole) == before
    file = tmp_path / "file"
    file.write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match="is a file"):
            build_index(rows(), file, force=force, **choices)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("names", [("notes.txt",), ("features/mine.csv",), ("rows/a", "ann/b", "curvature/c")])
def test_a_folder_with_other_files_is_never_cleared(
    names: tuple[str, ...], choices: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = hashes(folder)
    for how in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match="other files"):
            build_index(rows(), folder, **choices, **how)
    assert hashes(folder) == before


@pytest.mark.parametrize("name", ["manifest.json", "build.json"])
def test_a_folder_with_somebody_elses_manifest_is_never_cleared(
    name: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    """Web apps and browser extensions have a manifest.json too, and perhaps a folder of features."""
    folder = tmp_path / "webapp"
    (folder / "features").mkdir(parents=True)
    (folder / name).write_text('{"name": "My web app", "manifest_version": 3}')
    (folder / "features/login.js").write_text("mine")
    before = hashes(folder)
    with pytest.raises(ForebearError):
        build_index(rows(), folder, force=True, **choices)
    assert hashes(folder) == before


def test_force_replaces_an_index_and_spares_other_files(whole: Path, short: Path, choices: dict[str, Any]) -> None:
    (whole / "notes.txt").write_text("mine")
    build_index(rows(0, 30), whole, force=True, **choices)
    assert hashes(whole) == hashes(short) | {"notes.txt": hashlib.sha256(b"mine").hexdigest()}


def test_force_discards_an_unfinished_build(short: Path, choices: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        build_index(rows(), tmp_path / "index", progress=interrupt_at(12), **choices)
    build_index(rows(0, 30), tmp_path / "index", force=True, **choices)
    assert hashes(tmp_path / "index") == hashes(short)


def test_a_mistake_before_the_build_does_not_cost_the_old_index(
    whole: Path, choices: dict[str, Any], tmp_path: Path
) -> None:
    before = hashes(whole)
    with pytest.raises(ForebearError):
        build_index(rows(), whole, choose_model(str(tmp_path / "nowhere")).checkpoints, BuildOptions(), force=True)
    with pytest.raises(ForebearError):
        build_index(rows_from_texts(["a"], [7]), whole, **choices, force=True)
    assert hashes(whole) == before


# --- a full disk ---


def test_a_build_on_a_full_disk_stops_with_one_line_and_resumes_when_there_is_space(
    pristine: Path, choices: dict[str, Any], small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(60)
    with pytest.raises(StorageError) as caught:
        build_index(rows(), disk / "index", **choices)
    assert "No space left" in one_line(caught)
    assert str(disk / "index") in one_line(caught)
    assert not list(disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    build_index(rows(), disk / "index", resume=True, **choices)
    assert hashes(disk / "index") == hashes(pristine)


@pytest.mark.slow
@pytest.mark.parametrize("free_kib", [0, 40, 160, 640])
def test_an_append_on_a_full_disk_leaves_the_index_in_force(
    free_kib: int, short: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(4096)
    folder = Path(shutil.copytree(short, disk / "index"))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(b"0" * (free - free_kib * 1024))
    before, expected = hashes(folder), answers(folder)
    try:
        append_rows(folder, rows(30, 40))
        failed = False
    except StorageError as told:
        failed = True
        assert "\n" not in str(told)
    if failed:
        assert before.items() <= hashes(folder).items()
        assert answers(folder) == expected
        with pytest.raises((InputError, StorageError), match=r"unfinished append|cannot write"):
            retire_rows(folder, [1])
    assert failed == (free_kib < 200)
    (disk / "filler").unlink()
    if failed:
        append_rows(folder, rows(30, 40), resume=True)
    assert Index.open(folder).manifest.n_rows == 40
    use(folder)


def test_a_retire_on_a_full_disk_leaves_the_index_in_force(short: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(4096)
    folder = Path(shutil.copytree(short, disk / "index"))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(b"0" * (free - 20 * 1024))
    before, expected = hashes(folder), answers(folder)
    with pytest.raises(StorageError):
        retire_rows(folder, [1])
    assert before.items() <= hashes(folder).items()
    assert answers(folder) == expected
    (disk / "filler").unlink()
    index = retire_rows(folder, [1])
    assert set(hashes(folder)) == {"manifest.json", *index.manifest.files}


# --- an index written by an earlier commit ---


def test_the_golden_index_still_opens_and_answers_as_recorded(tmp_path: Path) -> None:
    """See tests/golden/make.py: a change that breaks this breaks every index that users have."""
    recorded = json.loads((GOLDEN / "scores.json").read_text())
    retriever = Retriever(Index.open(GOLDEN / "index"), model=str(GOLDEN / "model"), device="cpu")
    for name, scores in recorded["scores"].items():
        assert error(retriever.scores(recorded["queries"], name), np.array(scores)) <= TOLERANCE, name
    table = retriever.retrieve(recorded["queries"], methods=["gc", "nn-euc"], top=12)
    first = [r for r in table.to_pylist() if (r["query"], r["method"], r["side"]) == (0, "gc", "proponent")]
    order = sorted(range(12), key=lambda n: (-recorded["scores"]["gc"][0][n], n))
    assert [r["row"] for r in first] == order
    assert first[0]["label"] in ("negative", "positive")


def test_the_golden_words_still_open_and_answer_as_recorded() -> None:
    """The stored vectors' own scores, so that the format of the store is what counts."""
    recorded = json.loads((GOLDEN / "words.json").read_text())
    retriever = Retriever(Index.open(GOLDEN / "words"), model=str(GOLDEN / "model"), device="cpu")
    methods = list(dict.fromkeys(answer["method"] for answer in recorded["answers"]))
    table = retriever.retrieve(recorded["queries"], methods=methods, top=4, exact="none")
    found = table.select(list(recorded["answers"][0])).to_pylist()
    for answer, wanted in zip(found, recorded["answers"], strict=True):
        numbers = ("score", "contributions")
        assert {k: v for k, v in answer.items() if k not in numbers} == {
            k: v for k, v in wanted.items() if k not in numbers
        }
        assert answer["score"] == pytest.approx(wanted["score"], rel=1e-4, abs=1e-6)
        assert answer["contributions"] == pytest.approx(wanted["contributions"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["index", "words"])
def test_the_golden_indexes_are_small_and_whole(name: str) -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000
    found = hashes(GOLDEN / name)
    listed = read_manifest(GOLDEN / name).files
    assert {name: facts["sha256"] for name, facts in listed.items()} == {
        name: sha for name, sha in found.items() if name != "manifest.json"
    }


def test_a_manifest_of_another_version_is_refused_in_one_line(whole: Path) -> None:
    from forebear.indexer.storage.manifest import digest_of

    path = whole / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("digest")
    del content["spec"]["scopes"]
    path.write_text(json.dumps(content | {"digest": digest_of(content)}))
    with pytest.raises(CorruptIndexError, match="another version of forebear") as caught:
        Index.open(whole)
    assert "force=True" in one_line(caught)
