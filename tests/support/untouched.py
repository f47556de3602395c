"""``pytest --untouched``: which modules of the package do the chosen tests never enter?

``pytest -m 'not slow' --untouched`` must name none: the fast tests are few, but of every module. A module is entered
when one of its functions is called in a process of the tests; what they start by a command of its own does not count.
"""

from __future__ import annotations

import ast
import inspect
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from places import ROOT

PACKAGE = ROOT / "forebear"


def modules_with_functions() -> set[str]:
    """Paths of the modules that have something to enter."""
    return {
        str(path)
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }


class Untouched:
    """Watches calls, and tells at the end; with pytest-xdist, what all workers saw."""

    def __init__(self) -> None:
        self.seen: set[CodeType] = set()
        self.entered: set[str] = set()

    def _watch(self, frame: FrameType, _event: str, _argument: Any) -> None:
        code = frame.f_code
        if code not in self.seen:
            self.seen.add(code)
            if code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(str(PACKAGE)):  # no body of a class
                self.entered.add(code.co_filename)

    def pytest_sessionstart(self) -> None:
        threading.settrace(self._watch)
        sys.settrace(self._watch)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        sys.settrace(None)
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["entered"] = sorted(self.entered)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.entered.update(getattr(node, "workeroutput", {}).get("entered", ()))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        missed = sorted(Path(path).relative_to(ROOT).as_posix() for path in modules_with_functions() - self.entered)
        terminalreporter.section("modules that no test entered")
        terminalreporter.line("\n".join(missed) or "none")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--untouched", action="store_true", help="list the modules of forebear that no test enters")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--untouched"):
        config.pluginmanager.register(Untouched())
