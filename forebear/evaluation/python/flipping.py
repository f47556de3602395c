"""The fewest training rows that flip a prediction, as Python asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from forebear.errors import InputError
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.explain.explanation import ChangedRow, Flip
from forebear.evaluation.flips import flipping as of_flips
from forebear.evaluation.flips.head import check_head
from forebear.evaluation.flips.report import PATCH_NAME, SHOWN_ROWS, flips_report, patch_text
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, called, question_of, retriever_of, tested_rows
from forebear.evaluation.python.retrainings import Retraining, retrainer_of
from forebear.evaluation.reports.report import write_report
from forebear.evaluation.retraining.changes import seeds_of
from forebear.progress import Progress, progress_of
from forebear.retriever.retriever import Retriever


@dataclass(frozen=True, eq=False, repr=False)
class FlipFinding(Finding[of_flips.Flips]):
    """Flip sets, their report, and the patch: the rows of all sets and what becomes of each.

    Attributes:
        patch: The patch as CSV: query, row, action, label, new_label, texts.
    """

    patch: str = ""

    @override
    def write(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the files of every report, and patch.csv beside them; the page's path."""
        beside = {PATCH_NAME: self.patch}
        return write_report(self.report, Path(folder), result=self.result, force=force, beside=beside)


def flip(
    retriever: IndexLike,
    rows: Rows,
    *,
    to: str | None = None,
    relabel: bool = False,
    limit: int | None = None,
    damping: str | None = None,
    how: Retraining | None = None,
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
) -> FlipFinding:
    """The fewest training rows whose removal, or relabelling, changes a prediction.

    Rows are chosen greedily by their predicted effects, which are predicted anew as rows go; every set is verified by
    refitting the head to convergence, and made as small as the flip allows. That no smaller set exists is not proven.

    Args:
        retriever: A Retriever, an Index, or an index folder.
        rows: Test rows: a RowSource, a path, or a list of texts or of pairs; no labels are needed.
        to: Name of the label that the model shall predict; None: any other than it does.
        relabel: Give rows another label, instead of taking them out.
        limit: Training rows that are changed at most; None: half of them.
        damping: Of the head, as :class:`~forebear.QuerySpec` has it; None: the index's first.
        how: Retrain the model too, by the recipe ``full`` or ``top-K``, and grow or shrink each set until it flips most
            seeds; None: only the head is refitted.
        n_queries: Test rows in the sample; 0: all.
        seed: Seed of the sample, and of the first retraining.
        progress: True to draw a bar, or a function that is called with the stage, test rows done and in all.

    Raises:
        InputError: A number is out of range, no such label, or the head has too many classes.
        MissingStoreError: The index holds no curvature of its head.

    Example:
        >>> import forebear
        >>> forebear.flip("runs/demo/index", [("The cat sat .", "A cat sat .")], limit=50)
    """
    retriever = retriever_of(retriever, "flip")
    check_head(retriever.index)
    question = question_of(retriever, None, {"methods": ("if",), "damping": damping})
    n_limit = of_flips.limit_of(limit, len(retriever.index.live))
    if to is not None and to not in retriever.label_names:
        raise InputError(f"--to {to!r}: expected one of the model's labels, {', '.join(retriever.label_names)}.")
    target = None if to is None else retriever.label_names.index(to)
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format)
    queries = sample_queries(retriever, source, n_queries, seed)
    retrainer = None if how is None else retrainer_of(retriever, how, queries.texts, damping)
    flips = of_flips.flip_sets(
        retriever, queries, to=target, relabels=relabel, limit=n_limit, damping=damping, retrainer=retrainer,
        seeds=() if how is None or retrainer is None else seeds_of(retrainer, how.n_seeds, seed),
        progress=progress_of(progress),
    )  # fmt: skip
    note = "" if retrainer is None else f"Retrained by --retrain {retrainer.recipe.name}. {retrainer.recipe.note}"
    report, result = flips_report(flips, retriever, question, called("flip"), note)
    return FlipFinding(flips, report, result, patch_text(flips, retriever))


def flip_of(retriever: Retriever, query: str | tuple[str, str]) -> Flip:
    """The flip set of one text or pair at the head, as an explanation shows it."""
    found = flip(retriever, [query])  # type: ignore[arg-type]  # texts or pairs, as the index has them
    (flip_set,), (effects,), index = found.numbers.sets, found.numbers.effects, retriever.index
    shown = slice(0, SHOWN_ROWS if flip_set.flipped else 0)
    numbers = flip_set.rows[shown]
    columns = {name: column.to_pylist() for name, column in index.texts(numbers).items()}
    rows = tuple(
        ChangedRow(
            row=int(row), label=retriever.label_names[flip_set.labels[i]], effect=f"{effects[i]:.3g}",
            texts=tuple((name, texts[i]) for name, texts in columns.items()),
        )
        for i, row in enumerate(numbers)
    )  # fmt: skip
    note = "Effect: predicted rise of the predicted label's loss, in nats, without this row alone." if rows else ""
    if 0 < len(rows) < len(flip_set):
        note += f" The first {len(rows)} of {len(flip_set)} rows; forebear flip lists all."
    return Flip(summary=found.report.summary, rows=rows, note=note)
