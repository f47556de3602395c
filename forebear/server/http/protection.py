"""What stands before every route: who may ask, how much a request may send, how long it may take.

A request's body is read here, as a whole, before the routes see it: it is bounded in bytes, announced or not, and in
seconds, so that a client that sends slowly holds nothing but its connection. While the answer is made, the connection
is watched: a client that hangs up has its work dropped.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
import traceback
from dataclasses import dataclass, field
from http import HTTPStatus

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebear.server.http.answers import MEDIA_TYPE, error_line
from forebear.server.http.explorer import OPEN_FILES
from forebear.server.limits import Limits
from forebear.server.measures import Measures

LOG = logging.getLogger("forebear.server")
# For probes and for browsers that open a page, which have no token yet and learn nothing.
OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready", *OPEN_FILES)
FAULT = "the server could not answer; its log says why."
DISCARDED_BYTES = 64 << 20  # of a body that is too large, so that its sender reads why it was refused


class RefusedError(Exception):
    """A request that is refused before any route sees it.

    Attributes:
        status: Of the answer.
        headers: Of the answer, besides its type and length.
    """

    def __init__(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclass
class _Exchange:
    """How far one request has come."""

    scope: Scope
    send: Send
    status: int = 0
    is_whole: bool = False  # whether all of the answer is sent
    gone: anyio.Event = field(default_factory=anyio.Event)
    started: float = field(default_factory=time.perf_counter)

    async def pass_on(self, message: Message) -> None:
        """Send a message of the answer, and note its status."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def refuse(self, refused: RefusedError) -> None:
        """Answer with one line, and close the connection: what it has not sent is not waited for."""
        self.status = refused.status
        body = error_line(str(refused))
        headers = [
            (b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"), *refused.headers,
        ]  # fmt: skip
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


class Protected:
    """An application behind the server's limits, token, log and measures."""

    def __init__(self, app: ASGIApp, limits: Limits, measures: Measures, token: str | None) -> None:
        """Wrap an application.

        Args:
            app: The routes.
            limits: Of a request.
            measures: Where requests are counted.
            token: What clients must send; None: everybody may ask who reaches the server on the loopback interface.
        """
        self._app = app
        self._limits = limits
        self._measures = measures
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; see the class."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, send)
        try:
            await self._exchange(exchange, receive)
        finally:
            self._note(exchange)

    async def _exchange(self, exchange: _Exchange, receive: Receive) -> None:
        limits = self._limits
        try:
            self._check_sender(exchange.scope)
            body = await read_body(exchange.scope, receive, limits)
            if body is None:
                return
            with anyio.move_on_after(limits.request_seconds) as time_left:
                await self._answer(exchange, body, receive)
            if time_left.cancelled_caught and not exchange.gone.is_set():
                seconds = f"{limits.request_seconds:g}"
                raise RefusedError(HTTPStatus.GATEWAY_TIMEOUT, f"no answer within {seconds} s. Ask for less at a time.")
        except RefusedError as refused:
            if exchange.status:  # a part of the answer is sent: its end must not look like its end
                raise ConnectionAbortedError from None
            await exchange.refuse(refused)

    async def _answer(self, exchange: _Exchange, body: bytes, receive: Receive) -> None:
        """Run the routes, and stop them when the client hangs up."""
        sent = False

        async def again() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await exchange.gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            exchange.gone.set()
            group.cancel_scope.cancel()

        failed: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await self._app(exchange.scope, again, exchange.pass_on)
            except Exception as error:
                failed = error
            group.cancel_scope.cancel()
        if failed is not None:
            where = "".join(traceback.format_tb(failed.__traceback__))  # without the message, which may hold a text
            LOG.error("%s in %s\n%s", type(failed).__name__, _route(exchange.scope), where)
            if not (exchange.is_whole or exchange.gone.is_set()):
                raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, FAULT)

    def _check_sender(self, scope: Scope) -> None:
        """Refuse who may not ask.

        Without a token everybody on this machine may; but not the pages of other sites in a browser on it, which reach
        the server under a name of their own.

        Raises:
            RefusedError: With status 401 or 403.
        """
        headers = dict(scope["headers"])
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name.lower()):
                raise RefusedError(
                    HTTPStatus.FORBIDDEN,
                    "Host: expected localhost or a loopback address; a server under other names needs a token.",
                )
        elif scope["path"] not in OPEN_TO_ALL:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self._token) and kind.lower() == b"bearer"):
                raise RefusedError(
                    HTTPStatus.UNAUTHORIZED,
                    "expected the header Authorization: Bearer TOKEN, with this server's token.",
                    (b"www-authenticate", b"Bearer"),
                )

    def _note(self, exchange: _Exchange) -> None:
        """Count a request, and write its line to the log: nothing in it is a client's text."""
        route, seconds = _route(exchange.scope), time.perf_counter() - exchange.started
        method = exchange.scope["method"] if exchange.scope["method"] in ("GET", "POST", "PUT", "DELETE") else "other"
        status = str(exchange.status or "hung up")
        self._measures.requests.labels(route, status).inc()
        self._measures.seconds.labels(route).observe(seconds)
        asked = exchange.scope.get("state", {}).get("asked", "")
        LOG.info("%s %s %s %.0f ms%s", method, route, status, 1000 * seconds, asked)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as nobody else can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes | None:
    """The whole body of a request; None where the client hung up.

    Raises:
        RefusedError: It is larger than the limit (413), or did not arrive in time (408).
    """
    length = dict(scope["headers"]).get(b"content-length", b"0")
    announced = int(length[:18]) if length.isdigit() else 0  # h11 refuses what is no number
    parts, n_bytes = list[bytes](), 0
    with anyio.move_on_after(limits.body_seconds) as time_left:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            n_bytes += len(message.get("body", b""))
            if n_bytes <= limits.body_bytes:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
            if not message.get("more_body", False) or n_bytes > DISCARDED_BYTES or announced > DISCARDED_BYTES:
                break
    if n_bytes > limits.body_bytes or announced > limits.body_bytes:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {limits.body_bytes:,} bytes. Ask in several requests.",
        )
    if time_left.cancelled_caught:
        raise RefusedError(
            HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {limits.body_seconds:g} s. Send it at once."
        )
    return b"".join(parts)


def _route(scope: Scope) -> str:
    """The route that a request took, as it was declared; ``other`` for none."""
    return getattr(scope.get("route"), "path", "other")
