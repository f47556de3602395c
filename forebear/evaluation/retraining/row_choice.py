"""Choice of the rows that are removed before a retraining: one end of a ranking, its middle, or random rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.amounts import rows_of_share
from forebear.evaluation.common.queries import QueryRows, score_queries
from forebear.evaluation.common.span_queries import gradients_compared, training_spans
from forebear.indexer.model.forward import run_forward
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.question.models import N_VARIANTS
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.question.targets import choose_targets
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores
from forebear.retriever.spans.scores import SpanScores
from forebear.retriever.spans.stored import stored_row_scores
from forebear.retriever.words.tfidf import TfidfSearcher

Side = Literal["top", "bottom", "least"]
SIDES: dict[str, str] = {"top": "most positive", "bottom": "most negative", "least": "least influential"}


def sides_of(names: Sequence[str]) -> tuple[Side, ...]:
    """The named sides of a ranking, each once; all sides if no name is given.

    Raises:
        InputError: A name is not known.
    """
    unknown = [name for name in names if name not in SIDES]
    if unknown:
        raise InputError(f"--sides {unknown[0]}: expected {', '.join(SIDES)}.")
    return tuple(dict.fromkeys(names or SIDES))  # type: ignore[arg-type]  # checked


def rows_at(scores: np.ndarray, rows: np.ndarray, k: int, side: Side) -> np.ndarray:
    """The ``k`` rows at one side of a query's ranking by the signed, raw score; ties go to the lower row number.

    Args:
        scores: Scores of the rows, ``(n,)``; larger = proponent. Rows of score -inf hold no span and are not ranked.
        rows: Row numbers, ``(n,)``.
        k: Number of rows to take.
        side: ``top`` (largest scores), ``bottom`` (smallest), ``least`` (nearest to 0).

    Returns:
        Row numbers, ascending, ``(k,)``.

    Raises:
        InputError: Fewer than ``k`` rows are ranked.
    """
    n_ranked = int((~np.isneginf(scores)).sum())
    if n_ranked < k:
        raise InputError(f"{k} rows are to be removed, but only {n_ranked} hold a span to be ranked by. Remove fewer.")
    key = {"top": -scores, "bottom": scores, "least": np.abs(scores)}[side]
    key = np.where(np.isneginf(scores), np.inf, key)
    return np.sort(rows[np.lexsort((rows, key))[:k]])


def random_rows(rows: np.ndarray, k: int, *seeds: int) -> np.ndarray:
    """``k`` of the rows, drawn without replacement, ascending."""
    return np.sort(np.random.default_rng(seeds).permutation(rows)[:k])


def label_matched_rows(rows: np.ndarray, labels: np.ndarray, removed: np.ndarray, *seeds: int) -> np.ndarray:
    """As many random rows of each class as ``removed`` holds, drawn without replacement, ascending.

    To remove them changes the class balance as ``removed`` does, and nothing else. The same numbers of each class give
    the same rows, so that methods whose rows have the same labels share a retraining.

    Args:
        rows: Row numbers to draw from, ``(n,)``.
        labels: Class ids of all rows of the index.
        removed: Row numbers, some of ``rows``.
        *seeds: Seeds of the draw.
    """
    counts = np.bincount(labels[removed])
    order = np.random.default_rng([*seeds, *counts.tolist()]).permutation(rows)
    drawn = [order[labels[order] == label][:n] for label, n in enumerate(counts)]
    return np.sort(np.concatenate(drawn))


def stratified_rows(rows: np.ndarray, labels: np.ndarray, share: float, *seeds: int) -> np.ndarray:
    """The same share of each class' rows, drawn without replacement, ascending.

    Every draw of a share has the same number of rows of each class, so that what differs between two draws is not the
    class balance.

    Args:
        rows: Row numbers, ``(n,)``.
        labels: Their class ids, ``(n,)``.
        share: In (0, 1); a class of ``m`` rows gives ``share * m``, rounded half up.
        *seeds: Seeds of the draw.
    """
    order = np.random.default_rng(seeds).permutation(len(rows))
    classes = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(rows[np.concatenate([members[: int(share * len(members) + 0.5)] for members in classes])])


def amounts_of(remove: Sequence[int], shares: Sequence[str], n_rows: int, default: Sequence[str]) -> tuple[int, ...]:
    """Numbers of rows to remove, ascending, each once.

    Args:
        remove: Numbers of rows.
        shares: Shares of all rows, such as ``0.1``.
        n_rows: Number of live rows, or of candidates of a query.
        default: Numbers or shares to take where ``remove`` and ``shares`` are empty.

    Raises:
        InputError: A number is less than 1 or leaves fewer than two rows.
    """
    if not remove and not shares:
        remove, shares = (
            [int(amount) for amount in default if amount.isdigit()],
            [amount for amount in default if not amount.isdigit()],
        )
    given = [*map(str, remove), *shares]
    amounts = {*remove, *(rows_of_share(amount, n_rows) for amount in shares)}
    bad = sorted(k for k in amounts if not 1 <= k <= n_rows - 2)
    if bad:
        raise InputError(
            f"--remove or --share: {', '.join(given)} takes {bad[-1]} of {n_rows} rows away; expected 1 to "
            f"{n_rows - 2}."
        )
    return tuple(sorted(amounts))


def predictions_of(retriever: Retriever, queries: QueryRows, target: str) -> Predictions:
    """What the model says of the queries, with the class of each whose loss is explained.

    Args:
        retriever: Over the index.
        queries: Test rows, with labels where ``target`` is ``gold``.
        target: See :class:`~forebear.retriever.question.spec.QuerySpec`.
    """
    forward = run_forward(retriever.classifier(), queries.texts)
    targets = choose_targets(target, forward.predictions, queries.labels, retriever.label_names, retriever.index.loss)
    return Predictions.of(forward, targets)


def least_overlap(retriever: Retriever, queries: QueryRows, n_candidates: int) -> np.ndarray:
    """The live rows whose tf-idf vectors have the smallest cosine with each query's (Yeh22's no-overlap test).

    Args:
        retriever: Over an index with words.
        queries: Test rows.
        n_candidates: Number of rows for each query; ties go to the lower row number.

    Returns:
        Positions among the live rows, ascending, ``(q, n_candidates)``.

    Raises:
        InputError: There are not so many rows, or the index holds no words.
    """
    live = retriever.index.live
    if not 3 <= n_candidates <= len(live):
        raise InputError(f"--no-overlap {n_candidates}: expected 3 to {len(live)}, the number of live rows.")
    retriever.index.check_words()
    tfidf = retriever.searcher("tfidf")  # fitted once for all that ask it
    assert isinstance(tfidf, TfidfSearcher)
    positions = [
        np.argsort(tfidf.cosines(part.texts), axis=1, kind="stable")[:, :n_candidates] for part in queries.blocks()
    ]
    return np.sort(np.concatenate(positions), axis=1)


def row_scores(retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question) -> Scores:
    """Exact scores of all live rows, ``(q, n)`` float64 by method name.

    By a method that ranks spans, a row's score is the score of its best span; -inf if the model reads no span of it.

    Args:
        retriever: Over the index.
        queries: Test rows.
        spec: The question.

    Raises:
        InputError: A method explains saliency, not a prediction; or a test row has no span.
    """
    question = retriever.resolve(spec)
    methods = question.methods
    by_spans = [m for m in methods if m.ranks_spans]
    by_rows = question.of(m for m in methods if m not in by_spans)
    scores = score_queries(retriever, queries, by_rows) if by_rows.methods else Scores()
    if by_spans:
        best = _best_spans(retriever, queries, question.of(by_spans))
        scores.update(best)
        scores.note_residuals([best])
    return scores.of(method.name for method in methods)


def _best_spans(retriever: Retriever, queries: QueryRows, question: Question) -> Scores:
    """Score of each live row's best span, ``(q, n)`` by methods that rank spans."""
    index, models, methods = retriever.index, retriever.models, question.methods
    by_row, by_span = gradients_compared(retriever, queries, question)
    stored = question.spec.scope == "head" and question.spans_are_stored
    from_store = [m for m in methods if stored and not m.variants]
    by_model = [m for m in methods if m not in from_store]
    out = Scores()
    no_span = "no training row has a span that the model reads. Find spans otherwise (--spans)."
    if from_store:
        if not len(index.live_spans):
            raise InputError(no_span)
        search = GradientSearch.kept(models, "head", question.curvature)
        for method in from_store:
            out[method.name] = stored_row_scores(search, method, by_span if method.spans == "both" else by_row)
    if by_model:
        entries = training_spans(retriever, question, index.live)
        if not len(entries.rows):
            raise InputError(no_span)
        rows, starts = np.unique(entries.rows, return_index=True)
        positions = np.searchsorted(index.live, rows)
        n_checkpoints = len(index.manifest.checkpoints)
        for method in by_model:
            gradients = by_span if method.spans == "both" else by_row
            scores = SpanScores(index, models.classifier(), question.spec.scope, gradients, entries)
            if method.variants:
                values = scores.summed(models.classifier(n_checkpoints + m) for m in range(N_VARIANTS))
            else:
                values, convergence = scores.preconditioned(question.curvature)
                out.note_convergence(method.name, convergence)
            out[method.name] = np.full((len(queries), len(index.live)), -np.inf)
            out[method.name][:, positions] = np.maximum.reduceat(values, starts, axis=1)
    return out
