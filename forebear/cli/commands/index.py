"""``forebear index``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    from forebear.progress import Progress

# What a change takes besides its own name; everything else was decided by the build.
OPTIONS_OF_EVERY_CHANGE = ("out", "resume", "force", "quiet")
OPTIONS_OF_A_COPY = ("out", "quiet")  # which goes to a new folder
_OF_ROWS = (
    "train", "model", "text_columns", "label_column", "label_names", "unlabelled", "delimiter", "encoding", "device",
    "devices",
)  # fmt: skip
OPTIONS_OF_CHANGES = {
    "append": _OF_ROWS,
    "attach": (*_OF_ROWS, "keep_columns"),
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

    forebear index --out I --attach hf://me/mine-index --train train.csv

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

    def open_like(self, manifest: Manifest) -> RowSource:
        """All rows, read as those of an index were, but for marked ones without a label."""
        from forebear.indexer.rows.targets.label_column import DROP_MARKED

        return self.open_all(manifest.spec.label_names, manifest.row_format, DROP_MARKED)


@dataclass(frozen=True, kw_only=True)
class OutOptions(Options, panel="Output"):
    """The index folder."""

    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Index folder to write, or to change; of a build also a URL of fsspec, such as s3://bucket/index.",
            show_default=False,
        ),
    ]
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
    started = time.perf_counter()
    with progress_bar() as progress:
        asked = _Asked(
            place=place, rows=rows, chosen=chosen, choices=choices, change=change, ray=ray, progress=progress
        )
        done = _way(change, ray)(asked)
    seconds = time.perf_counter() - started
    if asked.unchanged:
        say(asked.unchanged[0])
    elif isinstance(done, str):
        say(f"{place.out}: {done}, {seconds:.1f} s")
    else:
        _say_what_was_built(done, place, of_rows=rows.train is not None or change.commit, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the command was asked for."""

    place: OutOptions
    rows: TrainingRows
    chosen: CheckpointOptions
    choices: ChoiceOptions
    change: ChangeOptions
    ray: RayOptions
    progress: Progress
    unchanged: list[str] = field(default_factory=list)  # says that nothing was left to do

    @property
    def out(self) -> str:
        """The index folder."""
        return self.place.out

    @property
    def how(self) -> dict[str, Any]:
        """What every change takes."""
        again = {"resume": self.change.resume, "force": self.place.force}
        return again | {"tell": self.unchanged.append, "progress": self.progress}

    @property
    def by_model(self) -> dict[str, Any]:
        """What a change takes that runs models."""
        computing = self.choices.computing
        on = {"device": computing.device, "devices": listed(computing.devices)}
        return self.how | on | {"model": self.chosen.model, "warn": warn}


_Way = Callable[[_Asked], "Index | str"]  # gives the index, or says what is there before it is one


def _way(change: ChangeOptions, ray: RayOptions) -> _Way:
    """What is done; :meth:`ChangeOptions.check` has refused several at once."""
    ways: dict[_Way, bool] = {
        _retire: bool(change.retire),
        _rebuild_ann: change.rebuild_ann,
        _refit: change.refit,
        _append: change.append,
        _attach: change.attach is not None,
        _fit: change.fit,
        _write_part: change.shard is not None,
        _commit: change.commit,
        _build_over_ray: ray.ray is not None,
    }
    return next((way for way, is_asked in ways.items() if is_asked), _build)


def _retire(asked: _Asked) -> Index:
    from forebear.indexer.building.build import retire_rows

    return retire_rows(asked.out, row_numbers(listed(asked.change.retire)), **asked.how)


def _rebuild_ann(asked: _Asked) -> Index:
    from forebear.indexer.building.build import rebuild_ann

    return rebuild_ann(asked.out, asked.choices.storing.ann, **asked.how)


def _refit(asked: _Asked) -> Index:
    from forebear.indexer.building.build import refit_index

    return refit_index(asked.out, **asked.by_model)


def _append(asked: _Asked) -> Index:
    from forebear.indexer.building.build import append_rows
    from forebear.indexer.index import Index
    from forebear.indexer.storage.files import path_of

    return append_rows(asked.out, asked.rows.open_like(Index.open(path_of(asked.out)).manifest), **asked.by_model)


def _attach(asked: _Asked) -> Index:
    from forebear.indexer.index import Index

    published, computing = Index.open(str(asked.change.attach)), asked.choices.computing
    given = {"keep_columns": listed(asked.choices.storing.keep_columns)} if asked.choices.storing.keep_columns else {}
    source = asked.rows.open_like(published.manifest)
    return published.with_texts(source, asked.out, model=asked.chosen.model, device=computing.device, **given)


def _build(asked: _Asked) -> Index:
    from forebear.indexer.building.build import build_index

    built = _from_model(asked, build_index)
    assert built is not None
    return built


def _fit(asked: _Asked) -> Index | str:
    from forebear.indexer.building.build import fit_index

    next_step = f"forebear index --out {asked.out} --train {asked.rows.train} --shard I/N, then --commit"
    return _from_model(asked, fit_index) or f"fitted. Next: {next_step}"


def _write_part(asked: _Asked) -> str:
    from forebear.indexer.building.build import build_part
    from forebear.indexer.building.sharing.part_files import read_fit
    from forebear.indexer.building.sharing.places import place_of

    part = str(asked.change.shard)
    with place_of("records", asked.out) as folder:
        source = asked.rows.open_like(read_fit(folder).manifest)
    return f"part {part} is written, {len(build_part(asked.out, source, part, **asked.by_model)):,} rows"


def _commit(asked: _Asked) -> Index:
    from forebear.indexer.building.build import commit_parts

    return commit_parts(asked.out, asked.change.parts or (), **asked.by_model)


def _build_over_ray(asked: _Asked) -> Index:
    from forebear.indexer.building.build import commit_parts, fit_index

    device = asked.choices.computing.device
    of_part = ["index", "--out", asked.out, "--train", str(asked.rows.train), "--device", device, "--quiet", "--shard"]
    built = _from_model(asked, fit_index)
    if built is not None:
        return built
    in_shards(asked.ray, lambda shard: [*of_part, shard], asked.progress)
    return commit_parts(asked.out, device=device, warn=warn, **asked.how)


def _from_model(asked: _Asked, build: Callable[..., Index | None]) -> Index | None:
    """Begin a build of the chosen checkpoints and choices."""
    from forebear.indexer.building.build import build_from_model
    from forebear.indexer.training.model_choice import choose_model

    chosen = asked.chosen
    run = choose_model(chosen.model, chosen.checkpoints or (), chosen.eta or ())
    source = asked.rows.open_all(run.class_names(), run.row_format, run.unlabelled)
    given = asked.choices.given(source.text_columns)
    return build_from_model(run, source, asked.out, build=build, warn=warn, **given, **asked.how)


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
        always = OPTIONS_OF_A_COPY if change == "attach" else OPTIONS_OF_EVERY_CHANGE
        foreign = [p.opts[0] for p in given if p.name not in (change, *always, *taken)]
        if change == "attach" and (again := [name for name in foreign if name in ("--resume", "--force")]):
            raise InputError(f"--attach takes no {', '.join(again)}: it writes a new folder. Name one by --out.")
        if foreign:
            also = ", ".join(option[name] for name in (*taken, *always))
            raise InputError(
                f"{option[change]} takes no {', '.join(foreign)}: the index keeps what it was built with. Leave that "
                f"out (it takes {also}), or build the index again."
            )
