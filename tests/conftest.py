"""Tiny models, and indexes of them built once a session: by pytest-xdist, once a worker."""

from __future__ import annotations

import os

# Tiny models are no work for two threads, which only wait for each other; the workers of pytest-xdist use the other
# cores. Before torch is imported, and for the commands that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# What ``auto`` is, on a machine with a GPU too: for fixtures of the session, tests, and the commands that they start.
os.environ["FOREBEAR_DEVICE"] = "cpu"

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import GPU, NO_GPU, NO_SMALL_DISK
from tiny import labels, make_tiny_model, sentences

from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.methods import METHODS
from forebear.retriever.retriever import Retriever

pytest_plugins = ["untouched", "serving", "exploring"]  # an option; servers, the explorer

N_ROWS = 60
N_QUERIES = 7
DAMPINGS = ("0.1x", "0.003", "2x")
ROW_METHODS = tuple(name for name, method in METHODS.items() if not method.by_model)
HEADS = {"bert": "classifier", "roberta": "classifier.out_proj", "distilbert": "classifier"}
HEADS |= {"electra": "classifier.out_proj"}

SEARCHED_MODULES = pytest.StashKey[int]()  # how many were imported when garbage was last sought among them

# Files that take 50 s of processor time or more, the longest first: begun first, so that no worker is left with one at
# the end.
LONGEST = (
    "test_demo.py", "test_tutorials.py", "test_families.py", "test_changes.py", "test_flow.py", "test_recall.py",
    "test_processes.py", "test_ties.py", "test_row_facts.py", "test_removal.py", "test_index.py", "test_gradients.py",
    "test_retraining.py", "test_spans.py", "test_planted_faults.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, an order that ``make test`` keeps; skip tests of a GPU where there is none."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if GPU.startswith("cuda") and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep libraries that were imported since out of the search for garbage.

    They are a million objects, and each training of transformers ends with a look through all of them, which takes
    longer than the training of a tiny model.
    """
    if len(sys.modules) > item.session.stash.get(SEARCHED_MODULES, 0):
        gc.collect()
        gc.freeze()
        item.session.stash[SEARCHED_MODULES] = len(sys.modules)


def texts_of(n: int, seed: int, pairs: bool) -> list[Any]:
    """Single texts, or pairs of texts."""
    single = sentences(n, seed=seed)
    return list(zip(single, sentences(n, seed=seed + 100, high=8), strict=True)) if pairs else single


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """max|difference| / max|score| of the worst query; shapes ``(q, n)``."""
    assert found.shape == truth.shape
    assert np.isfinite(found).all()
    assert np.isfinite(truth).all()
    return float((np.abs(found - truth).max(axis=1) / np.abs(truth).max(axis=1)).max())


@dataclass(frozen=True, eq=False)
class World:
    """A tiny run and its index: everything that an oracle needs, as plain lists and paths.

    Attributes:
        kind: Architecture.
        n_classes: c.
        models: Checkpoint folders in training order.
        etas: One a checkpoint.
        sentence_model: Folder of the un-tuned encoder.
        texts: Training texts, or pairs.
        labels: Gold class ids.
        queries: Test texts, or pairs.
        query_labels: Their gold class ids.
        index: The index of all this, with all stores.
        retriever: Over it.
    """

    kind: str
    n_classes: int
    models: tuple[str, ...]
    etas: tuple[float, ...]
    sentence_model: str
    texts: list[Any]
    labels: list[int]
    queries: list[Any]
    query_labels: list[int]
    index: Index
    retriever: Retriever

    @property
    def head(self) -> str:
        """Name of the head in the model."""
        return HEADS[self.kind]


@pytest.fixture(autouse=True)
def _auto_of_gpu_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is a GPU in a test that is marked ``gpu``."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("FOREBEAR_DEVICE")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """In this process too where torch was imported before."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Files that tests write need not outlive a loss of power, for which 5 ms a file are waited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a tiny random classifier; the same arguments give the same folder."""
    root = tmp_path_factory.mktemp("models")
    made: dict[tuple[Any, ...], str] = {}

    def make(kind: str = "bert", n_classes: int = 2, seed: int = 0, scale: float = 6.0) -> str:
        key = (kind, n_classes, seed, scale)
        if key not in made:
            made[key] = str(make_tiny_model(root / "-".join(map(str, key)), kind, n_classes, seed, scale))
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]
) -> Callable[[str, int, bool, int], World]:
    """Build a world on first use, and keep it."""
    made: dict[Any, World] = {}

    def make(kind: str, n_classes: int, pairs: bool, n_checkpoints: int) -> World:
        key = (kind, n_classes, pairs, n_checkpoints)
        if key in made:
            return made[key]
        models = tuple(tiny_model(kind, n_classes, seed) for seed in range(n_checkpoints))
        etas = (0.5, 0.25, 1.5)[:n_checkpoints]
        sentence_model = tiny_model("bert", 2, 9)
        texts, gold = texts_of(N_ROWS, 0, pairs), labels(N_ROWS, n_classes)
        options = BuildOptions(
            stores=("features", "sbert", "words"),
            words_tops=(0, 3),
            sentence_model=sentence_model,
            dampings=DAMPINGS,
            shard_rows=17,
            batch_tokens=64,
        )
        chosen = choose_model(None, models, etas).checkpoints
        folder = tmp_path_factory.mktemp(kind) / "index"
        index = build_index(rows_from_texts(texts, gold), folder, chosen, options)
        made[key] = World(
            kind, n_classes, models, etas, sentence_model, texts, gold,
            texts_of(N_QUERIES, 50, pairs), labels(N_QUERIES, n_classes, seed=3), index, Retriever(index),
        )  # fmt: skip
        return made[key]

    return make


@pytest.fixture(scope="session")
def bert_world(make_world: Callable[..., World]) -> World:
    """Two classes, single texts, two checkpoints."""
    return make_world("bert", 2, False, 2)


@pytest.fixture
def index_copy(bert_world: World, tmp_path: Path) -> Path:
    """A copy of the BERT world's index, to be damaged."""
    return Path(shutil.copytree(bert_world.index.folder, tmp_path / "copy"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB; tests that ask for it skip where that is not allowed."""
    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"{NO_SMALL_DISK} ({error})")
        if done.returncode:
            pytest.skip(f"{NO_SMALL_DISK} ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
