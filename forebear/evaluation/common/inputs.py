"""The opened inputs of an audit or evaluation, which its report names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.queries import QueryRows
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an audit or evaluation of test rows is given.

    Attributes:
        retriever: Over the index.
        question: The question, resolved against the index.
        queries: The sampled test rows.
        seed: Random seed of the sample, and of what the evaluation draws.
        command: The command line or the call that repeats it.
    """

    retriever: Retriever
    question: Question
    queries: QueryRows
    seed: int
    command: str

    def provenance(self, residuals: Mapping[str, float] | None = None, **facts: object) -> dict[str, str]:
        """The provenance lines of the report; see :func:`~forebear.evaluation.common.comparisons.provenance`."""
        facts = {"test_rows": self.queries.source, "queries": len(self.queries)} | facts
        return provenance(self.retriever, self.question, self.command, residuals=residuals, **facts)

    def record(self, residuals: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The question as ``result.json`` records it."""
        return question_record(self.retriever, self.question, residuals)
