"""Changes to an index: killed and resumed, done once, refitted, two at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interruptions import Interrupted, hashes, interrupt_at
from places import ROOT
from tiny import WORDS, labels, sentences, write_jsonl
from tiny_wordnet import write_wordnet
from warm import start_program

from forebear import (
    CorruptIndexError,
    Index,
    InputError,
    InUseError,
    MismatchError,
    OutputExistsError,
    Retriever,
    StorageError,
    verify_index,
)
from forebear.cli.main import run
from forebear.indexer.building import finish as finish_module
from forebear.indexer.building.build import (
    BuildOptions,
    append_rows,
    build_index,
    rebuild_ann,
    refit_index,
    retire_rows,
)
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage import journal as journal_module
from forebear.indexer.storage import locks
from forebear.indexer.storage.choices import LATER_CHOICES
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers import result_file

# Few words a row: with spans of a word, each is one more row of a pass.
TEXTS, LABELS = sentences(40, seed=21, low=3, high=6), labels(40, 2, seed=22)
OPTIONS = BuildOptions(
    stores=("features", "words", "spans"), spans="words", scopes=("head", "top-1"), words_tops=(3,), sketch_dim=8,
    sketch_bits=64, white_bits=64, calibration_queries=4, shard_rows=8, batch_tokens=64,
)  # fmt: skip
Change = Callable[..., Index]


def rows(start: int, stop: int) -> RowSource:
    return rows_from_texts(TEXTS[start:stop], LABELS[start:stop])


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model("bert", 2, 0)


@pytest.fixture(scope="module")
def first(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 24, three full shards, with sketches, words and spans."""
    chosen = choose_model(None, [model]).checkpoints
    return build_index(rows(0, 24), tmp_path_factory.mktemp("first") / "index", chosen, OPTIONS).folder


@pytest.fixture(scope="module")
def grown(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and rows 24 to 40 appended."""
    folder = Path(shutil.copytree(first, tmp_path_factory.mktemp("grown") / "index"))
    return append_rows(folder, rows(24, 40)).folder


@pytest.fixture(scope="module")
def head(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, the head alone: quick to change. Beside it, files of the rows."""
    folder = tmp_path_factory.mktemp("head")
    write_jsonl(folder / "more.jsonl", text=TEXTS[12:18], label=LABELS[12:18])
    write_jsonl(folder / "train.jsonl", text=TEXTS[:12], label=LABELS[:12])
    build_index(rows(0, 12), folder / "index", choose_model(None, [model]).checkpoints, BuildOptions())
    return folder


@pytest.fixture
def index(head: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(head / "index", tmp_path / "index"))


def command(*args: Any) -> int:
    return run([str(arg) for arg in args])


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# --- done once ---


def test_an_append_that_is_done_is_not_done_again(head: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append = ("index", "--out", index, "--append", "--train", head / "more.jsonl")
    assert command(*append, "--quiet") == 0
    before = hashes(index)
    capsys.readouterr()
    assert command(*append, "--resume") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "more.jsonl" in line
    assert "rows 12 to 17: nothing is left to do" in line
    assert command(*append) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rows 12 to 17" in line
    assert "--force" in line
    assert command("index", "--out", index, "--append", "--resume", "--train", head / "train.jsonl", "--quiet") == 0
    assert hashes(index) == before
    assert command(*append, "--force", "--quiet") == 0
    assert Index.open(index).manifest.n_rows == 24


def test_a_finished_build_is_not_taken_for_one_with_more_calibration(first: Path, model: str, tmp_path: Path) -> None:
    folder = copied(first, tmp_path / "index")
    more = replace(OPTIONS, calibration_queries=OPTIONS.calibration_queries + 6)
    with pytest.raises(MismatchError, match=f"calibrate={OPTIONS.calibration_queries}"):
        build_index(rows(0, 24), folder, choose_model(None, [model]).checkpoints, more, resume=True)


def test_rows_that_all_went_may_come_again(index: Path) -> None:
    append_rows(index, rows(12, 18))
    retire_rows(index, range(12, 17))
    with pytest.raises(OutputExistsError, match="rows 12 to 17"):
        append_rows(index, rows(12, 18))
    retire_rows(index, [17])
    assert append_rows(index, rows(12, 18), resume=True).manifest.n_rows == 24
    assert append_rows(index, rows(12, 18), resume=True).manifest.n_rows == 24


def test_a_retire_that_is_done_is_not_done_again(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("index", "--out", index, "--retire", "3,5", "--quiet") == 0
    before = hashes(index)
    capsys.readouterr()
    assert command("index", "--out", index, "--retire", "3,5", "--resume") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 rows" in line
    assert "nothing is left to do" in line
    assert command("index", "--out", index, "--retire", "3,6", "--resume") == 2
    assert command("index", "--out", index, "--retire", "3,5") == 2
    assert hashes(index) == before


def test_whole_search_structures_are_not_made_again_by_resume(index: Path) -> None:
    told: list[str] = []
    before = hashes(index)
    rebuild_ann(index, None, resume=True, tell=told.append)
    assert hashes(index) == before
    assert len(told) == 1
    damaged = next(index.glob("ann/*.arrow"))
    damaged.write_bytes(b"")
    rebuild_ann(index, None, resume=True, tell=told.append)
    assert len(told) == 1
    assert verify_index(index, n_rows=0).problems == ()


CHANGES: dict[str, Change] = {
    "append": lambda folder, **how: append_rows(folder, rows(24, 40), **how),
    "retire": lambda folder, **how: retire_rows(folder, [3, 30], **how),
    "rebuild": lambda folder, **how: rebuild_ann(folder, "SQfp16", **how),
    "refit": lambda folder, **how: refit_index(folder, **how),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_died_with_its_manifest_in_force_is_told_and_not_done_twice(
    kind: str, first: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, change = first if kind == "append" else grown, CHANGES[kind]
    undisturbed, killed = copied(base, tmp_path / "undisturbed"), copied(base, tmp_path / "killed")
    change(undisturbed)

    def die(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(finish_module, "tidy", die)
        change(killed)
    line = next(line for line in verify_index(killed, n_rows=0).problems if "not listed" not in line)
    assert f"the {kind} is done" in line
    assert "--force" not in line
    for how in ({"resume": True}, {"force": True}, {}):
        again = copied(killed, tmp_path / "-".join(["again", *how]))
        told: list[str] = []
        change(again, **how, tell=told.append)
        assert hashes(again) == hashes(undisturbed), how
        assert len(told) == 1


def test_resume_comes_before_force_and_says_what_is_true(grown: Path, tmp_path: Path) -> None:
    folder = copied(grown, tmp_path / "index")
    refit_index(folder)
    before, told = hashes(folder), list[str]()
    refit_index(folder, resume=True, force=True, tell=told.append)
    append_rows(folder, rows(24, 40), resume=True, force=True, tell=told.append)  # as after a kill before it began
    assert hashes(folder) == before
    assert "nothing is left to do" in told[0]
    assert "nothing is added by resume=True. To add them once more, give force=True without it." in told[1]


def test_rows_are_known_by_their_digest_however_their_file_is_called(
    head: Path, index: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = copied(index, tmp_path / "undisturbed")
    append = ("index", "--append", "--quiet", "--train")
    monkeypatch.chdir(head)
    assert command(*append, "more.jsonl", "--out", undisturbed) == 0
    with pytest.raises(Interrupted):
        append_rows(index, open_rows(head / "more.jsonl"), progress=interrupt_at(3))
    assert command(*append, "more.jsonl", "--out", index, "--resume") == 0
    assert hashes(index) == hashes(undisturbed)
    build = ("index", "--model", model, "--quiet", "--out", tmp_path / "b", "--train")
    assert command(*build, "train.jsonl") == 0
    assert command(*build, head / "train.jsonl", "--resume") == 0


def test_what_cannot_be_removed_ends_a_build_that_replaces_it(
    index: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    chosen = choose_model(None, [model]).checkpoints
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match=r"cannot remove .*/rows.*denied.*resume=True"),
    ):
        patch.setattr(journal_module.shutil, "rmtree", refuse)
        build_index(rows(0, 9), index, chosen, BuildOptions(), force=True)
    resumed = build_index(rows(0, 9), index, chosen, BuildOptions(), resume=True)
    assert hashes(index) == hashes(build_index(rows(0, 9), tmp_path / "b", chosen, BuildOptions()).folder)
    assert resumed.manifest.n_rows == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retire", "rebuild", "refit"])
def test_an_unfinished_change_is_named_and_resumed_or_discarded(kind: str, grown: Path, tmp_path: Path) -> None:
    change = CHANGES[kind]
    undisturbed, killed = copied(grown, tmp_path / "undisturbed"), copied(grown, tmp_path / "killed")
    change(undisturbed)
    with pytest.raises(Interrupted):
        change(killed, progress=interrupt_at(2))
    assert Index.open(killed).manifest.digest() == Index.open(grown).manifest.digest()
    with pytest.raises(OutputExistsError, match=f"unfinished {kind}.*resume=True.*force=True"):
        append_rows(killed, rows(0, 5))
    assert f"an unfinished {kind}" in verify_index(killed, n_rows=0).problems[-1]
    if kind == "retire":
        with pytest.raises(MismatchError, match="begun with n_rows=2"):
            retire_rows(killed, [3])
    discarded = copied(killed, tmp_path / "discarded")
    change(killed, resume=True)
    assert hashes(killed) == hashes(undisturbed)
    retire_rows(discarded, [1], force=True)
    assert verify_index(discarded, n_rows=0).problems == ()
    assert Index.open(discarded).retired.tolist() == [1]


def test_a_build_begun_before_a_choice_existed_is_resumed(model: str, tmp_path: Path) -> None:
    """Its journal does not name what is newer than the forebear that began it."""
    chosen = choose_model(None, [model]).checkpoints
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    build_index(rows(0, 12), undisturbed, chosen, BuildOptions())
    with pytest.raises(Interrupted):
        build_index(rows(0, 12), folder, chosen, BuildOptions(), progress=interrupt_at(2))
    journal = json.loads((folder / "build.json").read_text())
    for name in LATER_CHOICES:
        del journal["spec"][name]
    (folder / "build.json").write_text(json.dumps(journal))
    build_index(rows(0, 12), folder, chosen, BuildOptions(), resume=True)
    assert hashes(folder) == hashes(undisturbed)


def test_resuming_a_build_that_is_done_leaves_an_unfinished_append_alone(
    head: Path, index: Path, model: str, tmp_path: Path
) -> None:
    undisturbed = copied(index, tmp_path / "undisturbed")
    append_rows(undisturbed, rows(12, 18))
    with pytest.raises(Interrupted):
        append_rows(index, rows(12, 18), progress=interrupt_at(3))
    build_index(rows(0, 12), index, choose_model(None, [model]).checkpoints, BuildOptions(), resume=True)
    append_rows(index, rows(12, 18), resume=True)
    assert hashes(index) == hashes(undisturbed)


@pytest.mark.parametrize("at", ["before", "in the middle", "after"])
def test_a_build_killed_while_it_replaces_an_index_is_resumed(
    at: str, index: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_model(None, [model]).checkpoints
    build_index(rows(0, 9), tmp_path / "undisturbed", chosen, BuildOptions())
    real = journal_module.clear

    def dies(folder: Path) -> None:
        if at == "in the middle":
            (folder / "manifest.json").unlink()
        if at == "after":
            real(folder)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(journal_module, "clear", dies)
        build_index(rows(0, 9), index, chosen, BuildOptions(), force=True)
    if at == "before":
        assert Index.open(index).manifest.n_rows == 12
    with pytest.raises(MismatchError, match="begun with n_rows=9"):
        build_index(rows(0, 8), index, chosen, BuildOptions(), resume=True)
    build_index(rows(0, 9), index, chosen, BuildOptions(), resume=True)
    assert hashes(index) == hashes(tmp_path / "undisturbed")


def test_a_build_over_a_changed_index_that_was_killed_before_it_began_is_resumed(
    index: Path, model: str, tmp_path: Path
) -> None:
    chosen = choose_model(None, [model]).checkpoints
    undisturbed = copied(index, tmp_path / "undisturbed")
    append_rows(index, rows(12, 18))
    told: list[str] = []
    build_index(rows(0, 12), index, chosen, BuildOptions(), resume=True, tell=told.append)
    assert len(told) == 1  # no --force: built before, and changed since
    build_index(rows(0, 12), index, chosen, BuildOptions(), resume=True, force=True, tell=told.append)
    assert hashes(index) == hashes(undisturbed)
    assert len(told) == 1
    build_index(rows(0, 12), index, chosen, BuildOptions(), resume=True, force=True, tell=told.append)
    assert len(told) == 2


def test_a_manifest_without_its_last_byte_is_refused(index: Path) -> None:
    path = index / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptIndexError, match="was altered"):
        Index.open(index)


# --- two at once ---


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is killed."""
    code = "import sys, time; from pathlib import Path; from forebear.indexer.storage.locks import exclusive\n"
    code += "with exclusive(Path(sys.argv[1]), 'it'): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_of_two_changes_is_refused_with_the_owner_and_questions_are_answered(
    head: Path, index: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ("index", "--model", model, "--train", head / "train.jsonl", "--out", index)
    changes = [("index", "--out", index, *more) for more in (("--retire", "3"), ("--rebuild-ann",))]
    changes.append(("index", "--out", index, "--append", "--train", head / "more.jsonl", "--resume"))
    before = hashes(index)
    with holder(index / "forebear.lock") as other:
        capsys.readouterr()
        for args in (*changes, build, (*build, "--force"), (*build, "--resume")):
            assert command(*args) == 2, args
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{index} is being written by process {other.pid} on {socket.gethostname()}" in line
        assert {name: sha for name, sha in hashes(index).items() if name != "forebear.lock"} == before
        assert command("retrieve", "--index", index, "--text", TEXTS[0]) == 0
        (problem,) = verify_index(index, n_rows=0).problems
        assert f"being changed by process {other.pid}" in problem
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (index / "forebear.lock").exists()
        assert verify_index(index, n_rows=0).problems == ()
        assert command(*changes[0], "--quiet") == 0
    untouched = {name: sha for name, sha in before.items() if name.startswith(("rows/", "features/"))}
    assert untouched.items() <= hashes(index).items()
    assert not (index / "forebear.lock").exists()


def test_two_trainings_and_two_answers_to_one_place_are_kept_apart(
    head: Path, index: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--model", model, "--data", head / "train.jsonl", "--epochs", "1", "--out", tmp_path / "run")
    ask = ("retrieve", "--index", index, "--text", TEXTS[0], "--out", tmp_path / "a.parquet")
    (tmp_path / "run" / "checkpoints" / "epoch-1.partial").mkdir(parents=True)  # what the other has written by then
    for lock, args in ((tmp_path / "run" / "forebear.lock", train), (tmp_path / "a.parquet.lock", ask)):
        with holder(lock) as other:
            capsys.readouterr()
            assert command(*args, "--quiet") == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"process {other.pid} on" in line
    assert command(*ask, "--quiet") == 0
    assert command(*train, "--quiet", "--force") == 0  # the lock file of a process that was killed is in nobody's way
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]
    assert [path.name for path in tmp_path.glob("a.*")] == ["a.parquet"]
    (tmp_path / "a.parquet.lock").write_text("process 1 on some host")  # killed when the answers were already there
    assert command(*ask, "--quiet") == 2
    assert [path.name for path in tmp_path.glob("a.*")] == ["a.parquet"]


def test_a_lock_leaves_nothing_behind_and_a_mistake_no_folder(tmp_path: Path, model: str) -> None:
    chosen = choose_model(None, [model]).checkpoints
    with pytest.raises(InputError):
        build_index(rows_from_texts(["a film"]), tmp_path / "new" / "sub" / "index", chosen, BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_model_leaves_no_folder(head: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sub" / "index"
    assert command("index", "--model", tmp_path / "x", "--train", head / "train.jsonl", "--out", out, "--quiet") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_ends_between_two_looks_leaves_no_second_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.lock", locks._try
    with locks.claimed(path) as mine, monkeypatch.context() as patch:
        assert mine is None

        def then_it_ends(file: IO[str], kind: int = fcntl.LOCK_EX) -> str | None:
            if (owner := real(file, kind)) is not None and path.exists():
                path.unlink()  # as the owner does at its end
                path.write_text("")  # and another one begins
            return owner

        patch.setattr(locks, "_try", then_it_ends)
        with locks.claimed(path) as second, locks.claimed(path) as third:
            assert second is not None  # a lock on a file that is gone holds nothing off
            assert third is None


def test_a_lock_file_that_is_in_the_way_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = index / "forebear.lock"
    lock.mkdir()  # to root no file is closed: as one of another user that may not be written
    with pytest.raises(StorageError, match=rf"its lock file {lock} cannot be opened \(.*\). Remove that file"):
        retire_rows(index, [3])
    lock.rmdir()
    monkeypatch.setattr(locks.os.path, "samestat", lambda *_: False)
    with pytest.raises(StorageError) as found:
        retire_rows(index, [3])
    assert "None" not in str(found.value)


def test_results_that_another_process_wrote_meanwhile_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"

    @contextmanager
    def after_another(lock: Path, what: str) -> Iterator[None]:
        path.write_bytes(b"another's")
        with locks.exclusive(lock, what):
            yield

    monkeypatch.setattr(result_file, "exclusive", after_another)
    with pytest.raises(OutputExistsError), result_file.result_writer(path, {}, force=False):
        pass
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.parquet", b"another's")]


def test_killed_at_any_step_no_results_stand_beside_the_provenance_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"

    def write(run: int) -> None:
        with result_file.result_writer(path, {"forebear": json.dumps({"run": run})}, force=True) as table:
            table(pa.table({"run": [run]}))

    def dies(at: int, real: Callable[..., Any]) -> Callable[..., Any]:
        count = iter(range(at, -1, -1))

        def step(*args: Any, **choices: Any) -> Any:
            if next(count, 1) == 0:
                raise Interrupted
            return real(*args, **choices)

        return step

    for name in ("replace", "unlink"):
        for at in range(3):
            write(1)
            with monkeypatch.context() as patch, suppress(Interrupted):
                patch.setattr(Path, name, dies(at, getattr(Path, name)))
                write(2)
            facts = json.loads((tmp_path / "a.jsonl.meta.json").read_text())
            assert not path.exists() or json.loads(path.read_text()) == facts, (name, at)
    write(3)
    assert json.loads(path.read_text()) == {"run": 3}


def test_a_lock_is_refused_in_its_own_process_too(index: Path) -> None:
    from forebear.indexer.storage.locks import exclusive

    with exclusive(index / "forebear.lock", "it"), pytest.raises(InUseError, match=f"process {os.getpid()} on"):
        retire_rows(index, [3])


# --- what is fitted beyond the head ---


def without_folder(folder: Path) -> dict[str, str]:
    """sha256 by path of what a fit decides, whatever folder a refit put it into."""
    fitted = Index.open(folder).manifest.fitted_name("")
    found = {name.removeprefix(fitted): sha for name, sha in hashes(folder).items()}
    return {n: sha for n, sha in found.items() if n.startswith(("gradients/", "curvature/top-1"))}


@pytest.mark.slow
def test_a_refit_gives_the_bytes_of_a_build_from_scratch(grown: Path, model: str, tmp_path: Path) -> None:
    whole = build_index(rows(0, 40), tmp_path / "whole", choose_model(None, [model]).checkpoints, OPTIONS)
    folder = copied(grown, tmp_path / "grown")
    assert without_folder(folder) != without_folder(whole.folder)
    assert command("index", "--out", folder, "--refit", "--quiet") == 0
    index = Index.open(folder)
    assert without_folder(folder) == without_folder(whole.folder)
    assert index.manifest.calibration == whole.manifest.calibration
    assert index.manifest.curvature["top-1"] == whole.manifest.curvature["top-1"]
    assert index.manifest.fit_age.is_current
    assert verify_index(folder).problems == ()
    assert set(hashes(folder)) == {"manifest.json", *index.manifest.files}
    found, wanted = (Retriever(i).scores([TEXTS[5]], "if", scope="top-1") for i in (index, whole))
    assert (found == wanted).all()
    found, wanted = (
        Retriever(i).retrieve([TEXTS[5]], methods=["if++"], scope="top-1", top=3)["score"] for i in (index, whole)
    )
    assert found == wanted


@pytest.mark.slow
def test_a_refit_after_a_retire_fits_the_live_rows_and_keeps_the_numbers(
    grown: Path, model: str, tmp_path: Path
) -> None:
    folder = copied(grown, tmp_path / "grown")
    gone = [0, 7, 30]
    retire_rows(folder, gone)
    index = refit_index(folder)
    live = np.setdiff1d(np.arange(40), gone)
    source = rows_from_texts([TEXTS[i] for i in live], [LABELS[i] for i in live])
    chosen = choose_model(None, [model]).checkpoints
    other = build_index(source, tmp_path / "live", chosen, replace(OPTIONS, stores=("features",)))
    fitted = {n: s for n, s in without_folder(other.folder).items() if "/0" not in n}
    assert fitted.items() <= without_folder(folder).items()
    assert (index.manifest.n_rows, index.live.tolist()) == (40, live.tolist())
    assert (index.manifest.fit_age.n_rows, index.manifest.fit_age.is_current) == (37, True)
    np.testing.assert_allclose(
        index.gradients("top-1", damping=0).norms[live], other.gradients("top-1", damping=0).norms, rtol=1e-4
    )


@pytest.mark.slow
def test_rows_appended_after_a_refit_are_sketched_by_it(grown: Path, first: Path, tmp_path: Path) -> None:
    folder = copied(first, tmp_path / "index")
    append_rows(folder, rows(24, 32))
    refit_index(folder)
    index = append_rows(folder, rows(32, 40))
    assert (index.manifest.fit_age.n_rows, index.manifest.fit_age.appended) == (32, 8)
    assert verify_index(folder).problems == ()
    retire_rows(folder, [2])
    index = refit_index(folder)
    assert index.manifest.fit_age.is_current
    assert len(list((folder / "refit").iterdir())) == 1
    assert not (folder / "gradients").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 8, 14])
def test_an_interrupted_refit_leaves_the_old_fit_in_force_and_is_resumed_to_the_same_bytes(
    number: int, grown: Path, tmp_path: Path
) -> None:
    undisturbed, folder = copied(grown, tmp_path / "undisturbed"), copied(grown, tmp_path / "killed")
    refit_index(undisturbed)
    with pytest.raises(Interrupted):
        refit_index(folder, progress=interrupt_at(number))
    assert hashes(grown).items() <= hashes(folder).items()
    with pytest.raises(OutputExistsError, match=r"unfinished refit.*resume=True.*force=True"):
        refit_index(folder)
    refit_index(folder, resume=True)
    assert hashes(folder) == hashes(undisturbed)


def test_a_refit_of_nothing_says_so(
    first: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(first, tmp_path / "first")
    capsys.readouterr()
    assert command("index", "--out", folder, "--refit") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "fitted to its 24 live rows: nothing is left to do" in line
    assert hashes(folder) == hashes(first)
    assert command("index", "--out", index, "--refit") == 2
    assert "holds the head alone, which is exact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "foreign"),
    [
        (["--refit"], ["--calibrate", "0", "--damping", "9", "--scope", "all"]),
        (["--refit"], ["--train", "x.jsonl"]),
        (["--append", "--train", "x.jsonl"], ["--precision", "bf16", "--max-length", "9"]),
        (["--retire", "3"], ["--model", "x"]),
        (["--rebuild-ann", "--ann", "SQfp16"], ["--seed", "1"]),
    ],
)
def test_options_that_mean_nothing_for_a_change_are_refused_by_name(
    change: list[str], foreign: list[str], index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(index)
    assert command("index", "--out", index, *change, *foreign) == 2
    (line,) = capsys.readouterr().err.splitlines()
    names = sorted(name for name in foreign if name.startswith("--"))
    assert f"{change[0]} takes no" in line
    assert all(name in line.split(":")[1] for name in names)
    assert "the index keeps what it was built with" in line
    assert hashes(index) == before


@pytest.mark.slow
def test_a_refit_asks_about_as_many_rows_as_the_build_was_to(model: str, tmp_path: Path) -> None:
    chosen, options = choose_model(None, [model]).checkpoints, replace(OPTIONS, stores=("features",))
    for asked in (0, 30):
        wanted = replace(options, calibration_queries=asked)
        build_index(rows(0, 24), tmp_path / "i", chosen, wanted, force=True)  # 30: has no more than 24
        append_rows(tmp_path / "i", rows(24, 40))
        found = refit_index(tmp_path / "i").manifest
        whole = build_index(rows(0, 40), tmp_path / "whole", chosen, wanted, force=True).manifest
        assert found.calibration == whole.calibration
        assert bool(found.calibration) == bool(asked)


def test_an_append_warns_as_a_build_does(head: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append = ("index", "--out", index, "--append", "--train", head / "more.jsonl", "--quiet")
    assert command(*append) == 0
    said = capsys.readouterr().err
    assert "warning: the model's labels are unnamed; numbers in " in said, said
    warned: list[str | None] = []
    append_rows(index, rows(18, 24), warn=warned.append)
    assert len(warned) == 1


def test_what_was_fitted_on_other_rows_is_said_everywhere(
    grown: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "fitted on 24 rows; 16 appended and 0 retired since"
    assert command("info", grown) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert command("info", grown, "--json") == 0
    facts = json.loads(capsys.readouterr().out)["fitted_beyond_the_head"]
    assert facts == {"n_rows": 24, "appended": 16, "retired": 0}
    ask = ("retrieve", "--text", TEXTS[0], "--method", "if", "--top", "2")
    assert command(*ask, "--index", grown, "--scope", "top-1", "--out", tmp_path / "a.parquet") == 0
    assert f"warning: {grown}: sketches, EK-FAC and calibration beyond the head were {said}" in capsys.readouterr().err
    metadata = json.loads(pq.read_table(tmp_path / "a.parquet").schema.metadata[b"forebear"])
    assert metadata["fitted_beyond_the_head"] == facts
    assert command(*ask, "--index", grown, "--quiet", "--out", tmp_path / "b.parquet") == 0  # the head is exact
    assert capsys.readouterr().err == ""
    assert "fitted_beyond_the_head" not in json.loads(
        pq.read_table(tmp_path / "b.parquet").schema.metadata[b"forebear"]
    )
    html = tmp_path / "e.html"
    explain = ("explain", "--text", TEXTS[0], "--index", grown, "--method", "if", "--scope", "top-1", "--html", html)
    assert command(*explain, "--quiet") == 0
    assert said in capsys.readouterr().err
    assert said in html.read_text()
    write_jsonl(tmp_path / "test.jsonl", text=TEXTS[:4], label=LABELS[:4])
    tested = ("--index", grown, "--test", tmp_path / "test.jsonl", "--scope", "top-1")
    audit = ("audit", "hubs", *tested, "--method", "gd", "--top", "2", "--out", tmp_path / "hubs", "--quiet")
    pairs = [(f"{a}-{b}", [a, b], []) for a, b in zip(WORDS[::2], WORDS[1::2], strict=False)]
    write_wordnet(tmp_path / "wordnet", {"noun": pairs, "verb": [], "adj": [], "adv": []}, {})
    attack = ("perturb", "attack", *tested, "--queries", "1", "--rows", "1", "--seeds", "1", "--retrain", "head")
    attack += ("--wordnet", tmp_path / "wordnet", "--out", tmp_path / "attack", "--quiet")
    for args in (audit, attack):
        assert command(*args) == 0
        assert said in capsys.readouterr().err, args[:2]
        for name in ("report.html", "result.json"):
            assert said in (tmp_path / args[1] / name).read_text(), (args[:2], name)
    few = copied(first, tmp_path / "few")
    retire_rows(few, [3, 4])  # 2 of 24: said, not warned of
    assert command(*ask, "--index", few, "--scope", "top-1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "fitted on" in line]
    assert [line.startswith(f"note: {few}: ") for line in lines] == [True]
    assert "0 appended and 2 retired since" in lines[0]
    for args in (audit, attack):
        at = [few if arg == grown else arg for arg in args]
        assert command(*at, "--force") == 0
        assert "retired since" not in capsys.readouterr().err, args[:2]  # --quiet
        assert "0 appended and 2 retired since" in (tmp_path / args[1] / "report.html").read_text()
    assert command("index", "--out", few, "--retire", "5", "--quiet") == 0
    assert "warning" in capsys.readouterr().err


# --- the campaign, in small ---


@pytest.mark.slow
def test_a_small_campaign_of_kills_full_disks_and_flips_is_stood() -> None:
    """In a process of its own: it forks, which this one with its threads must not."""
    script = str(ROOT / "benchmarks" / "campaign.py")
    done = start_program(f"import runpy; runpy.run_path({script!r}, run_name='__main__')", ["--quick"]).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tried = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if " tried, " in line}
    assert tried["kills"] >= 12
    assert tried["full"] >= 4
    assert tried["flips"] >= 60
    assert tried["clock"] == 1
    assert tried["truncation"] >= 30
    assert tried["read-only"] in (0, 1)  # where no folder may be mounted it is left out, and says so
