"""Writes the tables of RESULTS.md again from the results: ``python benchmarks/papers/fill.py``.

A table stands between ``<!-- CASE -->`` and ``<!-- end -->``; without ``results/papers_CASE.json`` it stays as it is.
Under one of retrainings stands how many test rows a verdict would take, where a change cannot be told from none.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS
from tables import Table

from forebear.evaluation.common.power import about, number_for_verdict

PAGE = Path(__file__).with_name("RESULTS.md")
NOT_SHOWN = {"command", "index", "table"}


def filled(found: re.Match[str]) -> str:
    """A table of the page, with the case's figures where it was run."""
    path = RESULTS / f"papers_{found[1]}.json"
    if not path.is_file():
        return found[0]
    result = json.loads(path.read_text())
    facts = result["facts"]
    shown_facts = "; ".join(f"{n.replace('_', ' ')} {shown(v)}" for n, v in facts.items() if n not in NOT_SHOWN)
    facts_line = f"`{facts['command']}` at {result['commit']}: {shown_facts}."
    table = Table(facts["table"])
    needed = for_a_verdict(table) if "retrain" in facts else ""
    return f"<!-- {found[1]} -->\n{facts_line}\n{table}\n{needed}\n<!-- end -->"


def for_a_verdict(table: Table) -> str:
    """How many test rows would tell the changes whose interval holds 0 from none; empty where all are told."""
    lines = []
    for i, column in enumerate(table["columns"]):
        needed = []
        for label, row in table["rows"].items():
            ours = row[i]["ours"]
            if ours and ours["low"] is not None and ours["error"] and ours["low"] <= 0 <= ours["high"]:
                number = number_for_verdict(ours["mean"], ours["error"] * math.sqrt(ours["n"]))
                needed.append(f"{label} {'unknown' if number is None else about(number)}")
        if needed:
            lines.append(f"{column}: {', '.join(needed)}")
    if not lines or not table["intervals"]:
        return ""
    return f"\nTest rows for a verdict (power 80%), where the interval holds 0: {'; '.join(lines)}.\n"


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
