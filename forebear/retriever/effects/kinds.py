"""Which methods estimate an effect, and to what order: what the scores of a method say in nats, if anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.losses.sigmoid import SigmoidLoss
from forebear.indexer.rows.row_format import REGRESSION
from forebear.retriever.effects.descent import descent_divisor
from forebear.retriever.effects.measured import measured_line
from forebear.retriever.effects.refits import has_newton_steps
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import Question
from forebear.retriever.question.targets import LABEL

Order = Literal["Newton step", "first order"]
NEWTON: Order = "Newton step"
FIRST: Order = "first order"
UNMEASURED = (
    "The size of effects was not measured for this index (forebear evaluate effects --keep does), and beyond the head "
    "it can be many times too large."
)


@dataclass(frozen=True)
class EffectKind:
    """How the effects of a method's results are had.

    Attributes:
        order: By a Newton step of the head, the row's own curvature taken out, and the loss of the changed logits; or
            to first order, a score over the divisor. None: the method estimates no effect.
        note: What size and sign of the changes of the loss mean, in one sentence; or why the method estimates none.
        has_probability: Whether there is a change of the target's probability beside the change of the loss.
        divisor: What a score is divided by, to first order: N; 1 where the score is the effect itself; of TracIn see
            :mod:`~forebear.retriever.effects.descent`.
    """

    order: Order | None
    note: str
    has_probability: bool = False
    divisor: float = 1

    @property
    def meaning(self) -> str:
        """The note of both changes, of the loss and of the probability."""
        return self.note + (" Beside it, the change of the target's probability." if self.has_probability else "")

    def facts(self) -> dict[str, Any]:
        """What stands of it in an answer's provenance."""
        return {"effect": self.order, "effect_note": self.meaning}


def effect_kind(question: Question, method: Method) -> EffectKind:
    """How the effects of a method are had in the answers to a question."""
    if reason := _no_effect(question, method):
        return EffectKind(None, reason)
    loss, scope = question.index.loss, question.scope_of(method)
    preconditioned = method.query == "preconditioned"
    exact_head = scope == "head" and not method.spans and question.curvature.at("head") == "exact"
    if exact_head and preconditioned and has_newton_steps(question.index):
        order, has_probability = NEWTON, loss.problem_type != REGRESSION
    else:
        # The probability follows from the loss alone if this is -w log p, of one test row.
        single = isinstance(loss, SigmoidLoss) and question.spec.target.lower().startswith(LABEL)
        follows = single or (isinstance(loss, CrossEntropy) and not loss.label_smoothing)
        order, has_probability = FIRST, follows and method.spans != "both" and not question.spec.aggregate
    meaning = _meaning(question, method, order)
    divisor: float = question.index.manifest.n_live if preconditioned else 1
    if method.adds_up_steps:
        divisor, _ = descent_divisor(question.index)
    return EffectKind(order, meaning, has_probability, divisor)


def effect_meanings(question: Question, *, of_loss_alone: bool = False) -> dict[str, str]:
    """What the effects of each method mean, and how true they were found to be; empty where it estimates none.

    Args:
        question: The question.
        of_loss_alone: Whether changes of the probability are not shown.
    """
    meanings = {}
    for method in question.methods:
        kind = effect_kind(question, method)
        meaning = kind.note if of_loss_alone else kind.meaning
        parts = [] if kind.order is None else [meaning, effect_size(question, method, kind)]
        meanings[method.name] = " ".join(filter(None, parts))
    return meanings


def effect_size(question: Question, method: Method, kind: EffectKind) -> str:
    """How true the sizes of a method's effects were found to be, or that nobody measured what may be far off.

    Empty where the method estimates no effect, and where nobody measured effects at the head.
    """
    if kind.order is None:
        return ""
    beyond = question.scope_of(method) != "head" and method.query == "preconditioned"
    return measured_line(question, method) or (UNMEASURED if beyond else "")


def effect_meaning(facts: Mapping[str, Any]) -> str:
    """The same from the facts of a method that stand in an answer's provenance; older ones have none."""
    if not facts.get("effect"):
        return ""
    return " ".join(filter(None, [facts["effect_note"], facts.get("effect_measured", "")]))


def _no_effect(question: Question, method: Method) -> str:
    """Why a method estimates no effect; empty where it does."""
    if method.through_run:
        return ""
    if method.saliency:
        return "no effect: its score is of a word's saliency, not of the loss"
    if method.adds_up_steps:
        _, reason = descent_divisor(question.index)
        return reason and f"no effect: {reason}"
    if method.query != "preconditioned":
        return "no effect: its score does not estimate what a model trained without the row would say"
    if method.metric != "dot":
        return "no effect: a cosine has no size"
    if question.curvature.at(question.scope_of(method)) == "identity":
        return "no effect: without a curvature the score has no size"
    return ""


def _meaning(question: Question, method: Method, order: Order) -> str:
    """What size and sign of a method's changes of the loss mean, in one sentence."""
    loss, spec = question.index.loss, question.spec
    output_itself = loss.problem_type == REGRESSION and spec.target != "gold"
    unit = "nats" if loss.problem_type != REGRESSION else "units" if output_itself else "squared units"
    of_sum = ", summed over the test rows" if spec.aggregate else ""
    what = "fall of the output" if output_itself else "rise of the target's loss"
    if method.spans == "both":
        what += " beyond that of the text without its span"
    removal = "with the span masked" if method.spans else "without it"
    first_order = "the same run, first order: the score" if method.through_run else "first order: score / N"
    if method.adds_up_steps:
        first_order = f"its own steps left out, by the weights of scope {question.scope_of(method)} alone, first order"
    how = "the head fitted again" if order == NEWTON else first_order
    sign = "below 0 it rises" if output_itself else "below 0 it falls, so that the target gains"
    return f"effect: predicted {what} in {unit}{of_sum}, trained {removal} ({how}); {sign}."
