"""The commands of ``forebear``, and whether a command line is one that they take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from forebear.cli.main import app


def _leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its name."""
    below = getattr(command, "commands", None)
    if not below:
        yield " ".join(path), command
    for name, one in (below or {}).items():
        yield from _leaves(one, (*path, name))


APP = get_command(app)
COMMANDS: dict[str, Any] = dict(_leaves(APP))  # by name, such as "evaluate overlap"


def misread(arguments: list[str]) -> str | None:
    """What the parser says is wrong with a command line, or None; nothing is run."""
    command, words = APP, list(arguments)
    path = ["forebear"]
    if words[:1] == ["--version"]:
        return None
    while getattr(command, "commands", None):
        if not words or words[0] not in command.commands:
            return f"{' '.join(path)} has no command {words[0] if words else '(none)'}"
        path.append(words[0])
        command = command.commands[words.pop(0)]
    if "--help" in words:
        return None
    try:
        command.make_context(" ".join(path), words)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None


def written_commands(markdown: str) -> list[list[str]]:
    """Arguments of every ``forebear`` command line in the fenced blocks of a Markdown text.

    A line counts where it begins with ``forebear`` or ``$ forebear``; a backslash at its end joins the next line.
    """
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", markdown, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?forebear (.*)", line)
            if match:
                found.append(shlex.split(match[1], comments=True))
    return found


def named_commands(markdown: str) -> list[list[str]]:
    """Words of every ``forebear`` command that a Markdown text names in code marks, with the options it names."""
    text = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return [one.split() for one in re.findall(r"`forebear ([^`]*)`", text)]


def unknown_in(words: list[str]) -> str | None:
    """What of a command and its options that a text names, perhaps not in full, there is not; None: all is there."""
    command, path = APP, ["forebear"]
    while getattr(command, "commands", None) and words and not words[0].startswith("-") and words[0] != "COMMAND":
        if words[0] not in command.commands:
            return f"{' '.join(path)} {words[0]}"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    known = {"--help", "--version"}.union(*(option.opts for option in command.params))
    return next((word for word in words if word.startswith("--") and word.split("=")[0] not in known), None)
