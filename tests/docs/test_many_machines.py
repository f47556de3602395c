"""The shell scripts of docs/many-machines.md run as they stand, with stand-ins for Slurm, ssh and rsync.

A stand-in for ``forebear`` hands its words to this process, which runs the command in a copy of an interpreter that has
the libraries.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import hashes
from places import ROOT
from tiny import labels, sentences
from warm import Started, run_command, run_program, start_command

PAGE = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
ARRAY, SUBMITTING, OVER_SSH, PYTHON = re.findall(r"^```(?:bash|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
STAND_INS = {
    "forebear": """
        request=$(mktemp "$REQUESTS/XXXXXX")
        printf '%s\\n' "$PWD" "$@" > "$request" && mv "$request" "$request.asked"
        while [ ! -f "$request.done" ]; do sleep 0.02; done
        exit "$(cat "$request.done")"
    """,
    # runs an array's jobs at once; prints the job's number as sbatch does
    "sbatch": """
        for word; do case $word in --wrap) wrapped=1;; *) last=$word;; esac; done
        if [ -n "$wrapped" ]; then bash -c "$last"; exit; fi
        n=$(sed -n 's/^#SBATCH --array=1-//p' "$last")
        for i in $(seq "$n"); do SLURM_ARRAY_TASK_COUNT=$n SLURM_ARRAY_TASK_ID=$i bash "$last" >&2 & done
        wait; echo 17
    """,
    "ssh": 'cd "$HOSTS/$1" && bash -c "$2"',
    # HOST:PATH is a folder of that host
    "rsync": """
        shift; words=(); for word; do
          [[ $word == *:* ]] && word="$HOSTS/${word%%:*}/${word#*:}"; words+=("$word")
        done
        mkdir -p "${words[-1]}" && cp -rL "${words[@]}"
    """,
}


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model and the rows of the page, and the stand-ins in the path."""
    texts, gold = sentences(20, seed=3, low=3), labels(20, 2, seed=4)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip([*texts, *texts[2:6]], [*gold, *gold[2:6]], strict=True)])
    shutil.copytree(tiny_model("bert", 2, 0), tmp_path / "my-model")
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    for name in ("REQUESTS", "HOSTS"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for host in ("ant", "bee", "cat"):
        (tmp_path / "hosts" / host).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(script: str, place: Path) -> list[list[str]]:
    """Run a shell script that must end well; returns the words of the forebear commands that it ran, in order."""
    with (place / "said").open("w") as said:
        shell = subprocess.Popen(["bash", "-euo", "pipefail", "-c", script], stdout=said, stderr=said)
    running: dict[Path, Started] = {}
    asked: list[list[str]] = []
    while shell.poll() is None:
        for request in (place / "requests").glob("*.asked"):
            folder, *words = request.read_text().splitlines()
            asked.append(words)
            running[request.with_suffix(".done")] = start_command(words, Path(folder))
            request.unlink()
        for answer in [answer for answer, process in running.items() if not process.runs()]:
            done = running.pop(answer).wait()
            assert done.returncode == 0, done.stderr
            answer.with_suffix(".code").write_text(str(done.returncode))
            answer.with_suffix(".code").rename(answer)
        time.sleep(0.01)
    assert shell.returncode == 0, (place / "said").read_text()
    return asked


@pytest.mark.slow
def test_the_scripts_of_the_page_build_the_index_of_one_process(place: Path) -> None:
    plain = ["index", "--model", "my-model", "--train", "train.csv", "--out", "plain", "--shard-rows", "8"]
    assert run_command(plain, place).returncode == 0
    wanted = hashes(place / "plain")
    (place / "parts.sbatch").write_text(ARRAY)
    commands = run_script(SUBMITTING, place)
    assert sorted(words[words.index("--shard") + 1] for words in commands if "--shard" in words) == [
        "1/3",
        "2/3",
        "3/3",
    ]
    assert hashes(place / "my-index") == wanted
    shutil.rmtree("my-index")
    commands = run_script(OVER_SSH, place)
    assert len(commands) == 5
    assert hashes(place / "my-index") == wanted
    shutil.rmtree("my-index")
    in_files_of_8 = PYTHON.replace(".checkpoints)", ".checkpoints, __import__('forebear').BuildOptions(shard_rows=8))")
    done = run_program(in_files_of_8, place, os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    assert hashes(place / "my-index") == wanted
