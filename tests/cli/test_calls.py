"""The commands of ``audit`` and ``evaluate``, and ``explain``: each calls the function of the same name for Python."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from commands import COMMANDS

import forebear
from forebear.cli.commands import explain
from forebear.cli.commands.evaluate.training_rows import TruthOptions
from forebear.cli.main import run
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.report import ReportOptions
from forebear.evaluation.python.evaluations import Retraining
from forebear.progress import Listener, heard_by
from forebear.retriever.question.spec import QuerySpec

OTHER_NAMES = {  # of functions for Python whose commands have other names
    "audit mislabelled": "suspects",
    "evaluate semantic-agreement": "agreement",
    "evaluate label-agreement": "agreement",
}
CALLING = [name for name in COMMANDS if name.split()[0] in ("audit", "evaluate")]
REQUIRED = {"--feature": "f.py:f", "--true-label": "y"}


class _Called(Exception):
    """Ends a command where it would call the function, with the function and what is given to it."""

    def __init__(self, function: Any, given: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.given = function, given


@pytest.fixture
def not_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No index is opened: commands end with what they would call."""

    def stop(_report: ReportOptions, function: Any, _retriever: Any, *groups: Any, **given: Any) -> None:
        from forebear.cli.options.groups import values_of

        raise _Called(function, values_of(*groups) | given)

    monkeypatch.setattr(IndexOptions, "open", lambda _options: None)
    monkeypatch.setattr(TruthOptions, "read", lambda _options, _retriever: (object(), None))
    monkeypatch.setattr(ReportOptions, "call", stop)
    monkeypatch.setenv("FOREBEAR_DEBUG", "1")
    yield


def called(name: str) -> _Called:
    """What a command calls if only the options are given that it cannot do without."""
    words = [*name.split(), "--index", "I"]
    for option in COMMANDS[name].params:
        flag = option.opts[0]
        if flag in REQUIRED or (option.required and flag != "--index"):
            words += [flag, REQUIRED.get(flag, "x")]
    with pytest.raises(_Called) as caught:
        run(words)
    return caught.value


@pytest.mark.usefixtures("not_opened")
@pytest.mark.parametrize("name", CALLING)
def test_a_command_calls_the_function_of_its_name(name: str) -> None:
    group, own = name.split()
    door = {"audit": forebear.audits, "evaluate": forebear.evaluations}[group]
    assert called(name).function is getattr(door, OTHER_NAMES.get(name, own.replace("-", "_")))


@pytest.mark.usefixtures("not_opened")
@pytest.mark.parametrize("name", CALLING)
def test_a_commands_defaults_are_those_of_its_function(name: str) -> None:
    """None and nothing are the function's own defaults; each other value is compared with the one in its signature."""
    call = called(name)
    parameters = inspect.signature(call.function).parameters
    choices = {field.name: field.default for field in fields(QuerySpec)}
    compared = 0
    for option, value in call.given.items():
        if option in ("rows", "without", "shown", "feature", "measure", "wrong") or value is None or value == []:
            continue
        assert option in parameters or ("choices" in parameters and option in choices), f"{name} has no {option}"
        if option in parameters and parameters[option].default is inspect.Parameter.empty:  # which has no default
            continue
        default = parameters[option].default if option in parameters else choices[option]
        if option == "how":
            defaults = {f.name: getattr(default, f.name) for f in fields(Retraining) if f.name != "begin"}
            assert {n: getattr(value, n) for n in defaults} == defaults
        elif (name, option) == ("evaluate deletion-curve", "target"):  # which the function chooses in its body
            assert value == "gold"
        else:
            assert value == default, option
        compared += 1
    assert compared


def test_explain_has_the_defaults_of_its_function() -> None:
    parameters = inspect.signature(forebear.explain).parameters
    choices = {field.name: field.default for field in fields(QuerySpec)}
    compared = []
    for name, option in inspect.signature(explain.explain).parameters.items():
        if option.default is not None and (name in parameters or name in choices):
            default = 5 if name == "top" else parameters[name].default if name in parameters else choices[name]
            assert option.default in (default, inspect.Parameter.empty), name
            compared.append(name)
    assert {"form", "saliency_influence", "top", "target", "recall"} <= set(compared)


def test_who_listens_hears_warnings_and_notes(recwarn: pytest.WarningsRecorder) -> None:
    from forebear.progress import tell_note, tell_warning

    heard: list[str] = []
    with heard_by(Listener(lambda message: heard.append(str(message)), lambda subject, note: heard.append(note))):
        tell_warning("old")
        tell_note("the index", "older")
    assert heard == ["old", "older"]
    assert not recwarn.list
    tell_note("the index", "not told")
    with pytest.warns(UserWarning, match="^old$"):
        tell_warning("old")
