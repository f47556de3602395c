"""Options of a question: methods, target, gradients, curvature, search, spans, and the sample of test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import Options

if TYPE_CHECKING:
    from forebear.retriever.retriever import Retriever

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="Methods; `forebear methods` lists them.",
        show_default="all that score rows from this index",
        rich_help_panel="Question",
    ),
]
Top = Annotated[
    int,
    typer.Option("--top", help="k: rows at each end of a ranking, the k highest scores and the k lowest."),
]
Depths = Annotated[
    list[str] | None, typer.Option("--top", help="k, one or several: the top k rows are looked at.", show_default=False)
]
Listed = Annotated[int, typer.Option("--top", help="Rows, or groups of rows, that the report lists.")]
Shares = Annotated[
    list[str] | None,
    typer.Option("--share", help="Numbers of rows as shares of all rows, such as 0.01,0.1.", show_default=False),
]
Recall = Annotated[
    float,
    typer.Option(
        "--recall",
        help="Share of the exact top 10 that a scope beyond the head is expected to find, above 0 and at most 1; it "
        "sets how many candidates are scored.",
        rich_help_panel="Search",
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        "--candidates",
        help="Rows (or stored spans) at each end that sketches propose and the model scores.",
        show_default="as many as --recall takes",
        rich_help_panel="Search",
    ),
]
Word = Annotated[
    str | None,
    typer.Option(
        "--word",
        help="The word of the test row whose saliency is asked about.",
        show_default="its most salient",
        rich_help_panel="Question",
    ),
]
Spans = Annotated[
    str | None,
    typer.Option(
        "--spans",
        help="Spans that if+, if++, tracin+ and tracin++ rank: clauses, sentences, words, aspect, reader:MODEL or "
        "FILE.py:function.",
        show_default="those that the index stores, else clauses",
        rich_help_panel="Spans",
    ),
]
SpanColumn = Annotated[
    str | None,
    typer.Option(
        "--span-column",
        help="The text column that spans are in.",
        show_default="the index's, or the first",
    ),
]
SampleSeed = Annotated[
    int,
    typer.Option("--seed", help="Random seed, a whole number from 0 up: of samples, retrainings and intervals.", min=0),
]
SampledRows = Annotated[int, typer.Option("--rows", help="Training rows looked at, a seeded sample; 0: all.")]
Neighbours = Annotated[int, typer.Option("--neighbours", help="Nearest rows that are looked at, for each row.")]
HeadDamping = Annotated[
    str | None,
    typer.Option(
        "--damping",
        help="Of the head: how strongly its weights are held near the trained ones.",
        show_default="the index's first",
    ),
]
Curvature = Annotated[
    str | None,
    typer.Option(
        "--curvature",
        help="H^-1 of if and rif: exact (of the head), ekfac (beyond it), astra (which refines it), cg, cg-ekfac, "
        "cg-hessian, lissa or identity.",
        show_default="exact at the head, ekfac beyond it",
        rich_help_panel="Curvature",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="Whose loss: predicted (the predicted label's), gold (of labelled rows), or a label's name; of several "
        "labels a row label:NAME, the loss of this label alone.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ScopeOptions(Options, panel="Question"):
    """The scope whose gradients are compared, and the curvature of H^-1."""

    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            help="Parameters whose gradients are compared: head; or others that were indexed, such as all or top-2.",
        ),
    ] = "head"
    curvature: Curvature = None
    damping: Annotated[
        str | None,
        typer.Option(
            "--damping",
            help="Added to the curvature's eigenvalues: 1% of the largest, 0.1x their mean, or a number, as 1e-5.",
            show_default="the index's first",
            rich_help_panel="Curvature",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(ScopeOptions):
    """The target, besides the scope."""

    target: Target = "predicted"


@dataclass(frozen=True, kw_only=True)
class SeveralOptions(Options, panel="Question"):
    """Several scopes and dampings, whose answers stand in one table; curvature and target."""

    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="Scopes, one or several, such as head,top-2,all: methods are asked at each.",
            show_default="head",
        ),
    ] = None
    dampings: Annotated[
        list[str] | None,
        typer.Option(
            "--damping",
            help="Dampings, one or several, such as 0.1%,1%,10%: methods with H^-1 are asked at each.",
            show_default="the index's first",
            rich_help_panel="Curvature",
        ),
    ] = None
    curvature: Curvature = None
    target: Target = "predicted"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(QuestionOptions):
    """How exact a search for the top rows is, besides the question."""

    exact: Annotated[
        str,
        typer.Option(
            "--exact",
            help="rerank: candidates are scored exactly; full: every row is; none (of retrieve): ranks by sketches "
            "alone.",
            rich_help_panel="Search",
        ),
    ] = "rerank"
    recall: Recall = 0.98


@dataclass(frozen=True, kw_only=True)
class SolverOptions(Options, panel="Curvature"):
    """Settings of the solvers of H^-1 that iterate."""

    curvature_rows: Annotated[
        int,
        typer.Option("--curvature-rows", help="Training rows that cg and lissa take beyond the head; 0: all."),
    ] = 1024
    lissa: Annotated[
        str, typer.Option("--lissa", help="Settings of lissa: han20, pez21, or as in han20,depth=5000.")
    ] = "han20"
    astra: Annotated[
        str, typer.Option("--astra", help="Settings of astra, over all training rows: steps, and rows a step.")
    ] = "batch_rows=64,steps=100"
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative residual, above 0, at which cg stops.")] = (
        1e-3
    )


@dataclass(frozen=True, kw_only=True)
class SpanOptions(Options, panel="Spans"):
    """Which spans methods by spans compare."""

    spans: Spans = None
    query_spans: Annotated[
        str | None,
        typer.Option(
            "--query-spans",
            help="Spans of test rows; also columns:FROM,TO or clause-of:FROM,TO.",
            show_default="as --spans",
        ),
    ] = None
    span_column: SpanColumn = None

    def given(self, retriever: Retriever) -> dict[str, Any]:
        """The options as choices of a :class:`QuerySpec`: the column by its number."""
        column = None if self.span_column is None else retriever.index.text_column(self.span_column)
        return {"spans": self.spans, "query_spans": self.query_spans, "span_column": column}


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options, panel="Sample"):
    """How many test rows are sampled, and the random seed."""

    n_queries: Annotated[int, typer.Option("--queries", help="Rows asked about, a seeded sample; 0: all.")] = 100
    seed: SampleSeed = 0
