"""Commands and programs in processes of their own that need not import torch and transformers again.

A process of ``forebear`` takes seven seconds of processor time to import its libraries, more than most tests compute.
Here they are imported once, by a server that starts each process as a copy of itself. The rest is as a user has it: own
folder, environment, streams, signals and exit code; but nothing waits until a file is on the disk. What is tested of a
new interpreter uses ``subprocess``.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

LIBRARIES = [
    "faiss", "matplotlib.figure", "pandas", "pydantic.main", "pytest", "scipy.stats", "sklearn.linear_model",
    "transformers.models.bert.modeling_bert", "transformers.models.auto.tokenization_auto", "transformers.trainer",
    "forebear.cli.main", "forebear.evaluation.audits.rows.hub_shares", "forebear.evaluation.demo.run",
]  # fmt: skip
_COMMAND = "from forebear.cli.main import main; main()"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LIBRARIES)


def run_command(
    arguments: Sequence[object], folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run ``forebear`` with these arguments in a folder, the current one by default."""
    return _run(_COMMAND, arguments, folder, environment)


def run_program(
    code: str, folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder, as ``python -c`` does."""
    return _run(code, (), folder, environment)


def run_tests(
    arguments: Sequence[object], folder: Path, paths: Sequence[Path], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest in the repository, or in a copy of it, which is imported if it comes first in the import paths."""
    code = (
        "import os, sys; sys.path[:0] = os.environ['PYTHONPATH'].split(os.pathsep)\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'forebear']: del sys.modules[name]\n"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    # What the libraries above have imported cannot be rewritten by the plugins, which none of these tests needs.
    given = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return _run(code, arguments, folder, os.environ | given | variables)


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


def start_command(
    arguments: Sequence[object], folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Started:
    """Start ``forebear`` with these arguments, and do not wait for its end."""
    return Started(_COMMAND, arguments, folder, environment)


def start_program(code: str, arguments: Sequence[object]) -> Started:
    """Start a Python program as ``python -c`` does, and do not wait for its end."""
    return Started(code, arguments, None, os.environ)


def _run(
    code: str, arguments: Sequence[object], folder: Path | None, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return Started(code, arguments, folder, environment).wait()


class Started:
    """A program at work in a process of its own."""

    def __init__(
        self, code: str, arguments: Sequence[object], folder: Path | None, environment: Mapping[str, str]
    ) -> None:
        self._words = [str(argument) for argument in arguments]
        self._streams = tempfile.mkdtemp()
        where = str(folder or Path.cwd())
        self._process = _CONTEXT.Process(target=_be, args=(code, self._words, where, dict(environment), self._streams))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Its exit code, or minus the signal's number, and what it printed."""
        self._process.join(timeout)
        assert self._process.exitcode is not None
        printed = [(Path(self._streams) / name).read_text(encoding="utf-8") for name in ("out", "err")]
        shutil.rmtree(self._streams)
        return subprocess.CompletedProcess(self._words, self._process.exitcode, *printed)


def _be(code: str, arguments: list[str], folder: str, environment: dict[str, str], streams: str) -> None:
    """Become the process that was asked for."""
    for number, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(Path(streams) / name, os.O_WRONLY | os.O_CREAT), number)
    _become(code, ["forebear", *arguments], folder, environment)


def _become(code: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    gc.freeze()  # garbage is not sought among the libraries, at the end of each training of transformers
    os.fsync = os.fstat  # type: ignore[assignment]  # files of tests need not outlive a loss of power
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where these tests run in the background
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # as in a new process: decided by the environment
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
