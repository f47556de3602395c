"""What every benchmark shares: the machine, medians of repeated timings, one JSON file a case."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("FOREBEAR_DATA", ROOT.parent / "shared" / "data"))
FOREBEAR = str(Path(sys.executable).parent / "forebear")


def run(*args: str | Path) -> float:
    """Run a forebear command; wall seconds."""
    started = time.perf_counter()
    subprocess.run([FOREBEAR, *map(str, args)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.strip(),
    }


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def write_result(case: str, **facts: Any) -> None:
    """Write ``results/CASE.json`` and print it."""
    RESULTS.mkdir(exist_ok=True)
    content = {"case": case, "machine": machine(), **facts}
    (RESULTS / f"{case}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"\n{case}")
    for name, value in facts.items():
        print(f"  {name}: {value}")
