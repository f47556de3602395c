"""The share of reference queries that a row came up for in ``audit hubs``, beside each result of a search.

A proponent that came up for most reference queries explains none of them in particular.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from forebear.errors import InputError, MismatchError
from forebear.retriever.answers.results import SIDES
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever

COLUMN = "hub_share"
# Facts that do not change what is counted.
_HOW_FOUND = ("recall", "recall_note", "candidates", "stops_early", "certify", "sign")
Shares = dict[str, dict[int, float]]


def read_hub_shares(folder: Path, retriever: Retriever, question: Question) -> Shares:
    """Shares of rows by method, from the folder that ``audit hubs --out`` wrote; rows that never came up are left out.

    Raises:
        InputError: The folder holds no audit of hubs.
        MismatchError: The audit is of another index, or a method was audited at another scope or curvature than the
            question's.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        counts, n_queries, audited = result["counts"], int(result["n_queries"]), result["question"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no audit of hubs. Give a folder of `forebear audit hubs --out`.") from error
    if audited["index_digest"] != retriever.index.manifest.digest():
        raise MismatchError(
            f"{folder} is an audit of another index, {audited['index']}, or of this one before a change."
        )
    asked_facts = retriever.facts(question)["methods"]
    for name in question.spec.methods:
        if name not in counts or _facts(audited["methods"][name]) != _facts(asked_facts[name]):
            raise MismatchError(
                f"{folder} audits {', '.join(counts)} at scope {audited['spec']['scope']}; {name} is asked for at "
                f"scope {question.spec.scope}, or with another curvature. Audit it likewise."
            )
    return {
        name: {int(row): count / n_queries for row, count in counts[name].items()} for name in question.spec.methods
    }


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _HOW_FOUND}


def with_hub_share(table: pa.Table, shares: Shares) -> pa.Table:
    """Results with a last column ``hub_share``; null for opponents, of which the audit counts none."""
    lines = zip(*(table.column(name).to_pylist() for name in ("method", "side", "row")), strict=True)
    values = [shares[method].get(row, 0.0) if side == SIDES[0] else None for method, side, row in lines]
    return table.append_column(COLUMN, pa.array(values, pa.float64()))
