"""``forebear.audits.hans``: the HANS audit of one index or several, and what retraining without the shortcut does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.artifacts.hans import audit_hans, check_hans, shortcut_rows
from forebear.evaluation.audits.artifacts.hans_indexes import Hans, hans_page, names_of
from forebear.evaluation.audits.artifacts.hans_retrained import (
    HansRetrained,
    check_weight,
    n_shortcut_rows,
    retrain_hans,
    tested_rows_of,
)
from forebear.evaluation.audits.work_lists import MOST_BEHIND, hans_list
from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, called, finding, retriever_of, tested_rows
from forebear.evaluation.python.retrainings import Retraining, retrainer_of
from forebear.evaluation.retraining.recipes import check_recipe
from forebear.indexer.rows.row_source import RowSource
from forebear.progress import Progress, progress_of, tell_warning
from forebear.retriever.retriever import Retriever

DEFAULT_WEIGHT = 0.2


def hans(
    retriever: IndexLike | Sequence[IndexLike],
    rows: Rows,
    methods: Sequence[str] | None = None,
    *,
    top: int = 10,
    how: Retraining | None = None,
    dev: Rows | None = None,
    shortcut: str | int | float | None = None,
    weight: float = DEFAULT_WEIGHT,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Finding[Hans]:
    """Do the training rows behind a wrong "entailment" share the lexical-overlap shortcut, and do they cause it?

    Of several indexes each is audited by itself, and all stand side by side.

    Args:
        retriever: Over an index of pairs; or several, of other models or seeds.
        rows: Test pairs labelled entailment or non-entailment.
        methods: Names of methods; None: all methods that score rows.
        top: Rows whose overlap is averaged.
        how: How the models are trained again without the shortcut's rows; None: none is.
        dev: With ``how``: labelled rows like the training rows, on which the cost is measured.
        shortcut: With ``how``: rows that are taken for the shortcut's, a number or a share of the live rows; the first
            of the work list. None: all that the audit names.
        weight: With ``how``: weight in the loss of the shortcut's rows in a second retraining; 0: there is none.
        seed: Random seed of the retrainings, of the random rows beside them, and of intervals; of several indexes each
            is retrained with seeds of its own, in their order from this one up.
        progress: True, or a function.

    Raises:
        InputError: The rows or methods do not fit an index, an index is named twice, or a choice is out of range.
        DataError: The rows have other labels, or no row is mispredicted as entailment.
    """
    name, several = "audits.hans", isinstance(retriever, Sequence) and not isinstance(retriever, str)
    given: Sequence[IndexLike] = retriever if several else [retriever]  # type: ignore[assignment,list-item]
    opened = [retriever_of(one, name) for one in given]
    asked = dict(zip(names_of(opened), opened, strict=True))
    sources, merges = dict[str, RowSource](), dict[str, np.ndarray]()
    for index, one in asked.items():
        source = tested_rows(one.label_names, rows, like=one.index.manifest.row_format, need_labels=True)
        sources[index], (_, merges[index]) = source, check_hans(one, source, methods, top)
    numbers, devs = dict[str, int | None](), dict[str, QueryRows | None]()
    if how is not None:
        numbers, devs = _checked(how, asked, merges, dev, shortcut, weight)
    told = progress_of(progress)
    audits = {index: audit_hans(one, sources[index], methods, top=top, progress=told) for index, one in asked.items()}
    retrained, facts = dict[str, HansRetrained](), dict[str, dict[str, Any]]()
    if how is not None:
        named = {index: shortcut_rows(audit, asked[index].index) for index, audit in audits.items()}
        if nothing := [index for index, some in named.items() if not len(some)]:
            raise InputError(
                f"the audit of {nothing[0]} names no row of the shortcut: nothing can be left out. Leave out --retrain."
            )
        for i, (index, one) in enumerate(asked.items()):
            tested = tested_rows_of(sources[index], devs[index])
            retrainer = retrainer_of(one, how, tested.texts, None)
            how = replace(how, cache=how.cache or f"{one.index.folder.resolve()}-retraining", begin=_no_beginning)
            first = seed + i * how.n_seeds  # with the same seeds, models of one start and the same rows are the same
            seeds = tuple(range(first, first + how.n_seeds))
            retrained[index] = retrain_hans(
                retrainer, named[index], numbers[index], weight, tested, merges[index], seeds, told
            )
            facts[index] = retrainer.facts()
            for warning in retrainer.warnings:
                tell_warning(warning)
    found = Hans(audits=audits, retrained=retrained)
    page = hans_page(found, asked, sources, called(name), facts, seed)
    n_listed = {index: max(MOST_BEHIND, len(r.rows)) for index, r in retrained.items()}
    lists = {i: hans_list(audit, asked[i].index, n_listed.get(i, MOST_BEHIND)) for i, audit in audits.items()}
    return finding(found, page, None if len(lists) > 1 else lists[next(iter(lists))], lists if len(lists) > 1 else {})


def _no_beginning(_cache: object) -> None:
    """The work has begun with the first index; all indexes share its cache."""


def _checked(
    how: Retraining,
    asked: dict[str, Retriever],
    merges: dict[str, np.ndarray],
    dev: Rows | None,
    shortcut: str | int | float | None,
    weight: float,
) -> tuple[dict[str, int | None], dict[str, QueryRows | None]]:
    """Number of the shortcut's rows, and in-domain rows, by index; what cannot be retrained is refused before work."""
    check_weight(weight)
    if how.n_seeds < 1:
        raise InputError(f"--seeds {how.n_seeds}: expected at least 1.")
    if how.run is not None and len(asked) > 1:
        raise InputError(
            f"--run names one training, and {len(asked)} indexes are given. Leave --run out, or name one index."
        )
    numbers, devs = dict[str, int | None](), dict[str, QueryRows | None]()
    for name, one in asked.items():
        check_recipe(one.index, how.recipe, how.run)
        live = one.index.labels[one.index.live]
        numbers[name], devs[name] = n_shortcut_rows(shortcut, live, merges[name]), None
        if dev is not None:
            source = tested_rows(one.label_names, dev, like=one.index.manifest.row_format, need_labels=True)
            devs[name] = sample_queries(one, source, 0, 0, need_labels=True)
    return numbers, devs
