"""Which method to trust: the papers' measures; each asks what a command of ``forebear evaluate`` asks.

Every function takes a :class:`~forebear.Retriever` (or an index, or its folder) first, and gives a
:class:`~forebear.evaluation.python.opening.Finding`: ``.numbers`` the numbers, ``.report`` the page, ``.result`` the
numbers as plain values, ``.write(folder)``. Their common parameters:

- ``rows``: test rows, a RowSource, a path, or a list of texts or of pairs;
- ``n_queries`` and ``seed``: a seeded sample of them, 0 for all;
- ``spec`` and further keywords: the choices of a :class:`~forebear.QuerySpec`; by default all methods that score rows;
- ``progress``: True draws the usual bar.

They raise InputError where a choice is out of range, before any model runs. ``removal``, ``deletion_curve``,
``retraining_loss``, ``lds`` and ``effects`` train models again; see :class:`Retraining`.

    >>> from forebear import evaluations
    >>> finding = evaluations.overlap("runs/demo/index", [("A cat sat .", "The cat sat .")], methods=["gd", "if"])
    >>> finding.report.tables[0].rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forebear.evaluation.measures import agreement as of_agreement
from forebear.evaluation.measures import cancellation as of_cancellation
from forebear.evaluation.measures import correlation as of_correlation
from forebear.evaluation.measures import faithfulness as of_faithfulness
from forebear.evaluation.measures import metasmoothness as of_metasmoothness
from forebear.evaluation.measures import mislabelled as of_mislabelled
from forebear.evaluation.measures import near_duplicates as of_near_duplicates
from forebear.evaluation.measures import randomized as of_randomized
from forebear.evaluation.measures import recall as of_recall
from forebear.evaluation.measures import saliency_consistency as of_saliency
from forebear.evaluation.measures import top_overlap as of_overlap
from forebear.evaluation.measures.agreement_report import agreement_report
from forebear.evaluation.python.opening import (
    Finding,
    IndexLike,
    Rows,
    called,
    finding,
    opened,
    question_of,
    retriever_of,
)
from forebear.evaluation.python.retrainings import Retraining, deletion_curve, effects, lds, removal, retraining_loss
from forebear.progress import Progress, progress_of
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.spec import QueryChoices, QuerySpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Retraining",
    "agreement",
    "cancellation",
    "correlation",
    "deletion_curve",
    "effects",
    "faithfulness",
    "lds",
    "metasmoothness",
    "mislabelled",
    "near_duplicates",
    "overlap",
    "randomized",
    "recall",
    "removal",
    "retraining_loss",
    "saliency_consistency",
]


def correlation(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_rows: int = 500,
    n_queries: int = 100,
    seed: int = 0,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_correlation.Correlation]:
    """Do two methods order the training rows alike? Mean Spearman correlation of every pair.

    ``n_rows`` training rows are sampled, ``n_queries`` test rows.
    """
    asked = opened("evaluations.correlation", retriever, rows, spec, choices, n_queries, seed)
    found = of_correlation.correlations(asked.retriever, asked.queries, asked.question, n_rows=n_rows, seed=seed)
    return finding(found, of_correlation.correlation_report(found, asked))


def overlap(
    retriever: IndexLike,
    rows: Rows,
    *,
    tops: Sequence[int] = (),
    shares: Sequence[str] = (),
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_overlap.TopOverlap]:
    """Do two methods bring up the same training rows? Share of common rows in the tops of every pair.

    Args:
        retriever: Over the index.
        rows: Test rows.
        tops: Numbers of rows; 10 and 50, if neither these nor ``shares`` are given.
        shares: Shares of the live rows instead or besides, as texts: ``("0.01", "0.1")``.
        n_queries: Test rows in the sample; 0: all.
        seed: Random seed of the sample.
        progress: True, or a function.
        spec: The question.
        **choices: Fields of QuerySpec.
    """
    retriever = retriever_of(retriever, "evaluations.overlap")
    depths = of_overlap.depths_of(tops or (() if shares else (10, 50)), shares, retriever.index.manifest.n_live)
    asked = opened("evaluations.overlap", retriever, rows, spec, choices, n_queries, seed)
    found = of_overlap.top_overlaps(retriever, asked.queries, asked.question, depths, progress=progress_of(progress))
    return finding(found, of_overlap.top_overlap_report(found, asked))


def randomized(
    retriever: IndexLike,
    rows: Rows,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    n_rows: int = 500,
    n_queries: int = 100,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_randomized.Randomized]:
    """Do scores depend on what the model has learned? Spearman with randomly initialised models; near 0 is good.

    One random model for each of ``seeds``; ``n_rows`` sampled training rows are indexed under each.
    """
    retriever = retriever_of(retriever, "evaluations.randomized")
    if spec is None and "methods" not in choices:  # a method that does not depend on the model would be refused
        choices["methods"] = [n for n in retriever.row_methods() if METHODS[n].representation != "sentence"]
    asked = opened("evaluations.randomized", retriever, rows, spec, choices, n_queries, seed)
    found = of_randomized.randomized_correlations(
        retriever, asked.queries, asked.question, n_rows=n_rows, seed=seed, seeds=seeds, progress=progress_of(progress)
    )
    return finding(found, of_randomized.randomized_report(found, asked))


def saliency_consistency(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_queries: int = 50,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_saliency.SaliencyConsistency]:
    """Do influence and saliency agree? Influence of rows holding salient word pieces; tops without one.

    By default of ``if``.
    """
    asked = opened("evaluations.saliency_consistency", retriever, rows, spec, choices, n_queries, seed, default=("if",))
    found = of_saliency.saliency_consistency(
        asked.retriever, asked.queries, asked.question, progress=progress_of(progress)
    )
    return finding(found, of_saliency.saliency_consistency_report(found, asked))


def recall(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_queries: int = 50,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_recall.RetrievalRecall]:
    """How much of the exact top k does retrieval find, and how much faster? By method, at both ends."""
    asked = opened("evaluations.recall", retriever, rows, spec, choices, n_queries, seed)
    found = of_recall.retrieval_recall(asked.retriever, asked.queries, asked.question, progress=progress_of(progress))
    return finding(found, of_recall.retrieval_recall_report(found, asked))


def near_duplicates(
    retriever: IndexLike,
    *,
    edits: Sequence[str] = of_near_duplicates.EDITS,
    tops: Sequence[int] = of_near_duplicates.TOPS,
    n_queries: int = 200,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_near_duplicates.NearDuplicates]:
    """Is a training row found when it is asked about, as it is or with one word changed? hit@k for each of ``tops``.

    ``edits`` are some of ``same``, ``add``, ``remove`` and ``replace``; ``n_queries`` training rows are asked about.
    """
    retriever = retriever_of(retriever, "evaluations.near_duplicates")
    question = question_of(retriever, spec, choices)
    found = of_near_duplicates.near_duplicates(
        retriever,
        question,
        n_queries=n_queries,
        edits=tuple(dict.fromkeys(edits)),
        tops=sorted({*tops}),
        seed=seed,
        progress=progress_of(progress),
    )
    return finding(
        found,
        of_near_duplicates.near_duplicates_report(
            found, retriever, question, seed, called("evaluations.near_duplicates")
        ),
    )


def cancellation(
    retriever: IndexLike, *, n_rows: int = 100, seed: int = 0, progress: Progress | bool = False
) -> Finding[of_cancellation.Cancellation]:
    """Do the training rows' gradients cancel out? By layer, biases against weights, of ``n_rows`` sampled rows.

    Needs an index of two or more checkpoints.
    """
    retriever = retriever_of(retriever, "evaluations.cancellation")
    found = of_cancellation.cancellation(retriever, n_rows=n_rows, seed=seed, progress=progress_of(progress))
    page = of_cancellation.cancellation_report(found, retriever, seed, called("evaluations.cancellation"))
    return finding(found, page)


def metasmoothness(
    retriever: IndexLike,
    *,
    share: float = 0.05,
    n_directions: int = 1,
    seed: int = 0,
    keep: bool = False,
    progress: Progress | bool = False,
) -> Finding[of_metasmoothness.Metasmoothness]:
    """Do the run's weights move along straight lines when rows' weights change? How far ``magic`` can reach.

    Trains the run once, and twice for each direction, which is a random ``share`` of the rows on the way out. With
    ``keep`` the run's folder keeps the result, and answers by ``magic`` say it.
    """
    retriever = retriever_of(retriever, "evaluations.metasmoothness")
    found = of_metasmoothness.metasmoothness(
        retriever, share=share, n_directions=n_directions, seed=seed, keep=keep, progress=progress_of(progress)
    )
    page = of_metasmoothness.metasmoothness_report(found, retriever, seed, called("evaluations.metasmoothness"))
    return finding(found, page)


def mislabelled(
    retriever: IndexLike,
    wrong: np.ndarray,
    *,
    true_labels: np.ndarray | None = None,
    tops: Sequence[int] = (),
    n_neighbours: int = 10,
    seed: int = 0,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_mislabelled.Mislabelled]:
    """Does a row's influence on itself tell wrong labels? AUC and precision, beside two baselines.

    Args:
        retriever: Over the index.
        wrong: Whether a row is labelled wrongly, ``(N,)`` bool by row number.
        true_labels: Class ids of all rows, ``(N,)``, where they are known.
        tops: Numbers of rows whose precision is measured; the number of wrong rows always is.
        n_neighbours: Number of nearest rows whose labels are a baseline.
        seed: Random seed of the bootstrap.
        spec: The question; ``gd`` and ``if`` by default, and always about the gold label.
        **choices: Fields of QuerySpec.
    """
    retriever = retriever_of(retriever, "evaluations.mislabelled")
    question = question_of(retriever, spec, choices, ("gd", "if"), target="gold")
    found = of_mislabelled.mislabelled(
        retriever, question, np.asarray(wrong), true_labels=true_labels, n_neighbours=n_neighbours
    )
    page = of_mislabelled.mislabelled_report(found, retriever, question, tops, seed, called("evaluations.mislabelled"))
    return finding(found, page)


def agreement(
    retriever: IndexLike,
    rows: Rows,
    measure: of_agreement.Measure,
    *,
    at: Sequence[int] = (10,),
    n_queries: int = 200,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_agreement.Agreement]:
    """Do the rows and spans at the top mean what the query means, or bear its label? Sag@K and Lag@K.

    ``measure`` is ``semantic`` or ``label``; ``at`` is K, up to six numbers. By default of ``if`` and
    ``tracin`` by rows and by spans.
    """
    tops = of_agreement.depths(at)
    default = of_agreement.PAPER_METHODS
    asked = opened(
        "evaluations.agreement",
        retriever,
        rows,
        spec,
        choices,
        n_queries,
        seed,
        default=default,
        by_spans=True,
        top=tops[-1],
    )
    found = of_agreement.measure_agreement(
        asked.retriever, asked.queries, asked.question, tops, measure, seed=seed, progress=progress_of(progress)
    )
    return finding(found, agreement_report(found, asked))


def faithfulness(
    retriever: IndexLike,
    rows: Rows,
    *,
    n_rows: int = 200,
    n_repeats: int = of_faithfulness.REPEATS,
    n_queries: int = 50,
    seed: int = 0,
    progress: Progress | bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Finding[of_faithfulness.Faithfulness]:
    """Do span methods rank spans as the final model itself does? Spearman with its own span scores.

    Each of ``n_repeats`` draws other training rows (``n_rows``) and other variants of the model.
    """
    methods = of_faithfulness.METHODS
    asked = opened(
        "evaluations.faithfulness", retriever, rows, spec, choices, n_queries, seed, by_spans=True, methods=methods
    )
    found = of_faithfulness.measure_faithfulness(
        asked.retriever, asked.queries, asked.question, n_rows=n_rows, n_repeats=n_repeats, seed=seed,
        progress=progress_of(progress),
    )  # fmt: skip
    return finding(found, of_faithfulness.faithfulness_report(found, asked))
