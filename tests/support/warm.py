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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

LIBRARIES = [
    "faiss", "pandas", "pytest", "scipy.stats", "transformers.models.bert.modeling_bert",
    "transformers.models.auto.tokenization_auto", "forebear.cli.main",
    "forebear.evaluation.audits.rows.hub_shares", "forebear.evaluation.demo.run",
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


def run_tests(
    arguments: Sequence[object], folder: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder that holds a copy of the repository: its package is imported, not the one here."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'forebear']: del sys.modules[name]\n"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    # What the libraries above have imported cannot be rewritten by the plugins, which none of these tests needs.
    return _run(code, arguments, folder, {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


class CopiedInterpreter:
    """Stands in for ``subprocess.Popen`` of ``python -c CODE FD PARENT``, which ends with the process ``PARENT``.

    A copy is a child of the server, and so ends with that.
    """

    def __init__(
        self, command: Sequence[str], *, stdin: int, stderr: IO[bytes], pass_fds: Sequence[int], start_new_session: bool
    ) -> None:
        assert (stdin, start_new_session) == (subprocess.DEVNULL, True)
        (descriptor,) = pass_fds
        code, number, parent = command[command.index("-c") + 1 :]
        assert (number, parent) == (str(descriptor), str(os.getpid()))
        self._command = command
        with Connection(os.dup(descriptor)) as passed, Connection(os.dup(stderr.fileno())) as messages:
            self._process = _CONTEXT.Process(
                target=_be_interpreter, args=(code, passed, messages, str(Path.cwd()), dict(os.environ))
            )
            self._process.start()
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal's number."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0.0)
        return self._process.exitcode


def _be_interpreter(
    code: str, passed: Connection, messages: Connection, folder: str, environment: dict[str, str]
) -> None:
    os.setsid()
    os.dup2(messages.fileno(), 2)
    _become(code, ["-c", str(passed.fileno()), str(os.getppid())], folder, environment)


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
    _become(code, ["forebear", *arguments], folder, environment)


def _become(code: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
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
