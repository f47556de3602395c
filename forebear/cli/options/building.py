"""Options of ``forebear index``: what a build chooses, and what changes an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from forebear.cli.options.groups import Options, flag_of, values_of
from forebear.cli.options.model import ClassWeights, Device, Devices, Labels, LabelSmoothing, MaxLength, Precision, Seed
from forebear.cli.options.question import SpanColumn
from forebear.cli.screen.console import listed
from forebear.errors import InputError
from forebear.indexer.storage.choices import DEFAULT_DAMPING

if TYPE_CHECKING:
    pass

NO_CURVATURE = ("none",)  # the value of --damping that stands for no curvature


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options, panel="Model"):
    """The model, its checkpoints and their weights."""

    model: Annotated[
        str | None, typer.Option("--model", help="Run folder, model folder or hub name.", show_default=False)
    ] = None
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoints",
            help="'all' of a run or of a Trainer's output folder, or some of a run by name, or folders in training "
            "order.",
            show_default="the model alone",
        ),
    ] = None
    eta: Annotated[
        list[float] | None,
        typer.Option(
            "--eta",
            help="Weight of each checkpoint in TracIn's sum: the learning rate up to it.",
            show_default="the run's, else the mean rates that a Trainer logged, else 1",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StoreChoices(Options, panel="What is stored"):
    """Representations, and the vectors of sentences, words and spans."""

    stores: Annotated[
        list[str] | None,
        typer.Option("--store", help="features, and sbert, words, spans as wanted.", show_default="features"),
    ] = None
    sentence_model: Annotated[
        str,
        typer.Option("--sentence-model", help="Of sbert: an encoder that was not fine-tuned, a folder or hub name."),
    ] = "minilm"
    words_tops: Annotated[
        list[str] | None,
        typer.Option(
            "--words-top",
            help="Of words: positions of longest gradient whose words are kept a row; 0: all; or both, as 0,10.",
            show_default="10",
        ),
    ] = None
    words_precision: Annotated[
        str, typer.Option("--words-precision", help="Of stored word vectors: fp16, int8 or fp32.")
    ] = "fp16"
    spans: Annotated[
        str,
        typer.Option(
            "--spans",
            help="Of spans: clauses, sentences, words, aspect, columns:FROM,TO, clause-of:FROM,TO, or "
            "FILE.py:function.",
        ),
    ] = "clauses"
    span_column: SpanColumn = None
    keep_columns: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-columns",
            help="Columns kept besides texts and labels, to come out with results: names; all (of strings, numbers, "
            "true and false, dates, times); none.",
            show_default="all",
        ),
    ] = None
    ann: Annotated[
        str | None,
        typer.Option(
            "--ann",
            help="FAISS factory string: cosines and distances of features are looked up there, at a measured recall.",
            show_default="every row is compared",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GradientChoices(Options, panel="Gradients and curvature"):
    """Scopes, their sketches, and H."""

    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="Gradients to index: head; and top-K, all, adapter or layer:NAME, sketched.",
            show_default="head",
        ),
    ] = None
    sketch_dim: Annotated[
        int, typer.Option("--sketch-dim", help="Coordinates a row of a sketched scope, 8 to 4096.")
    ] = 128
    sketch_bits: Annotated[
        int,
        typer.Option(
            "--sketch-bits", help="Bits a row, of a code of what the coordinates leave over; a multiple of 8, 0: none."
        ),
    ] = 4096
    white_bits: Annotated[
        int, typer.Option("--white-bits", help="The same for the whitened sketches, those of if and rif.")
    ] = 5888
    whitening: Annotated[
        str,
        typer.Option(
            "--whitening",
            help="Of the sketches of if and rif: leading, by the curvature's leading directions where the damping is "
            "above most eigenvalues; or whole, three times as slow, with the exact self-influence of every row.",
        ),
    ] = "leading"
    sketch_basis: Annotated[
        str, typer.Option("--sketch-basis", help="What the coordinates are of: mixed, principal or random.")
    ] = "mixed"
    with_bias: Annotated[
        bool, typer.Option("--with-bias", help="Biases and LayerNorm take part in the sketched scopes.")
    ] = False
    curvature: Annotated[
        str, typer.Option("--curvature", help="Of the sketched scopes, for if and rif: ekfac or none.")
    ] = "ekfac"
    dampings: Annotated[
        list[str] | None,
        typer.Option(
            "--damping",
            help="Added to the curvature's eigenvalues: 1% of the largest, 0.1x their mean, or a number; several; "
            "none: no curvature.",
            show_default=DEFAULT_DAMPING,
        ),
    ] = None
    rep_refit: Annotated[bool, typer.Option("--rep-refit", help="Refit the head for `rep`, as Pez21 does.")] = False
    calibration_queries: Annotated[
        int,
        typer.Option(
            "--calibrate",
            help="Rows asked about to find how many candidates a recall takes; 0: none. Two thirds of them state it: "
            "n support a recall of n / (n + 1).",
        ),
    ] = 74


@dataclass(frozen=True, kw_only=True)
class ComputingChoices(Options, panel="Model"):
    """How rows are read and computed."""

    label_mode: Labels = None
    max_length: MaxLength = None
    precision: Precision = "fp32"
    class_weights: ClassWeights = None
    label_smoothing: LabelSmoothing = None
    device: Device = "auto"
    devices: Devices = None
    batch_tokens: Annotated[
        str,
        typer.Option(
            "--batch-tokens",
            help="Word pieces in a batch, padding included; auto: 4096 on the CPU, on a GPU as many as half of its "
            "memory holds.",
        ),
    ] = "auto"
    shard_rows: Annotated[
        int, typer.Option("--shard-rows", help="Rows in a file; an interrupted build goes on at a file.")
    ] = 4096
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(Options):
    """Choices of a build: each option is the field of the same name of :class:`BuildOptions`, and has its default."""

    computing: ComputingChoices
    storing: StoreChoices
    gradients: GradientChoices

    def given(self, text_columns: Sequence[str]) -> dict[str, Any]:
        """The choices of a build that are made, as :meth:`Index.build` takes them.

        Args:
            text_columns: Text columns of the training rows, one of which ``--span-column`` may name.
        """
        from forebear.indexer.building.options import BuildOptions

        kinds = get_type_hints(BuildOptions)
        given: dict[str, Any] = {}
        for name, value in values_of(self).items():
            if isinstance(value, list):
                parts = listed(value)
                given[name] = counts(self._flag(name), parts) if kinds[name] == tuple[int, ...] else parts
            else:
                given[name] = value
        if given["batch_tokens"].isdigit():
            given["batch_tokens"] = int(given["batch_tokens"])
        if given["span_column"] is not None:
            given["span_column"] = _column(given["span_column"], text_columns)
        choices = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v not in (None, [])}
        choices["scopes"] = tuple(dict.fromkeys(["head", *choices.get("scopes", ())]))
        if choices.get("dampings") == NO_CURVATURE:
            choices["dampings"] = ()
        return choices

    def _flag(self, name: str) -> str:
        groups = (getattr(self, field.name) for field in fields(self))
        return next(flag_of(type(group), name) for group in groups if hasattr(group, name))


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(Options, panel="Changes of an index, and builds in parts"):
    """A change of an index, or a step of a build; ``--resume`` goes on with an interrupted one."""

    append: Annotated[bool, typer.Option("--append", help="Add the --train rows to the index in --out.")] = False
    attach: Annotated[
        str | None,
        typer.Option(
            "--attach",
            help="Write to --out this index, which was published without texts (a folder, hf://user/name), with the "
            "texts of the --train rows, which must be those of the index.",
            show_default=False,
        ),
    ] = None
    retire: Annotated[
        list[str] | None, typer.Option("--retire", help="Row numbers to take out: 17,230-240.", show_default=False)
    ] = None
    rebuild_ann: Annotated[bool, typer.Option("--rebuild-ann", help="Make ann/ again, as --ann says.")] = False
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Fit sketches, EK-FAC and calibration beyond the head to the rows there are now."),
    ] = False
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Begin a build in parts: fit what they share, and write no rows. Takes what a build takes."
        ),
    ] = False
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="I/N: write part I of N of the rows, 1/N to N/N, in the folder that --fit wrote or in a copy of it. "
            "Takes --train.",
            show_default=False,
        ),
    ] = None
    commit: Annotated[bool, typer.Option("--commit", help="Make the index, when all parts are written.")] = False
    parts: Annotated[
        list[str] | None,
        typer.Option("--from", help="Of --commit: other folders that hold parts, or URLs.", show_default=False),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted build or change; one that is done is not done twice."),
    ] = False

    def is_given(self) -> bool:
        """Whether anything but a build as a whole is asked for."""
        steps = self.append or self.rebuild_ann or self.refit or self.fit or self.commit
        return steps or bool(self.retire) or self.shard is not None or self.attach is not None

    def check(self) -> None:
        """Refuse several changes at once."""
        changes = (self.append, bool(self.retire), self.rebuild_ann, self.refit, self.attach is not None)
        if sum(changes) > 1:
            raise InputError(
                "--append, --retire, --refit, --rebuild-ann and --attach are separate changes: give one of them."
            )
        steps = (self.fit, self.shard is not None, self.commit)
        if sum(steps) > 1 or (any(steps) and any(changes)):
            raise InputError("--fit, --shard and --commit are separate steps of a build: give one of them.")
        if self.parts and not self.commit:
            raise InputError("--from names the folders that --commit takes parts from. Give --commit, too.")


def _column(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise InputError(f"--span-column {name}: the text columns are {', '.join(names)}.")
    return names.index(name)


def counts(option: str, parts: Sequence[str]) -> list[int]:
    """Numbers from 0 up."""
    for part in parts:
        if not part.isdigit():
            raise InputError(f"{option} {part}: expected a whole number from 0 up.")
    return [int(part) for part in parts]


def row_numbers(parts: Sequence[str]) -> list[int]:
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
