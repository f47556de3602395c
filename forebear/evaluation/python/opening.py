"""What the functions of this room share: what is asked, about which test rows, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from forebear.errors import InputError
from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.reports.report import Report, write_report
from forebear.indexer.index import Index
from forebear.indexer.rows.row_source import RowSource, open_rows, rows_from_texts
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.retriever import Retriever

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
Asked: TypeAlias = Retriever | Index | str | Path  # who answers: a retriever, or an index, which gets one
Rows: TypeAlias = RowSource | str | Path | Sequence[str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Generic[T]):
    """What an audit or an evaluation found. In a notebook it shows its page.

    Attributes:
        found: The numbers, in the class of the function that measured them.
        report: Tables, figures and data rows, as the page shows them.
        result: The numbers as plain values, as ``result.json`` holds them.
    """

    found: T
    report: Report
    result: Mapping[str, Any]

    def write(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write report.html, table.csv, result.json and report.json, as the commands do; the page's path.

        Raises:
            OutputExistsError: The folder holds a report and ``force`` is not given.
            StorageError: The folder cannot be written.
        """
        return write_report(self.report, Path(folder), result=self.result, force=force)

    def __repr__(self) -> str:
        return f"<Finding {self.report.title!r}: {self.report.summary}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def retriever_of(asked: Asked) -> Retriever:
    """The retriever that is asked; one of its own for an index."""
    return asked if isinstance(asked, Retriever) else Retriever(asked)


def question_of(
    retriever: Retriever,
    spec: QuerySpec | None,
    choices: QueryChoices,
    default: Sequence[str] = (),
    **fixed: Unpack[QueryChoices],
) -> Question:
    """The question, checked.

    Args:
        retriever: That is asked.
        spec: As a public function is given it.
        choices: Likewise.
        default: Methods where none are named: those that the index can answer, else ``gd``; none: all that score rows.
        **fixed: What the audit or evaluation decides itself.
    """
    if spec is None and "methods" not in choices:
        answerable = retriever.available_methods()
        kept = [name for name in default if name in answerable] or ["gd"]
        choices = {**choices, "methods": kept if default else retriever.row_methods()}
    return retriever.resolve(QuerySpec.of(QuerySpec.of(spec, **choices), **fixed))


def tested_rows(retriever: Retriever, rows: Rows, *, need_labels: bool = False) -> RowSource:
    """Test rows, opened."""
    if isinstance(rows, RowSource):
        return rows
    if isinstance(rows, (str, Path)) or hasattr(rows, "columns"):
        return open_rows(rows, need_labels=need_labels, classes=retriever.label_names)
    if need_labels:
        raise InputError("these test rows need labels. Give rows_from_texts(texts, labels), or a file that has them.")
    return rows_from_texts(rows)


def sampled(
    retriever: Retriever, rows: Rows, question: Question, n_queries: int, seed: int, *, need_labels: bool = False
) -> QueryRows:
    """The test rows that are asked about."""
    labelled = need_labels or question.spec.target == "gold"
    return sample_queries(
        retriever, tested_rows(retriever, rows, need_labels=labelled), n_queries, seed, need_labels=labelled
    )


def finding(found: T, page: tuple[Report, Mapping[str, Any]]) -> Finding[T]:
    """What was found, with its report and plain numbers."""
    return Finding(found, *page)
