"""Steps that ``evaluate``, ``audit`` and ``perturb`` share: opening the index, the question and the test rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import SampleOptions, ScopeOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import MaybeTestOptions, TestOptions
from forebear.cli.screen.console import listed, note, warn
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.evaluation.common.queries import QueryRows
    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.question.spec import Question
    from forebear.retriever.retriever import Retriever


def open_retriever(options: IndexOptions, report: ReportOptions) -> Retriever:
    """The index's retriever, after a check that the report can be written."""
    report.check()
    return options.open()


def make_question(
    retriever: Retriever, method: Sequence[str] | None, options: ScopeOptions, *, quiet: bool, **choices: Any
) -> Question:
    """The question, resolved against the index, with a note on the age of its fit."""
    from forebear.retriever.question.methods import pick_methods
    from forebear.retriever.question.spec import QuerySpec

    names = tuple(m.name for m in pick_methods(listed(method))) if method else retriever.row_methods()
    question = retriever.resolve(QuerySpec(methods=names, **asdict(options), **choices))
    say_what_was_fitted(question, quiet=quiet)
    return question


def default_methods(retriever: Retriever, names: Sequence[str], options: ScopeOptions) -> list[str]:
    """A command's default methods, without those that need a curvature that the index does not hold.

    A warning names the methods left out. Where none is left, the default is ``gd``.
    """
    from forebear.retriever.question.methods import METHODS

    index, scope = retriever.index, options.scope
    has_curvature = index.manifest.spec.whitened if scope != "head" else "exact" in index.manifest.curvature["head"]
    if has_curvature or options.curvature not in (None, "exact", "ekfac"):
        return list(names)
    lacking = [name for name in names if METHODS[name].query == "preconditioned"]
    kept = [name for name in names if name not in lacking] or ["gd"]
    if lacking:
        warn(
            f"{index.folder} holds no curvature of scope {scope}: taken by default is {', '.join(kept)}, without "
            f"{', '.join(lacking)}. For {lacking[0]} build the index with a --damping."
        )
    return kept


def say_what_was_fitted(question: Question, *, quiet: bool) -> None:
    """Note how many rows came or went since the index was fitted, for a question beyond the head."""
    from forebear.retriever.coverage import fit_age

    age = fit_age(question)
    if age is not None and age.is_stale:
        warn(f"{question.index.folder}: {age}.")
    elif age is not None and not age.is_current:
        note(str(question.index.folder), f"{age}.", quiet=quiet)


def open_queries(
    retriever: Retriever, test_options: TestOptions | MaybeTestOptions, sample: SampleOptions, question: Question
) -> QueryRows:
    """A sample of the test rows; ``--test`` must be given."""
    from forebear.evaluation.common.queries import sample_queries

    assert test_options.test is not None
    by_gold = question.spec.target == "gold"
    source = test_options.open(test_options.test, retriever, need_labels=by_gold)
    warn_of_labels(retriever, source, required=by_gold)
    return sample_queries(retriever, source, sample.queries, sample.seed, need_labels=by_gold)


def warn_of_labels(retriever: Retriever, source: RowSource, *, required: bool) -> None:
    """Warn of test rows whose label is not one of the model's."""
    if source.label_column is None:
        return
    labels = retriever.query_labels(source, required=required)
    warn(
        f"{source.name}: its labels are not the model's, so query_label stays empty"
        if labels is None
        else labels.remark
    )


def integers(option: str, values: Sequence[str] | None) -> list[int]:
    """Whole numbers of a list option."""
    given = listed(values)
    if not all(value.isascii() and value.isdigit() for value in given):
        raise InputError(f"{option} {','.join(given)}: expected whole numbers, such as 10,50.")
    return [int(value) for value in given]


def command_line() -> str:
    """The command line of this process, which repeats the report."""
    return shlex.join(["forebear", *sys.argv[1:]])
