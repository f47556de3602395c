"""Several scopes and dampings in one evaluation: each method at every setting that makes a difference to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forebear.evaluation.common.comparisons import question_record
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.row_choice import row_scores
from forebear.retriever.answers.coverage import fit_lines
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores

UNDAMPED = ("identity", "lissa")  # lissa has a damping among its own settings


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method, with the scope and the damping at which it is asked.

    Attributes:
        method: Name of the method.
        scope: Scope of the gradients that it compares; None of a method that compares none.
        damping: Damping of its H^-1, as the user writes it; None of a method without one.
    """

    method: str
    scope: str | None
    damping: str | None

    @property
    def name(self) -> str:
        """The setting in one text, such as ``if, top-2, 1%``."""
        return ", ".join(part for part in (self.method, self.scope, self.damping) if part is not None)


@dataclass(frozen=True)
class Settings:
    """The questions of an evaluation: methods of each at one scope and one damping.

    Attributes:
        questions: Each with the settings of its methods, in the same order.
        are_several: Whether several scopes or dampings were asked for, so that a method has several lines.
    """

    questions: tuple[tuple[Question, tuple[Setting, ...]], ...]
    are_several: bool

    @classmethod
    def of(
        cls, retriever: Retriever, question: Question, scopes: Sequence[str] = (), dampings: Sequence[str] = ()
    ) -> Settings:
        """Every method at each scope, and at each damping if it applies H^-1; once where these make no difference.

        Args:
            retriever: Over the index.
            question: The methods and all other choices.
            scopes: Scopes; none: that of the question.
            dampings: Dampings; none: that of the question.

        Raises:
            InputError: A choice that means nothing.
            MissingStoreError: The index does not hold a scope, or what a method compares there.
        """
        places = [
            (scope, damping)
            for scope in dict.fromkeys(scopes or (question.spec.scope,))
            for damping in dict.fromkeys(dampings or (question.spec.damping,))
        ]
        seen: set[Setting] = set()
        questions = []
        for scope, damping in places:
            resolved = retriever.resolve(question, scope=scope, damping=damping, exact="full")
            new = {s: m for m in resolved.methods if (s := _setting(resolved, m)) not in seen}
            seen.update(new)
            if new:
                questions.append((resolved.of(new.values()), tuple(new)))
        return cls(tuple(questions), len(places) > 1)

    def __iter__(self) -> Iterator[Setting]:
        """The settings of all questions."""
        return (setting for _, settings in self.questions for setting in settings)

    def name(self, setting: Setting) -> str:
        """What a setting is called in results: the method alone, where it is asked once."""
        return setting.name if self.are_several else setting.method

    def scores(self, retriever: Retriever, queries: QueryRows) -> Iterator[Scores]:
        """Exact scores of all live rows, ``(q, n)`` by name of the setting, one question after another."""
        for question, settings in self.questions:
            scores = row_scores(retriever, queries, question)
            named = Scores({self.name(setting): scores[setting.method] for setting in settings})
            for setting in settings:
                named.note_residual(self.name(setting), scores.residuals.get(setting.method))
            yield named

    def provenance(self) -> dict[str, str]:
        """Lines of a report that differ from those of one question."""
        if not self.are_several:
            return {}
        questions = [question for question, _ in self.questions]
        ages = [line for question in questions for line in fit_lines(question).values()]
        return {
            "scope": ", ".join(dict.fromkeys(question.spec.scope for question in questions)),
            "damping": ", ".join(dict.fromkeys(s.damping for s in self if s.damping is not None)),
            "question digest": ", ".join(question.digest for question in questions),
            **({"fitted beyond the head": " ".join(dict.fromkeys(ages))} if ages else {}),
        }

    def record(self, retriever: Retriever) -> dict[str, Any]:
        """The settings as ``result.json`` has them, and each question that was asked."""
        settings = [
            {"name": self.name(s), "method": s.method, "scope": s.scope, "damping": s.damping} for s in self
        ]  # fmt: skip
        if not self.are_several:
            return {"settings": settings}
        return {"settings": settings, "questions": [question_record(retriever, q) for q, _ in self.questions]}


def _setting(question: Question, method: Method) -> Setting:
    """The scope and the damping of a question, as far as they make a difference to a method."""
    if method.representation != "head":
        return Setting(method=method.name, scope=None, damping=None)
    scope = question.scope_of(method)
    if method.query != "preconditioned" or question.curvature.at(scope) in UNDAMPED:
        return Setting(method=method.name, scope=scope, damping=None)
    damping = question.spec.damping or f"{question.curvature.facts(question.index, scope)['damping']:.3g}"
    return Setting(method=method.name, scope=scope, damping=damping)
