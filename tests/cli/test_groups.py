"""Groups of options: a command takes a dataclass, the command line has its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from forebear.cli.options.groups import Options, Shown, flag_of, grouped, values_of


@dataclass(frozen=True, kw_only=True)
class Place(Options, panel="Places"):
    """Two options."""

    folder: Annotated[str, typer.Option("--folder", help="Where.")]
    depth: Annotated[int, typer.Option("--depth", help="How deep.")] = 3


@dataclass(frozen=True, kw_only=True)
class Names(Options):
    """An option that takes several values."""

    names: Annotated[list[str] | None, typer.Option("--names")] = None


def app_of(seen: list[object], **defaults: object) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @grouped(**defaults)
    def command(
        place: Place, names: Names, loud: Annotated[bool, typer.Option("--loud")], n: Annotated[int, typer.Option()] = 1
    ) -> None:
        seen.append((place, names, loud, n))

    return app


def test_a_command_gets_objects_from_options() -> None:
    seen: list[object] = []
    arguments = ["--folder", "F", "--names", "a", "--names", "b", "--loud", "--n", "7"]
    assert CliRunner().invoke(app_of(seen), arguments).exit_code == 0
    assert seen == [(Place(folder="F"), Names(names=["a", "b"]), True, 7)]


def test_a_command_has_its_own_defaults() -> None:
    seen: list[object] = []
    assert CliRunner().invoke(app_of(seen, depth=9), ["--folder", "F", "--loud"]).exit_code == 0
    assert CliRunner().invoke(app_of(seen, depth=9), ["--folder", "F", "--loud", "--depth", "1"]).exit_code == 0
    assert [place.depth for place, *_ in seen] == [9, 1]  # type: ignore[misc]


def test_what_must_be_given_comes_first_under_its_heading_and_is_asked_for() -> None:
    app = app_of([])
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    assert shown.index("--folder") < shown.index("--depth") < shown.index("--loud") < shown.index("--n")
    assert CliRunner().invoke(app, ["--loud"]).exit_code == 2


@dataclass(frozen=True, kw_only=True)
class Both(Options):
    """A group of groups, and an option of its own."""

    place: Place
    names: Names
    n: Annotated[int, typer.Option("--n")] = 1


def test_a_group_may_hold_groups() -> None:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @grouped(depth=9)
    def command(both: Both) -> None:
        seen.append(both)

    assert CliRunner().invoke(app, ["--folder", "F", "--names", "a", "--n", "7"]).exit_code == 0
    assert seen == [Both(place=Place(folder="F", depth=9), names=Names(names=["a"]), n=7)]


@dataclass(frozen=True, kw_only=True)
class Deeper(Place):
    """What a place has besides."""

    wide: Annotated[bool, typer.Option("--wide")] = False


def test_options_stand_under_the_heading_of_their_group_and_defaults_are_said_in_words() -> None:
    app = typer.Typer()

    @app.command()
    @grouped(names=Shown("all of them"))
    def command(both: Deeper, names: Names) -> None: ...

    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    assert shown.index("─ Places ─") < shown.index("--folder") < shown.index("─ Of this command ─")
    assert shown.index("--wide") < shown.index("─ Of this command ─") < shown.index("--names")
    assert "[default: (all of them)]" in shown


def test_groups_give_their_values_and_flags_by_name() -> None:
    both = Both(place=Place(folder="F"), names=Names())
    assert values_of(both) == {"folder": "F", "depth": 3, "names": None, "n": 1}
    assert flag_of(Place, "depth") == "--depth"


def test_an_option_in_two_groups_or_a_default_for_none_is_refused() -> None:
    with pytest.raises(AssertionError, match="in two groups"):

        @grouped()
        def twice(place: Place, depth: int = 1) -> None: ...

    with pytest.raises(AssertionError, match="that it has not"):
        app_of([], width=2)


def test_a_dataclass_that_is_no_group_is_refused() -> None:
    @dataclass
    class Plain:
        depth: int = 1

    with pytest.raises(AssertionError, match="does not extend Options"):
        grouped()(_taking(Plain))


def _taking(kind: type) -> object:
    def command(given: object) -> None: ...

    command.__annotations__ = {"given": kind, "return": None}
    return command
