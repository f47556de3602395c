"""Writes the tables of RESULTS.md again from the results: ``python benchmarks/papers/fill.py``.

A table stands between ``<!-- CASE -->`` and ``<!-- end -->``; without ``results/papers_CASE.json`` it stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS
from tables import Table

PAGE = Path(__file__).with_name("RESULTS.md")
NOT_SHOWN = {"case", "machine", "command", "index", "table"}


def filled(found: re.Match[str]) -> str:
    """A table of the page, with the case's figures where it was run."""
    path = RESULTS / f"papers_{found[1]}.json"
    if not path.is_file():
        return found[0]
    result = json.loads(path.read_text())
    facts = [f"{name.replace('_', ' ')} {shown(value)}" for name, value in result.items() if name not in NOT_SHOWN]
    about = f"`{result['command']}` at {result['machine']['commit']}: {'; '.join(facts)}."
    return f"<!-- {found[1]} -->\n{about}\n{Table(result['table'])}\n\n<!-- end -->"


def shown(value: Any) -> str:
    """A fact in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """See the module."""
    PAGE.write_text(re.sub(r"<!-- ([\w-]+?) -->\n.*?<!-- end -->", filled, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
