"""The benchmarks: the quick cases, or every script of this folder one after the other.

    python benchmarks/run.py                quick cases                                      make bench
    python benchmarks/run.py --check        and what got slower since the last record        make bench-check
    python benchmarks/run.py --record       and a new record of this kind of machine         make bench-record
    python benchmarks/run.py --full         every script; each writes results/CASE.json      make bench-full
    python benchmarks/run.py --only words,nn_ann

Quick cases are in ``quick.py``. They compute on one thread and are timed in processor seconds, unless ``--threads``
says otherwise. What is compared, and how, is in ``harness.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# From end_to_end on they need its data, and gradients to peers the runs that it leaves.
SCRIPTS = (
    "hostile.py", "campaign.py", "head_scan.py", "ann.py", "end_to_end.py", "gradients.py", "words.py", "influence.py",
    "million.py", "peers.py", "spans.py", "retraining.py", "recall.py", "serve.py",
    "sizes.py",
)  # fmt: skip


def every_script() -> int:
    """How many of the scripts failed."""
    from common import DATA

    failed = 0
    for script in SCRIPTS:
        if script in SCRIPTS[SCRIPTS.index("end_to_end.py") :] and not DATA.is_dir():
            print(f"{script} skipped: no data in {DATA} (set FOREBEAR_DATA)")
            continue
        failed += subprocess.run([sys.executable, HERE / script], check=False).returncode != 0
    return failed


def quick(given: argparse.Namespace) -> int:
    """Measure the quick cases; the threads are set before numpy and torch are imported."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from common import count_processor_seconds
    from harness import run_cases

    torch.set_num_threads(given.threads)
    if given.threads == 1:
        count_processor_seconds()
    from quick import CASES

    names = [name for name in given.only.split(",") if name] or [case.name for case in CASES]
    if unknown := set(names) - {case.name for case in CASES}:
        print(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(case.name for case in CASES)}")
        return 2
    chosen = [case for case in CASES if case.name in names]
    return run_cases(chosen, check=given.check, record=given.record)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run every script in place of the quick cases")
    parser.add_argument("--check", action="store_true", help="compare with the record; exit code 1 if worse")
    parser.add_argument("--record", action="store_true", help="keep what is measured as the record of such machines")
    parser.add_argument("--only", default="", help="some of the quick cases, comma-separated")
    parser.add_argument("--threads", type=int, default=1, help="of the quick cases; default 1")
    given = parser.parse_args()
    return every_script() if given.full else quick(given)


if __name__ == "__main__":
    sys.exit(main())
