"""Cases that are measured again and again, their records by kind of machine, and what got slower since.

A record is ``results/quick/KIND/CASE.json``, written by ``run.py --record``. Ratios alone are compared, and only on the
kind of machine on which they were recorded: the same model of CPU, the same number of threads.
"""

from __future__ import annotations

import json
import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine, make_result, write_json

RECORDS = RESULTS / "quick"
LATEST = ROOT / "runs" / "bench" / "quick" / "results"
LEAST_CHANGE = 1.2  # a ratio that is less than this times worse is not called slower
RECALL_MARGIN = 0.002  # less than one row of the top 10 of 40 test rows at one end
BAD = ("slower", "recall fell", "gone")


class Skip(Exception):
    """A case cannot be measured here; the message says what it lacks."""


@dataclass(frozen=True)
class Case:
    """Something that is measured.

    Attributes:
        name: Of its JSON file.
        measure: Returns facts by name; raises ``Skip``.
        larger: Facts that are ratios (``common.Ratio``, or several by name) of which a larger one is better.
        smaller: Those of which a smaller one is better.
        recalls: Facts that are recalls or agreements.
    """

    name: str
    measure: Callable[[], Mapping[str, Any]]
    larger: tuple[str, ...] = ()
    smaller: tuple[str, ...] = ()
    recalls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A ratio or recall beside the recorded one. Verdicts: ``as before``, ``faster``, ``slower``, ``recall rose``,
    ``recall fell``, ``new`` (not in the record) or ``gone`` (in the record alone).
    """

    case: str
    name: str
    recorded: float | None
    now: float | None
    verdict: str


def kind(of: Mapping[str, Any]) -> str:
    """The kind of a machine (``common.machine``): its model of CPU and the threads, fit for a folder's name."""
    words = re.sub(r"\((r|tm)\)", " ", f"{of['cpu']} {of['model']}".lower())
    threads = f"{of['threads']}-thread{'s' * (of['threads'] > 1)}"
    return "-".join([*re.findall(r"[a-z0-9]+", words), threads])


def measured(case: Case) -> dict[str, Any]:
    """A case's JSON, from one measurement."""
    started = time.perf_counter()
    facts = case.measure()
    result = make_result(case.name, facts, case.larger, case.smaller, case.recalls)
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def compare(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[Line]:
    """Hold a case's ratios and recalls against the recorded ones.

    A ratio is slower or faster if it is 1.2 times worse or better than the recorded one, and outside of the recorded
    spread. A recall must not fall by more than 0.002.
    """
    lines = []
    for name, old, new in _both(recorded["ratios"], now["ratios"]):
        verdict = _verdict(old, new) if old and new else "gone" if old else "new"
        lines.append(Line(now["case"], name, old and old["value"], new and new["value"], verdict))
    for name, old, new in _both(recorded["recalls"], now["recalls"]):
        verdict = "gone" if new is None else "new" if old is None else "as before"
        if verdict == "as before" and abs(new - old) > RECALL_MARGIN:
            verdict = "recall fell" if new < old else "recall rose"
        lines.append(Line(now["case"], name, old, new, verdict))
    return lines


def _both(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    return ((name, recorded.get(name), now.get(name)) for name in {**recorded, **now})


def _verdict(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    times = new["value"] / old["value"]
    if max(times, 1 / times) < LEAST_CHANGE or old["low"] <= new["value"] <= old["high"]:
        return "as before"
    return "faster" if (times > 1) == (old["good"] == "larger") else "slower"


def table(lines: Iterable[Line]) -> str:
    """Case, ratio or recall, recorded, now, verdict: as text."""
    cells = [("case", "ratio or recall", "recorded", "now", "verdict")]
    cells += [(line.case, line.name, _shown(line.recorded), _shown(line.now), line.verdict) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def run_cases(cases: Iterable[Case], *, check: bool, record: bool, records: Path = RECORDS) -> int:
    """Measure cases, print what was found, and compare it with the records of this kind of machine.

    What looks slower is measured once more, and is slower only if it is so twice.

    Args:
        cases: What to measure.
        check: Compare with the records.
        record: Measure once more, and write records of both in place of those that are there.
        records: Folder of the records.

    Returns:
        Exit code: 1 if a case failed or, with ``check``, something got slower or a recall fell.
    """
    place, failed, lines = records / kind(machine()), False, []
    print(f"machine: {place.name}", flush=True)
    if check and not place.is_dir():
        print(f"no record of this kind of machine in {records}: nothing to compare with (make bench-record writes one)")
    for case in cases:
        kept = place / f"{case.name}.json"
        recorded = json.loads(kept.read_text()) if check and kept.is_file() else None
        try:
            result = measured(case)
            if recorded and any(line.verdict == "slower" for line in compare(recorded, result)):
                print(f"\n{case.name} looks slower: measured once more", flush=True)
                result = better_of(result, measured(case))
        except Skip as reason:
            print(f"\n{case.name} skipped: {reason}", flush=True)
            continue
        except Exception:
            traceback.print_exc()
            print(f"\n{case.name} FAILED", flush=True)
            failed = True
            continue
        write_json(LATEST / kept.name, result)
        if record:
            write_json(kept, both_of(result, measured(case)))
        _print(result)
        if recorded:
            lines += compare(recorded, result)
        elif check and place.is_dir():
            print("  not recorded on this kind of machine")
    worse = [line for line in lines if line.verdict in BAD]
    if lines:
        print(f"\n{table(lines)}\n\n{len(worse) or 'nothing'} of {len(lines)} got worse")
    return int(failed or bool(worse))


def better_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A case's second measurement, with each ratio of the first that was better."""
    ratios = dict(second["ratios"])
    for name, found in first["ratios"].items():
        best = max if found["good"] == "larger" else min
        ratios[name] = best(found, ratios.get(name, found), key=lambda ratio: ratio["value"])
    return {**second, "ratios": ratios}


def both_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two measurements as one: the mean of each ratio, in geometry, and the spread of both: runs differ, too."""
    ratios = {}
    for name, found in second["ratios"].items():
        other = first["ratios"].get(name, found)
        ratios[name] = found | {
            "value": math.sqrt(found["value"] * other["value"]),
            "low": min(found["low"], other["low"]),
            "high": max(found["high"], other["high"]),
        }
    return {**second, "ratios": ratios}


def _print(result: Mapping[str, Any]) -> None:
    """A case in a few lines."""
    print(f"\n{result['case']} ({result['seconds']:.0f} s)")
    for name, found in result["ratios"].items():
        print(f"  {name}: {found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}], {found['good']} is better")
    for name, value in result["recalls"].items():
        print(f"  {name}: {value:.4g}")
    print(f"  {json.dumps(result['facts'])[:400]}", flush=True)
