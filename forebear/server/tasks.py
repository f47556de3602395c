"""What is computed for a request: rankings, an explanation, flip sets or scores, by the functions of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import InputError
from forebear.evaluation.explain.explaining import chosen_methods
from forebear.evaluation.explorer.records import Drives, row_block
from forebear.evaluation.python.explaining import explain
from forebear.evaluation.python.flipping import flip
from forebear.indexer.curvature.damping import find_damping
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.answers.coverage import tell_fit_age
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.server.limits import Limits, Rows
from forebear.server.listed_rows import ListedRows
from forebear.server.micro_batches import Found
from forebear.server.served_indexes import Opened

NO_LABELS = "--target gold: texts given here have no labels. Give predicted, or the name of a label."
_OWN_LINES = ("index digest", "computed on", "query digest", "sign", "saliency", "versions")  # of an explanation


def question_of(opened: Opened, spec: QuerySpec) -> Question:
    """The question of a request, with its damping as the index names it.

    An index keeps what it has computed for each damping, so that clients may only name those that it holds.

    Raises:
        InputError: A choice means nothing, or does not fit the index; or another damping.
    """
    question = opened.retriever.resolve(spec)
    if spec.damping is None:
        return question
    scopes = {question.scope_of(method) for method in question.methods if method.query == "preconditioned"}
    curvature = opened.index.manifest.curvature
    held = [d for scope in scopes for facts in curvature.get(scope, {}).values() for d in facts.get("dampings", ())]
    if (number := find_damping(held, spec.damping)) is None and held:
        names = ", ".join(dict.fromkeys(str(facts["given"]) for facts in held))
        raise InputError(f"--damping {spec.damping}: clients may ask at those that the index holds, {names}.")
    return opened.retriever.resolve(spec, damping=None if number is None else held[number]["given"])


def resolved(opened: Opened, spec: QuerySpec, rows: Rows, n_asked: int, limits: Limits) -> Question:
    """The same, after everything that can be refused without a model.

    Raises:
        InputError: As said, or the question is beyond the server's limits.
    """
    if spec.target == "gold":
        raise InputError(NO_LABELS)
    opened.retriever.check_texts(source_of(rows))
    question = question_of(opened, spec)
    limits.check_question(question, n_asked)
    return question


def check_live(opened: Opened, rows: np.ndarray) -> None:
    """Refuse training rows that take no part in answers.

    Raises:
        InputError: Naming the first of them.
    """
    if len(unknown := np.setdiff1d(rows, opened.index.live)):
        raise InputError(
            f"row {unknown[0]} is not one of the {opened.index.manifest.n_live:,} live training rows; it was "
            f"retired, or is not from 0 to {opened.index.manifest.n_rows - 1}."
        )


def source_of(rows: Rows) -> Any:
    """Test rows as the library takes them."""
    return rows_from_texts([row[0] if len(row) == 1 else row for row in rows])  # type: ignore[arg-type]


def columns_of(rows: Rows) -> list[list[str]]:
    """Test rows as one list a text column."""
    return [list(column) for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class Retrieve:
    """The training rows at both ends of each test row's ranking."""

    spec: QuerySpec
    limits: Limits

    @cached_property
    def most_rows(self) -> int | None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        return self.limits.together(self.spec)

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        resolved(opened, self.spec, rows, n_asked, self.limits)

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """A table of results for each test row: columns as docs/answers.md lists them, by method, side and rank."""
        retriever, question = opened.retriever, question_of(opened, self.spec)
        tell_fit_age(question)
        tables: list[pa.Table] = []
        size = retriever.asked_together(source_of(rows), question)
        for start in range(0, len(rows), size):
            columns = columns_of(rows[start : start + size])
            tables += retriever.tables(retriever.answer_block(start, columns, None, question, effects=True))
        table = pa.concat_tables(tables)
        n_results = table.num_rows // len(rows)
        return [Found(question, table.slice(i * n_results, n_results)) for i in range(len(rows))]


@dataclass(frozen=True)
class Score:
    """Exact scores of given training rows.

    Attributes:
        rows: Training rows, ascending; None: all that are live.
    """

    spec: QuerySpec
    rows: tuple[int, ...] | None
    limits: Limits

    @cached_property
    def most_rows(self) -> int | None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        return self.limits.together(self.spec)

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        question = resolved(opened, self.spec, rows, n_asked, self.limits)
        for method in question.methods:
            if not method.scores_rows:
                raise InputError(f"{method.name} scores spans or asks of a word, not a row: ask for it by retrieve.")
        wanted = self._training_rows(opened)
        check_live(opened, wanted)
        n, most = n_asked * len(question.methods) * len(wanted), self.limits.scores
        if n > most:
            raise InputError(
                f"{n:,} scores (texts x methods x rows): this server takes at most {most:,}. Name fewer rows."
            )

    def _training_rows(self, opened: Opened) -> np.ndarray:
        return opened.index.live if self.rows is None else np.array(self.rows, np.int64)

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """For each test row the training rows, and by method their scores ``(n,)``, larger = proponent."""
        question, wanted = question_of(opened, self.spec), self._training_rows(opened)
        tell_fit_age(question)
        scores = opened.retriever.score_block(columns_of(rows), None, question, rows=wanted)
        return [Found(question, (wanted, {name: s[i] for name, s in scores.items()})) for i in range(len(rows))]


@dataclass(frozen=True)
class Explain:
    """One prediction explained.

    Attributes:
        spec: The question.
        own_methods: Whether its methods are those of the client, not the default ones.
        form: Form of the saliency.
        saliency_influence: Whether rows behind a word's saliency are asked for.
        flip: Whether the fewest rows that flip the prediction are looked for.
    """

    spec: QuerySpec
    own_methods: bool
    form: str
    saliency_influence: bool
    flip: bool
    limits: Limits
    most_rows = None

    def _spec(self, opened: Opened) -> QuerySpec:
        """The question, with the methods that an explanation takes where the client named none."""
        methods = chosen_methods(
            opened.retriever,
            self.spec.methods if self.own_methods else (),
            spans=self.spec.spans is not None,
            saliency_influence=self.saliency_influence or self.spec.word is not None,
        )
        return QuerySpec.of(self.spec, methods=tuple(methods))

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        resolved(opened, self._spec(opened), rows, n_asked, self.limits)

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """The explanation as plain values."""
        question = question_of(opened, self._spec(opened))
        (row,) = rows
        query: Any = row[0] if len(row) == 1 else row
        found = explain(opened.retriever, query, form=self.form, flip=self.flip, spec=question.spec)
        own = {*_OWN_LINES, *question.spec.methods}
        values = asdict(found)
        values["provenance"] = {name: line for name, line in values["provenance"].items() if name in own}
        values |= {"title": found.title, "summary": found.summary, "formula": found.formula}
        return [Found(question, values)]


@dataclass(frozen=True)
class Describe:
    """The record of a training row, as the explorer shows it; the job's one test row is empty."""

    row: int
    listed: ListedRows | None
    most_rows = None

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        check_live(opened, np.array([self.row]))

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """The record; with the predictions that it drives, of the listed test rows that are explained so far."""
        is_listed = self.listed is not None and self.listed.fits(opened)
        drives, counts = self.listed.drives(opened) if self.listed is not None and is_listed else (Drives(), {})
        (record,) = row_block(opened.retriever, np.array([self.row]), drives, {})
        return [Found(opened.retriever.resolve(QuerySpec()), {**record, **counts})]


@dataclass(frozen=True)
class ExplainListed:
    """The record of a test row that the explorer lists; the job's one test row is empty."""

    number: int
    listed: ListedRows
    most_rows = None

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """The record."""
        return [Found(opened.retriever.resolve(QuerySpec()), self.listed.page(opened, self.number))]


@dataclass(frozen=True)
class Flip:
    """The fewest training rows whose removal, or relabelling, changes a prediction."""

    to: str | None
    relabel: bool
    limit: int | None
    damping: str | None
    limits: Limits
    most_rows = None

    def _spec(self) -> QuerySpec:
        """The question that names its curvature and damping."""
        return QuerySpec(methods=("if",), damping=self.damping)

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """See :class:`~forebear.server.micro_batches.Task`."""
        resolved(opened, self._spec(), rows, n_asked, self.limits)
        most = self.limits.flip_rows
        if n_asked > self.limits.flip_texts:
            raise InputError(f"{n_asked:,} texts for flip sets: this server takes at most {self.limits.flip_texts}.")
        if self.limit is not None and self.limit > most:
            raise InputError(f"--limit {self.limit}: this server changes at most {most:,} training rows.")

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """A flip set for each test row, as ``forebear flip`` writes it to ``result.json``."""
        question = question_of(opened, self._spec())
        most = min(self.limits.flip_rows, opened.index.manifest.n_live // 2)
        found = flip(
            opened.retriever, source_of(rows), to=self.to, relabel=self.relabel,
            limit=most if self.limit is None else self.limit, damping=question.spec.damping, n_queries=0,
        )  # fmt: skip
        sizes = found.result["sizes"]
        return [Found(question, one | {"size": sizes[i]}) for i, one in enumerate(found.result["sets"])]
