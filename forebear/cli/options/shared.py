"""Options that several commands share, each said once."""

from __future__ import annotations

from typing import Annotated

import typer

TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text-columns", help="Text columns in order of encoding. Default: found by name.", show_default=False
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Label column. Default: found by name.", show_default=False)
]
LabelNames = Annotated[
    list[str] | None,
    typer.Option("--label-names", help="Names that integer labels stand for, in order.", show_default=False),
]
Unlabelled = Annotated[
    str,
    typer.Option(
        "--unlabelled",
        help="Rows without a gold label (null, '-', -1), where labels are needed: refuse; drop, and number the rows "
        "that are kept; keep '-' or -1 as a class. What the model has as a class is one.",
    ),
]
Pair = Annotated[str | None, typer.Option("--pair", help="The second text, where rows are pairs.", show_default=False)]
Scope = Annotated[str, typer.Option("--scope", help="Parameters whose gradients are compared.")]
Recall = Annotated[
    float,
    typer.Option("--recall", help="Expected of the exact top 10 at deeper scopes; sets how many candidates."),
]
Damping = Annotated[
    str | None,
    typer.Option("--damping", help="Of the curvature. Default: the index's first.", show_default=False),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
JsonOut = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IndexFolder = Annotated[str, typer.Option("--index", help="The index folder.", show_default=False)]
MovedModel = Annotated[
    str | None,
    typer.Option("--model", help="The model, if it has moved since; it must match the index.", show_default=False),
]
