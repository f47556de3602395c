"""``forebear index``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.building import ChangeOptions, CheckpointOptions, ChoiceOptions, row_numbers
from forebear.cli.options.groups import Options, Shown, grouped
from forebear.cli.options.ray import RayOptions
from forebear.cli.options.report import Quiet
from forebear.cli.options.rows import ColumnOptions, Train
from forebear.cli.ray_tasks import in_shards
from forebear.cli.screen.console import Command, listed, progress_bar, say, size, warn
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.indexer.index import Index
    from forebear.indexer.rows.row_format import RowFormat
    from forebear.indexer.rows.row_source import RowSource
    from forebear.indexer.storage.manifest import Manifest

# What a change takes besides its own name; everything else was decided by the build.
OPTIONS_OF_EVERY_CHANGE = ("out", "resume", "force", "quiet")
_OF_ROWS = (
    "train", "model", "text_columns", "label_column", "label_names", "unlabelled", "delimiter", "encoding", "device",
    "devices",
)  # fmt: skip
OPTIONS_OF_CHANGES = {
    "append": _OF_ROWS,
    "shard": _OF_ROWS,
    "retire": (),
    "rebuild_ann": ("ann",),
    "refit": ("model", "device", "devices"),
    "commit": ("parts", "model", "device", "devices"),
}

HELP = """Build the index of a classifier's training rows, once; or change one that is there.

Examples:

    forebear index --model runs/mine --train train.csv --out runs/mine-index

    forebear index --model runs/mine --train train.csv --out I --checkpoints all --store features,sbert

    forebear index --checkpoints ckpt/1 ckpt/2 ckpt/3 --eta 5e-5 3e-5 1e-5 --train train.csv --out I

    forebear index --model runs/mine --train train.csv --out I --scope head,all

    forebear index --model runs/mine --train train.csv --out I --store features,words --words-top 0,10

    forebear index --model runs/mine --train train.csv --out I --scope head,top-2 --store features,spans --spans clauses

    forebear index --out I --append --train more.csv

    forebear index --out I --retire 17,230-240

    forebear index --out I --refit

    forebear index --model runs/mine --train train.csv --out I --scope head,all --fit

    forebear index --out I --train train.csv --shard 3/8

    forebear index --out I --commit --from copy-1/I copy-2/I
"""


@dataclass(frozen=True, kw_only=True)
class TrainingRows(ColumnOptions):
    """The rows that are indexed."""

    train: Train = None

    def open_all(self, classes: Sequence[str], like: RowFormat, unlabelled: str) -> RowSource:
        """All rows, read as ``like`` says where no option does; warnings are said."""
        if self.train is None:
            raise InputError("no training rows given. Name their file by --train.")
        return self.open(self.train, classes=classes, like=like, unlabelled=unlabelled)


@dataclass(frozen=True, kw_only=True)
class OutOptions(Options, panel="Output"):
    """The index folder."""

    out: Annotated[str, typer.Option("--out", help="Index folder to write, or to change.", show_default=False)]
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the index in --out. Of a change: discard what an unfinished one left; add rows also if they "
            "are there already.",
        ),
    ] = False
    quiet: Quiet = False


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("index", help=HELP, cls=Command)(index)


@grouped(
    max_length=Shown("the run's, else the model's limit, or 512 if it has none"),
    class_weights=Shown("the run's, else none"),
    label_smoothing=Shown("the run's, else 0"),
)
def index(
    ctx: typer.Context,
    place: OutOptions,
    rows: TrainingRows,
    chosen: CheckpointOptions,
    choices: ChoiceOptions,
    change: ChangeOptions,
    ray: RayOptions,
) -> None:
    """See HELP."""
    change.check()
    ray.check()
    if ray.ray is not None and change.is_given():
        raise InputError("--ray divides a build among machines, not a change of an index. Leave one of them out.")
    _refuse_what_a_build_takes(ctx)
    unchanged: list[str] = []  # says that nothing was left to do
    started = time.perf_counter()
    with progress_bar() as progress:
        how = {"resume": change.resume, "force": place.force, "tell": unchanged.append, "progress": progress}
        built = _build_or_change(place.out, rows, chosen, choices, change, ray, how)
    if unchanged:
        say(unchanged[0])
        return
    if isinstance(built, str):
        say(f"{place.out}: {built}, {time.perf_counter() - started:.1f} s")
        return
    _say_what_was_built(
        built, place, of_rows=rows.train is not None or change.commit, seconds=time.perf_counter() - started
    )


def _build_or_change(
    out: str,
    rows: TrainingRows,
    chosen: CheckpointOptions,
    choices: ChoiceOptions,
    change: ChangeOptions,
    ray: RayOptions,
    how: dict[str, Any],
) -> Index | str:
    """The index after what was asked for, or what is there before it is one; ``how`` is what every change takes."""
    from forebear.indexer.building import build
    from forebear.indexer.building.sharing.part_files import read_fit
    from forebear.indexer.index import Index
    from forebear.indexer.rows.targets.label_column import DROP_MARKED
    from forebear.indexer.training.model_choice import choose_model

    computing = choices.computing
    on: dict[str, Any] = {"device": computing.device, "devices": listed(computing.devices)}
    if change.retire:
        return build.retire_rows(out, row_numbers(listed(change.retire)), **how)
    if change.rebuild_ann:
        return build.rebuild_ann(out, choices.storing.ann, **how)
    if change.refit:
        return build.refit_index(out, model=chosen.model, warn=warn, **on, **how)
    if change.commit:
        return build.commit_parts(out, change.parts or (), model=chosen.model, warn=warn, **on, **how)
    if change.shard is not None:
        like = read_fit(Path(out)).manifest
        source = rows.open_all(like.spec.label_names, like.row_format, DROP_MARKED)
        written = build.build_part(out, source, change.shard, model=chosen.model, warn=warn, **on, **how)
        return f"part {change.shard} is written, {len(written):,} rows"
    if change.append:
        manifest = Index.open(Path(out)).manifest
        source = rows.open_all(manifest.spec.label_names, manifest.row_format, DROP_MARKED)
        return build.append_rows(out, source, model=chosen.model, warn=warn, **on, **how)
    run = choose_model(chosen.model, chosen.checkpoints or (), chosen.eta or ())
    source = rows.open_all(run.class_names(), run.row_format, run.unlabelled)
    given = choices.given(source.text_columns)
    if not change.fit and ray.ray is None:
        return Index.build(run, source, out, **given, warn=warn, **how)
    begun = build.build_from_model(run, source, out, build=build.fit_index, warn=warn, **given, **how)
    if ray.ray is not None and begun is None:
        device = choices.computing.device
        of_part = ["index", "--out", out, "--train", str(rows.train), "--device", device, "--quiet", "--shard"]
        in_shards(ray, lambda shard: [*of_part, shard], how["progress"])
        return build.commit_parts(out, device=device, warn=warn, tell=how["tell"], progress=how["progress"])
    return begun or f"fitted. Next: forebear index --out {out} --train {rows.train} --shard I/N, then --commit"


def _say_what_was_built(built: Index, place: OutOptions, *, of_rows: bool, seconds: float) -> None:
    """Say what the index holds now, and of new rows what is odd about them."""
    from forebear.indexer.building.row_facts import row_facts
    from forebear.indexer.gradients.self_check import CheckedGradients

    manifest, out = built.manifest, place.out
    if manifest.spec.sketched_scopes and manifest.fit_age.is_stale:
        warn(f"{out}: {manifest.fit_age}.")
    if manifest.generation == 0 and manifest.self_check:
        say(CheckedGradients(**manifest.self_check).describe())
    if of_rows:
        facts = row_facts(built)
        for line in facts.describe():
            say(line)
        for line in facts.warnings():
            warn(line)
    if manifest.generation == 0 and (kept := kept_line(manifest)) is not None:
        say(kept)
    total = sum(facts["bytes"] for facts in manifest.files.values())
    say(
        f"{out}: {manifest.n_live:,} rows, {len(manifest.checkpoints)} checkpoint(s), {size(total)} "
        f"({total / manifest.n_rows:,.0f} bytes a row), {seconds:.1f} s. "
        f"Next: forebear retrieve --index {out} --text '...'",
    )


def kept_line(manifest: Manifest) -> str | None:
    """Which columns are kept besides texts and labels, and how many bytes they take; None where there are none."""
    from forebear.indexer.storage.layout import COLUMNS

    if not manifest.columns:
        return None
    names = ", ".join(f"{name} ({kind})" for name, kind in manifest.columns.items())
    n_bytes, n_text_bytes = (
        sum(facts["bytes"] for name, facts in manifest.files.items() if name.startswith(f"{folder}/"))
        for folder in (COLUMNS, "rows")
    )
    heavy = ", more than the texts" if n_bytes > n_text_bytes else ""
    return f"columns kept besides texts and labels: {names}; {size(n_bytes)}{heavy}. --keep-columns chooses others"


def _refuse_what_a_build_takes(ctx: typer.Context) -> None:
    """Refuse options that mean nothing for the change that is asked for, by name."""
    sources = {p.name: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    given = [p for p in ctx.command.params if (of := sources[p.name]) is not None and of.name == "COMMANDLINE"]
    for change, taken in OPTIONS_OF_CHANGES.items():
        if not any(p.name == change for p in given):
            continue
        option = {p.name: p.opts[0] for p in ctx.command.params}
        foreign = [p.opts[0] for p in given if p.name not in (change, *OPTIONS_OF_EVERY_CHANGE, *taken)]
        if foreign:
            also = ", ".join(option[name] for name in (*taken, *OPTIONS_OF_EVERY_CHANGE))
            raise InputError(
                f"{option[change]} takes no {', '.join(foreign)}: the index keeps what it was built with. Leave that "
                f"out (it takes {also}), or build the index again."
            )
