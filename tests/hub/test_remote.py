"""Indexes at URLs: fetched file by file into a cache, each state into a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from tiny import labels, sentences

from forebear import Index, Retriever, build_index, choose_model, retire_rows
from forebear.cli.main import run
from forebear.errors import CorruptIndexError, InputError
from forebear.hub import remote
from forebear.indexer.rows.opening import rows_from_texts
from forebear.server.served_indexes import names_of

URL = "memory://bucket/mine"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model("bert", 2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    out = tmp_path_factory.mktemp("remote") / "index"
    return build_index(rows_from_texts(sentences(30, seed=6), labels(30)), out, choose_model(model).checkpoints).folder


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store in memory that holds the index, and an empty cache."""
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    upload(memory, folder)
    yield memory
    memory.rm("/bucket", recursive=True)


def upload(memory: fsspec.AbstractFileSystem, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/mine/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_an_index_at_a_url_answers_as_its_folder_and_is_fetched_once(
    store: fsspec.AbstractFileSystem, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = {"methods": ("gc", "if"), "top": 4}
    index = Index.open(URL)
    ours, theirs = (Retriever(one, model=model).retrieve(sentences(2, seed=8), **question) for one in (folder, index))
    assert ours.equals(theirs)
    fetched: list[str] = []
    get_file = type(store).get_file
    monkeypatch.setattr(
        type(store), "get_file", lambda *given, **kw: fetched.append(given[1]) or get_file(*given, **kw)
    )
    assert Index.open(URL).folder == index.folder
    assert fetched == []
    store.pipe_file("/bucket/mine/effects.json", b"what was measured later")
    assert (Index.open(URL).folder / "effects.json").read_bytes() == b"what was measured later"
    assert names_of([URL, f"other={URL}"]) == {"mine": index.folder, "other": index.folder}


def test_another_state_of_the_index_has_a_folder_of_its_own(
    store: fsspec.AbstractFileSystem, folder: Path, tmp_path: Path, model: str
) -> None:
    before = Index.open(URL)
    changed = retire_rows(shutil.copytree(folder, tmp_path / "changed"), [2])
    upload(store, changed.folder)
    after = Index.open(URL)
    assert after.manifest == changed.manifest
    assert after.folder != before.folder
    assert Retriever(before, model=model).retrieve(["a text"], methods=("gc",), top=30).num_rows == 60
    assert 2 not in Retriever(after, model=model).retrieve(["a text"], methods=("gc",), top=29)["row"].to_pylist()


def test_a_fetch_that_broke_off_goes_on(
    store: fsspec.AbstractFileSystem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file, left = type(store).get_file, [3]

    def few(*given: object, **kw: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionResetError("the connection was closed")
        return get_file(*given, **kw)

    monkeypatch.setattr(type(store), "get_file", few)
    with pytest.raises(InputError, match=r"^memory://bucket/mine cannot be reached: the connection was closed\."):
        Index.open(URL)
    monkeypatch.setattr(type(store), "get_file", get_file)
    index = Index.open(URL)
    files = {path.relative_to(index.folder) for path in index.folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_what_is_not_there_or_damaged_is_one_line(
    store: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert run(["retrieve", "--index", "memory://bucket/none", "--text", "a"]) == 2
    assert "error: memory://bucket/none is no index" in capsys.readouterr().err
    assert run(["info", "nothing://bucket/none"]) == 2
    assert "Protocol not known" in capsys.readouterr().err
    name = next(path for path in store.find("/bucket/mine") if "/features/" in path)
    content = bytearray(store.cat_file(name))
    content[-100] ^= 1
    store.pipe_file(name, bytes(content))
    with pytest.raises(CorruptIndexError, match="altered"):
        Retriever(Index.open(URL), model=model).retrieve(["a text"], methods=("gc",))


def test_a_file_url_is_the_folder_itself(folder: Path) -> None:
    assert Index.open(f"file://{folder}").folder == folder
