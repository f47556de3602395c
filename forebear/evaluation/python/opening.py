"""Parts that the functions of this room share: how they open and check their inputs, and the class they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from forebear.errors import InputError
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.common.span_queries import sample_span_queries
from forebear.evaluation.reports.report import Group, Report, write_report
from forebear.evaluation.worklists.files import file_names, rendered
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.passages import SHOWN_ITEMS, passages_of
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_given
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL, RowFormat
from forebear.indexer.rows.row_source import RowSource
from forebear.progress import tell_warning
from forebear.retriever.answers.coverage import tell_fit_age
from forebear.retriever.question.methods import METHODS, pick_methods
from forebear.retriever.question.query_rows import tell_label_remark
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.wording import caller, caller_of, worded

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
IndexLike: TypeAlias = (
    Retriever | Index | str | Path
)  # a retriever; or an index or its folder, for which a retriever is opened
Rows: TypeAlias = RowSource | str | Path | Sequence[str] | Sequence[tuple[str, str]] | Callable[..., RowSource]

# What takes an index of several labels or of numbers, too. All else reads one class a row, and is refused by name.
OF_ANY_TARGETS = frozenset({
    "audits.suspects", "audits.duplicates", "audits.hubs", "explain", "saliency",
    "evaluations.cancellation", "evaluations.correlation", "evaluations.mislabelled", "evaluations.near_duplicates",
    "evaluations.overlap", "evaluations.recall",
})  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Generic[T]):
    """The result of an audit or an evaluation. In a notebook it shows its page.

    Attributes:
        numbers: The numbers, as an object of the class that the function names as its result.
        report: Tables, figures and data rows, as the page shows them.
        result: The numbers as plain values, as ``result.json`` holds them.
        work_list: The training rows that it names, to be decided on; None where it names none.
        work_lists: Of several indexes the list of each, by the index's name.
    """

    numbers: T
    report: Report
    result: Mapping[str, Any]
    work_list: WorkList | None = field(default=None, kw_only=True)
    work_lists: Mapping[str, WorkList] = field(default_factory=dict, kw_only=True)

    def write(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write report.html, its tables as CSV, result.json and report.json, as the commands do; the page's path.

        A work list goes beside them: worklist.parquet, worklist.csv and worklist.jsonl, which hold the same. Of several
        indexes each has its own: worklist-NAME.csv and so on.

        Raises:
            OutputExistsError: The folder holds a report and ``force`` is not given.
            StorageError: The folder cannot be written.
        """
        beside = {} if self.work_list is None else rendered(self.work_list)
        for name, work_list in zip(file_names(self.work_lists), self.work_lists.values(), strict=True):
            beside |= rendered(work_list, name)
        return write_report(self.report, Path(folder), result=self.result, force=force, beside=beside)

    def __repr__(self) -> str:
        return f"<Finding {self.report.title!r}: {self.report.summary}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def opened(
    call: str,
    retriever: IndexLike,
    rows: Rows,
    spec: QuerySpec | None,
    choices: QueryChoices,
    n_queries: int,
    seed: int,
    *,
    default: Sequence[str] = (),
    by_spans: bool = False,
    **fixed: Unpack[QueryChoices],
) -> Inputs:
    """Open an index, a question (see :func:`question_of`) and a sample of the test rows.

    ``call`` is the name of the public function. ``by_spans`` says that spans are compared, so that the test rows must
    hold some; see :func:`sampled_spans`.
    """
    retriever = retriever_of(retriever, call)
    question = question_of(retriever, spec, choices, default, **fixed)
    sample = sampled_spans if by_spans else sampled
    queries = sample(retriever, rows, question, n_queries, seed)
    return Inputs(retriever=retriever, question=question, queries=queries, seed=seed, command=called(call))


def retriever_of(index: IndexLike, call: str) -> Retriever:
    """The given retriever, or a new retriever over the given index.

    Args:
        index: The index.
        call: Name of the public function that asks.

    Raises:
        InputError: The function is for one label a row, and the index has several labels or numbers.
    """
    retriever = index if isinstance(index, Retriever) else Retriever(index)
    check_targets(retriever.index, call)
    return retriever


def check_targets(index: Index, call: str) -> None:
    """Refuse what is for one label a row, before any work, where the index has several labels or numbers a row.

    Args:
        index: The index.
        call: Name of the public function that asks, such as ``audits.hans``.

    Raises:
        InputError: As said.
    """
    problem_type = index.manifest.spec.problem_type
    if problem_type == SINGLE_LABEL or call in OF_ANY_TARGETS:
        return
    has = "numbers (regression)" if problem_type == REGRESSION else "several labels a row"
    room, _, name = call.partition(".")
    command = f"{room.removesuffix('s')} {name}".replace("evaluation ", "evaluate ").replace("_", "-").strip()
    raise InputError(f"{caller_of(command, call)} is for one label a row; {index.folder} has {has}.")


def question_of(
    retriever: Retriever,
    spec: QuerySpec | None,
    choices: QueryChoices,
    default: Sequence[str] = (),
    **fixed: Unpack[QueryChoices],
) -> Question:
    """The question of a public function, resolved against the index, with a note on the age of the index's fit.

    Args:
        retriever: Over the index.
        spec: The ``spec`` that the public function was given.
        choices: The further keywords that it was given.
        default: Methods to take where the caller names none; see :func:`_default_methods`. If it is empty, all methods
            that score rows.
        **fixed: Choices that the audit or evaluation makes itself; they replace the caller's.
    """
    asked = QuerySpec.of(QuerySpec.of(spec, **choices), **fixed)
    if spec is None and "methods" not in (choices | fixed):
        methods = _default_methods(retriever, default, asked) if default else retriever.row_methods()
    else:
        methods = [method.name for method in pick_methods(asked.methods)]
    question = retriever.resolve(QuerySpec.of(asked, methods=methods))
    tell_fit_age(question)
    return question


def _default_methods(retriever: Retriever, names: Sequence[str], spec: QuerySpec) -> Sequence[str]:
    """Default methods, without those that need a curvature that the index does not hold, of which a warning tells.

    Where none is left, the default is ``gd``.
    """
    index, scope = retriever.index, spec.scope
    has_curvature = index.manifest.spec.whitened if scope != "head" else index.head.solver is not None
    if has_curvature or spec.curvature not in (None, "exact", "ekfac"):
        return names
    lacking = [name for name in names if METHODS[name].query == "preconditioned"]
    kept = [name for name in names if name not in lacking] or ["gd"]
    if lacking:
        tell_warning(
            worded(
                f"{index.folder} holds no curvature of scope {scope}: taken by default is {', '.join(kept)}, without "
                f"{', '.join(lacking)}. For {lacking[0]} build the index with a --damping.",
                of="index",
            )
        )
    return kept


def tested_rows(
    classes: Sequence[str], rows: Rows, *, need_labels: bool = False, like: RowFormat | None = None
) -> RowSource:
    """The source of the test rows: what :func:`rows_given` takes, or a function that opens them.

    Args:
        classes: The model's class names.
        rows: The rows; a function is called with the keywords ``classes``, ``need_labels`` and ``like`` of
            :func:`~forebear.indexer.rows.opening.open_rows`.
        need_labels: Whether rows without labels are refused.
        like: How the run or the index read its rows.
    """
    if callable(rows):
        return rows(need_labels=need_labels, classes=classes, like=like)
    return rows_given(rows, need_labels=need_labels, classes=classes, like=like)


def sampled(retriever: Retriever, rows: Rows, question: Question, n_queries: int, seed: int) -> QueryRows:
    """A seeded sample of the test rows, with labels where the target is the gold one."""
    by_gold = question.spec.target == "gold"
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format, need_labels=by_gold)
    tell_label_remark(retriever.index, source, required=by_gold)
    return sample_queries(retriever, source, n_queries, seed, need_labels=by_gold)


def sampled_spans(retriever: Retriever, rows: Rows, question: Question, n_queries: int, seed: int) -> QueryRows:
    """The same for methods that compare spans, which what the model itself says is the measure of.

    Sampled rows without a span are left out, if a method ranks spans.
    """
    if question.spec.exact == "none":
        raise InputError("--exact none ranks by sketches alone; give rerank or full.")
    source = tested_rows(
        retriever.label_names,
        rows,
        like=retriever.index.manifest.row_format,
        need_labels=question.spec.target == "gold",
    )
    return sample_span_queries(retriever, source, question, n_queries, seed)


def called(function: str) -> str:
    """What repeats a report: the command line, or the call of a function such as ``audits.hans``."""
    return caller(f"forebear.{function}(...) in Python")


def finding(
    found: T,
    page: tuple[Report, Mapping[str, Any]],
    work_list: WorkList | None = None,
    work_lists: Mapping[str, WorkList] = MappingProxyType({}),
) -> Finding[T]:
    """A finding from the numbers, the pair of report and plain numbers, and the rows that somebody should decide on:
    one list, or one for each of several indexes, by its name."""
    report, result = page
    if work_list is not None:
        report = replace(report, listed=passages_of(work_list, SHOWN_ITEMS), n_listed=len(work_list))
    groups = [
        Group(
            f"{index}: rows to decide on",
            passages_of(some, SHOWN_ITEMS),
            f"The first {min(SHOWN_ITEMS, len(some))} of {len(some):,}. All of them are in {name}.csv, .jsonl and "
            ".parquet beside this page.",
        )
        for (index, some), name in zip(work_lists.items(), file_names(work_lists), strict=True)
    ]
    report = replace(report, groups=(*groups, *report.groups))
    return Finding(found, report, result, work_list=work_list, work_lists=work_lists)
