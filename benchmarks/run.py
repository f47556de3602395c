"""Every benchmark, one after the other: ``make bench``. Each writes ``benchmarks/results/CASE.json``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import DATA

HERE = Path(__file__).parent
# From end_to_end on they need its data, and gradients to peers the runs that it leaves.
CASES = (
    "hostile.py", "campaign.py", "head_scan.py", "ann.py", "end_to_end.py", "gradients.py", "words.py", "influence.py",
    "peers.py", "spans.py", "retraining.py", "recall.py",
)  # fmt: skip


def main() -> int:
    failed = 0
    for case in CASES:
        if case in CASES[CASES.index("end_to_end.py") :] and not DATA.is_dir():
            print(f"{case} skipped: no data in {DATA} (set FOREBEAR_DATA)")
            continue
        failed += subprocess.run([sys.executable, HERE / case], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
