"""The tutorials: every command and every program on the pages runs, in order, and prints what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import HAS_MINILM, NO_MINILM, ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def alike(line: str) -> str:
    """A line without what differs between machines: its numbers, and the white space that they leave."""
    return " ".join(re.sub(r"[\d,.]*\d%?", "N", line).split())


def run(command: list[str], folder: Path) -> str:
    """What a command prints on both streams; it must end well."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
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
            printed = run([sys.executable, "-c", block], tmp_path)
        elif kind == "console":
            for command, shown in commands(block):
                assert command.startswith("forebear ")
                printed = run(["bash", "-c", command], tmp_path)
                must_hold(printed, shown)
            printed = ""  # a text that follows a command is a part of a longer output
        elif printed:
            must_hold(printed, block.split("\n")[0])
            printed = ""


def test_a_line_that_the_page_does_not_show_is_noticed():
    must_hold("wrote 3 files\n", "wrote 4 files")
    with pytest.raises(AssertionError):
        must_hold("wrote 3 files\n", "wrote 3 folders")
