"""``forebear.audits.deletion`` and ``.sources``: what the model would say without rows, or without a source of rows."""

from __future__ import annotations

from forebear.evaluation.audits.deletion import deletion as of_deletion
from forebear.evaluation.audits.deletion.given import GivenRows, named_rows
from forebear.evaluation.audits.deletion.report import deletion_list, deletion_report
from forebear.evaluation.audits.sources import sources as of_sources
from forebear.evaluation.audits.sources.report import sources_list, sources_report
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, finding, opened, retriever_of
from forebear.evaluation.python.retrainings import Retraining, retrainer_of
from forebear.evaluation.retraining.changes import seeds_of
from forebear.progress import Progress, progress_of
from forebear.retriever.answers.groups import grouping_of
from forebear.retriever.question.spec import QueryChoices


def deletion(
    retriever: IndexLike,
    rows: Rows,
    without: GivenRows,
    *,
    how: Retraining | None = None,
    group_by: str | None = None,
    n_listed: int = 100,
    n_queries: int = 0,
    seed: int = 0,
    damping: str | None = None,
    progress: Progress | bool = False,
) -> Finding[of_deletion.Deletion]:
    """What would leaving these training rows out change, and how strongly does the model depend on each?

    Args:
        retriever: Over an index of one label a row.
        rows: Labelled test rows.
        without: The training rows: their numbers, a work list, or a file of numbers, ids or texts.
        how: How models are trained again, to see what comes true; None: none is.
        group_by: A column of the test rows: accuracy by its values, besides by label.
        n_listed: Training rows and test rows in the report.
        n_queries: Test rows in the sample; 0: all.
        seed: Random seed of the sample, the retrainings and the intervals.
        damping: Of the head's curvature; None: the index's first.
        progress: True, or a function.

    Raises:
        InputError: No such rows are in the index, or the rows that stay say too little of the head.
        DataError: The test rows have no labels of the model.
    """
    name = "audits.deletion"
    retriever = retriever_of(retriever, name)
    named = named_rows(retriever.index, without)
    asked = _asked(name, retriever, rows, n_queries, seed, damping)
    groups = of_deletion.groups_of(asked.queries, retriever.label_names, group_by)
    retrainer, seeds = None, tuple[int, ...]()
    if how is not None:
        texts = [
            [*own, *more] for own, more in zip(asked.queries.texts, retriever.index.text_lists(named.rows), strict=True)
        ]
        retrainer = retrainer_of(retriever, how, texts, damping)
        seeds = seeds_of(retrainer, how.n_seeds, seed)
    found = of_deletion.measure_deletion(
        retriever, named, asked.queries, damping, retrainer=retrainer, seeds=seeds, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    page = deletion_report(found, groups, asked, n_listed, None if retrainer is None else retrainer.recipe)
    return finding(found, page, deletion_list(found, retriever.index))


def sources(
    retriever: IndexLike,
    rows: Rows,
    column: str,
    *,
    n_left_out: int = 20,
    n_listed: int = 100,
    n_queries: int = 0,
    seed: int = 0,
    damping: str | None = None,
    progress: Progress | bool = False,
) -> Finding[of_sources.Sources]:
    """Which annotator, crawl, year or template helps, and which drives the errors?

    Args:
        retriever: Over an index of one label a row.
        rows: Labelled test rows.
        column: A column that the index keeps, or ``label``; its values are the sources.
        n_left_out: Sources without which the head is refitted, the worst and the best.
        n_listed: Rows of the worst source in the report.
        n_queries: Test rows in the sample; 0: all.
        seed: Random seed of the sample, the intervals and the permutation test.
        damping: Of the head's curvature; None: the index's first.
        progress: True, or a function.

    Raises:
        InputError: The index keeps no such column, or it does not part the rows into sources.
        DataError: The test rows have no labels of the model.
    """
    name = "audits.sources"
    retriever = retriever_of(retriever, name)
    grouping = grouping_of(retriever.index, column, "--column")
    of_sources.check_sources(grouping)
    asked = _asked(name, retriever, rows, n_queries, seed, damping)
    found = of_sources.measure_sources(
        retriever, grouping, asked.queries, asked.question, n_left_out=n_left_out, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    page = sources_report(found, asked, n_listed)
    return finding(found, page, sources_list(found, retriever.index, n_listed))


def _asked(name: str, retriever: IndexLike, rows: Rows, n_queries: int, seed: int, damping: str | None) -> Inputs:
    """``if`` at the head about the gold labels of a sample of test rows."""
    choices: QueryChoices = {}
    return opened(
        name, retriever, rows, None, choices, n_queries, seed, methods=("if",), target="gold", damping=damping
    )
