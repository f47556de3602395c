"""The evaluations that train the model again without some of its rows; exported by ``forebear.evaluations``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.common.span_queries import sample_span_queries
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, finding, retriever_of, tested_rows
from forebear.evaluation.retraining import deletion_curve as of_deletion
from forebear.evaluation.retraining import lds as of_lds
from forebear.evaluation.retraining import removal as of_removal
from forebear.evaluation.retraining import retraining_loss as of_loss
from forebear.evaluation.retraining.changes import seeds_of
from forebear.evaluation.retraining.jobs import Retrainer
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.evaluation.retraining.row_choice import (
    amounts_of,
    least_overlap,
    removal_methods,
    row_scores,
    sides_of,
    targets_of,
)
from forebear.progress import Progress, progress_of
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
COMMAND = "forebear.evaluations.{}(...) in Python"


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """How the model is trained again, how often, and where the outputs of retrained models are kept.

    Attributes:
        recipe: What is trained: ``full`` as the run did; ``top-K``, the last K layers from stored states; ``head``, the
            last layer on stored features, in about a second.
        n_seeds: Retrainings of each kind; of ``head`` one is enough.
        run: Run folder of the training; None: the one that the index's model lies in.
        cache: Folder of finished retrainings, with which an interrupted call goes on; None: INDEX-retraining.
        l2: For ``head``: weight of half the squared norm, above 0.
        budget: Models to train at most; comparisons are then sampled. None: all comparisons.
        device: Where models are trained.
    """

    recipe: str = "head"
    n_seeds: int = 5
    run: str | Path | None = None
    cache: str | Path | None = None
    l2: float = 0.01
    budget: int | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The opened parts of an evaluation by retraining.

    Attributes:
        retriever: Over the index.
        question: The question, with its methods.
        queries: Test rows that scores are computed for.
        retrainer: Trains models and evaluates them on ``evaluated``.
        seeds: Seeds of the retrainings.
        evaluated: Test rows on which retrained models are evaluated: the queries, or all test rows.
    """

    retriever: Retriever
    question: Question
    queries: QueryRows
    retrainer: Retrainer
    seeds: tuple[int, ...]
    evaluated: QueryRows

    def scores(self) -> Scores:
        """Scores of all live rows, ``(q, n)`` by method."""
        return row_scores(self.retriever, self.queries, self.question)

    def page(self, found: T, make_report: object, seed: int, name: str) -> Finding[T]:
        """The finding with its report; the retrainer's lines on damaged files and lacking classes become warnings."""
        for line in self.retrainer.warnings:
            warnings.warn(line, stacklevel=3)
        assert callable(make_report)
        page = make_report(
            found, self.retriever, self.queries, self.question, self.retrainer, seed, COMMAND.format(name)
        )
        return finding(found, page)


def _open(
    index: IndexLike,
    rows: Rows,
    retraining: Retraining,
    n_queries: int,
    seed: int,
    spec: QuerySpec | None,
    choices: QueryChoices,
    *,
    need_labels: bool = False,
    evaluate_all: bool = False,
) -> _Opened:
    retriever = retriever_of(index)
    named = spec is not None or "methods" in choices
    spec = QuerySpec.of(spec, **choices)
    question = retriever.resolve(spec, methods=removal_methods(retriever, spec.methods if named else ()))
    labelled = need_labels or spec.target == "gold"
    source = tested_rows(retriever, rows, need_labels=labelled)
    queries = sample_span_queries(retriever, source, question, n_queries, seed, need_labels=labelled)
    evaluated = sample_queries(retriever, source, 0, seed, need_labels=labelled) if evaluate_all else queries
    cache = retraining.cache if retraining.cache is not None else f"{retriever.index.folder.resolve()}-retraining"
    retrainer = open_retrainer(
        retriever,
        retraining.recipe,
        evaluated.texts,
        cache,
        run=retraining.run,
        l2=retraining.l2,
        device=retraining.device,
    )
    return _Opened(
        retriever=retriever, question=question, queries=queries, retrainer=retrainer,
        seeds=seeds_of(retrainer, retraining.n_seeds, seed), evaluated=evaluated,
    )  # fmt: skip


def removal(
    retriever: IndexLike,
    rows: Rows,
    *,
    remove: Sequence[int] = (),
    shares: Sequence[str] = (),
    sides: Sequence[str] = (),
    how: Retraining = Retraining(),
    n_queries: int = 50,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_removal.Removal]:
    """How does the confidence change without the rows that a method names, after retraining?

    Args:
        retriever: Over the index.
        rows: Test rows.
        remove: Numbers of rows to remove.
        shares: Shares of the live rows instead or besides, as texts; a tenth, if neither is given.
        sides: Which rows: some of ``top``, ``bottom`` and ``least``; none: all three.
        how: The retraining.
        n_queries: Test rows in the sample; 0: all.
        seed: Seed of the sample, and of the first retraining.
        progress: True to draw a bar, or a function that is called with the stage, jobs done and jobs in all.
        spec: The question; by default all methods that give rows a score.
        **choices: Fields of QuerySpec.
    """
    opened = _open(retriever, rows, how, n_queries, seed, spec, choices)
    amounts = amounts_of(remove, shares, len(opened.retriever.index.live), ["0.1"])
    found = of_removal.measure_removal(
        opened.retrainer, opened.scores(), amounts, opened.seeds, sides=sides_of(sides), budget=how.budget, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    return opened.page(found, of_removal.removal_report, seed, "removal")


def deletion_curve(
    retriever: IndexLike,
    rows: Rows,
    *,
    remove: Sequence[int] = (),
    shares: Sequence[str] = (),
    no_overlap: int | None = None,
    how: Retraining = Retraining(),
    n_queries: int = 30,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_deletion.DeletionCurve]:
    """DEL+ and DEL-: the gold class's probability without the top k proponents or opponents, retrained.

    As :func:`removal`; 10, 20, ... 100 rows, if neither ``remove`` nor ``shares`` are given. By ``no_overlap`` only so
    many rows of least tf-idf overlap with the test row may be removed. Test rows have labels; the target is ``gold``
    unless ``spec`` or ``target`` says otherwise.
    """
    if spec is None:
        choices.setdefault("target", "gold")
    opened = _open(retriever, rows, how, n_queries, seed, spec, choices, need_labels=True)
    assert opened.queries.labels is not None
    n_rows = len(opened.retriever.index.live) if no_overlap is None else no_overlap
    found = of_deletion.measure_deletion(
        opened.retrainer, opened.scores(), opened.queries.labels,
        amounts_of(remove, shares, n_rows, [str(k) for k in range(10, 101, 10)]), opened.seeds,
        candidates=None if no_overlap is None else least_overlap(opened.retriever, opened.queries, no_overlap),
        budget=how.budget, seed=seed, progress=progress_of(progress),
    )  # fmt: skip
    return opened.page(found, of_deletion.deletion_report, seed, "deletion_curve")


def retraining_loss(
    retriever: IndexLike,
    rows: Rows,
    *,
    remove: Sequence[int] = (),
    shares: Sequence[str] = (),
    how: Retraining = Retraining(),
    n_queries: int = 200,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_loss.RetrainingLoss]:
    """How much accuracy is lost without the rows of largest score summed over the queries, retrained?

    As :func:`removal`; a fifth and a half of the rows, if neither ``remove`` nor ``shares`` are given. Test rows have
    labels; accuracy is measured on all of them, scores are summed over the sample.
    """
    opened = _open(retriever, rows, how, n_queries, seed, spec, choices, need_labels=True, evaluate_all=True)
    assert opened.evaluated.labels is not None
    found = of_loss.measure_retraining_loss(
        opened.retrainer, opened.scores(), opened.evaluated.labels,
        amounts_of(remove, shares, len(opened.retriever.index.live), ["0.2", "0.5"]), opened.seeds,
        budget=how.budget, seed=seed, progress=progress_of(progress),
    )  # fmt: skip
    return opened.page(found, of_loss.retraining_loss_report, seed, "retraining_loss")


def lds(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_subsets: int = 100,
    how: Retraining = Retraining(),
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_lds.Lds]:
    """Linear datamodeling score: do summed scores foretell the outputs of models trained on random halves?

    As :func:`removal`; ``n_subsets`` random halves of the training rows, a model for each.
    """
    opened = _open(retriever, rows, how, n_queries, seed, spec, choices)
    targets = targets_of(opened.retriever, opened.queries, opened.question.spec.target)
    found = of_lds.measure_lds(
        opened.retrainer, opened.scores(), targets, opened.seeds, n_subsets=n_subsets, budget=how.budget, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    return opened.page(found, of_lds.lds_report, seed, "lds")
