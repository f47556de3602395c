"""Options of a command whose parts run on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from forebear.cli.options.groups import Options
from forebear.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RayOptions(Options, panel="Ray"):
    """Which cluster, and what a part takes of it."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Divide the work among the machines of a Ray cluster, which see the same files: its address, auto, or "
            "local for the processors of this machine.",
            show_default=False,
        ),
    ] = None
    ray_shards: Annotated[
        int | None,
        typer.Option("--ray-shards", help="Parts.", show_default="as many as the cluster runs at once"),
    ] = None
    ray_cpus: Annotated[
        int | None, typer.Option("--ray-cpus", help="CPUs of a part.", show_default="the threads of this process")
    ] = None
    ray_gpus: Annotated[float, typer.Option("--ray-gpus", help="GPUs of a part, such as 1 or 0.5.")] = 0.0

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            InputError: A number is too small, or given without ``--ray``.
        """
        for option, value in {"--ray-shards": self.ray_shards, "--ray-cpus": self.ray_cpus}.items():
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: expected 1 or more.")
        if self.ray_gpus < 0:
            raise InputError(f"--ray-gpus {self.ray_gpus:g}: expected 0 or more.")
        if self.ray is None and (self.ray_shards or self.ray_cpus or self.ray_gpus):
            raise InputError("--ray-shards, --ray-cpus and --ray-gpus are about a cluster. Name it by --ray.")
