"""All commands: what each takes, that each option is declared once, and that every help has an example."""

from __future__ import annotations

import ast
import shlex
from collections import defaultdict
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from commands import COMMANDS, misread, named_commands, unknown_in, written_commands
from places import ROOT

from forebear.cli.commands import train
from forebear.cli.main import run
from forebear.cli.options import building, groups, question
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.training.fine_tuning import TrainOptions
from forebear.retriever.question.spec import QuerySpec

PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
MADE_UP = (["evaluate", "concentration"], ["audit", "length"])  # what docs/extending.md adds as examples
PINNED = ROOT / "tests" / "cli" / "options.txt"
DECLARED_MORE_THAN_ONCE = {  # one name, several meanings: what each declaration is of
    "--model": ("of an index, if it has moved", "to index", "to start training from"),
    "--out": ("report", "index", "run", "answers", "demo", "site", "training file", "list"),
    "--index": ("one", "one or several of one model", "one or several, compared", "of a work list"),
    "--top": ("k", "several k", "rows that a report lists"),
    "--shard": ("of an index's rows", "of test rows"),
    "--scope": ("of a question", "of a question, several", "of an index, several"),
    "--curvature": ("of a question", "of an index"),
    "--damping": ("of a question", "of a question, several", "of an index, several", "of the head"),
    "--spans": ("of a question", "of an index"),
    "--rows": ("sampled", "changed", "recomputed", "left out"),
    "--queries": ("asked about; 0: all", "attacked, or mended for"),
    "--seed": ("any", "from 0 up"),
    "--dev": ("whose accuracy is measured", "whose mistakes are mended", "on which a cost is measured"),
    "--force": ("of what is written", "of an index"),
    "--resume": ("a change of an index", "a file of answers"),
    "--to": ("label that an answer flips to", "labelling tool"),
    "--from": ("parts of an index", "labelling tool"),
    "--train": ("that was indexed", "that a work list changes"),
    "--group-by": ("sums of scores", "counts of suspects", "of test rows", "of test rows, without a set"),
    "--sentence-model": ("of sentence embeddings", "of a reference"),
    "--column": ("a text column", "whose values are sources"),
    "--share": ("removed, several", "on its way out"),
}


def test_commands_take_what_they_took(tmp_path: Path) -> None:
    """To take a change into the file, copy what this writes, as its message says."""
    lines = []
    for name, command in sorted(COMMANDS.items()):
        lines.append(f"forebear {name}")
        for option in sorted(command.params, key=lambda option: option.opts):
            default = "required" if option.required else repr(option.default)
            many = ", several" if getattr(option, "multiple", False) or option.nargs != 1 else ""
            lines.append(f"    {', '.join([*option.opts, *option.secondary_opts])} = {default}{many}")
    now = tmp_path / PINNED.name
    now.write_text("\n".join(lines) + "\n", encoding="utf-8")
    same = now.read_text(encoding="utf-8") == PINNED.read_text(encoding="utf-8")
    assert same, f"commands or options changed. If they are meant to: cp {now} {PINNED.relative_to(ROOT)}"


@cache
def declarations() -> dict[str, list[str]]:
    """Where each flag is declared: modules, with lines."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "forebear" / "cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option" and node.args:
                found[ast.literal_eval(node.args[0])].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_an_option_is_declared_once_for_each_thing_that_it_means() -> None:
    for flag, places in declarations().items():
        assert len(places) == len(DECLARED_MORE_THAN_ONCE.get(flag, ("",))), f"{flag}: {places}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_means(name: str) -> None:
    for option in COMMANDS[name].params:
        assert option.help, f"{name} {option.opts[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_that_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = COMMANDS[name].help or ""
    assert "\nExample" in text
    examples = [line.strip() for line in text.split("\nExample")[1].replace(":", "\n", 1).splitlines()]
    examples = [line for line in examples if line.startswith("forebear ")]
    assert any(line.startswith(f"forebear {name}") for line in examples)
    for example in examples:
        assert misread(shlex.split(example)[1:]) is None, example
    assert run([*name.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(option.opts[0] in shown for option in COMMANDS[name].params if option.opts[0].startswith("-"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_documents_is_one_that_forebear_takes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = written_commands(text)
    assert found or page != "README.md"
    for arguments in found:
        assert misread(arguments) is None, shlex.join(["forebear", *arguments])
    for words in named_commands(text):
        assert words[:2] in MADE_UP or unknown_in(words) is None, words


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("retrieve --index I --text a --nonsense", "--nonsense"),
        ("evaluate nothing --index I", "no command nothing"),
        ("retrieve --text a", "--index"),
        ("report A B --out C", None),
        ("index --out I --retire 3 4-6", None),
    ],
)
def test_documents_with_a_wrong_command_would_be_found_out(line: str, problem: str | None) -> None:
    assert unknown_in(["index", "--apend"]) == "--apend"
    assert unknown_in(["audit", "hams"]) == "forebear audit hams"
    assert unknown_in(["index", "--append", "F"]) is None
    (arguments,) = written_commands(f"Text\n\n```console\n$ forebear {line}   # why\nits output\n```\n")
    said = misread(arguments)
    assert said is None if problem is None else problem in str(said)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((building.ComputingChoices, building.StoreChoices, building.GradientChoices), BuildOptions),
        ((train.TrainingChoices,), TrainOptions),
        ((question.SearchOptions, question.SolverOptions), QuerySpec),
    ],
)
def test_choices_have_the_names_and_defaults_of_the_library(given: tuple[Any, ...], taken: Any) -> None:
    known = {field.name: field.default for field in fields(taken)}
    for group in given:
        for field in fields(group):
            assert field.name in known, f"{taken.__name__} has no {field.name}"
            if (
                field.default is not None and field.name != "lissa"
            ):  # None: the library's own; lissa: a short name of it
                assert field.default == known[field.name], field.name


def test_every_choice_of_a_build_is_an_option() -> None:
    choices = (building.ComputingChoices, building.StoreChoices, building.GradientChoices)
    options = {field.name: group for group in choices for field in fields(group)}
    assert set(options) == {field.name for field in fields(BuildOptions)}
    for name, group in options.items():
        assert groups.flag_of(group, name).startswith("--")


def test_lists_become_what_the_library_takes() -> None:
    given = building.ChoiceOptions(
        computing=building.ComputingChoices(max_length=40),
        storing=building.StoreChoices(stores=["features,words"], words_tops=["0", "3"], span_column="b"),
        gradients=building.GradientChoices(scopes=["all"], dampings=["none"]),
    ).given(("a", "b"))
    wanted = {
        "stores": ("features", "words"), "words_tops": (0, 3), "span_column": 1, "scopes": ("head", "all"),
        "dampings": (), "max_length": 40,
    }  # fmt: skip
    options = BuildOptions(**given)
    assert options == BuildOptions(**wanted)  # type: ignore[arg-type]
    kinds = get_type_hints(BuildOptions)
    for field in fields(options):
        value = getattr(options, field.name)
        assert field.default is not MISSING
        assert isinstance(value, tuple) == str(kinds[field.name]).startswith("tuple"), field.name


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"forebear {version('forebear')}"
