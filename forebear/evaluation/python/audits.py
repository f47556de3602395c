"""Audits of a model's training rows; each asks what a command of ``forebear audit`` asks.

Every function takes a :class:`~forebear.Retriever` (or an index, or its folder) first, and gives a
:class:`~forebear.evaluation.python.opening.Finding`: ``.numbers`` the numbers, ``.report`` the page, ``.result`` the
numbers as plain values, ``.work_list`` the training rows that it names, ``.write(folder)``. Test rows are a RowSource,
a path, or a list of texts or of pairs. ``progress=True`` draws the usual bar. ``spec`` and further keywords are the
choices of a :class:`~forebear.QuerySpec`.

    >>> from forebear import Retriever, audits
    >>> retriever = Retriever("runs/demo/index")
    >>> audits.suspects(retriever, n_listed=20).write("runs/suspects")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from forebear.errors import InputError
from forebear.evaluation.audits import work_lists
from forebear.evaluation.audits.artifacts.features import (
    Feature,
    measure,
    negation_feature,
    overlap_feature,
    user_feature,
)
from forebear.evaluation.audits.artifacts.regression import ArtifactRegression, regress_artifact
from forebear.evaluation.audits.artifacts.regression_report import artifact_report
from forebear.evaluation.audits.rows import duplicates as of_duplicates
from forebear.evaluation.audits.rows import errors as of_errors
from forebear.evaluation.audits.rows import hubs as of_hubs
from forebear.evaluation.audits.rows import suspects as of_suspects
from forebear.evaluation.audits.versions import regressions as of_regressions
from forebear.evaluation.audits.versions.regressions_report import regressions_report
from forebear.evaluation.audits.versions.row_changes import check_versions, row_changes
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.measures.mislabelled import wrong_rows_of
from forebear.evaluation.python.hans import hans
from forebear.evaluation.python.leaving_out import deletion, sources
from forebear.evaluation.python.opening import (
    Finding,
    IndexLike,
    Rows,
    called,
    finding,
    opened,
    question_of,
    retriever_of,
    sampled,
    tested_rows,
)
from forebear.evaluation.python.planted import poison
from forebear.progress import Progress, progress_of
from forebear.retriever.answers.groups import grouping_of
from forebear.retriever.question.query_rows import tell_label_remark
from forebear.retriever.question.spec import QueryChoices, QuerySpec
from forebear.retriever.retriever import Retriever

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "artifact",
    "deletion",
    "duplicates",
    "errors",
    "hans",
    "hubs",
    "negation",
    "overlap",
    "poison",
    "regressions",
    "sources",
    "suspects",
]


def overlap(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[ArtifactRegression]:
    """Are the most influential training rows those of high lexical overlap? See :func:`artifact`; of pairs alone."""
    retriever = retriever_of(retriever, "audits.overlap")
    feature = overlap_feature(retriever.index.manifest.spec.text_columns)
    return _regress(retriever, rows, feature, n_queries, seed, progress, spec, choices, "audits.overlap")


def negation(
    retriever: IndexLike,
    rows: Rows,
    *,
    column: str | None = None,
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[ArtifactRegression]:
    """Are the most influential training rows those with a negation in a text column (None: the last)?

    See :func:`artifact`.
    """
    retriever = retriever_of(retriever, "audits.negation")
    feature = negation_feature(retriever.index.manifest.spec.text_columns, column)
    return _regress(retriever, rows, feature, n_queries, seed, progress, spec, choices, "audits.negation")


def artifact(
    retriever: IndexLike,
    rows: Rows,
    feature: str | Callable[[dict[str, str]], float],
    *,
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[ArtifactRegression]:
    """Are the most influential training rows those on which a function is high?

    For each test row, over all training rows: artifact = a z^2 + b z + c, z the z-normalised influence. a above 0: rows
    of large influence hold more of it than the rest.

    Args:
        retriever: Over the index.
        rows: Test rows.
        feature: Function from a dictionary of a row's texts, by column, to a number; or ``FILE.py:function``.
        n_queries: Test rows in the sample; 0: all.
        seed: Random seed of the sample.
        progress: True, or a function.
        spec: The question; ``if`` by default.
        **choices: Fields of QuerySpec.

    Raises:
        InputError: A choice is out of range, or the rows do not fit the index.
    """
    retriever = retriever_of(retriever, "audits.artifact")
    measured = user_feature(feature, retriever.index.manifest.spec.text_columns)
    return _regress(retriever, rows, measured, n_queries, seed, progress, spec, choices, "audits.artifact")


def suspects(
    retriever: IndexLike,
    *,
    n_listed: int = 100,
    n_neighbours: int = 10,
    group_by: str | None = None,
    planted: str | Path | None = None,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_suspects.Suspects]:
    """Which training rows may be labelled wrongly? As ``forebear audit mislabelled``; no true label is needed.

    Args:
        retriever: Over the index.
        n_listed: Rows in the report.
        n_neighbours: Number of nearest rows whose labels are compared with the label of a row.
        group_by: A column that the index keeps, or ``label``: how many of the listed rows each of its values has.
        planted: A text file of numbers of rows whose labels were made wrong on purpose before the training, one a line:
            the probability of a wrong label is measured on them.
        spec: The question; ``gd`` and ``if`` by default, and always about the gold label.
        **choices: Fields of QuerySpec.
    """
    retriever = retriever_of(retriever, "audits.suspects")
    grouping = None if group_by is None else grouping_of(retriever.index, group_by)
    question = question_of(retriever, spec, choices, ("gd", "if"), target="gold")
    made_wrong = None if planted is None else wrong_rows_of(Path(planted), retriever.index.manifest.n_rows)
    found = of_suspects.suspects(retriever, question, n_neighbours=n_neighbours, planted=made_wrong)
    page = of_suspects.suspects_report(found, retriever, question, n_listed, called("audits.suspects"), grouping)
    return finding(found, page, work_lists.suspects_list(found, retriever.index, page[1]["opponents"]))


def duplicates(
    retriever: IndexLike,
    rows: Rows | None = None,
    *,
    n_listed: int = 100,
    jaccard: float = 0.8,
    cosine: float = 0.95,
    cosine_jaccard: float = 0.5,
    neighbours: int = 10,
) -> Finding[list[of_duplicates.DuplicateGroup]]:
    """Which training rows say the same, and with different labels? Which test rows are among them?

    Args:
        retriever: Over the index.
        rows: Test rows that should not be among the training rows; None: no test rows are compared.
        n_listed: Groups in the report.
        jaccard: Least similarity of word sets, 0 to 1.
        cosine: Least cosine of the features of neighbours, -1 to 1.
        cosine_jaccard: Least similarity of the word sets of such neighbours, 0 to 1.
        neighbours: Number of nearest rows of each row, by features, whose cosines are compared; 0: no cosines.

    Raises:
        InputError: A threshold is out of range.
    """
    thresholds = of_duplicates.Thresholds(
        jaccard=jaccard, cosine=cosine, cosine_jaccard=cosine_jaccard, neighbours=neighbours
    )
    thresholds.check()
    retriever = retriever_of(retriever, "audits.duplicates")
    queries = None
    if rows is not None:
        source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format)
        tell_label_remark(retriever.index, source, required=False)
        queries = sample_queries(retriever, source, 0, 0)
    found = of_duplicates.duplicates(retriever.models, thresholds)
    leaked = [] if queries is None else of_duplicates.leaks(retriever.index, queries, thresholds)
    page = of_duplicates.duplicates_report(
        found, retriever, thresholds, n_listed, called("audits.duplicates"), queries, leaked
    )
    return finding(found, page, work_lists.duplicates_list(found[:n_listed], retriever.index))


def errors(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_clusters: int = 1,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_errors.Mistakes]:
    """Which training rows are behind a group of mistakes? One search for each kind of mistake.

    Args:
        retriever: Over the index.
        rows: Labelled test rows.
        n_clusters: Groups that each kind of mistake is parted into, by features; 1: none.
        seed: Random seed of the clusters.
        progress: True, or a function.
        spec: The question, of methods that are linear in the query; ``if`` by default.
        **choices: Fields of QuerySpec.

    Raises:
        InputError: A choice is out of range.
        DataError: The rows have no labels of the model.
    """
    of_errors.check_clusters(n_clusters)
    retriever = retriever_of(retriever, "audits.errors")
    question = question_of(retriever, spec, choices, ("if",), aggregate=True)
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format, need_labels=True)
    found = of_errors.mistakes_of(retriever, source, progress=progress_of(progress))
    groups = of_errors.group_mistakes(found, retriever.label_names, n_clusters, seed)
    answers = of_errors.explain_groups(retriever, found, groups, question)
    page = of_errors.errors_report(found, groups, answers, retriever, question, seed, called("audits.errors"))
    return finding(found, page, work_lists.errors_list(groups, answers, retriever.index, question.spec))


def regressions(
    retriever: IndexLike,
    before: IndexLike,
    rows: Rows,
    *,
    before_model: str | None = None,
    n_listed: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_regressions.Regressions]:
    """Which test rows did the version before have right, and which training rows broke them?

    Args:
        retriever: Over the index of the later version.
        before: The index of the version before.
        rows: Labelled test rows; all are asked about.
        before_model: The model of ``before``, if it has moved since that index was built.
        n_listed: Rows on each list of the report, and on the work list.
        seed: Random seed of the sample of rows that stayed right, and of the intervals.
        progress: True, or a function.
        spec: The question, of one method; ``if`` by default.
        **choices: Fields of QuerySpec.

    Raises:
        InputError: A choice is out of range, or both indexes are the same.
        MismatchError: The indexes have other text columns or labels.
        DataError: The rows have no labels of the model, or both versions have the same of them right.
        MissingStoreError: An index was published without texts.
    """
    retriever = retriever_of(retriever, "audits.regressions")
    if not isinstance(before, Retriever):
        before = Retriever(before, model=before_model, device=str(retriever.models.device))
    earlier = retriever_of(before, "audits.regressions")
    if n_listed < 1:
        raise InputError(f"--top {n_listed}: expected at least 1.")
    check_versions(retriever.index, earlier.index)
    question = question_of(retriever, spec, choices, ("if",), target="predicted")
    of_regressions.check_method(question)
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format, need_labels=True)
    queries = sample_queries(retriever, source, 0, seed, need_labels=True)
    told = progress_of(progress)
    predicted = of_regressions.predicted_by_both(retriever, earlier, queries, progress=told)
    changes = row_changes(retriever.index, earlier.index)
    found = of_regressions.regressions(retriever, predicted, changes, question, seed=seed, progress=told)
    asked = Inputs(
        retriever=retriever, question=question, queries=queries, seed=seed, command=called("audits.regressions")
    )
    page, work_list = regressions_report(found, asked, earlier.index, n_listed)
    return finding(found, page, work_list)


def hubs(
    retriever: IndexLike,
    rows: Rows | None = None,
    *,
    n_queries: int = 500,
    n_listed: int = 20,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_hubs.Hubs]:
    """Which training rows come up whatever is asked? Share of reference queries by row, and hubness.

    Args:
        retriever: Over the index.
        rows: Test rows; None: the training rows themselves, each without its own place.
        n_queries: Rows in the sample; 0: all.
        n_listed: Rows in the report, for each method.
        seed: Random seed of the sample.
        progress: True, or a function.
        spec: The question; by default of all methods that score rows.
        **choices: Fields of QuerySpec.
    """
    retriever = retriever_of(retriever, "audits.hubs")
    question = question_of(retriever, spec, choices)
    if rows is None:
        queries = of_hubs.training_queries(retriever, n_queries, seed)
    else:
        queries = sampled(retriever, rows, question, n_queries, seed)
    found = of_hubs.hubs(retriever, queries, question, progress=progress_of(progress))
    asked = Inputs(retriever=retriever, question=question, queries=queries, seed=seed, command=called("audits.hubs"))
    page = of_hubs.hubs_report(found, asked, n_listed)
    return finding(found, page, work_lists.hubs_list(found, retriever.index))


def _regress(
    retriever: Retriever,
    rows: Rows,
    feature: Feature,
    n_queries: int,
    seed: int,
    progress: Progress | bool,
    spec: QuerySpec | None,
    choices: QueryChoices,
    name: str,
) -> Finding[ArtifactRegression]:
    """Regress a feature of training rows on their influence."""
    values = measure(retriever.index, feature)
    asked = opened(name, retriever, rows, spec, choices, n_queries, seed, default=("if",))
    found = regress_artifact(retriever, asked.queries, asked.question, values, progress=progress_of(progress))
    page = artifact_report(found, feature, values, asked)
    return finding(found, page, work_lists.artifact_list(found, feature, values, retriever.index))
