"""The bar that a caller of the library may ask for: in a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from forebear.progress import ProgressBar, counted


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work() -> None:
    on_rows = counted(ProgressBar(), "gradients", 7)
    on_rows(3)
    on_rows(4)


def test_a_terminal_shows_the_stage_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := _Terminal())
    work()
    assert "gradients" in screen.getvalue()
    assert "7/7" in screen.getvalue()


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    work()
    assert file.getvalue() == ""


def test_a_notebook_gets_a_bar_although_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={"IPKernelApp": {}}))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr(sys, "stderr", page := io.StringIO())
    work()
    assert "7/7" in page.getvalue()


def test_a_stage_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := _Terminal())
    bar = ProgressBar()
    for _ in range(2):
        bar("rows", 0, 2)
        bar("rows", 2, 2)
    assert screen.getvalue().count("2/2") == 2
