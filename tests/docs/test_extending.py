"""The diffs of docs/extending.md: each applies to this tree, and the tests that it brings pass on the result."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from warm import run_tests

DIFFS = sorted((ROOT / "docs" / "examples").glob("*.diff"))
COPIED = ("forebear", "tests", "docs", "pyproject.toml")


def apply(diff: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``git apply`` in a folder that is no repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(diff)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code, the tests and the documents."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: the diffs of docs/extending.md are not applied")
    folder = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_page_shows_every_diff():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"literalinclude\} examples/(\S+\.diff)", page)) == [diff.name for diff in DIFFS]


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_diff_applies(diff, tree):
    done = apply(diff, tree, "--check")
    assert done.returncode == 0, f"{done.stderr}\nMake docs/examples/{diff.name} anew."


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_the_tests_of_a_diff_pass(diff, tree):
    tests = re.findall(r"^\+\+\+ b/(tests/\S+\.py)$", diff.read_text(encoding="utf-8"), re.MULTILINE)
    assert tests
    assert apply(diff, tree).returncode == 0
    try:
        arguments = ["-q", "-p", "no:cacheprovider", *tests]
        if "methods.md" in diff.read_text(encoding="utf-8"):
            arguments += ["tests/docs/test_pages.py", "-k", f"{Path(tests[0]).stem} or every_method"]
        done = run_tests(arguments, tree, [tree])
        assert done.returncode == 0, done.stdout + done.stderr
        changed = re.findall(r"^\+\+\+ b/(\S+\.py)$", diff.read_text(encoding="utf-8"), re.MULTILINE)
        for tool in (["format", "--check"], ["check"]):
            command = [sys.executable, "-m", "ruff", *tool, *changed]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
    finally:
        assert apply(diff, tree, "--reverse").returncode == 0
