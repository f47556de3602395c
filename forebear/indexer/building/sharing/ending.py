"""A process that ends with the one that started it, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

TERMINATED = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Ask Linux to end this process with its parent.

    Args:
        parent: Process id of the parent, which may have ended before this call; then this process ends now.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(TERMINATED)
