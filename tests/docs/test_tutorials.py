"""The tutorials: every command and every program on the pages runs, in order, and prints what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
from places import HAS_MINILM, NO_MINILM, ROOT
from warm import run_command, run_program

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def alike(line: str) -> str:
    """A line without what differs between machines: its numbers, and the white space that they leave."""
    return " ".join(re.sub(r"[\d,.]*\d%?", "N", line).split())


def printed_by(done: subprocess.CompletedProcess[str]) -> str:
    """What a process printed on both streams; it must have ended well."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def commands(block: str) -> list[tuple[str, str]]:
    """Commands of a block with the first line that the page shows of what each prints."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.split("\n")[0], part.split("\n")[1] if "\n" in part else "") for part in parts]


def must_hold(printed: str, shown: str) -> None:
    """Check that a line of what was printed is what the page shows, but for numbers."""
    if shown.strip():
        assert alike(shown) in [alike(line) for line in printed.splitlines()], printed


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINILM, reason=NO_MINILM)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_as_it_stands(path, tmp_path):
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert sum(kind != "text" for kind, _ in blocks) >= 4
    printed = ""
    for kind, block in blocks:
        if kind == "python":
            printed = printed_by(run_program(block, tmp_path))
        elif kind == "console":
            for command, shown in commands(block):
                program, *arguments = shlex.split(command)
                assert program == "forebear"
                printed = printed_by(run_command(arguments, tmp_path, os.environ | {"COLUMNS": "80"}))
                must_hold(printed, shown)
            printed = ""  # a text that follows a command is a part of a longer output
        elif printed:
            must_hold(printed, block.split("\n")[0])
            printed = ""


def test_a_line_that_the_page_does_not_show_is_noticed():
    must_hold("wrote 3 files\n", "wrote 4 files")
    with pytest.raises(AssertionError):
        must_hold("wrote 3 files\n", "wrote 3 folders")
