"""The application: routes, and what becomes of each error; the same object that uvicorn runs and tests call."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import forebear
from forebear.errors import ForebearError, InUseError, ModelError, NotEnoughMemoryError, is_out_of_memory
from forebear.server.http.answers import MEDIA_TYPE, error_line
from forebear.server.http.explorer import explorer_routes
from forebear.server.http.protection import FAULT, LOG, Protected
from forebear.server.http.routes import Service, described, explained, health_routes, index_routes, question_routes
from forebear.server.micro_batches import QueueFullError, StoppedError, TimeRanOutError


def make_app(service: Service, token: str | None = None) -> ASGIApp:
    """The application.

    Args:
        service: What answers; its worker is started and stopped by the caller.
        token: What clients must send as ``Authorization: Bearer``; None: nothing.
    """
    app = FastAPI(
        title="forebear",
        version=forebear.__version__,
        summary="Which training rows made a text classifier predict this?",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    explorer = explorer_routes(
        service.indexes, service.explored, partial(described, service), partial(explained, service)
    )
    for router in (question_routes(service), index_routes(service), health_routes(service), explorer):
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (ForebearError, QueueFullError, StoppedError, TimeRanOutError, MemoryError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(Exception, _on_fault)
    return Protected(app, service.limits, service.measures, token)


def status_of(error: Exception) -> HTTPStatus:
    """The status of an answer that is an error."""
    if isinstance(error, QueueFullError):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, TimeRanOutError):
        return HTTPStatus.GATEWAY_TIMEOUT
    if isinstance(error, StoppedError | NotEnoughMemoryError) or is_out_of_memory(error):
        return HTTPStatus.SERVICE_UNAVAILABLE
    its_own = isinstance(error, ModelError | InUseError) or getattr(error, "exit_code", 1) != 2
    return HTTPStatus.INTERNAL_SERVER_ERROR if its_own else HTTPStatus.UNPROCESSABLE_ENTITY


def _line(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_line(message), status, headers, MEDIA_TYPE)


async def _on_error(_request: Request, error: Exception) -> Response:
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        LOG.error("%s: %s", type(error).__name__, error)
    if isinstance(error, QueueFullError):
        return _line(status, str(error), {"retry-after": str(error.retry_seconds)})
    if isinstance(error, TimeRanOutError):
        return _line(status, "no answer in time, for others asked before. Ask again later.")
    return _line(status, str(error))


async def _on_fault(_request: Request, _error: Exception) -> Response:
    return _line(HTTPStatus.INTERNAL_SERVER_ERROR, FAULT)  # what went wrong is raised on, and logged


async def _on_invalid(_request: Request, error: Exception) -> Response:
    """One line on the first thing that is wrong with a body; what it held is not repeated."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = next((one for one in found if one["type"] not in ("string_type", "list_type")), found[0])  # of a union
    if first["type"] == "json_invalid":
        return _line(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {first.get('ctx', {}).get('error', 'not read')}.")
    place = ".".join(str(part)[:100] for part in first["loc"][1:]) or "body"
    said = "no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return _line(HTTPStatus.UNPROCESSABLE_ENTITY, f"{place}: {said}.")


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        400: "the body is no JSON.",
        404: "no such route; /openapi.json lists them.",
        405: f"not by {request.method}.",
    }
    return _line(error.status_code, said.get(error.status_code, str(error.detail)), dict(error.headers or {}))
