"""Every benchmark, one after the other: ``make bench``. Each writes ``benchmarks/results/CASE.json``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import DATA

HERE = Path(__file__).parent
# From the fifth to the eighth they use the runs of end_to_end.
CASES = (
    "hostile.py", "head_scan.py", "ann.py", "end_to_end.py", "gradients.py", "words.py", "influence.py", "peers.py",
    "spans.py", "retraining.py", "recall.py",
)  # fmt: skip


def main() -> int:
    failed = 0
    for case in CASES:
        if case in CASES[3:] and not DATA.is_dir():
            print(f"{case} skipped: no data in {DATA} (set FOREBEAR_DATA)")
            continue
        failed += subprocess.run([sys.executable, HERE / case], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
