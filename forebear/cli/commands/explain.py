"""``forebear explain``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Options, Shown, grouped, values_of
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, QuestionOptions, Recall, Spans, Top, Word
from forebear.cli.options.report import OutputOptions
from forebear.cli.options.rows import TEXT, Pair
from forebear.cli.screen.console import OUT, Command, listed, say, shortened

if TYPE_CHECKING:
    from rich.text import Text

    from forebear.evaluation.explain.explanation import Explanation, Flip, FoundRow, Side
    from forebear.evaluation.explain.marks import Piece

HELP = """Explain one prediction: its salient words, the training rows for and against it, and the words they share.

Examples:

    forebear explain --index I --text "a gripping film"

    forebear explain --index I --text "A man sleeps." --pair "A person is awake." --target entailment

    forebear explain --index I --text "a gripping film" --method gc,if --top 3 --html page.html

    forebear explain --index I --text "dull plot, great cast" --spans clauses --saliency-influence
"""
SHOWN_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions(Options, panel="Saliency"):
    """Which saliency is shown, and whether rows behind a word's saliency are searched."""

    form: Annotated[str, typer.Option("--saliency", help="Of each word: gradient-x-input or summed-gradient.")] = (
        "gradient-x-input"
    )
    saliency_influence: Annotated[
        bool,
        typer.Option(
            "--saliency-influence",
            help="Also ask which rows and words made the model look at its word of largest summed-gradient saliency.",
        ),
    ] = False
    word: Word = None


@dataclass(frozen=True, kw_only=True)
class PageOptions(OutputOptions):
    """Where the explanation goes."""

    html: Annotated[
        str | None, typer.Option("--html", help="Write a page, NAME.html, instead of printing.", show_default=False)
    ] = None

    def check(self) -> None:
        """Refuse a page that cannot be written, before any work."""
        from forebear.evaluation.explain.page import check_page

        if self.html is not None:
            check_page(Path(self.html), force=self.force)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain", help=HELP, cls=Command)(explain)


@grouped(
    methods=Shown("tracin-we-topk where the index holds words, and gc"), top=5, spans=Shown("spans are not ranked")
)
def explain(
    index: IndexOptions,
    text: Annotated[str, TEXT],
    question: QuestionOptions,
    saliency: SaliencyOptions,
    output: PageOptions,
    pair: Pair = None,
    methods: Methods = None,
    top: Top = 5,
    spans: Spans = None,
    recall: Recall = 0.98,
    flip: Annotated[
        bool, typer.Option("--flip", help="Also look for the fewest training rows that flip the prediction.")
    ] = False,
) -> None:
    """Explain one prediction, on the screen or as a page."""
    from forebear.evaluation.explain.page import write_page
    from forebear.evaluation.python.explaining import explain

    output.check()
    choices = values_of(question, saliency) | {"methods": listed(methods), "top": top, "spans": spans, "recall": recall}
    choices["flip"] = flip
    explanation = explain(index.open(), text if pair is None else (text, pair), **choices)
    if output.html is None:
        show_explanation(explanation)
    else:
        write_page(explanation, Path(output.html), force=output.force)
        say(f"wrote {output.html}")


def show_explanation(explanation: Explanation) -> None:
    """Print an explanation."""
    from rich.text import Text

    OUT.print(explanation.title, style="bold", markup=False)
    OUT.print(explanation.summary, markup=False)
    for name, _, shown in explanation.probabilities:
        OUT.print(f"  {shown:>8}  {name}", markup=False)
    OUT.print()
    for column in explanation.texts:
        OUT.print(Text(f"{column.name}: ").append_text(marked_text(column.pieces)))
    OUT.print(f"(+) supports “{explanation.target}”, (-) opposes it. {explanation.form} saliency.", style="dim")
    OUT.print(f"Start and end tokens together: {explanation.ends}.", style="dim")
    for answer in explanation.answers:
        OUT.print(f"\n{answer.method}: score = {answer.formula}", markup=False)
        for column in answer.asked:
            if any(piece.asked for piece in column.pieces):
                kind = "word (by summed-gradient saliency)" if answer.of_saliency else "span"
                OUT.print(Text(f"asked about, a {kind} of {column.name}: ").append_text(marked_text(column.pieces)))
        for side in answer.sides:
            target = "the word's saliency" if answer.of_saliency else explanation.target
            show_side(answer.method, side, target, answer.effect_note)
    if explanation.flip is not None:
        show_flip(explanation.flip)


def show_flip(flip: Flip) -> None:
    """Print what would flip the prediction."""
    OUT.print(f"\nflip: {flip.summary}", markup=False)
    for row in flip.rows:
        texts = " | ".join(text for _, text in row.texts)
        OUT.print(f"  row {row.row}, {row.label}, effect {row.effect}: {shortened(texts)}", markup=False)
    if flip.note:
        OUT.print(flip.note, style="dim", markup=False)


def show_side(method: str, side: Side, target: str, effect_note: str) -> None:
    """Print one end of a method's ranking, and below it what its effects mean."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    notes = escape(" ".join(filter(None, [*side.notes, effect_note]))) or None
    title = f"{method}: {side.name}s of {escape(target)}"
    grid = Table(title=title, title_justify="left", caption=notes, caption_justify="left", box=SIMPLE_HEAD)
    grid.pad_edge, grid.collapse_padding = False, True
    effects = any(row.effect for row in side.rows)
    for name in ("row", "score", *(["effect\np change"] if effects else [])):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("label\nprediction", max_width=16, overflow="fold")
    grid.add_column("loss", justify="right", no_wrap=True)
    grid.add_column("text", ratio=1, overflow="fold")
    for row in side.rows:
        classes = escape(f"{row.label}\n{row.prediction}")
        numbers = [str(row.row), row.score, *([f"{row.effect}\n{row.effect_probability}"] if effects else [])]
        grid.add_row(*numbers, classes, f"{row.loss:.3g}", row_text(row))
    OUT.print(grid)


def row_text(row: FoundRow) -> Text:
    """The texts of a training row, and what its shared words contribute."""
    from rich.text import Text

    from forebear.evaluation.explain.marks import shorten

    lines = [marked_text(column.pieces) for column in row.texts]
    if len(row.texts) > 1:
        lines = [Text(f"{c.name}: ").append_text(line) for c, line in zip(row.texts, lines, strict=True)]
    if row.total:
        parts = [f"{word.text} {word.number}" for word in shorten(row.words, SHOWN_WORDS)]
        lines.append(Text(f"shared: {' | '.join(parts) or 'no word'} = {row.total}", style="dim"))
    if row.columns:
        lines.append(Text(", ".join(f"{name}: {shortened(value)}" for name, value in row.columns), style="dim"))
    return Text("\n").join(lines)


def marked_text(pieces: Iterable[Piece]) -> Text:
    """A text with its marks: the sign or number of each in brackets, which colour and weight repeat."""
    from rich.text import Text

    out = Text()
    for piece in pieces:
        if not piece.read:
            out.append(f" [not read by the model: {len(piece.text)} characters]", style="dim")
            continue
        if piece.asked:
            out.append(f"[{piece.text}]", style="bold magenta")
            continue
        style = ""
        if piece.value is not None and piece.level:
            style = ("green" if piece.value > 0 else "red") + (" bold" if piece.level > 1 else "")
        phrase = piece.note and " " in piece.text.strip()  # its beginning must be visible without colour too
        out.append(f"‹{piece.text}›" if phrase else piece.text, style=style)
        if piece.note:
            out.append(f"({piece.note})", style=style)
    return out if out.plain.strip() else Text("(empty)", style="dim italic")
