"""The routes: questions, the indexes and methods, health and measures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from forebear.errors import InputError
from forebear.retriever.question.methods import METHODS
from forebear.server.explored import Explored
from forebear.server.http import answers, examples
from forebear.server.http.answers import LINES_TYPE, MEDIA_TYPE, dumped
from forebear.server.http.questions import (
    Asked,
    ExplainQuestion,
    FlipQuestion,
    RetrieveQuestion,
    ScoreQuestion,
    row_of,
)
from forebear.server.limits import Limits, Rows
from forebear.server.measures import Measures
from forebear.server.micro_batches import Job, Outcome, Task, Worker
from forebear.server.served_indexes import ServedIndexes
from forebear.server.tasks import Describe, Explain, ExplainListed, Flip, Retrieve, Score

Shown = Callable[[Any, int], dict[str, Any]]  # what was found for a test row and the row's number, as JSON has it


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    Attributes:
        indexes: By name.
        worker: Computes.
        limits: Of a request.
        measures: What ``/metrics`` says.
        log_texts: Whether the log has the texts of requests.
        explored: What the explorer shows besides what it asks.
    """

    indexes: ServedIndexes
    worker: Worker
    limits: Limits
    measures: Measures
    log_texts: bool = False
    explored: Explored = field(default_factory=Explored)


def question_routes(service: Service) -> APIRouter:
    """``/v1/retrieve``, ``/v1/explain``, ``/v1/flip`` and ``/v1/score``."""
    router = APIRouter(prefix="/v1", tags=["questions"])
    limits = service.limits

    @router.post("/retrieve", response_class=Response, responses=examples.responses("retrieve"))
    async def retrieve(request: Request, asked: Annotated[RetrieveQuestion, examples.body("retrieve")]) -> Response:
        """The training rows at both ends of each text's ranking; columns of results as docs/answers.md lists them."""
        rows = [row_of(text) for text in asked.texts]
        return await _answered(service, request, asked, Retrieve(asked.spec(), limits), rows, answers.ranking)

    @router.post("/score", response_class=Response, responses=examples.responses("score"))
    async def score(request: Request, asked: Annotated[ScoreQuestion, examples.body("score")]) -> Response:
        """Exact scores of training rows, larger = proponent, in the order of ``rows``."""
        rows = [row_of(text) for text in asked.texts]
        wanted = None if asked.rows is None else tuple(sorted(set(asked.rows)))
        task = Score(asked.spec(), wanted, limits)
        return await _answered(service, request, asked, task, rows, answers.scores, "rows")

    @router.post("/explain", response_class=Response, responses=examples.responses("explain"))
    async def explain(request: Request, asked: Annotated[ExplainQuestion, examples.body("explain")]) -> Response:
        """One prediction: salient words, training rows for and against it, shared words."""
        task = Explain(
            asked.spec(), "methods" in asked.model_fields_set, asked.form, asked.saliency_influence, asked.flip, limits
        )
        return await _answered(service, request, asked, task, [row_of(asked.text)], lambda found, _: found.value)

    @router.post("/flip", response_class=Response, responses=examples.responses("flip"))
    async def flip(request: Request, asked: Annotated[FlipQuestion, examples.body("flip")]) -> Response:
        """The fewest training rows that change each prediction; ``size`` is null where none of at most ``limit`` do."""
        task = Flip(asked.to, asked.relabel, asked.limit, asked.damping, limits)
        rows = [row_of(text) for text in asked.texts]
        return await _answered(service, request, asked, task, rows, lambda found, i: {"query": i, **found.value})

    return router


async def described(service: Service, name: str, row: int) -> dict[str, Any]:
    """The record of a training row."""
    return await _recorded(service, name, Describe(row, service.explored.listed))


async def explained(service: Service, name: str, number: int) -> dict[str, Any]:
    """The record of a test row that is listed."""
    if service.explored.listed is None:
        raise InputError("no test rows are listed. Give a file of them by --test.")
    return await _recorded(service, name, ExplainListed(number, service.explored.listed))


async def _recorded(service: Service, name: str, task: Task) -> dict[str, Any]:
    outcome = await anext(_parts(service, name, task, [("",)]))
    record: dict[str, Any] = outcome.answers[0].value
    return record


def index_routes(service: Service) -> APIRouter:
    """``/v1/indexes`` and ``/v1/methods``."""
    router = APIRouter(prefix="/v1", tags=["indexes"])

    @router.get("/indexes")
    async def indexes() -> dict[str, Any]:
        """The indexes that are served; ``problem`` says why what is on disk now cannot be opened, where it cannot."""
        return {"indexes": [one.current.summary | {"problem": one.problem} for one in service.indexes.values()]}

    @router.get("/methods")
    async def methods() -> dict[str, Any]:
        """The methods, what a score of each is, and the indexes that answer it."""
        able = {name: set(one.current.methods) for name, one in service.indexes.items()}
        return {
            "methods": [
                {
                    "name": m.name, "formula": m.formula, "sign": m.sign, "source": m.source,
                    "indexes": [name for name, known in able.items() if m.name in known],
                }
                for m in METHODS.values()
            ]
        }  # fmt: skip

    return router


def health_routes(service: Service) -> APIRouter:
    """Health as the Open Inference Protocol has it, and ``/metrics``."""
    router = APIRouter(tags=["health"])

    @router.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server runs."""
        return {"live": True}

    @router.get("/v2/health/ready", responses={503: {"description": "Questions are not answered now."}})
    async def ready(response: Response) -> dict[str, bool]:
        """Whether questions are answered."""
        if not service.worker.is_ready:
            response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return {"ready": service.worker.is_ready}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.measures.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _answered(
    service: Service, request: Request, asked: Asked, task: Task, rows: Rows, shown: Shown, beside: str | None = None
) -> Response:
    """Answer a request: as one JSON object, or a line a test row where the client accepts lines.

    Args:
        service: What answers.
        request: The request.
        asked: Its body.
        task: What is computed.
        rows: The test rows.
        shown: What was found for a test row as JSON.
        beside: Name under which the first part of what was found stands beside all answers; None: there is none.
    """
    service.limits.check_rows(rows)
    served = service.indexes.named(asked.index)
    note = f" index={served.name} texts={len(rows)}"
    request.state.asked = note + (f" {json.dumps(asked.model_dump(), allow_nan=False)}" if service.log_texts else "")
    parts = _parts(service, served.name, task, rows)
    first = await anext(parts)
    headers = {"x-forebear-index": first.opened.name, "x-forebear-digest": first.opened.digest}
    if LINES_TYPE in request.headers.get("accept", ""):
        return StreamingResponse(_lines(first, parts, shown), media_type=LINES_TYPE, headers=headers)
    found = [first] + [part async for part in parts]
    body = await asyncio.to_thread(_object, found, shown, beside)
    return Response(body, media_type=MEDIA_TYPE, headers=headers)


async def _parts(service: Service, name: str, task: Task, rows: Rows) -> AsyncIterator[Outcome]:
    """The answers to a request, a batch of its test rows at a time, all from the index as it was for the first.

    The next part is asked for when this one is sent: a client that reads slowly holds one part.
    """
    size, opened = task.most_rows or len(rows), None
    deadline = time.monotonic() + service.limits.request_seconds
    for start in range(0, len(rows), size):
        job = Job(service.indexes[name], task, rows[start : start + size], len(rows), deadline, opened)
        service.worker.submit(job)
        try:
            outcome = await asyncio.wrap_future(job.outcome)
        finally:
            job.outcome.cancel()  # of a client that has hung up: what is not yet computed need not be
        opened = outcome.opened
        yield outcome


def _object(found: Sequence[Outcome], shown: Shown, beside: str | None) -> bytes:
    all_found = [one for outcome in found for one in outcome.answers]
    head = answers.head_of(found[0])
    if beside is not None:
        head[beside] = all_found[0].value[0].tolist()
    return dumped(head | {"answers": [shown(one, number) for number, one in enumerate(all_found)]})


async def _lines(first: Outcome, parts: AsyncIterator[Outcome], shown: Shown) -> AsyncIterator[bytes]:
    """A line a test row, as they are computed; an error after the first of them is the last line."""

    def lines(outcome: Outcome, start: int) -> bytes:
        return b"".join(dumped(shown(one, start + i)) + b"\n" for i, one in enumerate(outcome.answers))

    outcome: Outcome | None = first
    n_sent = 0
    while outcome is not None:
        yield await asyncio.to_thread(lines, outcome, n_sent)
        n_sent += len(outcome.answers)
        try:
            outcome = await anext(parts, None)
        except Exception as error:
            yield answers.error_line(str(error)) + b"\n"
            if not isinstance(error, InputError):
                raise
            return
