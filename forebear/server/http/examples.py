"""Examples of questions and answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import Body

from forebear.server.http.answers import LINES_TYPE, MEDIA_TYPE

_RESULT = {
    "method": "gc", "side": "proponent", "rank": 1, "row": 317, "score": 0.9981, "exact": True, "label": "positive",
    "prediction": "positive", "text": "a gripping thriller , beautifully acted",
}  # fmt: skip
_TEXTS = ["a gripping , beautifully acted film"]
QUESTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieve": {
        "one text": {"texts": _TEXTS, "methods": ["gc", "if"], "top": 3},
        "pairs of texts": {"texts": [["A man sleeps.", "A person is awake."]], "methods": ["gc"], "top": 3},
        "beyond the head": {"texts": _TEXTS, "methods": ["if"], "scope": "all", "recall": 0.95},
    },
    "score": {"three rows": {"texts": _TEXTS, "methods": ["gc"], "rows": [5, 17, 317]}},
    "explain": {"one text": {"text": _TEXTS[0], "top": 3}},
    "flip": {"one text": {"texts": _TEXTS, "limit": 50}},
}
_HEAD = {"index": "reviews", "digest": "3f0c9a…", "facts": {"methods": {"gc": {"metric": "cos"}}}, "notes": []}
_ANSWERS: dict[str, Any] = {
    "retrieve": {"query": 0, "query_prediction": "positive", "target": "positive", "results": [_RESULT]},
    "score": {"query": 0, "scores": {"gc": [0.12, -0.4, 0.9981]}},
    "explain": {"title": "Why “positive”?", "summary": "The model predicts “positive” with probability 0.991."},
    "flip": {"query": 0, "rows": [317, 21], "before": "positive", "after": "negative", "size": 2},
}
_STATUSES = {
    401: "The token is missing or another one.",
    403: "Reached under a name that is not this machine's, without a token.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The question means nothing, does not fit the index, or asks for more than one request may.",
    429: "Too many requests wait; `Retry-After` says for how many seconds.",
    503: "The server is being stopped, or memory does not suffice.",
    504: "No answer in time.",
}


def body(route: str) -> Any:
    """The body of a route's requests, with its examples."""
    return Body(openapi_examples={name: {"value": value} for name, value in QUESTIONS[route].items()})


def responses(route: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers, by status."""
    answer = _ANSWERS[route]
    whole = _HEAD | ({"rows": [5, 17, 317]} if route == "score" else {}) | {"answers": [answer]}
    error = {MEDIA_TYPE: {"example": {"error": "top=0: expected at least 1."}}}
    found: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answers; or, where the client accepts it, a line a text.",
            "content": {MEDIA_TYPE: {"example": whole}, LINES_TYPE: {"example": answer}},
        }
    }
    return found | {status: {"description": said, "content": error} for status, said in _STATUSES.items()}
