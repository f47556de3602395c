"""Parts that the functions of this room share: how they open an index and test rows, and the class they return."""

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
IndexLike: TypeAlias = (
    Retriever | Index | str | Path
)  # a retriever; or an index or its folder, for which a retriever is opened
Rows: TypeAlias = RowSource | str | Path | Sequence[str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Generic[T]):
    """The result of an audit or an evaluation. In a notebook it shows its page.

    Attributes:
        found: The numbers, as an object of the class that the function names as its result.
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


def retriever_of(index: IndexLike) -> Retriever:
    """The given retriever, or a new retriever over the given index."""
    return index if isinstance(index, Retriever) else Retriever(index)


def question_of(
    retriever: Retriever,
    spec: QuerySpec | None,
    choices: QueryChoices,
    default: Sequence[str] = (),
    **fixed: Unpack[QueryChoices],
) -> Question:
    """The question of a public function, checked against the index.

    Args:
        retriever: Over the index.
        spec: The ``spec`` that the public function was given.
        choices: The further keywords that it was given.
        default: Methods to take where the caller names none: those of them that the index can answer, or else ``gd``.
            If it is empty, all methods that score rows.
        **fixed: Choices that the audit or evaluation makes itself; they replace the caller's.
    """
    if spec is None and "methods" not in choices:
        answerable = retriever.available_methods()
        kept = [name for name in default if name in answerable] or ["gd"]
        choices = {**choices, "methods": kept if default else retriever.row_methods()}
    return retriever.resolve(QuerySpec.of(QuerySpec.of(spec, **choices), **fixed))


def tested_rows(retriever: Retriever, rows: Rows, *, need_labels: bool = False) -> RowSource:
    """The source of the test rows, which are a source, a path, a data frame or a list of texts."""
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
    """A seeded sample of the test rows, with labels where they are needed."""
    labelled = need_labels or question.spec.target == "gold"
    return sample_queries(
        retriever, tested_rows(retriever, rows, need_labels=labelled), n_queries, seed, need_labels=labelled
    )


def finding(found: T, page: tuple[Report, Mapping[str, Any]]) -> Finding[T]:
    """A finding from the numbers, and the pair of report and plain numbers."""
    return Finding(found, *page)
