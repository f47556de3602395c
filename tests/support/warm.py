"""Commands and programs in processes of their own that need not import torch and transformers again.

A process of ``forebear`` takes seven seconds of processor time to import its libraries, more than most tests compute.
Here they are imported once, by a server that starts each process as a copy of itself. The rest is as a user has it: own
folder, environment, streams and exit code. What is tested of a fresh process, or of one that is killed, uses
``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = [
    "faiss", "transformers.models.bert.modeling_bert", "transformers.models.auto.tokenization_auto",
    "forebear.cli.main", "forebear.evaluation.audits.rows.hub_shares", "forebear.evaluation.demo.run",
]  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LIBRARIES)


def run_command(
    arguments: Sequence[object], folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run ``forebear`` with these arguments in a folder, the current one by default."""
    return _run("from forebear.cli.main import main; main()", arguments, folder, environment)


def run_program(
    code: str, folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder, as ``python -c`` does."""
    return _run(code, (), folder, environment)


def _run(
    code: str, arguments: Sequence[object], folder: Path | None, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as streams:
        process = _CONTEXT.Process(
            target=_be, args=(code, words, str(folder or Path.cwd()), dict(environment), streams)
        )
        process.start()
        process.join()
        printed = [(Path(streams) / name).read_text(encoding="utf-8") for name in ("out", "err")]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, *printed)


def _be(code: str, arguments: list[str], folder: str, environment: dict[str, str], streams: str) -> None:
    """Become the process that was asked for."""
    for number, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(Path(streams) / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["forebear", *arguments]
    sys.path.insert(0, "")
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:  # as the interpreter does at the end of a program
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
