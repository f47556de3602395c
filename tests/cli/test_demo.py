"""The demo end to end, as a new user runs it, and README's Python on what it wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import HAS_MINILM, NO_MINILM, ROOT
from warm import run_command, run_program

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOREBEAR = Path(sys.executable).parent / "forebear"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_MINILM, reason=NO_MINILM),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which `forebear demo` was run."""
    folder = tmp_path_factory.mktemp("demo")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([FOREBEAR, "demo"], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_demo_finds_what_was_planted(world):
    folder, out = world
    assert "NOT found" not in out
    result = json.loads((folder / "runs/demo/report/result.json").read_text())
    assert result["found"] is True
    assert result["dev_accuracy"] > 0.9
    assert result["wrong_labels"]["precision"]["gc"] > 10 * result["wrong_labels"]["share"]
    page = (folder / "runs/demo/report/report.html").read_text()
    assert "planted wrong label" in page
    assert not re.search(r'(src|href)="http', page)


def test_the_artifact_regression_finds_the_planted_artifact_and_no_other(world):
    folder, _ = world
    (folder / "mine.py").write_text('def odd(row):\n    return len(row["premise"]) % 2\n')
    found = {}
    for name, options in (("overlap", []), ("artifact", ["--feature", "mine.py:odd"])):
        arguments = ["audit", name, *options, "--index", "runs/demo/index", "--queries", "0", "--json"]
        done = run_command([*arguments, "--test", "runs/demo/data/probe.parquet"], folder)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["methods"]["if"]["groups"]["all"]
    assert found["overlap"]["rows_low"] > 0
    assert found["overlap"]["low"] > 0
    assert found["artifact"]["rows_low"] < 0 < found["artifact"]["rows_high"]


def test_the_demo_is_not_run_over_without_force(world):
    folder, _ = world
    done = run_command(["demo"], folder)
    assert done.returncode == 2
    assert "--force" in done.stderr


def test_the_python_in_readme_runs(world):
    folder, _ = world
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run_program(code, folder)
    assert done.returncode == 0, done.stderr
    assert "proponent" in done.stdout
    assert done.stdout.count("\n") == 21  # a heading and 2 methods x 2 sides x 5 rows


def test_the_index_of_the_demo_verifies(world):
    folder, _ = world
    done = run_command(["verify", "runs/demo/index"], folder)
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout
