"""``--workers``: further processes of the same command, which share its retrainings by the cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from forebear.cli.options.model import WORKER
from forebear.cli.screen.console import warn
from forebear.errors import InputError
from forebear.indexer.building.sharing.ending import TERMINATED, end_with

PARENT = "FOREBEAR_WORKER_OF"  # environment variable: process id of the command that started a worker
_stops: list[Callable[[], None]] = []  # each stops the workers of the running command


def start_workers(workers: int, cache: Path) -> None:
    """Run this command in ``workers - 1`` more processes until :func:`stop_workers`; the cache keeps what they add.

    Of several devices (``--devices``) each worker takes the next one, in turn.

    Args:
        workers: Processes in all, this one included.
        cache: Folder of finished retrainings.

    Raises:
        InputError: The number is below 1.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected 1 or more.")
    if workers == 1:
        return
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(
        threads
    )  # the number of threads decides last bits of an outcome: it is the same in all workers
    folder = tempfile.TemporaryDirectory(prefix="forebear-workers-")
    base_command = [sys.executable, "-m", "forebear.cli.main", *sys.argv[1:], "--workers", "1", "--cache", str(cache)]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment[PARENT] = str(os.getpid())
    with suppress(ValueError):  # raised where the command does not run in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    for number in range(1, workers):
        messages = Path(folder.name) / f"{number}.txt"
        with messages.open("wb") as file:
            command = [*base_command, "--out", f"{folder.name}/{number}", "--quiet"]
            own = environment | {WORKER: str(number)}
            process = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=file)
        running.append((process, messages))

    def stop() -> None:
        for process, messages in running:
            ended = process.poll()
            process.terminate()
            process.wait()
            if ended:
                lines = messages.read_text(errors="replace").strip().splitlines()
                warn(f"a worker ended before its work was done: {lines[-1] if lines else f'exit code {ended}'}")
        folder.cleanup()

    _stops.append(stop)


def end_with_parent() -> None:
    """In a worker: end with the command that started it, however that ends."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        end_with(int(parent))


def stop_workers() -> None:
    """End the started workers; to be called when a command has ended."""
    while _stops:
        _stops.pop()()
