"""The evaluations that train the model again without some of its rows; exported by ``forebear.evaluations``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forebear.errors import InputError
from forebear.evaluation.common.queries import refuse_saliency, sample_queries
from forebear.evaluation.common.span_queries import sample_span_queries
from forebear.evaluation.python.opening import (
    Finding,
    IndexLike,
    Rows,
    called,
    finding,
    question_of,
    retriever_of,
    tested_rows,
)
from forebear.evaluation.reports.report import Report
from forebear.evaluation.retraining import deletion_curve as of_deletion
from forebear.evaluation.retraining import removal as of_removal
from forebear.evaluation.retraining import retraining_loss as of_loss
from forebear.evaluation.retraining.changes import RetrainingInputs, seeds_of
from forebear.evaluation.retraining.effects.measure import (
    EffectPairs,
    Predictor,
    check_effects,
    measure_effects,
)
from forebear.evaluation.retraining.effects.report import effects_report, measured
from forebear.evaluation.retraining.jobs import Retrainer
from forebear.evaluation.retraining.lds.baselines import baseline_scores
from forebear.evaluation.retraining.lds.draws import Draws
from forebear.evaluation.retraining.lds.measure import Lds, measure_lds
from forebear.evaluation.retraining.lds.report import lds_report
from forebear.evaluation.retraining.lds.settings import Settings
from forebear.evaluation.retraining.recipes import find_run, open_retrainer
from forebear.evaluation.retraining.row_choice import (
    amounts_of,
    least_overlap,
    predictions_of,
    row_scores,
    sides_of,
)
from forebear.progress import Progress, progress_of, tell_warning
from forebear.retriever.effects.measured import KEPT_EFFECTS
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """How the model is trained again, how often, and where the outputs of retrained models are kept.

    Attributes:
        recipe: What is trained: ``full`` as the run did; ``top-K``, the last K layers from stored states; ``head``, the
            last layer on stored features, in about a second; ``proximal-head``, the last layer from its trained weight,
            held by the damping of the question: the refit that ``if`` at the head linearises.
        n_seeds: Retrainings of each kind; of ``head`` one is enough.
        run: Run folder of the training; None: the one that the index's model lies in.
        cache: Folder of finished retrainings, with which an interrupted call goes on; None: INDEX-retraining.
        l2: For ``head``: weight of half the squared norm, above 0.
        budget: Models to train at most; comparisons are then sampled. None: all comparisons.
        device: Where models are trained.
        begin: Called with the cache's folder when the inputs are checked, before the work.
    """

    recipe: str = "head"
    n_seeds: int = 5
    run: str | Path | None = None
    cache: str | Path | None = None
    l2: float = 0.01
    budget: int | None = None
    device: str = "auto"
    begin: Callable[[Path], None] = lambda _cache: None


def _open(
    call: str,
    retriever: Retriever,
    rows: Rows,
    how: Retraining,
    n_queries: int,
    seed: int,
    question: Question,
    *,
    need_labels: bool = False,
    evaluate_all: bool = False,
) -> RetrainingInputs:
    refuse_saliency(question)
    labelled = need_labels or question.spec.target == "gold"
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format, need_labels=labelled)
    queries = sample_span_queries(retriever, source, question, n_queries, seed, need_labels=labelled)
    evaluated = sample_queries(retriever, source, 0, seed, need_labels=labelled) if evaluate_all else queries
    retrainer = retrainer_of(retriever, how, evaluated.texts, question.spec.damping)
    return RetrainingInputs(
        retriever=retriever, question=question, queries=queries, seed=seed, retrainer=retrainer,
        seeds=seeds_of(retrainer, how.n_seeds, seed), evaluated=evaluated, command=called(call),
    )  # fmt: skip


def retrainer_of(
    retriever: Retriever, how: Retraining, evaluation: Sequence[Sequence[str]], damping: str | None
) -> Retrainer:
    """Trains the model of an index again, and keeps what retrained models say of the evaluation rows.

    Args:
        retriever: Over the index.
        how: The retraining.
        evaluation: Texts of the evaluation rows, one list a text column.
        damping: Of ``proximal-head``, as a question names it; None: the index's first.
    """
    cache = Path(f"{retriever.index.folder.resolve()}-retraining" if how.cache is None else how.cache)
    how.begin(cache)
    return open_retrainer(
        retriever, how.recipe, evaluation, cache, run=how.run, l2=how.l2, device=how.device, damping=damping
    )


def _take_first(choices: QueryChoices, scopes: Sequence[str], dampings: Sequence[str]) -> None:
    """Let the question be asked at the first of several scopes and dampings."""
    if scopes:
        choices["scope"] = scopes[0]
    if dampings:
        choices["damping"] = dampings[0]


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
    retriever = retriever_of(retriever, "evaluations.removal")
    amounts, named_sides = amounts_of(remove, shares, len(retriever.index.live), ["0.1"]), sides_of(sides)
    question = question_of(retriever, spec, choices)
    asked = _open("evaluations.removal", retriever, rows, how, n_queries, seed, question)
    found = of_removal.measure_removal(
        asked.retrainer, _scores(asked), amounts, asked.seeds, sides=named_sides, budget=how.budget, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    return _finding(found, of_removal.removal_report, asked)


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
    retriever = retriever_of(retriever, "evaluations.deletion_curve")
    n_rows = len(retriever.index.live) if no_overlap is None else no_overlap
    amounts = amounts_of(remove, shares, n_rows, [str(k) for k in range(10, 101, 10)])
    question = question_of(retriever, spec, choices)
    asked = _open("evaluations.deletion_curve", retriever, rows, how, n_queries, seed, question, need_labels=True)
    assert asked.queries.labels is not None
    candidates = None if no_overlap is None else least_overlap(retriever, asked.queries, no_overlap)
    found = of_deletion.measure_deletion(
        asked.retrainer, _scores(asked), asked.queries.labels, amounts, asked.seeds, candidates=candidates,
        budget=how.budget, seed=seed, progress=progress_of(progress),
    )  # fmt: skip
    return _finding(found, of_deletion.deletion_report, asked)


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
    retriever = retriever_of(retriever, "evaluations.retraining_loss")
    amounts = amounts_of(remove, shares, len(retriever.index.live), ["0.2", "0.5"])
    question = question_of(retriever, spec, choices)
    asked = _open(
        "evaluations.retraining_loss", retriever, rows, how, n_queries, seed, question, need_labels=True,
        evaluate_all=True,
    )  # fmt: skip
    assert asked.evaluated.labels is not None
    found = of_loss.measure_retraining_loss(
        asked.retrainer, _scores(asked), asked.evaluated.labels, amounts, asked.seeds, budget=how.budget, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    return _finding(found, of_loss.retraining_loss_report, asked)


def lds(
    retriever: IndexLike,
    rows: Rows,
    *,
    scopes: Sequence[str] = (),
    dampings: Sequence[str] = (),
    draw: str = "stratified",
    rows_share: float = 0.5,
    paired: bool = False,
    n_subsets: int = 100,
    how: Retraining = Retraining(),
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[Lds]:
    """Linear datamodeling score: do summed scores foretell the outputs of models trained on random draws of the rows?

    As :func:`removal`; a model is trained on each draw. Baselines stand beside the methods.

    Args:
        retriever: Over the index.
        rows: Test rows.
        scopes: Scopes at which methods are asked, without another retraining; none: that of the question.
        dampings: Dampings likewise.
        draw: ``stratified``: every draw keeps the same share of each class; ``plain``: of all rows.
        rows_share: That share, between 0 and 1.
        paired: Rows that are not kept keep their place in the batches and weigh nothing, and the seed is that of the
            run that is explained: what a derivative through the training foretells. Takes one seed.
        n_subsets: Number of draws.
        how: The retraining.
        n_queries: Test rows in the sample; 0: all.
        seed: Seed of the sample and of the draws, and the first one of the retrainings.
        progress: See :func:`removal`.
        spec: The question; by default all methods that give rows a score.
        **choices: Fields of QuerySpec.
    """
    draws = Draws(how=draw, share=rows_share, paired=paired)
    draws.check()
    if paired and how.n_seeds != 1:
        raise InputError(
            f"--seeds {how.n_seeds}: --paired repeats the training that is explained, which has one seed; expected 1."
        )
    retriever = retriever_of(retriever, "evaluations.lds")
    _take_first(choices, scopes, dampings)
    choices["exact"] = "full"
    question = question_of(retriever, spec, choices)
    settings = Settings.of(retriever, question, scopes, dampings)
    asked = _open("evaluations.lds", retriever, rows, how, n_queries, seed, question)
    if paired and asked.retrainer.recipe.seeded:
        asked = replace(asked, seeds=(int(find_run(retriever.index, how.run).settings["seed"]),))
    target = asked.question.spec.target
    targets = predictions_of(retriever, asked.queries, target).targets
    found = measure_lds(
        asked.retrainer, settings.scores(retriever, asked.queries), targets, asked.seeds,
        baselines=baseline_scores(retriever, asked.queries, target, targets, seed), draws=draws, n_subsets=n_subsets,
        budget=how.budget, seed=seed, progress=progress_of(progress),
    )  # fmt: skip
    return _finding(found, lambda lds, inputs: lds_report(lds, settings, inputs), asked)


def effects(
    retriever: IndexLike,
    rows: Rows,
    *,
    scopes: Sequence[str] = (),
    dampings: Sequence[str] = (),
    remove: Sequence[int] = (),
    shares: Sequence[str] = (),
    n_sets: int = 10,
    keep: bool = False,
    how: Retraining = Retraining(recipe="proximal-head"),
    n_queries: int = 50,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[EffectPairs]:
    """Do predicted effects come true when the model is trained again without the rows?

    As :func:`removal`; 1 row, and a thousandth, a hundredth and a twentieth of the rows, if neither ``remove`` nor
    ``shares`` are given. Removed are random rows, and each test row's proponents and opponents.

    Args:
        retriever: Over the index.
        rows: Test rows.
        scopes: Scopes at which methods are asked, without another retraining; none: that of the question.
        dampings: Dampings likewise. ``proximal-head`` is held by the first.
        remove: Numbers of rows to remove.
        shares: Shares of the live rows instead or besides.
        n_sets: Random sets of each size.
        keep: Whether the index keeps the result, so that answers say how true their effects are.
        how: The retraining.
        n_queries: Test rows in the sample; 0: all.
        seed: Seed of the sample, of the random sets, and of the first retraining.
        progress: See :func:`removal`.
        spec: The question; by default the method ``if``.
        **choices: Fields of QuerySpec.

    Raises:
        InputError: A method estimates no effect.
        StorageError: The index is to keep the result and cannot be written.
    """
    retriever = retriever_of(retriever, "evaluations.effects")
    _take_first(choices, scopes, dampings)
    n_live = len(retriever.index.live)
    default = sorted({1, *(max(1, n_live // part) for part in (1000, 100, 20))})
    sizes = amounts_of(remove, shares, n_live, [str(k) for k in default])
    question = question_of(retriever, spec, choices, default=("if",))
    check_effects(question)
    settings = Settings.of(retriever, question, scopes, dampings)
    if keep:
        KEPT_EFFECTS.check(retriever.index.folder)
    asked = _open("evaluations.effects", retriever, rows, how, n_queries, seed, question)
    predictions = predictions_of(retriever, asked.queries, question.spec.target)
    predictors = [
        Predictor(settings.name(setting), one.of([method]), scores[settings.name(setting)], retriever.models)
        for (one, of_question), scores in zip(
            settings.questions, settings.scores(retriever, asked.queries), strict=True
        )
        for method, setting in zip(one.methods, of_question, strict=True)
    ]
    found = measure_effects(
        asked.retrainer, predictors, predictions, sizes, asked.seeds, n_sets=n_sets,
        budget=how.budget, seed=seed, progress=progress_of(progress),
    )  # fmt: skip
    if keep:
        KEPT_EFFECTS.keep(retriever.index.folder, measured(found, settings, asked))
    return _finding(found, lambda pairs, inputs: effects_report(pairs, settings, inputs), asked)


def _scores(inputs: RetrainingInputs) -> Scores:
    """Scores of all live rows, ``(q, n)`` by method."""
    return row_scores(inputs.retriever, inputs.queries, inputs.question)


def _finding(
    found: T,
    report: Callable[[T, RetrainingInputs], tuple[Report, Mapping[str, Any]]],
    inputs: RetrainingInputs,
) -> Finding[T]:
    """The finding with its report; the retrainer's lines on damaged files and lacking classes become warnings."""
    for line in inputs.retrainer.warnings:
        tell_warning(line)
    return finding(found, report(found, inputs))
