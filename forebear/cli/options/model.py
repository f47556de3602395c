"""Options that name an index, its model and where it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import Options
from forebear.cli.screen.console import listed
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.retriever.retriever import Retriever

WORKER = "FOREBEAR_WORKER"  # environment variable: the number of a worker, from 1, among those of --workers
MovedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model, if it has moved since the index was built; it must be the one that was indexed.",
        show_default="where it lay then",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where the model runs: cpu, cuda, cuda:N (the N-th GPU, from 0), or auto: what FOREBEAR_DEVICE says, else "
        "a GPU where there is one.",
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--devices",
        help="In place of --device several, which share the work: 0,1 are cuda:0 and cuda:1. The numbers are the same.",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="binary-nli: neutral and contradiction are one class, non-entailment, here and later.",
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", help="Longest row in word pieces; the rest is cut, in test rows too."),
]
Precision = Annotated[
    str, typer.Option("--precision", help="Numbers that the model computes in: fp32 or bf16; train has auto, too.")
]
ClassWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--class-weights",
        help="Factor of each class' loss: balanced (rows / (classes x rows of the class)), one number a class in the "
        "order of the model's labels, as 1,2.5, or none.",
    ),
]
LabelSmoothing = Annotated[
    float | None,
    typer.Option("--label-smoothing", help="Share of each label that the loss spreads over all classes, from 0 to 1."),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Random seed, a whole number: of training, of sketches, of samples of rows.")
]


@dataclass(frozen=True, kw_only=True)
class IndexOptions(Options, panel="Index and model"):
    """The index, and its model."""

    index: Annotated[str, typer.Option("--index", help="The index folder, or hf://user/name.", show_default=False)]
    model: MovedModel = None
    device: Device = "auto"
    devices: Devices = None

    def places(self) -> dict[str, Any]:
        """``device`` and ``devices`` as keyword arguments; a worker has one of the devices for itself."""
        given, worker = listed(self.devices), os.environ.get(WORKER)
        if not given or worker is None:
            return {"device": self.device, "devices": given}
        from forebear.indexer.model.device.picking import pick_devices

        names = pick_devices(self.device, given)
        return {"device": names[int(worker) % len(names)], "devices": ()}

    def first_device(self) -> str:
        """The device that retrains."""
        from forebear.indexer.model.device.picking import pick_devices

        return pick_devices(**self.places())[0]

    def open(self) -> Retriever:
        """The index's retriever."""
        from forebear.retriever.retriever import Retriever

        return Retriever(self.index, model=self.model, **self.places())


@dataclass(frozen=True, kw_only=True)
class ComparedOptions(Options, panel="Index and model"):
    """One index, or several of other models or seeds, which are compared."""

    indexes: Annotated[
        list[str],
        typer.Option(
            "--index", help="The index folder; several, each of its own model, stand side by side.", show_default=False
        ),
    ]
    model: MovedModel = None
    device: Device = "auto"
    devices: Devices = None

    def each(self) -> list[IndexOptions]:
        """The options of each index."""
        if self.model is not None and len(self.indexes) > 1:
            raise InputError(
                f"--model is one model, --index {len(self.indexes)} indexes. Leave --model out, or name one index."
            )
        return [
            IndexOptions(index=index, model=self.model, device=self.device, devices=self.devices)
            for index in self.indexes
        ]

    def open(self) -> list[Retriever]:
        """The retriever of each index."""
        return [options.open() for options in self.each()]


@dataclass(frozen=True, kw_only=True)
class MaybeIndexOptions(Options, panel="Index and model"):
    """The index that a file's rows are of, and its model; both may be left out."""

    index: Annotated[str | None, typer.Option("--index", help="The index that the list is of.", show_default=False)] = (
        None
    )
    model: MovedModel = None
    device: Device = "auto"
    devices: Devices = None

    @property
    def given(self) -> IndexOptions | None:
        """The options of the index, where there is one."""
        if self.index is None:
            return None
        return IndexOptions(index=self.index, model=self.model, device=self.device, devices=self.devices)


@dataclass(frozen=True, kw_only=True)
class IndexesOptions(Options, panel="Index and model"):
    """One index or several of one model, and the model."""

    indexes: Annotated[
        list[str],
        typer.Option(
            "--index", help="The index folder; several of one model are asked as one index.", show_default=False
        ),
    ]
    model: MovedModel = None
    device: Device = "auto"
    devices: Devices = None

    def open(self) -> Retriever:
        """The retriever of the index, or of all of them."""
        from forebear.retriever.retriever import JointRetriever

        one = IndexOptions(index=self.indexes[0], model=self.model, device=self.device, devices=self.devices)
        if len(self.indexes) == 1:
            return one.open()
        return JointRetriever(self.indexes, model=self.model, **one.places())
