"""What every benchmark shares: seconds, ratios of ways that run by turns, the machine, one JSON file a case."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("FOREBEAR_DATA", ROOT.parent / "shared" / "data"))
FOREBEAR = str(Path(sys.executable).parent / "forebear")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")  # those that matter
_started = time.perf_counter()
_clock = time.perf_counter


class Ratio(NamedTuple):
    """A ratio of seconds: the median of the rounds, and between what a tenth and nine tenths of them lie."""

    value: float
    low: float
    high: float


def run(*args: str | Path) -> float:
    """Run a forebear command; wall seconds."""
    started = time.perf_counter()
    subprocess.run([FOREBEAR, *map(str, args)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def count_processor_seconds() -> None:
    """From here on: of a process of one thread they say the same, and nothing of what else the machine does."""
    global _clock
    _clock = time.process_time


def now() -> float:
    """The clock by which ways are timed: of the wall, or of the processor."""
    return _clock()


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not counted. For a ratio: ``by_turns``."""
    return statistics.median(by_turns({"": run}, repeats)[""])


def by_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int = 5, *, calls: int = 1, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way in each round, A B B A A B ...: what else the machine does meets all of them alike.

    Args:
        ways: What is called, by name.
        rounds: How often each is timed.
        calls: Calls that are timed together; the seconds are those of one.
        warm: Call each once before, uncounted.
    """
    for way in ways.values() if warm else ():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            started = now()
            for _ in range(calls):
                ways[name]()
            taken[name].append((now() - started) / calls)
    return taken


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Seconds of one way over those of another, round by round."""
    import numpy as np

    low, middle, high = np.quantile(np.divide(over, under), (0.1, 0.5, 0.9))
    return Ratio(float(middle), float(low), float(high))


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    cpu = {name.strip(): value.strip() for name, value in cpu.items()}
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "model": f"{cpu['cpu family']}/{cpu['model']}" if {"cpu family", "model"} <= set(cpu) else "",
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if _clock is time.process_time else "wall",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def make_result(
    case: str, facts: Mapping[str, Any], larger: Sequence[str], smaller: Sequence[str], recalls: Sequence[str]
) -> dict[str, Any]:
    """What a case's JSON holds. A declared fact that holds several is taken apart: ``stages, curvature``.

    Args:
        case: Its name.
        facts: What was found, by name.
        larger: Facts that are ratios of which a larger one is better.
        smaller: Facts that are ratios of which a smaller one is better.
        recalls: Facts that are recalls or agreements: a smaller one is worse, by however little.
    """
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True).stdout

    def of(names: Sequence[str]) -> dict[str, Any]:
        parts = {name: facts[name] if isinstance(facts[name], dict) else {"": facts[name]} for name in names}
        return {f"{name}, {part}".rstrip(", "): value for name in names for part, value in parts[name].items()}

    ratios = {
        name: (value if isinstance(value, Ratio) else Ratio(value, value, value))._asdict() | {"good": good}
        for good, names in (("larger", larger), ("smaller", smaller))
        for name, value in of(names).items()
    }
    return {
        "case": case,
        "commit": commit,
        "dirty": bool(changed),
        "machine": machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - _started, 1),
        "ratios": ratios,
        "recalls": of(recalls),
        "facts": {name: value for name, value in facts.items() if name not in {*larger, *smaller, *recalls}},
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Keep a result; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_result(
    case: str, *, larger: Sequence[str] = (), smaller: Sequence[str] = (), recalls: Sequence[str] = (), **facts: Any
) -> None:
    """Write ``results/CASE.json`` and print it; arguments as of :func:`make_result`."""
    global _started
    result = make_result(case, facts, larger, smaller, recalls)
    _started = time.perf_counter()
    write_json(RESULTS / f"{case}.json", result)
    print(f"\n{case}")
    for name, value in facts.items():
        print(f"  {name}: {value}")
