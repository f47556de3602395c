"""Where the tests find things: the repository, the golden indexes, and real data where a machine has it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
DATA = Path(os.environ.get("FOREBEAR_DATA", ROOT / "data"))
NO_DATA = "set FOREBEAR_DATA to a folder of real datasets (mnli10k, sst2, hans) to check readers on real files"
