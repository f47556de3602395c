"""``--ray``: parts of a command as tasks of a Ray cluster, each a command that could be typed on any machine.

Ray decides where and when a part runs, and runs it again where its machine or process has died; what a part is, and
that none is written twice, is the business of ``--shard``.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebear.errors import ForebearError, InputError, first_line

if TYPE_CHECKING:
    from forebear.cli.options.ray import RayOptions

RETRIES = 3  # of a part whose process died or failed, not of one that was refused
_BUSY_SECONDS = 30.0  # for which a part waits that the process of a dead task still holds
_PASSED_ON = ("HF_", "FOREBEAR_", "TRANSFORMERS_", "TOKENIZERS_", "PYTHONPATH")  # variables that parts get


def in_shards(
    options: RayOptions, command: Callable[[str], Sequence[str]], progress: Callable[[str, int, int], None]
) -> int:
    """Run a command for each shard on the cluster, until all have ended well.

    Args:
        options: The cluster, and what a part takes of it.
        command: The arguments of ``forebear`` for a shard ``3/8``.
        progress: Told how many parts are done.

    Returns:
        Number of shards.

    Raises:
        InputError: Ray is not installed or the cluster not reached; or a part was refused: the line that it said.
        ForebearError: A part failed as often as it may.
    """
    import torch

    n_cpus = options.ray_cpus or torch.get_num_threads()
    with _cluster(str(options.ray)) as ray:
        n_shards = options.ray_shards or _places(ray.cluster_resources(), n_cpus, options.ray_gpus)
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
        part = ray.remote(run_part).options(
            num_cpus=n_cpus, num_gpus=options.ray_gpus, max_retries=RETRIES, retry_exceptions=[PartFailedError]
        )
        names = [f"{number}/{n_shards}" for number in range(1, n_shards + 1)]
        waiting = {part.remote(list(command(name)), variables, str(Path.cwd())): name for name in names}
        progress("parts", 0, n_shards)
        while waiting:
            (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
            try:
                refused = ray.get(ended)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                said = str(cause if isinstance(cause, PartFailedError) else error).strip().splitlines()[-1]
                raise ForebearError(f"part {waiting[ended]} failed {RETRIES + 1} times: {said}") from error
            if refused is not None:
                raise InputError(f"part {waiting[ended]}: {refused}")
            del waiting[ended]
            progress("parts", n_shards - len(waiting), n_shards)
    return n_shards


class PartFailedError(Exception):
    """A part ended with a fault of its machine, or was killed: it is run again."""


def run_part(arguments: list[str], variables: dict[str, str], folder: str) -> str | None:
    """Run ``forebear`` in a process of its own, which ends with this one.

    Returns:
        None where it did its work; else why it was refused, which it would be anywhere.

    Raises:
        PartFailedError: It failed, or was killed.
    """
    from forebear.cli.workers import PARENT

    command = [sys.executable, "-m", "forebear.cli.main", *arguments]
    environment = os.environ | variables | {PARENT: str(os.getpid())}
    tries_end = time.monotonic() + _BUSY_SECONDS
    while True:
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return None
        lines = ended.stderr.strip().splitlines() or ["nothing was said"]
        errors = [line for line in lines if line.startswith("error: ")]
        said = (errors or lines)[-1].removeprefix("error: ")
        if ended.returncode == InputError.exit_code:
            if "is being written by" in said and time.monotonic() < tries_end:
                time.sleep(1)
                continue
            return said
        raise PartFailedError(f"exit code {ended.returncode}: {said}")


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here ends with the block."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray. Install it with: pip install 'forebear[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"--ray {address}: no cluster is there ({first_line(error)}). Give local, or its address."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _places(resources: dict[str, float], n_cpus: int, n_gpus: float) -> int:
    """How many parts run at once.

    Raises:
        InputError: Not one.
    """
    places = int(resources.get("CPU", 0) // n_cpus)
    if n_gpus:
        places = min(places, int(resources.get("GPU", 0) // n_gpus))
    if not places:
        found = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        raise InputError(f"the cluster has {found}; a part takes {n_cpus} and {n_gpus:g} (--ray-cpus, --ray-gpus).")
    return places


def arguments_without(arguments: Sequence[str], flags: Sequence[str], valued: Sequence[str]) -> list[str]:
    """Arguments of a command without some of its options: flags, and options that take a value."""
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, equals, _ = argument.partition("=")
        if name in valued:
            if not equals:
                next(left, None)
        elif argument not in flags:
            kept.append(argument)
    return kept
