"""``--fit``, ``--shard``, ``--commit``: an index built in parts, anywhere, has the bytes of a plain build."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import hashes
from tiny import labels, sentences, write_jsonl
from warm import CopiedInterpreter, Started, start_command

from forebear import Index, InputError, MismatchError, OutputExistsError, Retriever, open_rows
from forebear.cli.main import run
from forebear.indexer.building.build import BuildOptions, build_index, build_part, commit_parts, fit_index
from forebear.indexer.building.sharing import part_files, parts, processes
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage import locks
from forebear.indexer.storage.layout import CLAIMS
from forebear.indexer.training.model_choice import choose_model
from forebear.wording import at_command_line

TEXTS, LABELS = sentences(40, seed=21, low=3), labels(40, 2, seed=22)
TEXTS += TEXTS[3:9] + TEXTS[30:38]  # in other parts, some with the other label
LABELS += LABELS[3:6] + [1 - label for label in LABELS[6:9]] + LABELS[30:38]
N_SHARDS = 7
SKETCHES = ("--sketch-dim", 8, "--sketch-bits", 64, "--white-bits", 64, "--calibrate", 4, "--batch-tokens", 64)
OPTIONS = BuildOptions(
    scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=4, batch_tokens=64,
    shard_rows=8,
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and models, which is the current one."""
    write_jsonl(tmp_path / "train.jsonl", text=TEXTS, label=LABELS, note=[f"row {i}" for i in range(len(TEXTS))])
    for name, seed in (("one", 0), ("two", 1), ("sentences", 9)):
        (tmp_path / name).symlink_to(tiny_model("bert", 2, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def new_interpreters_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.subprocess, "Popen", CopiedInterpreter)


def rows() -> RowSource:
    return open_rows("train.jsonl")


def fit(out: str, options: BuildOptions = OPTIONS, **how: bool) -> Path:
    assert fit_index(rows(), out, choose_model("two").checkpoints, options, **how) is None
    return Path(out)


def copies(folder: Path, n: int) -> list[Path]:
    return [Path(shutil.copytree(folder, f"copy-{i}")) for i in range(1, n + 1)]


def index_command(out: str, *more: object) -> list[str]:
    words = ("index", "--checkpoints", "one", "two", "--eta", "1", "1", "--train", "train.jsonl", "--out", out,
             "--shard-rows", 8, *SKETCHES, *more)  # fmt: skip
    return list(map(str, words))


WHOLE = ("--store", "features,words,spans,sbert", "--sentence-model", "sentences", "--words-top", "0,3",
         "--scope", "head,top-1,all")  # fmt: skip


# ---------------------------------------------------------------- equal bytes


@pytest.mark.slow
@pytest.mark.usefixtures("new_interpreters_are_copies")
def test_parts_of_everything_that_is_stored_from_separate_folders_give_the_bytes_of_one_build(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third part has one process and the fourth two; the rows lie elsewhere; one folder has two parts."""
    assert run(index_command("whole", *WHOLE)) == 0
    assert run(index_command("index", *WHOLE, "--fit")) == 0
    first, second, third = copies(place / "index", 3)
    for folder, part, *how in ((first, "2/4"), (first, "1/4"), (second, "4/4", "--devices", "cpu,cpu"), (third, "3/4")):
        Path("elsewhere").mkdir()
        rows_there = Path("train.jsonl").rename("elsewhere/rows.jsonl")
        assert run(["index", "--out", str(folder), "--train", str(rows_there), "--shard", part, *how]) == 0
        rows_there.rename("train.jsonl")
        Path("elsewhere").rmdir()
        assert not (folder / CLAIMS).exists()
    before = {folder: hashes(folder) for folder in (first, second, third)}
    assert run(["index", "--out", "index", "--commit", "--from", "copy-1", "copy-2", "--from", "copy-3"]) == 0
    assert hashes(place / "index") == hashes(place / "whole")
    assert before == {folder: hashes(folder) for folder in before}
    said = capsys.readouterr().err
    assert "copy-2: part 4/4 is written, 14 rows" in said
    assert "Next: forebear index --out index --train train.jsonl --shard I/N" in said
    assert run(["index", "--out", "index", "--commit"]) == 0
    assert "is an index already: nothing is left to do" in capsys.readouterr().err
    assert hashes(place / "index") == hashes(place / "whole")


class Killer:
    """Starts commands, and kills them where it is so decided."""

    def __init__(self, seed: int) -> None:
        self.random, self.n_killed = random.Random(seed), 0

    def run_until_all_end(self, commands: list[list[str]], n_kills: int, seconds: float) -> None:
        """Run commands beside each other until each has ended by itself; so many kills come before, at random."""
        end = self.n_killed + n_kills
        running = {i: start_command(command) for i, command in enumerate(commands)}
        while running:
            for process in running.values():
                self._kill(process, seconds if self.n_killed < end else 600)
            for i, process in list(running.items()):
                done = process.wait(60)
                assert done.returncode in (0, -signal.SIGKILL), done.stderr
                if done.returncode == 0 and self.n_killed >= end:
                    del running[i]
                else:
                    running[i] = start_command(commands[i])

    def _kill(self, process: Started, seconds: float) -> None:
        stop = time.monotonic() + self.random.uniform(0, seconds)
        while process.runs() and time.monotonic() < stop:
            time.sleep(0.005)
        if process.runs():
            os.kill(process.pid, signal.SIGKILL)
            self.n_killed += 1


@pytest.mark.slow
def test_two_processes_killed_at_random_ten_times_leave_the_bytes_of_one_build(place: Path) -> None:
    killer, many = Killer(7), ("--store", "features,words,spans", "--scope", "head,top-1", "--shard-rows", 4)
    assert run(index_command("whole", *many)) == 0
    killer.run_until_all_end([index_command("index", *many, "--fit", "--resume")], 2, 1.5)
    shards = [["index", "--out", "index", "--train", "train.jsonl", "--shard", f"{i}/2"] for i in (1, 2)]
    killer.run_until_all_end(shards, 10, 1.2)
    killer.run_until_all_end([["index", "--out", "index", "--commit"]], 3, 1.5)
    assert killer.n_killed >= 10
    assert hashes(place / "index") == hashes(place / "whole")


@pytest.mark.slow
def test_a_plain_build_goes_on_where_parts_are_missing(place: Path) -> None:
    """Who began in parts may end as one."""
    whole = build_index(rows(), "whole", choose_model("two").checkpoints, OPTIONS)
    folder = fit("index")
    build_part(folder, rows(), "2/3")
    build_index(rows(), folder, choose_model("two").checkpoints, OPTIONS, resume=True)
    assert hashes(folder) == hashes(whole.folder)


# ---------------------------------------------------------------- what is refused


def refused(error: type[InputError], call: Callable[[], object], *parts_of_line: str) -> None:
    with at_command_line():
        with pytest.raises(error) as caught:
            call()
        line = str(caught.value)
    assert (caught.value.exit_code, "\n" in line) == (2, False)
    for part in parts_of_line:
        assert part in line, line


def test_a_part_that_is_none_is_refused_and_parts_beyond_the_shards_are_empty(place: Path) -> None:
    options = BuildOptions(shard_rows=8)
    refused(InputError, lambda: build_part("index", rows(), "1/2"), "index: no such folder", "forebear index --fit")
    assert not Path("index").exists()
    folder = fit("index", options)
    for part in ("0/8", "9/8", "3", "a/b", "-1/8", "1/0", "1/2/3"):
        refused(InputError, lambda part=part: build_part(folder, rows(), part), f"--shard {part}: expected I/N")
    refused(OutputExistsError, lambda: fit("index"), "holds an unfinished build", "--resume", "--force")
    told: list[str] = []
    sizes = [len(build_part(folder, rows(), f"{i}/9", tell=told.append)) for i in range(1, 10)]
    assert sum(sizes) == len(TEXTS)
    assert sizes.count(0) == 9 - N_SHARDS
    assert len(told) == 2
    assert "has 7 files of rows (--shard-rows)" in told[0]
    with pytest.raises(InputError, match="is an unfinished build"):
        Index.open(folder)
    index = commit_parts(folder)
    whole = build_index(rows(), "whole", choose_model("two").checkpoints, options)
    assert hashes(index.folder) == hashes(whole.folder)
    assert build_part(folder, rows(), "1/2", tell=told.append) == range(0)
    assert told[-1] == "index is an index already: nothing is left to do."


def test_rows_models_and_options_that_are_not_those_of_the_fit_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("index", BuildOptions(shard_rows=8))
    before = hashes(folder)
    write_jsonl(place / "other.jsonl", text=[*TEXTS[1:], "another"], label=LABELS, note=["row"] * len(TEXTS))
    refused(MismatchError, lambda: build_part(folder, open_rows("other.jsonl"), "1/2"), "other.jsonl has 54 rows",
            "was fitted to 54", "--train")  # fmt: skip
    refused(MismatchError, lambda: build_part(folder, rows(), "1/2", model="one"), "is not the one")
    assert run(["index", "--out", "index", "--train", "train.jsonl", "--shard", "1/2", "--scope", "all"]) == 2
    assert "--shard takes no --scope" in " ".join(capsys.readouterr().err.split())
    for extra in (["--shard", "1/2", "--fit"], ["--append", "--commit"], ["--from", "x"]):
        assert run(["index", "--out", "index", "--train", "train.jsonl", *extra]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    (folder / "build.json").rename("kept")
    refused(InputError, lambda: build_part(folder, rows(), "1/2"), "no fit")
    Path("kept").rename(folder / "build.json")
    assert hashes(folder) == before


@pytest.mark.slow
def test_missing_damaged_foreign_and_twofold_parts_are_refused_and_can_be_mended(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_index(rows(), "whole", choose_model("two").checkpoints, OPTIONS)
    folder = fit("index")
    one, two, cut = copies(folder, 3)
    refused(InputError, lambda: commit_parts(folder), "54 of 54 rows are in no finished part", "--shard I/N")
    refused(InputError, lambda: commit_parts(folder, [one]), "--from copy-1: no finished part is there")
    refused(InputError, lambda: commit_parts(folder, ["nowhere"]), "--from nowhere: no such folder")
    build_part(one, rows(), "1/3")
    build_part(two, rows(), "3/3")
    refused(InputError, lambda: commit_parts(folder, [one, two]), "16 of 54 rows", "rows 16 to 31", "--shard 2/3")

    (cut / "gradients/top-1/final/bases.arrow").write_bytes(b"cut")
    refused(InputError, lambda: build_part(cut, rows(), "2/3"), "bases.arrow has 3 bytes", "run --fit again")
    shutil.rmtree(cut)
    (cut,) = [Path(shutil.copytree(folder, "copy-3"))]
    build_part(cut, rows(), "2/3")
    file = cut / "rows" / "00003.arrow"
    content = file.read_bytes()
    for damaged, said in ((content[:-9], "it was cut or altered"), (content[:-1] + b"?", "its sha256 is not")):
        file.write_bytes(damaged)
        refused(InputError, lambda: commit_parts(folder, [one, two, cut]), "copy-3/rows/00003.arrow", said, "2/3")
    warned: list[str | None] = []
    assert build_part(cut, rows(), "2/3", warn=warned.append) == range(16, 32)
    assert [line for line in warned if line] == [
        "copy-3: files of rows 24 to 31 were cut or altered since they were written; they are made again"
    ]
    assert file.read_bytes() == content
    record = cut / "parts" / "2-of-3.json"
    as_written = record.read_bytes()
    record.write_bytes(as_written.replace(b'"bytes":', b'"bytes":1', 1))
    refused(InputError, lambda: commit_parts(folder, [cut]), "2-of-3.json is damaged", "run --shard")
    record.write_bytes(as_written)

    other = fit("other", BuildOptions(shard_rows=8))
    build_part(other, rows(), "2/3")
    refused(MismatchError, lambda: commit_parts(folder, [one, two, other]), "part 2/3 was written with fit",
            "other rows, choices or models")  # fmt: skip

    twice = Path(shutil.copytree(one, "twice"))
    build_part(twice, rows(), "1/4")  # rows 0 to 7 again, from other folder: the same numbers
    changed = json.loads((twice / "parts" / "1-of-4.json").read_text())
    assert changed["shards"] == [0, 1]
    name = next(name for name in changed["files"] if name.startswith("features/"))
    changed["files"][name]["sha256"] = "0" * 64
    del changed["digest"]
    changed["digest"] = part_files.digest_of(changed)
    (twice / "parts" / "1-of-4.json").write_text(json.dumps(changed))
    refused(MismatchError, lambda: commit_parts(folder, [one, two, cut, twice]), "rows 0 to 7 are in two parts",
            "part 1/3 in copy-1", "1-of-4.json")  # fmt: skip
    (twice / "parts" / "1-of-4.json").unlink()

    assert sorted(hashes(folder)) == sorted(hashes(Path(shutil.copytree(folder, "untouched"))))
    assert not (folder / "rows").exists()
    with locks.exclusive(parts.part_lock(folder, "1/3"), "it"):
        refused(InputError, lambda: commit_parts(folder, [one, two, cut]), "part 1/3 of index is being written by")
        refused(InputError, lambda: fit("index", force=True), "part 1/3 of index is being written by")
        refused(InputError, lambda: build_part(folder, rows(), "1/3"), "part 1/3 of index is being written by")
    with locks.exclusive(folder / "forebear.lock", "it"):
        refused(InputError, lambda: build_part(folder, rows(), "1/3"), "index is being written by")

    index = commit_parts(folder, [one, two, cut, twice])
    assert hashes(index.folder) == hashes(whole.folder)


def test_a_file_cut_on_its_way_before_its_part_was_finished_is_written_again(place: Path) -> None:
    folder = fit("index", BuildOptions(shard_rows=8))
    build_part(folder, rows(), "1/1")
    before = hashes(folder)
    (folder / "parts" / "1-of-1.json").unlink()
    for name in ("features/final/00002.arrow", "rows/00004.arrow"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    warned: list[str | None] = []
    build_part(folder, rows(), "1/1", warn=warned.append)
    assert [line for line in warned if line] == [
        "index: files of rows 16 to 23, 32 to 39 were cut or altered since they were written; they are made again"
    ]
    assert hashes(folder) == before


# ---------------------------------------------------------------- what info says


def test_info_says_what_a_build_in_parts_lacks_and_which_command_comes_next(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def info(name: str) -> dict[str, object]:
        assert run(["info", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert run(["info", name]) == 0
        assert facts["next"] in " ".join(capsys.readouterr().out.split())
        return facts

    folder = fit("index", BuildOptions(shard_rows=8))
    fitted = info("index")
    assert (fitted["n_rows"], fitted["n_missing"], fitted["parts"]) == (54, 54, [])
    assert str(fitted["next"]).startswith("forebear index --out index --train ROWS --shard I/N, here or in a copy")
    build_part(folder, rows(), "1/3")
    build_part(folder, rows(), "3/3")
    begun = json.loads((folder / "parts" / "3-of-3.json").read_text()) | {"files": {}}
    del begun["digest"]
    (folder / "parts" / "3-of-3.json").write_text(json.dumps(begun | {"digest": part_files.digest_of(begun)}))
    found = info("index")
    said = [(part["part"], part["rows"], part["is_finished"]) for part in found["parts"]]
    assert said == [("1/3", [0, 16], True), ("3/3", [32, 54], False)]
    assert found["n_missing"] == 54 - 16
    assert "--shard 2/3" in str(found["next"])
    for part in ("2/3", "3/3"):
        build_part(folder, rows(), part)
    whole = info("index")
    assert (whole["n_missing"], whole["next"]) == (0, "forebear index --out index --commit")
    before = hashes(folder)
    assert info("index") == whole
    assert hashes(folder) == before
    commit_parts(folder)
    assert run(["info", "index"]) == 0
    assert "in parts" not in capsys.readouterr().out


# ---------------------------------------------------------------- other machines


def test_what_computed_a_part_otherwise_is_warned_of_and_recorded(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BuildOptions(shard_rows=8)
    folder = fit("index", options)
    here = part_files._processor()
    build_part(folder, rows(), "1/2")
    monkeypatch.setattr(part_files, "_processor", lambda: "another processor")
    warned: list[str | None] = []
    build_part(folder, rows(), "2/2", warn=warned.append)
    (line,) = (line for line in warned if line)
    assert line == (
        "part 2/2 is not computed by what computed the fit of index (processor another processor, not "
        f"{here[:60]}): numbers may differ from those of a build on one machine in their last digits. The index "
        "records it."
    )
    monkeypatch.setattr(part_files, "_processor", lambda: here)
    shutil.rmtree(folder / "features")  # as if the part had been killed, and went on here
    record = json.loads((folder / "parts" / "2-of-2.json").read_text()) | {"files": {}}
    del record["digest"]
    (folder / "parts" / "2-of-2.json").write_text(json.dumps(record | {"digest": part_files.digest_of(record)}))
    refused(InputError, lambda: commit_parts(folder), "30 of 54 rows", "--shard 2/2")
    for part in ("1/2", "2/2"):
        build_part(folder, rows(), part)
    index = commit_parts(folder)
    assert index.manifest.parts == ({"part": "2/2", "shards": [3, 7], "processor": "another processor"},)
    assert Index.open(folder).manifest == index.manifest
    capsys.readouterr()
    assert run(["info", "index"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "part 2/2 (rows 24 to 53): computed otherwise than the fit: processor another processor" in said
    whole = build_index(rows(), "whole", choose_model("two").checkpoints, options)
    assert whole.manifest.parts == ()
    found, wanted = (Retriever(i).retrieve([TEXTS[0]], methods=["gc", "if"], top=5) for i in (index, whole))
    assert found.column("score").to_pylist() == wanted.column("score").to_pylist()
