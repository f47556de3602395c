"""``forebear index``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.rows import open_rows_aloud
from forebear.cli.options.shared import Device, LabelColumn, LabelNames, Quiet, TextColumns, Unlabelled
from forebear.cli.screen.console import Variadic, listed, progress_bar, say, size, warn
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.indexer.index import Index
    from forebear.indexer.rows.row_source import RowSource
    from forebear.progress import Progress

# What a change takes besides its own name; everything else was decided by the build.
OPTIONS_OF_EVERY_CHANGE = ("out", "resume", "force", "quiet")
OPTIONS_OF_CHANGES = {
    "append": ("train", "model", "text_columns", "label_column", "label_names", "unlabelled", "device"),
    "retire": (),
    "rebuild_ann": ("ann",),
    "refit": ("model", "device"),
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
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("index", help=HELP, cls=Variadic)(index)


def index(
    ctx: typer.Context,
    out: Annotated[str, typer.Option("--out", help="Index folder to write, or to change.")],
    train: Annotated[str | None, typer.Option("--train", help="The rows the model was trained on, labelled.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Run folder, model folder or hub name.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoints",
            help="'all' of a run or of a Trainer's output folder, or some of a run by name, or folders in training "
            "order.",
            show_default=False,
        ),
    ] = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(
            "--eta",
            help="TracIn weight of each checkpoint. Default: the run's, else the mean rates that a Trainer logged, "
            "else 1.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="Gradients to index: head; top-K, all or layer:NAME, sketched.  [default: head]",
            show_default=False,
        ),
    ] = None,
    sketch_dim: Annotated[int, typer.Option("--sketch-dim", help="Coordinates a row of a sketched scope.")] = 128,
    sketch_bits: Annotated[
        int, typer.Option("--sketch-bits", help="One-bit code a row of what the coordinates leave over.")
    ] = 4096,
    white_bits: Annotated[int, typer.Option("--white-bits", help="The same for the sketches of if and rif.")] = 5888,
    sketch_basis: Annotated[str, typer.Option("--sketch-basis", help="mixed, principal or random.")] = "mixed",
    with_bias: Annotated[
        bool, typer.Option("--with-bias", help="Biases and LayerNorm take part in the sketched scopes.")
    ] = False,
    curvature: Annotated[
        str, typer.Option("--curvature", help="Of the sketched scopes, for if and rif: ekfac or none.")
    ] = "ekfac",
    calibrate: Annotated[
        int,
        typer.Option(
            "--calibrate",
            help="Rows asked about to find how many candidates a recall takes; 0: none. Two thirds of them state it: "
            "n support a recall of n / (n + 1).",
        ),
    ] = 74,
    store: Annotated[
        list[str] | None,
        typer.Option(
            "--store", help="features, and sbert, words, spans as wanted.  [default: features]", show_default=False
        ),
    ] = None,
    sentence_model: Annotated[str, typer.Option("--sentence-model", help="Un-tuned encoder for sbert.")] = "minilm",
    words_top: Annotated[
        list[str] | None,
        typer.Option(
            "--words-top",
            help="Positions of longest gradient whose words are kept a row; 0: all; or both, as 0,10.  [default: 10]",
            show_default=False,
        ),
    ] = None,
    words_precision: Annotated[
        str, typer.Option("--words-precision", help="Of stored word vectors: fp16, int8 or fp32.")
    ] = "fp16",
    spans: Annotated[
        str,
        typer.Option(
            "--spans",
            help="What --store spans stores: clauses, sentences, words, aspect, columns:FROM,TO, clause-of:FROM,TO, or "
            "FILE.py:function.",
        ),
    ] = "clauses",
    span_column: Annotated[
        str | None,
        typer.Option(
            "--span-column", help="The text column that spans are in. Default: the first.", show_default=False
        ),
    ] = None,
    damping: Annotated[
        list[str] | None,
        typer.Option(
            "--damping",
            help="Of the curvature: 0.1x of the mean eigenvalue, or absolute; several; none.  [default: 0.1x]",
            show_default=False,
        ),
    ] = None,
    rep_refit: Annotated[bool, typer.Option("--rep-refit", help="Refit the head for `rep`, as Pez21 does.")] = False,
    ann: Annotated[str | None, typer.Option("--ann", help="FAISS factory string. Default: chosen by size.")] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="binary-nli. Default: the run's.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Longest row in word pieces; the rest is cut, in test rows too. Default: the run's, else the model's "
            "limit, at most 512.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "fp32",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="Padded tokens in a batch.")] = 4096,
    shard_rows: Annotated[int, typer.Option("--shard-rows", help="Rows in a file; a build resumes at a file.")] = 4096,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted build or change; one that is done is not done twice."),
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="Add the --train rows to the index in --out.")] = False,
    retire: Annotated[
        list[str] | None, typer.Option("--retire", help="Row numbers to take out: 17,230-240.", show_default=False)
    ] = None,
    rebuild_ann: Annotated[bool, typer.Option("--rebuild-ann", help="Make ann/ again, as --ann says.")] = False,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Fit sketches, EK-FAC and calibration beyond the head to the rows there are now."),
    ] = False,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    unlabelled: Unlabelled = "refuse",
    device: Device = "auto",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the index in --out. Of a change: discard what an unfinished one left; add rows also if they "
            "are there already.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """See HELP."""
    from forebear.indexer.building import build
    from forebear.indexer.building.options import BuildOptions
    from forebear.indexer.building.row_facts import row_facts
    from forebear.indexer.index import Index
    from forebear.indexer.training.run import choose_model

    if sum((append, bool(retire), rebuild_ann, refit)) > 1:
        raise InputError("--append, --retire, --refit and --rebuild-ann are separate changes: give one of them.")
    _refuse_what_a_build_takes(ctx)
    done: list[str] = []  # says that nothing was left to do

    def rows(columns: list[str] | None, classes: Sequence[str]) -> RowSource:
        if train is None:
            raise InputError("no training rows given. Name their file by --train.")
        return open_rows_aloud(
            train,
            text_columns=columns,
            label_column=label_column,
            label_names=label_names,
            unlabelled=unlabelled,
            need_labels=True,
            classes=classes,
        )

    def change(progress: Progress) -> Index:
        how: dict[str, Any] = {"resume": resume, "force": force, "tell": done.append}
        if retire:
            return build.retire_rows(out, row_numbers(listed(retire)), **how, progress=progress)
        if rebuild_ann:
            return build.rebuild_ann(out, ann, **how, progress=progress)
        if refit:
            return build.refit_index(out, model=model, device=device, warn=warn, **how, progress=progress)
        if append:
            source = rows(listed(text_columns) or None, Index.open(Path(out)).manifest.spec.label_names)
            return build.append_rows(out, source, model=model, device=device, warn=warn, **how, progress=progress)
        chosen = choose_model(model, checkpoints or (), eta or ())
        warn(chosen.remark)
        source = rows(listed(text_columns) or _if_there(chosen.text_columns, train), chosen.class_names())
        warn(chosen.data_remark(source))
        options = BuildOptions(
            stores=tuple(listed(store)) or ("features",),
            scopes=tuple(dict.fromkeys(["head", *listed(scope)])),
            sketch_dim=sketch_dim,
            sketch_bits=sketch_bits,
            white_bits=white_bits,
            sketch_basis=sketch_basis,
            with_bias=with_bias,
            curvature=curvature,
            calibration_queries=calibrate,
            sentence_model=sentence_model,
            words_tops=tuple(counts("--words-top", listed(words_top))) or (10,),
            words_precision=words_precision,
            spans=spans,
            span_column=0 if span_column is None else _column(span_column, source.text_columns),
            dampings=() if listed(damping) == ["none"] else tuple(listed(damping)) or ("0.1x",),
            rep_refit=rep_refit,
            ann=ann,
            seed=seed,
            precision=precision,
            max_length=chosen.max_length if max_length is None else max_length,
            label_mode=labels or chosen.label_mode,
            batch_tokens=batch_tokens,
            shard_rows=shard_rows,
            device=device,
        )
        return build.build_index(source, out, chosen.checkpoints, options, warn=warn, **how, progress=progress)

    started = time.perf_counter()
    with progress_bar(quiet=quiet) as progress:
        built = change(progress)
    if done:
        say(done[0], quiet=quiet)
        return
    manifest = built.manifest
    if manifest.spec.sketched_scopes and manifest.fit_age.is_stale:
        warn(f"{out}: {manifest.fit_age}.")
    if train is not None:
        facts_of_rows = row_facts(built)
        for line in facts_of_rows.describe():
            say(line, quiet=quiet)
        for line in facts_of_rows.warnings():
            warn(line)
    total = sum(facts["bytes"] for facts in manifest.files.values())
    say(
        f"{out}: {manifest.n_live:,} rows, {len(manifest.checkpoints)} checkpoint(s), {size(total)} "
        f"({total / manifest.n_rows:,.0f} bytes a row), {time.perf_counter() - started:.1f} s. "
        f"Next: forebear retrieve --index {out} --text '...'",
        quiet=quiet,
    )


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


def _if_there(columns: tuple[str, ...] | None, train: str | None) -> list[str] | None:
    """The run's text columns, where the training file has them; else they are found by name."""
    from forebear.errors import DataError
    from forebear.indexer.rows.row_source import open_rows

    if columns is None or train is None:
        return None
    try:
        open_rows(train, text_columns=list(columns))
    except DataError:
        return None
    return list(columns)


def _column(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise InputError(f"--span-column {name}: the text columns are {', '.join(names)}.")
    return names.index(name)


def counts(option: str, parts: list[str]) -> list[int]:
    """Numbers from 0 up."""
    for part in parts:
        if not part.isdigit():
            raise InputError(f"{option} {part}: expected a whole number from 0 up.")
    return [int(part) for part in parts]


def row_numbers(parts: list[str]) -> list[int]:
    """``17,230-240`` as numbers; a file name stands for the numbers in it, one a line."""
    numbers: list[int] = []
    for part in parts:
        if Path(part).is_file():
            numbers += row_numbers(Path(part).read_text(encoding="utf-8").split())
            continue
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"--retire {part}: expected row numbers such as 17 or 230-240, or a file of them.")
        if int(last or first) < int(first):
            raise InputError(f"--retire {part}: the range ends before it begins.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
