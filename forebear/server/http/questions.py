"""What clients may send: the fields of a question that can neither open a file nor name a model.

Of the choices of :class:`~forebear.QuerySpec` those are left out that a client has no use for (``aggregate``,
``span_column``), that would hold the server (``curvature_rows``, ``lissa``, ``astra``, ``tolerance``), or whose values
can name files (``spans`` of a function or a reader: the spans of the index itself are used, or one of four kinds).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from forebear.retriever.question.spec import QuerySpec

Name = Annotated[str, Field(max_length=200)]
SpanKind = Literal["clauses", "sentences", "words", "aspect"]
Text = str | Annotated[list[str], Field(min_length=1, max_length=2)]
Texts = Annotated[
    list[Text],
    Field(min_length=1, max_length=100_000, description="Test rows: a text, or [text, text] for an index of pairs."),
]
NOT_OF_QUESTIONS = frozenset({"index", "texts", "text", "rows", "form", "saliency_influence", "flip"})


def row_of(text: Text) -> tuple[str, ...]:
    """A test row as the library has it: one text a text column."""
    return (text,) if isinstance(text, str) else tuple(text)


class Asked(BaseModel):
    """What every question has: the index it is about. Other fields than those declared are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    index: Name | None = Field(None, description="Name of the index; may be left out where one is served.")


class Scored(Asked):
    """The choices that decide a score."""

    methods: Annotated[list[Name], Field(min_length=1, max_length=100)] = ["gc"]
    target: Name = Field("predicted", description="predicted, or the name of a label.")
    scope: Name = "head"
    normalise: bool = False
    curvature: Name | None = None
    damping: Name | None = None

    def spec(self) -> QuerySpec:
        """The question as the library has it."""
        given: dict[str, Any] = self.model_dump(exclude_unset=True, exclude=set(NOT_OF_QUESTIONS))
        return QuerySpec.of(**given)


class Ranked(Scored):
    """The choices that decide a ranking."""

    top: Annotated[int, Field(le=1_000_000)] = 10
    exact: Name = "rerank"
    recall: float = 0.98
    candidates: Annotated[int, Field(le=1_000_000_000)] | None = None
    spans: SpanKind | None = None
    query_spans: SpanKind | None = None
    word: Name | None = None


class RetrieveQuestion(Ranked):
    """Which training rows support and oppose the predictions for these texts?"""

    texts: Texts
    certify: bool = False


class ScoreQuestion(Scored):
    """How do given training rows score for these texts?"""

    texts: Texts
    rows: Annotated[list[Annotated[int, Field(ge=0, le=2**62)]], Field(min_length=1, max_length=1_000_000)] | None = (
        Field(None, description="Training rows by number; all that are live where none are given.")
    )


class ExplainQuestion(Ranked):
    """Why this prediction? Salient words, the rows for and against it, the words that they share."""

    text: Text
    top: Annotated[int, Field(le=1_000_000)] = 5
    form: Name = "gradient-x-input"
    saliency_influence: bool = False
    flip: bool = False


class FlipQuestion(Asked):
    """Which fewest training rows, taken out or relabelled, change these predictions?"""

    texts: Texts
    to: Name | None = Field(None, description="The label to be predicted; any other than now where none is given.")
    relabel: bool = False
    limit: Annotated[int, Field(le=1_000_000_000)] | None = None
    damping: Name | None = None
