"""The word store on disk: what it holds, merged, resumed, appended to, retired from, damaged, on a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import error
from words_oracle import ALL, ETAS, GRADIENTS, MODES, TOP, World, ask, assert_ends, build, ends_of, kept, make_world

from forebear import BuildOptions, InputError, MissingStoreError, Retriever, append_rows
from forebear.errors import CorruptIndexError, MismatchError, StorageError
from forebear.indexer.building.build import retire_rows
from forebear.indexer.building.verify import verify_index
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage.arrow import column, read_batches, write_columns
from forebear.indexer.storage.layout import PARTS
from forebear.indexer.storage.manifest import digest_of
from forebear.indexer.words import store as module
from forebear.indexer.words.gradients import PRECISIONS, WordRows, encode_vectors
from forebear.indexer.words.store import merge_shards, read_word_store, write_shard

ROUNDING = {"fp32": 1e-6, "fp16": 1e-3, "int8": 3e-2}  # of a vector of 16 numbers, as a share of its length
FULL = ROUNDING | {"fp32": 1e-5}  # of scores; the models' own rounding included
N_FIRST = 12  # rows before an append; the last shard is not full
KINDS = [f"words/checkpoint-{c}/{top}" for c in (1, 2) for top in ("all", f"top-{TOP}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("word-store")


@pytest.fixture(scope="module")
def world(folder) -> World:
    """21 rows in shards of 9, two checkpoints, all positions and the longest."""
    return make_world(folder, "bert", False, "fp16")


@pytest.fixture(scope="module")
def short(folder, world) -> Path:
    return build(folder / "short", world.models, world.texts[:N_FIRST], world.labels[:N_FIRST]).index.folder


def folder_of(world: World) -> Path:
    return world.retriever.index.folder


def added(world: World):
    return rows_from_texts(world.texts[N_FIRST:], world.labels[N_FIRST:])


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file by path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_tidy(folder: Path) -> None:
    """No words of single shards, no journal, nothing half written: the manifest's files alone."""
    assert set(hashes(folder)) == {"manifest.json", *Index.open(folder).manifest.files}
    assert not list(folder.rglob("shards"))


# --- what is stored ---


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["tracin-we", "tracin-we-topk"])
def test_postings_are_the_rows_tokens_and_vectors_of_a_slow_loop(folder, method, precision):
    world = make_world(folder, "bert", False, precision)
    for c, path in enumerate(world.models):
        store = world.retriever.index.words(TOP if method == "tracin-we-topk" else 0, c)
        wanted: dict[tuple[int, int], np.ndarray] = {}
        for row, (text, label) in enumerate(zip(world.texts, world.labels, strict=True)):
            for token, delta in kept(path, text, label, method):
                wanted[token, row] = wanted.get((token, row), 0.0) + delta
        tokens = np.repeat(store.tokens, np.diff(store.starts))
        pairs = list(zip(tokens.tolist(), store.rows.tolist(), strict=True))
        assert pairs == sorted(wanted)  # tokens ascend, rows ascend within a token, none twice
        truth = np.array([wanted[pair] for pair in pairs])
        lengths = np.linalg.norm(truth, axis=1)
        np.testing.assert_allclose(store.norms, lengths, rtol=1e-5)
        off = np.linalg.norm(store.codes * store.scales[:, None].astype(np.float64) - truth, axis=1) / lengths
        assert (off <= store.errors[np.searchsorted(store.tokens, tokens)] + 1e-5).all()
        assert store.errors.max() <= ROUNDING[precision]
        assert store.codes.dtype == {"fp16": np.float16, "int8": np.int8, "fp32": np.float32}[precision]


def test_the_view_by_row_is_the_postings_turned_around(world):
    for top in (0, TOP):
        store = world.retriever.index.words(top)
        assert store.n_rows == len(world.texts)
        tokens = np.repeat(store.tokens, np.diff(store.starts))
        entry_rows = np.repeat(np.arange(store.n_rows), np.diff(store.row_starts))
        np.testing.assert_array_equal(store.rows[store.entry_places], entry_rows)
        np.testing.assert_array_equal(tokens[store.entry_places], store.entry_tokens)
        np.testing.assert_array_equal(np.lexsort((store.entry_tokens, entry_rows)), np.arange(len(entry_rows)))
        assert sorted(store.entry_places) == list(range(len(tokens)))
        some = store.take(np.array([20, 3, 3]))
        assert some.tokens.tolist() == [t for n in (20, 3, 3) for t in sorted(tokens[store.rows == n].tolist())]
        places = [p for n in (20, 3, 3) for p in np.flatnonzero(store.rows == n)]
        np.testing.assert_allclose(some.vectors, store.codes[places] * store.scales[places, None], rtol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_vector_is_stored_twice(folder, precision):
    """Bytes of the four files, but for what Arrow adds to each."""
    index = make_world(folder, "bert", False, precision).retriever.index
    for number, kind in enumerate(KINDS):
        store = index.words((0, TOP)[number % 2], number // 2)
        m, vector_bytes = len(store.rows), store.codes.itemsize * 16
        wanted = {
            "tokens": 12 * len(store.tokens),
            "postings": m * (vector_bytes + 12),
            "rows": 21 * 4,
            "entries": m * 8,
        }
        found = {path.name.split("-")[0]: path.stat().st_size for path in (index.folder / kind).iterdir()}
        assert set(found) == set(wanted)
        assert all(0 <= found[part] - wanted[part] <= 1500 for part in PARTS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_keeps_lengths_and_tells_its_error(precision):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((60, 24)).astype(np.float32) * np.logspace(-30, 15, 60, dtype=np.float32)[:, None]
    vectors[7], vectors[8, 1:], vectors[9] = 0.0, 0.0, vectors[9, 0]
    coded = encode_vectors(vectors, precision)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    np.testing.assert_allclose(coded.norms, lengths, rtol=1e-6)
    back = coded.codes.astype(np.float64) * coded.scales[:, None]
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), lengths, rtol=1e-6)
    real = lengths > 0
    off = np.linalg.norm(back - vectors, axis=1)[real] / lengths[real]
    np.testing.assert_allclose(coded.errors[real], off, rtol=1e-3, atol=1e-7)
    assert off.max() <= ROUNDING[precision]
    assert not coded.codes[7].any()
    assert coded.norms[7] == coded.errors[7] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_stored_scores_are_the_models_within_the_stores_rounding(folder, precision):
    world = make_world(folder, "bert", False, precision)
    for normalise in (False, True):
        stored, full = (
            ask(world.retriever, world.queries, GRADIENTS, top=21, exact=exact, normalise=normalise)
            for exact in ("none", "full")
        )
        for method in GRADIENTS:
            for q in range(len(world.queries)):
                mine, wanted = ({r["row"]: r["score"] for r in ends_of(x, q, method)[0]} for x in (stored, full))
                assert mine == pytest.approx(wanted, rel=0, abs=FULL[precision] * max(map(abs, wanted.values())))
                for some in zip(ends_of(stored, q, method), ends_of(full, q, method), strict=True):
                    first = [{r["row"] for r in side[:10]} for side in some]
                    assert len(first[0] & first[1]) >= 9


# --- merging ---


def synthetic(precision: str, first: int, stop: int) -> WordRows:
    """Words of some of 40 rows, the same each time; row 13 has none, token 2 is in all others."""
    counts, tokens, vectors = [], [], []
    for row in range(first, stop):
        rng = np.random.default_rng(row)
        mine = np.union1d(rng.choice(12, rng.integers(0, 6)), [2]) if row != 13 else np.empty(0)
        counts.append(len(mine))
        tokens.append(mine)
        vectors.append(rng.standard_normal((len(mine), 5)).astype(np.float32))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    coded = encode_vectors(np.concatenate(vectors), precision)
    return WordRows(starts, np.concatenate(tokens).astype(np.int64), coded=coded)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shards_merged_at_once_or_onto_older_rows_give_the_same_bytes(tmp_path, precision, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 7)  # postings of an older store are moved a few at a time

    def merge(name: str, generation: int, cuts: list[int], old: str | None = None) -> dict[str, str]:
        shards = [tmp_path / name / f"shard-{start}" for start in cuts[:-1]]
        for shard, start, stop in zip(shards, cuts[:-1], cuts[1:], strict=True):
            write_shard(shard, synthetic(precision, start, stop), start)
        before = None
        if old is not None:
            before = read_word_store([tmp_path / old / f"{part}-0000.arrow" for part in PARTS])
        files = merge_shards(tmp_path, name, generation, shards, before, cuts[-1])
        assert not list(tmp_path.rglob("*.partial"))
        return {Path(file).name.split("-")[0]: hashes(tmp_path)[file] for file in files}

    whole = merge("whole", 0, [0, 40])
    assert merge("three", 0, [0, 1, 17, 40]) == whole
    merge("first", 0, [0, 14])
    assert merge("then", 1, [14, 30, 40], old="first") == whole


def test_shards_of_any_size_give_the_same_store(world, tmp_path):
    """One row a batch, so that every gradient has the same last bit."""
    found = []
    for shard_rows in (4, 100):
        retriever = build(
            tmp_path / str(shard_rows), world.models, world.texts, world.labels, shard_rows=shard_rows, batch_tokens=1
        )
        files = hashes(retriever.index.folder)
        found.append({name: sha for name, sha in files.items() if name.startswith("words/")})
        assert_tidy(retriever.index.folder)
    assert found[0] == found[1]
    assert len(found[0]) == len(KINDS) * len(PARTS)


# --- interrupted, full, grown ---


class Interrupted(BaseException):
    """As if the process had died: nothing in the package catches it."""


def dies_at(stage: str, done: int, number: int):
    """A progress callback that dies at the n-th call for a stage with as many rows done."""
    calls = []

    def progress(name: str, rows: int, _total: int) -> None:
        if name == stage and rows >= done:
            calls.append(rows)
            if len(calls) == number:
                raise Interrupted

    return progress


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "done", "number"),
    [
        ("features checkpoint-1", 10, 1),
        ("features checkpoint-2", 19, 1),
        ("words", 0, 1),
        ("words", 0, 4),
        ("words", 21, 4),
    ],
    ids=["first shards", "last shards", "before the merge", "between merges", "after the merges"],
)
def test_a_killed_build_is_resumed_to_the_same_bytes(world, tmp_path, stage, done, number):
    out, rows = tmp_path / "index", (world.models, world.texts, world.labels)
    with pytest.raises(Interrupted):
        build(out, *rows, how={"progress": dies_at(stage, done, number)})
    assert (out / KINDS[0] / "shards/00000.arrow").is_file()
    build(out, *rows, how={"resume": True})
    assert hashes(out) == hashes(folder_of(world))
    assert_tidy(out)


def test_a_merge_killed_half_way_is_resumed_to_the_same_bytes(world, tmp_path, monkeypatch):
    def dying(path, columns):
        if path.name == "rows-0000.arrow":
            raise Interrupted
        write_columns(path, columns)

    out, rows = tmp_path / "index", (world.models, world.texts, world.labels)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_columns", dying)
        with pytest.raises(Interrupted):
            build(out, *rows)
    assert (out / KINDS[0] / "postings-0000.arrow").is_file()
    (out / KINDS[0] / "code-0000.partial").write_bytes(b"half of the vectors")
    with pytest.raises(MismatchError, match=r"words_tops=\[0, 4\].*words_tops=\[0, 5\]"):
        build(out, *rows, how={"resume": True}, words_tops=(0, 5))
    with pytest.raises(MismatchError, match=r"words_precision=fp16.*words_precision=int8"):
        build(out, *rows, how={"resume": True}, words_precision="int8")
    build(out, *rows, how={"resume": True})
    assert hashes(out) == hashes(folder_of(world))
    assert_tidy(out)


def fill(disk: Path, but_kib: int) -> Path:
    """Take all of a disk but so many KiB."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(b"0" * (free - but_kib * 1024))
    return disk / "filler"


@pytest.mark.slow
@pytest.mark.parametrize("free_kib", [0, 12, 40])
def test_a_merge_on_a_full_disk_says_so_and_goes_on_when_there_is_space(world, small_disk, free_kib):
    disk, rows = small_disk(4096), (world.models, world.texts, world.labels)
    with pytest.raises(Interrupted):
        build(disk / "index", *rows, how={"progress": dies_at("words", 0, 1)})
    filler = fill(disk, free_kib)
    with pytest.raises(StorageError, match="No space left") as caught:
        build(disk / "index", *rows, how={"resume": True})
    assert str(disk / "index") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    build(disk / "index", *rows, how={"resume": True})
    assert hashes(disk / "index") == hashes(folder_of(world))


@pytest.mark.slow
@pytest.mark.parametrize("free_kib", [60, 100])
def test_an_append_on_a_full_disk_leaves_the_words_in_force(world, short, small_disk, free_kib):
    disk = small_disk(4096)
    out = Path(shutil.copytree(short, disk / "index"))
    filler, before, expected = fill(disk, free_kib), hashes(out), ask(Retriever(out), world.queries, top=4)
    with pytest.raises(StorageError, match="words/checkpoint-1"):
        append_rows(out, added(world))
    assert before.items() <= hashes(out).items()
    assert ask(Retriever(out), world.queries, top=4) == expected
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    append_rows(out, added(world), resume=True)
    assert_tidy(out)
    assert error(Retriever(out).scores(world.queries, ALL[0]), world.retriever.scores(world.queries, ALL[0])) <= 1e-5


def words_files(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(folder).items() if name.startswith("words/")}


def test_append_replaces_the_store_and_retire_keeps_it(world, short, tmp_path):
    out = Path(shutil.copytree(short, tmp_path / "index"))
    append_rows(out, added(world))
    grown = words_files(out)
    assert set(grown) == {f"{kind}/{part}-0001.arrow" for kind in KINDS for part in PARTS}
    assert_tidy(out)
    retire_rows(out, [0, 13])
    assert words_files(out) == grown
    assert_tidy(out)
    append_rows(out, rows_from_texts(["a good film"], [1]))
    assert set(words_files(out)) == {f"{kind}/{part}-0003.arrow" for kind in KINDS for part in PARTS}
    assert Index.open(out).words(TOP).n_rows == 22
    assert not verify_index(out).problems


@pytest.mark.slow
def test_append_and_retire_give_the_answers_of_a_build_from_scratch(world, short, tmp_path):
    out, gone = Path(shutil.copytree(short, tmp_path / "index")), [0, 7, 13, 20]
    live = [n for n in range(21) if n not in gone]
    grown = Retriever(append_rows(out, added(world)))
    table = ask(grown, world.queries, top=4)
    for method in ALL:
        assert_ends(table, world.retriever.scores(world.queries, method), method, 4)
    retired = Retriever(retire_rows(out, gone))
    kept_texts, kept_labels = ([values[n] for n in live] for values in (world.texts, world.labels))
    scratch = build(tmp_path / "scratch", world.models, kept_texts, kept_labels)
    scores = {method: scratch.scores(world.queries, method) for method in ALL}
    for exact in MODES:
        for top in (4, 100):
            table = ask(retired, world.queries, top=top, exact=exact)
            assert {r["row"] for r in table} <= set(live)
            for method in ALL if exact != "none" else []:
                assert_ends(table, scores[method], method, top, rows=live)


# --- damage ---


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_file_is_found_and_named(world, tmp_path, part):
    out = Path(shutil.copytree(folder_of(world), tmp_path / "index"))
    name = f"{KINDS[3]}/{part}-0000.arrow"
    content = (out / name).read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0x10
    (out / name).write_bytes(flipped)
    assert verify_index(out, n_rows=0).problems == (f"{name} was altered: its sha256 is not the manifest's",)
    with pytest.raises(CorruptIndexError, match=name):
        ask(Retriever(out), world.queries, ["tracin-we-topk"])
    (out / name).write_bytes(content[:-8])
    with pytest.raises(CorruptIndexError, match=f"{name} has .* bytes"):
        Index.open(out)
    (out / name).unlink()
    with pytest.raises(CorruptIndexError, match=f"{name} is missing"):
        Index.open(out)
    assert verify_index(out, n_rows=0).problems == (f"{name} is missing",)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verify_computes_word_gradients_again(folder, tmp_path, precision):
    """Vectors that were wrong when they were written have the right sha256."""
    world = make_world(folder, "bert", False, precision)
    assert not verify_index(folder_of(world), n_rows=21).problems
    out, name = Path(shutil.copytree(folder_of(world), tmp_path / "index")), f"{KINDS[2]}/postings-0000.arrow"
    batch = read_batches(out / name)[0]
    columns = {key: column(batch, key).copy() for key in batch.schema.names}
    columns["code"] *= -1
    (out / name).unlink()
    write_columns(out / name, columns)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = hashes(out)[name]
    del manifest["digest"]
    (out / "manifest.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}) + "\n")
    assert not verify_index(out, n_rows=0).problems
    assert verify_index(out, n_rows=21).problems


# --- choices ---


@pytest.mark.parametrize("tops", [(), (-1,), (0, 0), (10, 10), (5, 10), (0, 5, 10)])
def test_word_positions_that_mean_nothing_are_refused(tops):
    with pytest.raises(InputError, match="words_tops="):
        BuildOptions(stores=("features", "words"), words_tops=tops).check()
    with pytest.raises(InputError, match="words_precision='fp8': expected fp16, int8 or fp32"):
        BuildOptions(words_precision="fp8").check()


@pytest.mark.parametrize(
    ("changes", "available", "message"),
    [
        ({"stores": ("features",)}, [], r'stores=\("features", "words"\)'),
        ({"words_tops": (10,)}, [ALL[1], ALL[4]], r'stores=\("features", "words"\), words_tops=\(0, 10\)'),
        ({"words_tops": (0,)}, [ALL[0], *ALL[2:]], r'stores=\("features", "words"\), words_tops=\(0, 10\)'),
    ],
    ids=["none", "top", "all"],
)
def test_methods_without_their_store_name_the_options_that_build_it(world, tmp_path, changes, available, message):
    retriever = build(tmp_path / "index", world.models[:1], world.texts[:9], world.labels[:9], **changes)
    assert [method for method in ALL if method in retriever.available_methods()] == available
    for method in ALL:
        if method in available:
            assert len(ask(retriever, world.queries[:1], [method], top=2)) == 4
            continue
        for call in (lambda m: retriever.scores(["a"], m), lambda m: ask(retriever, ["a"], [m])):
            with pytest.raises(MissingStoreError, match=message) as caught:
                call(method)
            assert "\n" not in str(caught.value)


def test_an_index_without_words_says_that_a_method_needs_all_positions(world, tmp_path):
    """The default of --words-top would be refused next."""
    options = {"stores": ("features",)}
    retriever = build(tmp_path / "index", world.models[:1], world.texts[:9], world.labels[:9], **options)
    with pytest.raises(MissingStoreError, match=r'stores=\("features", "words"\), words_tops=\(0,\)'):
        retriever.scores(["a"], "tracin-we")


def test_answers_say_which_words_were_compared_and_how_sure_they_are(world):
    for exact, recall in (("none", None), ("rerank", 1.0), ("full", 1.0)):
        table = world.retriever.retrieve(world.queries[:1], methods=ALL, top=2, exact=exact, normalise=True)
        facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
        assert [facts[method].get("words") for method in ALL] == ["all", "topk", "common", "nocommon", None]
        assert {facts[method]["recall"] for method in GRADIENTS} == {recall}
        assert all(facts[method]["normalise"] and facts[method]["eta"] == list(ETAS) for method in ALL)
        assert facts["tracin-we"]["tops"] == [0, TOP]
