"""Builds at URLs: fit, parts and index are sent there; a step that is killed while it sends leaves nothing whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from interruptions import Interrupted, hashes
from tiny import labels, sentences, write_jsonl

from forebear import BuildOptions, Index, build_index, build_part, choose_model, commit_parts, fit_index, open_rows
from forebear.cli.main import run
from forebear.errors import InputError, OutputExistsError
from forebear.hub import remote
from forebear.indexer.building.sharing import segments
from forebear.indexer.building.sharing.under_way import find_build
from forebear.indexer.rows.row_source import RowSource

URL = "memory://bucket/mine"
OPTIONS = BuildOptions(
    scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=4, batch_tokens=64,
    shard_rows=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Path:
    """Rows with repeats in both parts, the index that one process builds of them, and a folder with its fit alone."""
    folder = tmp_path_factory.mktemp("given")
    texts = sentences(28, seed=31, low=3)
    write_jsonl(folder / "train.jsonl", text=[*texts, *texts[:6]], label=[*labels(28), *labels(28)[:6]])
    (folder / "model").symlink_to(tiny_model("bert", 2, 6))
    build_index(rows(folder), folder / "whole", model(folder), OPTIONS)
    fit_index(rows(folder), folder / "fitted", model(folder), OPTIONS)
    return folder


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty object store in memory, and an empty cache."""
    another_machine(monkeypatch, tmp_path)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine has fetched, and was about to send, is lost."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))


def rows(folder: Path) -> RowSource:
    return open_rows(str(folder / "train.jsonl"))


def model(folder: Path) -> Any:
    return choose_model(str((folder / "model").resolve())).checkpoints


def fit_at(url: str, given: Path, **how: bool) -> None:
    assert fit_index(rows(given), url, model(given), OPTIONS, **how) is None


def there(store: fsspec.AbstractFileSystem) -> dict[str, bytes]:
    """All files of the build, by name."""
    return {name.removeprefix("/bucket/mine/"): store.cat_file(name) for name in store.find("/bucket/mine")}


class Kill:
    """Sending dies at the n-th file, also where it is one that says that others are whole; -1: never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, filesystem: fsspec.AbstractFileSystem) -> None:
        self.left, self.sent = -1, []
        for name, which in (("put_file", 1), ("mv", 1)):
            monkeypatch.setattr(type(filesystem), name, self._dying(getattr(type(filesystem), name), which))

    def _dying(self, send: Callable[..., Any], which: int) -> Callable[..., Any]:
        def dying(filesystem: Any, *paths: str, **how: Any) -> Any:
            if self.left == 0:
                raise Interrupted
            self.left -= 1
            self.sent.append(paths[which])
            return send(filesystem, *paths, **how)

        return dying

    def at(self, number: int) -> None:
        self.left, self.sent = number, []


@pytest.mark.slow
def test_steps_on_three_machines_give_the_bytes_of_a_build_by_one(
    store: fsspec.AbstractFileSystem,
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["index", "--out", URL, "--train", str(given / "train.jsonl")]
    fit_at(URL, given)
    for part in ("2/2", "1/2"):
        another_machine(monkeypatch, tmp_path)
        assert run([*words, "--shard", part]) == 0
        assert f"{URL}: part {part} is written" in capsys.readouterr().err
        assert run(["info", URL, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["folder"], found["n_missing"]) == (URL, {"2/2": 16, "1/2": 0}[part])
        assert ("--shard 1/2" in found["next"]) == (part == "2/2")
    another_machine(monkeypatch, tmp_path)
    assert run(["index", "--out", URL, "--commit"]) == 0
    assert f"--index {URL}" in capsys.readouterr().err
    wanted = {name: (given / "whole" / name).read_bytes() for name in hashes(given / "whole")}
    assert there(store) == wanted
    assert hashes(Index.open(URL).folder) == hashes(given / "whole")
    assert run(["index", "--out", URL, "--commit"]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    told: list[str] = []
    assert build_part(URL, rows(given), "1/2", tell=told.append) == range(0)
    assert told == [f"{URL} is an index already: nothing is left to do."]


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", [True, False], ids=["its machine lost", "its folder kept"])
def test_a_part_whose_sending_is_killed_is_no_part_and_can_be_written_again(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    fit_at(URL, given)
    build_part(URL, rows(given), "2/2")
    kill, written, sent = Kill(monkeypatch, store), [], []
    monkeypatch.setattr(segments.ShardWriter, "write", counting(segments.ShardWriter.write, written))
    for number in (0, 3, -1):
        kill.at(number)
        try:
            build_part(URL, rows(given), "1/2")
        except Interrupted:
            assert number >= 0
            sent += kill.sent
            assert "parts/1-of-2.json" not in there(store)
            with pytest.raises(InputError, match="of 34 rows are in no finished part"):
                commit_parts(URL)
        if is_lost:
            another_machine(monkeypatch, tmp_path)
    assert len(written) == (3 if is_lost else 1)  # passes over the rows
    assert len(sent) == 3
    assert is_lost or not set(sent) & set(kill.sent)  # what was sent before is not sent again
    assert hashes(commit_parts(URL).folder) == hashes(given / "whole")


def counting(function: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def counted(*given: Any, **how: Any) -> Any:
        calls.append(given)
        return function(*given, **how)

    return counted


@pytest.mark.slow
def test_a_commit_whose_sending_is_killed_leaves_the_parts_and_no_index(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_at(URL, given)
    build_part(URL, rows(given), "1/1")
    kill = Kill(monkeypatch, store)
    n_files = len(hashes(given / "whole"))
    for number in (4, n_files - 1):  # the last one is the manifest
        kill.at(number)
        with pytest.raises(Interrupted):
            commit_parts(URL)
        with pytest.raises(InputError, match="is no index"):
            Index.open(URL)
        another_machine(monkeypatch, tmp_path)
    kill.at(-1)
    assert hashes(commit_parts(URL).folder) == hashes(given / "whole")
    assert set(there(store)) == set(hashes(given / "whole"))


@pytest.mark.slow
def test_a_damaged_file_of_a_part_is_refused_and_its_step_mends_it(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_at(URL, given)
    build_part(URL, rows(given), "1/1")
    before = there(store)
    (name,) = (name for name in before if name.endswith("/rows/00002.arrow"))
    for damaged in (before[name][:-1] + b"?", before[name][:-9]):
        store.pipe_file(f"/bucket/mine/{name}", damaged)
        another_machine(monkeypatch, tmp_path)
        with pytest.raises(InputError, match=rf"^{URL}/parts/1-of-1.*/rows/00002.arrow.* in its folder again"):
            commit_parts(URL)
        another_machine(monkeypatch, tmp_path)
        warned: list[str | None] = []
        build_part(URL, rows(given), "1/1", warn=warned.append)
        assert any(line is not None and "files of rows 16 to 23 were cut or altered" in line for line in warned)
        assert there(store) == before
    store.pipe_file("/bucket/mine/parts/1-of-1.json", b"{")
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(InputError, match="is damaged"):
        commit_parts(URL)
    build_part(URL, rows(given), "1/1")
    assert there(store) == before


def test_parts_that_another_tool_copied_there_are_taken_from_there(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path
) -> None:
    """From an object store, from a second one, and from a folder named by its URL."""
    folders = [Path(shutil.copytree(given / "fitted", tmp_path / f"copy-{i}")) for i in range(3)]
    for number, folder in enumerate(folders, 1):
        build_part(f"file://{folder}", rows(given), f"{number}/3")
    store.put(str(folders[0]), "/bucket/copied", recursive=True)
    places = ["memory://bucket/copied", f"local://{folders[1]}", f"file://{folders[2]}"]
    out = Path(shutil.copytree(given / "fitted", tmp_path / "index"))
    with pytest.raises(InputError, match=r"memory://bucket/nowhere.*: no finished part is there"):
        commit_parts(out, ["memory://bucket/nowhere"])
    assert run(["index", "--out", str(out), "--commit", "--from", *places]) == 0
    assert hashes(out) == hashes(given / "whole")


@pytest.mark.slow
def test_a_plain_build_goes_to_a_url_and_is_replaced_there_by_force_alone(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(given)
    checkpoints = choose_model("model").checkpoints  # a path that is valid here alone is not remembered as such
    built = build_index(rows(given), URL, checkpoints, OPTIONS)
    assert hashes(built.folder) == hashes(given / "whole")
    with pytest.raises(OutputExistsError, match=rf"^{URL} holds an index"):
        fit_at(URL, given)
    told: list[str] = []
    build_index(rows(given), URL, checkpoints, OPTIONS, resume=True, tell=told.append)
    assert "nothing is left to do" in told[0]
    fit_at(URL, given, force=True)
    assert set(there(store)) == set(hashes(given / "fitted"))
    with pytest.raises(OutputExistsError, match=rf"^{URL} holds an unfinished build"):
        fit_at(URL, given)
    fit_at(URL, given, resume=True)
    assert set(there(store)) == set(hashes(given / "fitted"))


FOREIGN = {"parts/a.txt": b"mine", "rows/b.txt": b"mine", "manifest.json": b'{"version": 1}', "build.json": b"{}"}


@pytest.mark.parametrize("names", [["parts/a.txt", "rows/b.txt"], ["manifest.json"], ["build.json"]])
def test_files_of_others_are_left_alone_whatever_their_names(
    store: fsspec.AbstractFileSystem, given: Path, names: list[str]
) -> None:
    for name in names:
        store.pipe_file(f"/bucket/mine/{name}", FOREIGN[name])
    for how in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match=rf"^{URL} holds other files and no index: it is left alone"):
            fit_at(URL, given, **how)
        with pytest.raises(OutputExistsError, match="left alone"):
            build_index(rows(given), URL, model(given), OPTIONS, **how)  # type: ignore[arg-type]
    assert there(store) == {name: FOREIGN[name] for name in names}


def test_a_manifest_of_others_that_came_after_the_fit_is_no_index(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken for the index by its name: the part that was to be written was done, as the command said."""
    fit_at(URL, given)
    store.pipe_file("/bucket/mine/manifest.json", FOREIGN["manifest.json"])
    here = shutil.copytree(given / "fitted", tmp_path / "here")
    (here / "manifest.json").write_bytes(FOREIGN["manifest.json"])
    before = there(store)
    for place in (URL, str(here)):
        out, train = ["index", "--out", place], ["--train", str(given / "train.jsonl")]
        for step in (["--shard", "1/1", *train], ["--commit"]):
            assert run([*out, *step]) == 2
            line = capsys.readouterr().err
            assert line == f"error: {place} holds a manifest.json that is no index's: it is left alone. " + (
                "Move it away, or build in another place.\n"
            )
    for how in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputExistsError, match=f"^{URL} holds a manifest"):
            build_index(rows(given), URL, model(given), OPTIONS, **how)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"^{URL} is no index: the manifest"):
        Index.open(URL)
    assert there(store) == before
    assert set(hashes(here)) == {"manifest.json", *hashes(given / "fitted")}


def test_a_fit_whose_sending_is_killed_is_gone_on_with_and_none_of_a_part(
    store: fsspec.AbstractFileSystem, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = Kill(monkeypatch, store)
    kill.at(2)
    with pytest.raises(Interrupted):
        fit_at(URL, given)
    kill.at(-1)
    with pytest.raises(InputError, match="an unfinished build, whose fit is not finished"):
        build_part(URL, rows(given), "1/1")
    fit_at(URL, given, resume=True)
    assert set(there(store)) == set(hashes(given / "fitted"))


def test_what_was_made_of_a_fit_is_not_sent_over_another(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is killed while it sends; then, from elsewhere, fit and part are replaced by those of other rows."""
    (tmp_path / "rows.jsonl").write_bytes(b"".join((given / "train.jsonl").read_bytes().splitlines(True)[:12]))
    other, options = open_rows(str(tmp_path / "rows.jsonl")), BuildOptions(batch_tokens=64, shard_rows=8)
    kill = Kill(monkeypatch, store)
    fit_index(rows(given), URL, model(given), options)
    build_part(URL, rows(given), "2/2")
    assert find_build(URL).parts[0].rows == (16, 34)  # type: ignore[union-attr]
    build_part(URL, rows(given), "1/2")
    kill.at(4)
    with pytest.raises(Interrupted):
        commit_parts(URL)
    kill.at(-1)
    of_before = there(store)["parts/2-of-2.json"]
    fit_index(other, URL, model(given), options, force=True)
    store.pipe_file("/bucket/mine/parts/2-of-2.json", of_before)
    (left,) = find_build(URL).parts  # type: ignore[union-attr]
    assert (left.rows, left.of_this_fit) == (None, False)
    assert run(["info", URL]) == 0
    store.rm("/bucket/mine/parts/2-of-2.json")
    build_part(URL, other, "1/1")
    assert commit_parts(URL).manifest.n_rows == 12


def test_a_damaged_part_that_was_mended_there_is_fetched_again_and_not_computed_again(
    store: fsspec.AbstractFileSystem, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_at(URL, given)
    build_part(URL, rows(given), "1/1")
    (name,) = (name for name in there(store) if name.endswith("/rows/00002.arrow"))
    whole = there(store)[name]
    store.pipe_file(f"/bucket/mine/{name}", whole[:-1] + b"?")
    with pytest.raises(InputError, match=r"00002.arrow was altered"):
        commit_parts(URL)
    store.pipe_file(f"/bucket/mine/{name}", whole)
    parts = there(store)
    assert hashes(commit_parts(URL).folder) == hashes(given / "whole")
    for name in there(store):
        store.rm(f"/bucket/mine/{name}")
    for name, content in parts.items():
        store.pipe_file(f"/bucket/mine/{name}", content)
    another_machine(monkeypatch, tmp_path)
    written: list[object] = []
    features = counting(segments.ShardWriter._write_features, written)
    monkeypatch.setattr(segments.ShardWriter, "_write_features", features)
    assert hashes(build_index(rows(given), URL, model(given), OPTIONS, resume=True).folder) == hashes(given / "whole")
    assert not written
    assert set(there(store)) == set(hashes(given / "whole"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", URL, "--shard", "1/2"], f"{URL}: no fit"),
        (["--out", URL, "--commit"], f"{URL}: no fit"),
        (["--out", URL, "--append"], "is asked, not changed"),
        (["--out", URL, "--retire", "3"], "is asked, not changed"),
        (["--out", URL, "--attach", "INDEX"], "are put back in a folder of this machine"),
        (["--out", "hf://me/mine", "--commit"], "forebear push"),
        (["--out", "s3://bucket/mine", "--commit"], "Install s3fs"),
        (["--out", "nothing://bucket/mine", "--fit"], "Protocol not known"),
        (["--out", "here", "--commit", "--from", "gs://bucket/mine"], "here: no such folder"),
    ],
)
def test_what_cannot_be_done_at_a_url_is_one_line(
    store: fsspec.AbstractFileSystem, given: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begins = "--fit" in more
    train = [] if {"--commit", "--retire"} & set(more) else ["--train", str(given / "train.jsonl")]
    more = [str(given / "whole") if word == "INDEX" else word for word in more]
    assert run(["index", *more, *train, *(["--model", str(given / "model")] if begins else [])]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in " ".join(line.split())
    assert not Path("memory:").exists()
    assert not Path("s3:").exists()
