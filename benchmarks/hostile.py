"""Hostile data files: every one is read rightly, or refused in one line with exit code 2, in bounded memory.

    python benchmarks/hostile.py [--only tables nested]

Files are made in a temporary folder, as small as they can be: a line of 1 GB is a sparse file, a bomb is packed. Each
is given to ``forebear retrieve --test`` of a tiny index, in a child process that may take ``MEMORY_BYTES`` more address
space than it has when it begins. The child is a fork of a process that has imported the package, so that a case takes
its own time and not that of the imports.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import write_result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
MEMORY_BYTES = 4 << 30
SECONDS = 120
TEXT = "a good film"


@dataclass(frozen=True)
class Case:
    """A file that is given to a command.

    Attributes:
        name: What is hostile about it.
        path: The file, or what stands in its place.
        n_rows: How many rows must be read; None: it must be refused.
        says: Part of the line that refuses it.
        may_end_early: What is missing may be what ends the file, and no row.
    """

    name: str
    path: Path
    n_rows: int | None = None
    says: str = ""
    may_end_early: bool = False


def bombs(folder: Path) -> Iterator[Case]:
    """Files that unpack to far more than they hold."""
    rows = b"text,label\n" + b"a,0\n" * (1 << 20)
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress)):
        path = folder / f"rows.csv{suffix}"
        packed = pack(b"a,0\n" * (1 << 22))
        with path.open("wb") as file:
            file.write(pack(rows))
            for _ in range(64):  # members one after the other: 1 GiB of rows
                file.write(packed)
        yield Case(f"{suffix} bomb of rows", path, says="times its size")
    path = folder / "line.jsonl.gz"
    zeros = gzip.compress(b" " * (64 << 20))
    path.write_bytes(gzip.compress(b'{"text": "') + zeros * 64)
    yield Case("gzip bomb of one line of 4 GiB", path, says="times its size")
    for n_rows, n_bytes, kind, store_schema in (
        (100_000, 8 << 20, "strings", False),
        (5_000, 1 << 20, "a dictionary", True),  # as pandas writes a Categorical
        (5_000, 1 << 20, "bytes beside the text", False),
        (5_000, 1 << 20, "lists beside the text", False),
    ):
        path = folder / f"bomb-{kind.replace(' ', '-')}.parquet"
        held = pa.array(["x" * n_bytes])
        column: pa.Array = pa.DictionaryArray.from_arrays(
            pa.array([0] * n_rows, pa.int32()), held.cast(pa.binary()) if "bytes" in kind else held
        )
        if "lists" in kind:
            column = pa.ListArray.from_arrays(pa.array(range(n_rows + 1), pa.int32()), column)
        columns = {"text": ["a"] * n_rows, "other": column} if "beside" in kind else {"text": column}
        pq.write_table(pa.table(columns), path, compression="zstd", store_schema=store_schema)
        yield Case(f"Parquet that repeats {n_bytes >> 20} MiB {n_rows:,} times, {kind}", path, says="times its size")
    path = folder / "labels.parquet"
    pq.write_table(pa.table({"text": ["a"] * 10, "label": ["x" * (64 << 20)] * 10}), path, compression="zstd")
    yield Case("Parquet with labels of 64 MiB", path)
    path = folder / "bomb.csv"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    yield Case("zip file named .csv", path, says="zip file")
    path = folder / "zstd.csv"
    path.write_bytes(pa.compress(b"text\n" * 1000, "zstd", asbytes=True))
    yield Case("zstd file named .csv", path, says="zstd file")


def wide(folder: Path) -> Iterator[Case]:
    """Rows that are too long or too wide."""
    names = ",".join(f"c{i}" for i in range(1_000_000))
    path = folder / "wide.csv"
    path.write_text(f"text,{names}\n" + "a" + "," * 1_000_000 + "\n")
    yield Case("CSV of a million columns", path, says="columns")
    path = folder / "wide.jsonl"
    path.write_text(json.dumps({"text": "a"} | {f"c{i}": i for i in range(1_000_000)}) + "\n")
    yield Case("JSON object of a million keys", path, says="16 MiB")
    path = folder / "keys.jsonl"
    path.write_text("".join(json.dumps({"text": "a", f"c{i}": i}) + "\n" for i in range(1_000_000)))
    yield Case("JSON Lines with a new key in each of a million rows", path, says="columns")
    path = folder / "wide.parquet"
    columns = {f"c{i}": pa.array([1], pa.int8()) for i in range(100_000)}
    pq.write_table(pa.table({"text": ["a"], **columns}), path, write_statistics=False)
    yield Case("Parquet of 100,000 columns", path, says="columns")
    for suffix, begin in (
        (".csv", b"text\n"),
        (".tsv", b"text\n"),
        (".jsonl", b'{"text": "'),
        (".json", b'[{"text": "'),
    ):
        path = folder / f"line{suffix}"
        with path.open("wb") as file:
            file.write(begin)
            file.seek(1 << 30)  # a hole, read as NUL bytes
            file.write(b"\n")
        yield Case(f"{suffix} with a line of 1 GB", path, says="16 MiB")
    path = folder / "quote.csv"
    path.write_text('text,label\n"a,0\n' + "b,1\n" * 10_000_000)
    yield Case("CSV whose first quote is never closed (40 MB)", path, says="quote")


def nested(folder: Path) -> Iterator[Case]:
    """Odd values in JSON."""
    deep = "[" * 1_000_000 + "]" * 1_000_000
    for name, content, n_rows, says in (
        ("deep array in a line", '{"text": "a", "x": ' + deep + "}\n", None, "line 1"),
        ("deep array as the file", deep, None, "broken"),
        ("deep objects", '{"text": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, None, "line 1"),
        ("NaN, Infinity and null beside the text", '{"text": "a", "x": NaN, "y": Infinity, "z": -Infinity}\n', 1, ""),
        ("NaN as text", '{"text": NaN}\n', None, "a number in row 0"),
        ("NaN as label", '{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n', 2, ""),
        ("Infinity as label", '{"text": "a", "label": Infinity}\n', None, "a number"),
        ("an integer of 10,000 digits", '{"text": "a", "label": ' + "9" * 10_000 + "}\n", None, "line 1"),
        ("an integer of 30 digits as label", '{"text": "a", "label": ' + "9" * 30 + "}\n", None, "a long integer"),
        ("a lone surrogate", '{"text": "\\ud83d"}\n', None, "line 1"),
        ("NUL in a text", '{"text": "a \\u0000 b"}\n', 1, ""),
        ("objects and lists beside the text", '{"text": "a", "x": {"y": [1]}}\n{"text": "b", "x": 3}\n', 2, ""),
        ("an object as text", '{"text": {"a": 1}}\n', None, "an object in row 0"),
        ("the same key twice", '{"text": "a", "text": "b"}\n', None, "twice"),
        ("an array of objects over many lines", json.dumps([{"text": "a"}, {"text": "b"}], indent=4), 2, ""),
        ("an array that is cut short", json.dumps([{"text": "a"}, {"text": "b"}])[:-8], None, "broken"),
        ("carriage returns alone between lines", '{"text": "a"}\r{"text": "b"}', None, "line 1"),
        ("line ends of all kinds", '{"text": "a"}\r\n{"text": "b"}\n\r\n{"text": "c"}', 3, ""),
    ):
        path = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        path.write_text(content)
        yield Case(f"JSON: {name}", path, n_rows, says)


def tables(folder: Path) -> Iterator[Case]:
    """Odd CSV and TSV files."""
    for name, content, n_rows, says in (
        ("line ends of all kinds", b"text,label\r\na,0\nb,1\rc,0\r\n", 3, ""),
        ("NUL bytes in a text", b"text\na\0b\n", 1, ""),
        ("a column twice", b"text,text\na,b\n", None, "more than one column"),
        ("a row too short", b"text,label\na,0\nb\n", None, "Expected 2 columns"),
        ("a row too long", b"text,label\na,0\nb,1,2\n", None, "Expected 2 columns"),
        ("a quote never closed", b'text,label\n"a,0\nb,1\n', None, ""),
        ("a quote within a value", b'text,label\na "b" c,0\n', 1, ""),
        ("semicolons", b"text;label\na;0\n", None, "semicolons"),
        ("a header alone", b"text,label\n", None, "no rows"),
        ("no bytes", b"", None, "empty"),
        ("blank lines alone", b"\n\n\n", None, ""),
        ("spaces after commas", b"text, label\na, 0\n", 1, ""),
        ("a huge integer as label", b"text,label\na," + b"9" * 400 + b"\n", 1, ""),
        ("integers and names as labels", b"text,label\na,0\nb,x\n", None, "a name in row 1"),
        ("UTF-8 with a byte order mark", "\ufefftext,label\nä,0\n".encode(), 1, ""),
        ("UTF-16 with a byte order mark", "text,label\nä,0\n".encode("utf-16"), 1, ""),
        ("UTF-16 without one", "text,label\nä,0\n".encode("utf-16-le"), None, "utf-16-le"),
        ("UTF-32 with a byte order mark", "text,label\nä,0\n".encode("utf-32"), 1, ""),
        ("UTF-16 cut in the middle", "text,label\nä,0\n".encode("utf-16")[:-1], None, ""),
        ("Latin-1", "text,label\ncafé,0\n".encode("latin-1"), None, "byte 14"),
        ("a text of 40 MiB", b"text,label\n" + b"a" * (40 << 20) + b",0\n", None, "longer than"),
        ("a word of a million letters", b"text,label\n" + b"a" * 1_000_000 + b",0\n", 1, ""),
        ("empty texts", b"text,label\n ,0\n,1\n", 2, ""),
    ):
        path = folder / f"{name.replace(' ', '-')}.csv"
        path.write_bytes(content)
        yield Case(f"CSV: {name}", path, n_rows, says)


def places(folder: Path, index: Path) -> Iterator[Case]:
    """What is no plain file, and odd names."""
    (folder / "folder.csv").mkdir()
    yield Case("a folder named .csv", folder / "folder.csv", says="no folder of datasets")
    os.mkfifo(folder / "pipe.csv")
    yield Case("a pipe", folder / "pipe.csv", says="pipe")
    yield Case("a device", Path("/dev/zero"), says="device")
    (folder / "link.csv").symlink_to(folder / "nothing")
    yield Case("a link to nothing", folder / "link.csv", says="link")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    yield Case("a link to itself", folder / "loop.csv", says="link")
    for name in ("two\nlines.csv", "a:b.csv", "ünï.csv", "-x.csv", "[red].csv", "%s{x}.csv"):
        (folder / name).write_text("text\na\n")
        yield Case(f"a file named {name!r}", folder / name, 1)
    yield Case("a name of 5,000 characters", Path("x" * 5000), says="no such file")
    yield Case("an index", index, says="is an index")
    (folder / "a.docx").write_text("text")
    yield Case("a kind that is not known", folder / "a.docx", says="expected a file named")


def typed(folder: Path) -> Iterator[Case]:
    """Odd columns of Parquet, and files cut short."""
    import datetime as dt

    day = pa.array([dt.date(2020, 1, 1)])
    odd: dict[str, dict[str, Any]] = {
        "a date as text": {"text": day},
        "a date beside the text": {"text": ["a"], "when": day, "at": pa.array([dt.datetime(2020, 1, 1)])},
        "a list as text": {"text": [["a"]]},
        "a struct as text": {"text": [{"a": "b"}]},
        "bytes as text": {"text": [b"a"]},
        "a list as label": {"text": ["a"], "label": [["b"]]},
        "nothing as text": {"text": pa.nulls(1)},
        "a label beyond 63 bits": {"text": ["a"], "label": pa.array([2**64 - 1], pa.uint64())},
        "no rows": {"text": pa.array([], pa.string())},
    }
    for name, columns in odd.items():
        path = folder / f"{name.replace(' ', '-')}.parquet"
        pq.write_table(pa.table(columns), path)
        yield Case(f"Parquet: {name}", path, 1 if name in ("a date beside the text", "a list as label") else None)
    whole = folder / "whole.parquet"
    pq.write_table(pa.table({"text": [f"{TEXT} {i}" for i in range(300)], "label": [i % 2 for i in range(300)]}), whole)
    content = whole.read_bytes()
    for length in sorted(
        {*range(0, len(content), max(1, len(content) // 20)), 1, 4, len(content) - 1, len(content) - 8}
    ):
        path = folder / f"cut-{length}.parquet"
        path.write_bytes(content[:length])
        yield Case(f"Parquet of {len(content)} bytes cut at {length}", path)
    import datasets

    datasets.disable_progress_bars()
    saved = folder / "saved"
    datasets.Dataset.from_dict({"text": [TEXT] * 300}).save_to_disk(str(saved))
    (arrow,) = saved.glob("*.arrow")
    content = arrow.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 10)):
        import shutil

        cut = folder / f"saved-{length}"
        shutil.copytree(saved, cut)
        (cut / arrow.name).write_bytes(content[:length])
        yield Case(f"saved data set of {len(content)} bytes cut at {length}", cut, may_end_early=True)


def bad_bytes(folder: Path) -> Iterator[Case]:
    """A byte that is no UTF-8 at every place of small files."""
    for suffix, content in ((".csv", b"text,label\na film,0\n"), (".jsonl", b'{"text": "a", "label": 0}\n')):
        for place in range(len(content)):
            path = folder / f"bad-{place}{suffix}"
            path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
            yield Case(f"{suffix} with a wrong byte at {place}", path, says=f"byte {place} (from 0)")


GROUPS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "bombs": bombs, "wide": wide, "nested": nested, "tables": tables, "typed": typed, "bad bytes": bad_bytes,
}  # fmt: skip


def outcome(case: Case, command: list[str]) -> dict[str, Any]:
    """Run a case in a child of bounded memory, and judge how it ends."""
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        child = os.fork()
        if not child:
            _run_child(command, errors.fileno(), output.fileno())
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - started
        errors.seek(0)
        output.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
        shown = output.read()
    code = os.waitstatus_to_exitcode(status)
    refusals = [line for line in lines if line.startswith("error:")]
    wrong = None
    if any("Traceback" in line or "a bug in forebear" in line for line in lines):
        wrong = "a traceback"
    elif case.may_end_early and not code:
        wrong = None if "of 300 queries" in " ".join(lines) else "rows are missing"
    elif case.n_rows is None and (code, len(refusals)) != (2, 1):
        wrong = f"exit code {code} and {len(refusals)} lines of error; expected 2 and 1"
    elif case.n_rows is None and case.says not in refusals[0]:
        wrong = f"the line does not say {case.says!r}"
    elif case.n_rows is not None and code:
        wrong = f"exit code {code}; expected {case.n_rows} rows"
    elif case.n_rows is not None and sum(line.startswith("query ") for line in shown.splitlines()) != min(
        case.n_rows, 5
    ):
        wrong = f"not the {case.n_rows} rows that are expected"
    elif lines and max(map(len, lines)) > 2000 + len(str(case.path)):
        wrong = "a line of more than 2,000 characters"
    refusals = [line.replace(str(case.path), case.path.name) for line in refusals]
    facts = {"case": case.name, "exit_code": code, "seconds": round(seconds, 2), "peak_mib": usage.ru_maxrss >> 10}
    return facts | {"said": (refusals or lines or [""])[-1][:400], "wrong": wrong}


def _run_child(command: list[str], errors: int, output: int) -> None:
    """Become the command, and never return."""
    try:
        os.dup2(errors, 2)
        os.dup2(output, 1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        from forebear.cli.main import run

        code = run(command)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def make_index(folder: Path) -> Path:
    """A tiny index to ask."""
    from tiny import labels, make_tiny_model, sentences, write_jsonl

    from forebear.cli.main import run

    model = make_tiny_model(folder / "model")
    train = write_jsonl(folder / "train.jsonl", text=sentences(20), label=labels(20))
    args = ["index", "--model", str(model), "--train", str(train), "--out", str(folder / "index"), "--quiet"]
    assert run([*args, "--damping", "none"]) == 0
    return folder / "index"


def main() -> None:
    """Run the groups that are asked for, print what went wrong, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*GROUPS, "places"], help="groups of cases")
    chosen = parser.parse_args()
    found = []
    torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
    with tempfile.TemporaryDirectory() as scratch:
        index = make_index(Path(scratch))
        for group in chosen.only:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                cases = places(Path(folder), index) if group == "places" else GROUPS[group](Path(folder))
                for case in cases:
                    command = ["retrieve", "--index", str(index), "--test", str(case.path), "--top", "1"]
                    facts = outcome(case, command)
                    found.append({"group": group, **facts})
                    if facts["wrong"]:
                        sys.stdout.write(f"WRONG {json.dumps(facts)}\n")
            sys.stdout.flush()
    wrong = sum(facts["wrong"] is not None for facts in found)
    most = max(facts["peak_mib"] for facts in found)
    slowest = max(facts["seconds"] for facts in found)
    sys.stdout.write(f"{len(found)} cases, {wrong} wrong, at most {most:,} MiB and {slowest:.1f} s\n")
    if set(chosen.only) == {*GROUPS, "places"}:
        write_result("hostile", n_cases=len(found), wrong=wrong, most_mib=most, slowest_seconds=slowest, cases=found)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
