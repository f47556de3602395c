"""Parts of pages that follow from the code: every command with its options, and public names that no page lists yet.

A page holds a marker, such as ``<!-- generated: commands -->``; while Sphinx reads the page, what is generated takes
the marker's place. Nothing is written beside the pages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

COMMANDS = "<!-- generated: commands -->"
OTHER_NAMES = "<!-- generated: other public names -->"


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    app.connect("env-get-outdated", lambda *_: [f"reference/{page}" for page in ("commands", "api")])
    app.connect("autodoc-process-docstring", escape_bars)
    return {"parallel_read_safe": True}


def fill(_app: Any, _page: str, source: list[str]) -> None:
    """Put what is generated into a page's text."""
    if COMMANDS in source[0]:
        source[0] = source[0].replace(COMMANDS, "\n".join(command_lines()))
    if OTHER_NAMES in source[0]:
        source[0] = source[0].replace(OTHER_NAMES, other_names(source[0]))


def escape_bars(_app: Any, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Norms in docstrings, ||g||, are no substitutions of reStructuredText."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[i] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def other_names(page: str) -> str:
    """Directives for the public names that a page does not document."""
    import forebear

    missing = [name for name in forebear.__all__ if not re.search(rf"forebear\.{name}\s", page)]
    if not missing:
        return ""
    lines = ["## Other names", ""]
    for name in missing:
        found = getattr(forebear, name)
        if isinstance(found, type):
            directive = [f".. autoclass:: forebear.{name}", "   :members:"]
        elif callable(found):
            directive = [f".. autofunction:: forebear.{name}"]
        else:
            directive = [f".. py:data:: forebear.{name}"]
        lines += ["```{eval-rst}", *directive, "```", ""]
    return "\n".join(lines)


def command_lines() -> Iterator[str]:
    """The Markdown of all commands: usage, help, examples and a table of arguments and options."""
    import typer

    from forebear.cli.main import app

    yield from _group(typer.main.get_command(app), "forebear", 2)


def _group(group: Any, path: str, level: int) -> Iterator[str]:
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        full = f"{path} {name}"
        yield f"{'#' * level} {full}"
        yield ""
        yield from _help(command.help or "")
        if hasattr(command, "commands"):
            yield from _group(command, full, level + 1)
        else:
            yield from _parameters(command)


def _help(text: str) -> Iterator[str]:
    """The help text; lines that are commands become a block of code."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        flat = " ".join(paragraph.split())
        example = re.fullmatch(r"(?:Examples?: )?(forebear .*)", flat)
        if flat in ("Example:", "Examples:"):
            continue
        yield from (["```console", f"$ {example[1]}", "```", ""] if example else [_escaped(flat), ""])


def _parameters(command: Any) -> Iterator[str]:
    """A table for each group of options that the help shows."""
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        row = _row(parameter)
        if row is not None:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(row)
    for panel, rows in panels.items():
        if panel:
            yield f"*{_escaped(panel)}*"
            yield ""
        yield "| argument or option | default | meaning |"
        yield "| --- | --- | --- |"
        yield from rows
        yield ""


def _row(parameter: Any) -> str | None:
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return None
    is_argument = parameter.param_type_name == "argument"
    names = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
    meaning = _escaped(" ".join((parameter.help or "").split()))
    stated = re.search(r"\s*\\?\[default: (.*?)\\?\]", meaning)
    default = "required" if parameter.required else ""
    if isinstance(getattr(parameter, "show_default", None), str):
        default = _escaped(parameter.show_default)
    elif stated:
        meaning, default = meaning.replace(stated[0], ""), f"`{stated[1]}`"
    elif parameter.default not in (None, False, (), []) and not parameter.required:
        value = parameter.default
        default = f"`{shlex.quote(str(value)) if isinstance(value, str) else value}`"
    return f"| `{names}` | {default} | {meaning} |"


def _escaped(text: str) -> str:
    """Help texts are prose: what Markdown would read as markup or as a table's border stands for itself."""
    parts = re.split(r"(`.*?`)", text)
    for i, part in enumerate(parts):
        if not part.startswith("`"):
            parts[i] = re.sub(r"([|<>*_\[\]$])", r"\\\1", part)
            parts[i] = re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", parts[i])
    return "".join(parts)
