"""The explanation of a prediction: the words that speak for it, and the training rows behind it."""

from __future__ import annotations

from dataclasses import dataclass

from forebear.display import framed
from forebear.evaluation.explain.marks import MarkedText, Word
from forebear.evaluation.explain.rendering import render_page
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
from forebear.retriever.question.methods import METHODS
from forebear.retriever.saliency.maps import GRADIENT_X_INPUT, SUMMED_GRADIENT

FORMULAS = {
    GRADIENT_X_INPUT: "-<dL/de_t, e_t> over its L1 norm in the row; summed over the pieces of a word",
    SUMMED_GRADIENT: "sum over dimensions of dS_y/de_t, S_y the target's probability; summed over the pieces of a word",
}


@dataclass(frozen=True, kw_only=True)
class FoundRow:
    """A training row at one end of a method's ranking.

    Attributes:
        rank: Rank in the ranking, from 1.
        row: Training row number.
        score: The score as it is written; larger supports the target.
        label: Gold label of the row.
        prediction: Class that the model predicts for the row.
        loss: Cross-entropy of the gold label in nats.
        texts: Texts of the row. Marked in them are the tokens that it shares with the query, or the ranked span, or
            the words that influence the query's salient word, by ``saliency-if-token``.
        query_texts: The query's texts with the same tokens marked; empty for methods without words.
        words: Shared tokens by falling contribution to the score; added tokens ([CLS], [SEP]) among them.
        total: Sum of the contributions, as it is written; empty for methods without words.
        columns: What the user's columns say of the row: (name, value as it is written), without nulls.
        effect: Predicted change of the target's loss without the row, as it is written; empty where the method
            estimates none.
        effect_probability: The same of the target's probability.
    """

    rank: int
    row: int
    score: str
    label: str
    prediction: str
    loss: float
    texts: tuple[MarkedText, ...]
    query_texts: tuple[MarkedText, ...]
    words: tuple[Word, ...]
    total: str
    columns: tuple[tuple[str, str], ...] = ()
    effect: str = ""
    effect_probability: str = ""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One end of a method's ranking, ``proponent`` or ``opponent``, with notes for its reader."""

    name: str
    rows: tuple[FoundRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The rows that one method finds.

    Attributes:
        method: Name of the method.
        formula: Formula of its score.
        asked: The query's texts with the word or span that is asked about; empty where the whole row is.
        sides: Both ends of the ranking.
        effect_note: What size and sign of the effects mean; empty where the method estimates none.
    """

    method: str
    formula: str
    asked: tuple[MarkedText, ...]
    sides: tuple[Side, ...]
    effect_note: str = ""

    @property
    def has_words(self) -> bool:
        """Whether its scores are sums over shared words."""
        return any(row.total for side in self.sides for row in side.rows)

    @property
    def has_spans(self) -> bool:
        """Whether it ranks spans of rows."""
        return METHODS[self.method].spans is not None if self.method in METHODS else False

    @property
    def of_saliency(self) -> bool:
        """Whether it is about the saliency of one of the query's words."""
        return self.method in METHODS and METHODS[self.method].saliency


@dataclass(frozen=True, kw_only=True)
class ChangedRow:
    """A training row that is taken out to flip the prediction.

    Attributes:
        row: Training row number.
        label: Its label.
        effect: Predicted rise of the predicted label's loss without this row alone, in nats, as it is written.
        texts: Its texts: (column, text).
    """

    row: int
    label: str
    effect: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """The fewest training rows that were found to flip the prediction, in a sentence, and the first of them."""

    summary: str
    rows: tuple[ChangedRow, ...]
    note: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """The explanation of one prediction.

    Attributes:
        texts: The query's texts, marked by saliency.
        words: Words of the query by falling |saliency|.
        ends: Saliency of the start and end tokens together, as it is written; they are no words.
        form: Form of the saliency.
        probabilities: Class, probability, and the probability as it is written; falling.
        prediction: The most probable class; else the labels of a probability above 1/2, or the numbers.
        target: The class, labels or number whose loss is explained.
        answers: One answer for each method.
        provenance: Lines on index, question, methods and versions, and the command to repeat the explanation.
        flip: What would flip the prediction; None where it was not asked.
        problem_type: What the model's targets are. Of several labels ``probabilities`` has each label's own, of numbers
            the numbers.
    """

    texts: tuple[MarkedText, ...]
    words: tuple[Word, ...]
    ends: str
    form: str
    probabilities: tuple[tuple[str, float, str], ...]
    prediction: str
    target: str
    answers: tuple[Answer, ...]
    provenance: dict[str, str]
    flip: Flip | None = None
    problem_type: str = SINGLE_LABEL

    @property
    def are_numbers(self) -> bool:
        """Whether the model gives numbers, no probabilities."""
        return self.problem_type == REGRESSION

    def remark_on(self, name: str) -> str:
        """Whether a class, or one of several labels, is predicted, explained or both; else empty.

        Labels are named together in a text, those that are explained as absent by ``not NAME``.
        """
        predicted, explained = (
            {text, *text.split("; ")} & {name, f"not {name}"} for text in (self.prediction, self.target)
        )
        return ", ".join([*(["predicted"] if name in predicted else []), *(["explained"] if explained else [])])

    @property
    def formula(self) -> str:
        """Formula of the saliency."""
        return FORMULAS[self.form]

    @property
    def title(self) -> str:
        """The question in a few words."""
        return f"Why “{self.target}”?" if self.target == self.prediction else f"What speaks for “{self.target}”?"

    @property
    def summary(self) -> str:
        """The prediction in a sentence, and what is explained if that is another class."""
        if self.problem_type != SINGLE_LABEL:
            explained = "" if self.target == self.prediction else f" Explained here is “{self.target}”."
            return f"The model predicts “{self.prediction}”.{explained}"
        shown = {name: number for name, _, number in self.probabilities}
        said = f"The model predicts “{self.prediction}” with probability {shown[self.prediction]}."
        if self.target == self.prediction:
            return said
        return f"{said} Explained here is “{self.target}”, with probability {shown[self.target]}."

    def __repr__(self) -> str:
        return f"<Explanation {self.title!r}: {self.summary}>"

    def _repr_html_(self) -> str:
        return framed(render_page(self), self.title)
