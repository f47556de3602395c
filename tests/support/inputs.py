"""Inputs of a report, without the functions for Python callers that open them."""

from __future__ import annotations

from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever


def inputs_of(retriever: Retriever, queries: QueryRows, spec: QuerySpec) -> Inputs:
    """What a question of some test rows gives to a report; the seed is 0."""
    return Inputs(retriever=retriever, question=retriever.resolve(spec), queries=queries, seed=0, command="forebear")
