"""Files of answers that go on behind the test rows that were answered before a kill: same bytes, refusals, damage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import N_QUERIES, N_ROWS
from interruptions import hashes
from tiny import write_jsonl
from warm import run_program

from forebear.cli.main import run
from forebear.indexer.building.change import retire_rows
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.storage.locks import exclusive
from forebear.retriever.answers import parts as parts_module
from forebear.retriever.answers.result_file import result_writer
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

ASKED = ("gc", "if", "tracin-we", "if++")
ENDINGS = ("parquet", "jsonl", "csv")
BLOCK_ROWS = 2  # 7 test rows are 4 blocks
PARTS = [f"{a:09d}-{b:09d}.arrow" for a, b in ((0, 1), (2, 3), (4, 5), (6, 6))]
TOP = 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("forebear.retriever.retriever.queries_together", lambda *_: BLOCK_ROWS)


def write_test_rows(world, folder: Path) -> Path:
    return write_jsonl(folder / "test.jsonl", text=world.queries, label=world.query_labels)


@pytest.fixture
def test_rows(bert_world, tmp_path):
    return write_test_rows(bert_world, tmp_path)


def arguments(world, test, out, *more, methods=ASKED, top=TOP):
    asked = ["retrieve", "--index", world.index.folder, "--test", test, "--method", ",".join(methods), "--top", top]
    return list(map(str, [*asked, "--out", out, *more]))


def written(folder: Path, name: str) -> dict[str, bytes]:
    """The output file and the provenance beside it."""
    return {path.name: path.read_bytes() for path in folder.glob(f"{name}*") if path.is_file()}


def killed(args: list[str], where: str) -> None:
    """Run the command as a process of its own that kills itself, with SIGKILL, where code says so."""
    code = f"""
import os, signal, sys
from pathlib import Path
import forebear.retriever.retriever as retriever
from forebear.cli.main import run
from forebear.retriever.answers import parts, result_file
retriever.queries_together = lambda *_: {BLOCK_ROWS}
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def dies(real, at):
    calls = iter(range(at))
    return lambda *args, **choices: real(*args, **choices) if next(calls, None) is not None else die()
{where}
sys.exit(run({args!r}))
"""
    done = run_program(code)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED = {  # where, and the parts that are there then
    "before the first block": ("parts.Parts.write = die", 0),
    "after one block": ("parts.Parts.write = dies(parts.Parts.write, 1)", 1),
    "within a block": ("parts.file_sha256 = dies(parts.file_sha256, 2)", 2),
    "after all blocks": ("parts.Parts.tables = die", 4),
    "within the file": (
        "result_file.pq.ParquetWriter.write_table = dies(result_file.pq.ParquetWriter.write_table, 1)",
        4,
    ),
    "after the file": ("parts.remove_parts = dies(parts.remove_parts, 1)", 4),
}


@pytest.fixture(scope="module")
def undisturbed(bert_world, tmp_path_factory):
    """The bytes that a run leaves which nothing ends, and what it says with its file's name as ``{out}``."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr("forebear.retriever.retriever.queries_together", lambda *_: BLOCK_ROWS)
        asked = arguments(bert_world, write_test_rows(bert_world, folder), folder / "whole.parquet")
        assert run(asked) == 0
    return (folder / "whole.parquet").read_bytes(), said.getvalue().replace(str(folder / "whole.parquet"), "{out}")


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_goes_on_to_the_same_bytes(where, bert_world, undisturbed, test_rows, tmp_path, capsys):
    out, (wanted, said_of_it) = tmp_path / "a.parquet", undisturbed
    said = said_of_it.replace("{out}", str(out)).splitlines()
    code, n_parts = KILLED[where]
    killed(arguments(bert_world, test_rows, out), code)
    folder = tmp_path / "a.parquet.parts"
    assert sorted(path.name for path in folder.glob("*.arrow")) == PARTS[:n_parts]
    assert out.exists() == (where == "after the file")
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        block = Retriever.answer_block
        patch.setattr(
            Retriever, "answer_block", lambda self, start, *a, **b: asked.append(start) or block(self, start, *a, **b)
        )
        more = ["--force"] if out.exists() else []
        assert run(arguments(bert_world, test_rows, out, "--resume", *more)) == 0
    assert asked == [0, 2, 4, 6][n_parts:]
    assert out.read_bytes() == wanted
    assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "test.jsonl"]
    again = capsys.readouterr().err.splitlines()
    n_done = min(N_QUERIES, BLOCK_ROWS * n_parts)
    assert [line for line in again if line not in said] == [
        f"note: a.parquet: {n_done} of {N_QUERIES} test rows were answered before the interruption"
    ]
    assert [line for line in said if line not in again] == []


def broken_off(world, test, out, n_parts, *more, capsys=None, **choices):
    """As :func:`killed`, but in this process and by an error, which leaves the same parts."""
    write, calls = parts_module.Parts.write, iter(range(n_parts))

    def breaks(self, start, tables):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        write(self, start, tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module.Parts, "write", breaks)
        assert run(arguments(world, test, out, *more, **choices)) == 130
    if capsys is not None:
        assert "retrieve with --resume" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_file_is_what_is_written_without_parts(ending, bert_world, test_rows, tmp_path, capsys):
    """By the same writer from tables that were never on disk."""
    source = open_rows(test_rows, classes=bert_world.retriever.label_names)
    question = bert_world.retriever.resolve(QuerySpec(methods=ASKED, top=TOP))
    wanted = tmp_path / "wanted"
    with result_writer(wanted / f"a.{ending}", bert_world.retriever.metadata(question), force=False) as write:
        for answers in bert_world.retriever.answers(source, question):
            for table in bert_world.retriever.tables(answers):
                write(table)
    out = tmp_path / "found" / f"a.{ending}"
    broken_off(bert_world, test_rows, out, 2, capsys=capsys)
    assert run(arguments(bert_world, test_rows, out, "--resume")) == 0
    assert written(out.parent, "a") == written(wanted, "a")
    assert len(written(wanted, "a")) == (1 if ending == "parquet" else 2)
    assert run(arguments(bert_world, test_rows, out, "--force")) == 0
    assert written(out.parent, "a") == written(wanted, "a")
    assert [path.name for path in out.parent.iterdir() if path.is_dir()] == []


def test_notes_and_counts_are_of_all_test_rows(bert_world, test_rows, tmp_path, capsys):
    choices = {"methods": ("gd",), "top": N_ROWS}
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 3, **choices)
    capsys.readouterr()
    assert run(arguments(bert_world, test_rows, out, "--resume", **choices)) == 0
    said = capsys.readouterr().err
    assert f"{N_QUERIES} queries, {2 * N_ROWS * N_QUERIES} results" in said
    assert f"of {N_ROWS * N_QUERIES} proponents have scores below 0" in said
    assert f"of {N_ROWS * N_QUERIES} opponents have scores above 0" in said


def refused(capsys, args):
    capsys.readouterr()
    assert run(args) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    return line


def test_what_cannot_go_on_is_refused(bert_world, test_rows, tmp_path, capsys):
    out = tmp_path / "a.parquet"
    said = refused(capsys, arguments(bert_world, test_rows, out, "--resume"))
    assert f"there is no {out}.parts of an interrupted run" in said
    for option in (["--aggregate"], ["--group-by", "label"]):
        said = refused(capsys, arguments(bert_world, test_rows, out, "--resume", *option, methods=("gd",)))
        assert f"{option[0]} keeps none" in said
    asked = ["retrieve", "--index", str(bert_world.index.folder), "--test", str(test_rows), "--resume"]
    assert "Name it by --out" in refused(capsys, asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl"]


def test_parts_that_are_left_are_not_written_over_unasked(bert_world, test_rows, tmp_path, capsys):
    out, folder = tmp_path / "a.parquet", tmp_path / "a.parquet.parts"
    broken_off(bert_world, test_rows, out, 2)
    before = hashes(folder)
    for option in ([], ["--group-by", "label"]):
        said = refused(capsys, arguments(bert_world, test_rows, out, *option, methods=("gd",)))
        assert (
            f"{folder} holds answers of a run that was interrupted. Give --resume to go on with them, or --force"
            in said
        )
    out.write_bytes(b"mine")
    said = refused(capsys, arguments(bert_world, test_rows, out, "--resume"))
    assert "Give --resume and --force" in said
    assert (hashes(folder), out.read_bytes()) == (before, b"mine")
    with exclusive(tmp_path / "a.parquet.lock", str(out)):
        assert f"is being written by process {os.getpid()}" in refused(capsys, arguments(bert_world, test_rows, out))
    assert run(arguments(bert_world, test_rows, out, "--force", top=1)) == 0
    assert pq.read_table(out).num_rows == 2 * N_QUERIES * len(ASKED)
    assert not folder.exists()


def test_groups_replace_parts_by_force_alone(bert_world, test_rows, tmp_path):
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 2)
    assert run(arguments(bert_world, test_rows, out, "--group-by", "label", "--force", methods=("gd",))) == 0
    assert not (tmp_path / "a.csv.parts").exists()


def test_a_folder_of_something_else_is_left_alone(bert_world, test_rows, tmp_path, capsys):
    folder = tmp_path / "a.csv.parts"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    for option in ([], ["--force"], ["--resume"]):
        said = refused(capsys, arguments(bert_world, test_rows, tmp_path / "a.csv", *option))
        assert "holds something else, thesis.tex: it is left alone" in said
    assert (folder / "thesis.tex").read_text() == "years"


def test_a_run_without_a_finished_block_leaves_nothing(bert_world, test_rows, tmp_path):
    broken_off(bert_world, test_rows, tmp_path / "new" / "a.csv", 0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"top": 3}, ["top=4", "asks for top=3"]),
        ({"methods": ("if", "gc", "tracin-we", "if++")}, ["methods=['gc', 'if',", "asks for methods=['if', 'gc',"]),
        ({"more": ["--target", "gold"]}, ["target=predicted", "asks for target=gold"]),
        ({"more": ["--damping", "0.5"]}, ["damping=None", "asks for damping=0.5"]),
        (
            {"more": ["--label-names", "LABEL_1,LABEL_0"]},
            ["label names=", "asks for label names=['LABEL_1', 'LABEL_0']"],
        ),
    ],
)
def test_another_question_is_refused_by_what_differs(change, parts, bert_world, test_rows, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    broken_off(bert_world, test_rows, out, 1)
    change = dict(change)
    said = refused(capsys, arguments(bert_world, test_rows, out, "--resume", *change.pop("more", []), **change))
    for part in (f"{out}.parts was begun with ", *parts, "or start over with --force"):
        assert part in said
    assert run(arguments(bert_world, test_rows, out, "--resume", "--damping", "0.1x")) == 0  # the index's own, by name


def test_other_test_rows_are_refused(bert_world, test_rows, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    broken_off(bert_world, test_rows, out, 1)
    lines = test_rows.read_text().splitlines()
    test_rows.write_text("\n".join(lines[:-1]) + "\n")
    said = refused(capsys, arguments(bert_world, test_rows, out, "--resume"))
    assert "number of test rows=7; this command asks for number of test rows=6" in said
    test_rows.write_text("\n".join([*lines[:-1], json.dumps({"text": "other", "label": 0})]) + "\n")
    assert "test rows' sha256=" in refused(capsys, arguments(bert_world, test_rows, out, "--resume"))
    with_column = [json.dumps(json.loads(line) | {"from": 0}) for line in lines]
    test_rows.write_text("\n".join(with_column) + "\n")  # which functions that find spans would see
    assert "test rows' other columns=" in refused(capsys, arguments(bert_world, test_rows, out, "--resume"))


def test_another_index_is_refused(bert_world, test_rows, tmp_path, capsys):
    folder, out = shutil.copytree(bert_world.index.folder, tmp_path / "index"), tmp_path / "a.csv"
    world = SimpleNamespace(index=Index.open(folder))
    broken_off(world, test_rows, out, 1, methods=("gc",))
    then = retire_rows(folder, [3]).manifest.digest()
    said = refused(capsys, arguments(world, test_rows, out, "--resume", methods=("gc",)))
    assert f"index digest={world.index.manifest.digest()}; this command asks for index digest={then}" in said


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "of another run", "missing"])
def test_a_damaged_part_is_asked_again(damage, bert_world, test_rows, tmp_path, capsys):
    whole, out, two = tmp_path / "whole.parquet", tmp_path / "a.parquet", {"methods": ("gc", "if")}
    assert run(arguments(bert_world, test_rows, whole, **two)) == 0
    broken_off(bert_world, test_rows, out, 3, **two)
    part = tmp_path / "a.parquet.parts" / PARTS[1]
    content = part.read_bytes()
    if damage == "cut":  # where a reader of Arrow streams sees no fault
        part.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        part.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "emptied":
        part.write_bytes(b"")
    elif damage == "of another run":
        broken_off(bert_world, test_rows, tmp_path / "b.parquet", 2, top=3, **two)
        part.write_bytes((tmp_path / "b.parquet.parts" / PARTS[1]).read_bytes())
    else:
        part.unlink()
    capsys.readouterr()
    assert run(arguments(bert_world, test_rows, out, "--resume", **two)) == 0
    said = capsys.readouterr().err
    assert (f"warning: {part} is damaged: its test rows 2 to 3 are asked again." in said) == (damage != "missing")
    assert f"4 of {N_QUERIES} test rows were answered" in said
    assert out.read_bytes() == whole.read_bytes()


def test_a_part_damaged_before_the_file_is_written_never_comes_into_it(bert_world, test_rows, tmp_path, capsys):
    out, part = tmp_path / "a.csv", tmp_path / "a.csv.parts" / PARTS[0]
    tables = parts_module.Parts.tables

    def damaged(self):
        part.write_bytes(part.read_bytes()[:-65] + b"x" + part.read_bytes()[-64:])
        return tables(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module.Parts, "tables", damaged)
        assert run(arguments(bert_world, test_rows, out)) == 1
    assert f"error: {part} was altered" in capsys.readouterr().err
    assert not out.exists()
    assert run(arguments(bert_world, test_rows, out, "--resume")) == 0
    assert not part.parent.exists()


def test_a_damaged_account_of_the_run_is_refused(bert_world, test_rows, tmp_path, capsys):
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 1)
    for content in (b"{", b"[]", b"{}"):
        (tmp_path / "a.csv.parts" / "run.json").write_bytes(content)
        assert run(arguments(bert_world, test_rows, out, "--resume")) == 1
        assert "run.json is damaged" in capsys.readouterr().err


def test_another_number_of_threads_is_warned_of(bert_world, test_rows, tmp_path, capsys):
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 1)
    path = tmp_path / "a.csv.parts" / "run.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 7'))
    assert run(arguments(bert_world, test_rows, out, "--resume")) == 0
    assert "begun with 7 threads and goes on with 1" in capsys.readouterr().err


def test_a_full_disk_keeps_the_parts(bert_world, test_rows, tmp_path, small_disk, capsys):
    choices = {"methods": ("gc", "if"), "top": N_ROWS}
    whole = tmp_path / "whole.jsonl"
    assert run(arguments(bert_world, test_rows, whole, **choices)) == 0
    disk = small_disk(200)
    capsys.readouterr()
    assert run(arguments(bert_world, test_rows, disk / "a.jsonl", **choices)) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "No space left" in line
    assert "retrieve go on by --resume" in line
    assert list((disk / "a.jsonl.parts").glob("*.arrow"))
    assert not list(disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert run(arguments(bert_world, test_rows, disk / "a.jsonl", "--resume", **choices)) == 0
    assert (disk / "a.jsonl").read_bytes() == whole.read_bytes()


def test_parts_are_streams_that_arrow_reads(bert_world, test_rows, tmp_path):
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 1)
    with pa.OSFile(str(tmp_path / "a.csv.parts" / PARTS[0])) as file:
        table = pa.ipc.open_stream(file).read_all()
    wanted = bert_world.retriever.retrieve(bert_world.queries[:2], methods=list(ASKED), top=TOP)
    names = ["query", "method", "side", "rank", "row", "score", "text", "span", "words"]
    assert table.select(names).to_pylist() == wanted.select(names).to_pylist()


def test_an_effect_that_was_measured_meanwhile_is_no_other_question(bert_world, test_rows, tmp_path):
    out = tmp_path / "a.csv"
    broken_off(bert_world, test_rows, out, 1, methods=("if",))
    path = tmp_path / "a.csv.parts" / "run.json"
    facts = json.loads(path.read_text())
    assert "methods.if.damping" in facts["how"]
    assert not [name for name in facts["how"] if "effect_measured" in name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forebear.retriever.answers.coverage.effect_size", lambda *_: {"slope": 0.5})
        assert run(arguments(bert_world, test_rows, out, "--resume", methods=("if",))) == 0
    assert '"slope": 0.5' in (tmp_path / "a.csv.meta.json").read_text()
