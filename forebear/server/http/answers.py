"""Answers as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa

from forebear.server.micro_batches import Found, Outcome

OF_TEST_ROW = ("query_label", "query_prediction", "target")  # columns that are equal in all results of a test row
MEDIA_TYPE = "application/json"
LINES_TYPE = "application/x-ndjson"


def dumped(value: Any) -> bytes:
    """A value as one line of JSON, which never holds NaN."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def error_line(message: str) -> bytes:
    """An error: one line, and nothing that ends it, or that is no character."""
    return dumped({"error": " ".join(message.encode("utf-8", "replace").decode().split())})


def ranking(found: Found, number: int) -> dict[str, Any]:
    """The results of a test row; columns that only spans, words or the like have are left out where they are empty.

    Args:
        found: A table of results.
        number: Of the test row in its request, from 0.
    """
    table: pa.Table = found.value
    shared = {name: table.column(name)[0].as_py() for name in OF_TEST_ROW if name in table.column_names}
    results = table.drop_columns(["query", *shared]).to_pylist()
    del shared["query_label"]  # texts of a request have none
    return {"query": number, **shared, "results": [_finite(result) for result in results]}


def scores(found: Found, number: int) -> dict[str, Any]:
    """Scores by method, in the order of the training rows."""
    _, by_method = found.value
    return {"query": number, "scores": {name: values.tolist() for name, values in by_method.items()}}


def head_of(outcome: Outcome) -> dict[str, Any]:
    """What stands once before all answers of a request."""
    opened = outcome.opened
    return {"index": opened.name, "digest": opened.digest, "facts": outcome.facts, "notes": list(outcome.notes)}


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays and numbers of numpy, dates."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
