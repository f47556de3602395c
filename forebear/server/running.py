"""The process: indexes opened, the socket bound, uvicorn run until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from forebear.errors import InputError
from forebear.progress import Tell
from forebear.server.explored import Explored, ExportedSite
from forebear.server.http.app import make_app
from forebear.server.http.protection import LOG, is_loopback
from forebear.server.http.routes import Service
from forebear.server.limits import Limits
from forebear.server.listed_rows import ListedRows, Listing
from forebear.server.measures import Measures
from forebear.server.micro_batches import Worker
from forebear.server.served_indexes import ServedIndex, ServedIndexes, names_of
from forebear.server.worklists import WorkLists

TOKEN = "FOREBEAR_TOKEN"  # environment variable: the token, where no file holds it
TOKEN_CHARACTERS = 16
HEAD_BYTES = 32 << 10  # of a request: its first line and its headers
KEEP_ALIVE_SECONDS = 10


def token_of(path: str | None) -> str | None:
    """The token that clients must send: of a file, else of the environment; None: there is none.

    Raises:
        InputError: It is too short to be a secret, or holds what no header may.
    """
    if path is None:
        token, where = os.environ.get(TOKEN), f"the environment variable {TOKEN}"
    else:
        where = path
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
            open_to_all = Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {path}: cannot be read ({error}).") from error
        if open_to_all:
            raise InputError(f"--token-file {path}: others may read it. Make it yours alone: chmod 600 {path}.")
    if token is None:
        return None
    if len(token) < TOKEN_CHARACTERS or not all("!" <= character <= "~" for character in token):
        raise InputError(
            f"{where}: expected a token of at least {TOKEN_CHARACTERS} letters, digits or signs of ASCII, without "
            "spaces. `openssl rand -hex 32` makes one."
        )
    return token


def check_place(host: str, token: str | None) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        InputError: As said.
    """
    if token is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: whoever reaches it could ask the index. Give a token by --token-file or the variable "
            f"{TOKEN}, or leave --host out, to serve this machine alone."
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before models are loaded; it listens later.

    Raises:
        InputError: The port is in use, or the address not of this machine.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with ExitStack() as until_bound:
            bound = until_bound.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            until_bound.pop_all()
    except OSError as error:
        raise InputError(
            f"cannot serve at {host}, port {port} ({error.strerror or error}). Give another --port (0: any that is "
            "free) or --host."
        ) from error
    return bound


class PatientProtocol(H11Protocol):
    """HTTP as uvicorn speaks it, for clients that may be slow or gone.

    A connection on which no whole head of a request comes is closed, and one whose client does not read the end of an
    answer is dropped; uvicorn waits for both without end.
    """

    limits: Limits
    _waits_for_head: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    @override
    def data_received(self, data: bytes) -> None:
        """Take what has come, and wait on where it is not yet a request."""
        super().data_received(data)
        self._wait_for_head()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._waits_for_head is not None:
            self._waits_for_head.cancel()

    @override
    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is not used; what its client does not read of the last answer is dropped in time."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.limits.request_seconds, self.transport.abort)

    def _wait_for_head(self) -> None:
        at_work = self.cycle is not None and not self.cycle.response_complete
        if at_work:
            if self._waits_for_head is not None:
                self._waits_for_head.cancel()
                self._waits_for_head = None
        elif self._waits_for_head is None:
            self._waits_for_head = self.loop.call_later(self.limits.body_seconds, self._give_up)

    def _give_up(self) -> None:
        self._waits_for_head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def open_indexes(given: Sequence[str], *, model: str | None = None, device: str = "auto") -> ServedIndexes:
    """Open indexes and load their models.

    Args:
        given: ``FOLDER`` or ``NAME=FOLDER`` of each.
        model: Where the model is, if it has moved; for one index.
        device: On which models run.

    Raises:
        ForebearError: One cannot be opened, or its model is not there.
    """
    if model is not None and len(given) > 1:
        raise InputError("--model is for one index; several are served here, each with the model that it was built of.")
    folders = names_of(given)
    return ServedIndexes([ServedIndex(name, path, model=model, device=device) for name, path in folders.items()])


def server_of(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """Uvicorn over an application, within the limits of connections and time."""
    config = uvicorn.Config(
        app,
        http=type("LimitedProtocol", (PatientProtocol,), {"limits": limits}),
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.CRITICAL,  # what goes wrong is in the log of this package
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(limits.shutdown_seconds),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    return uvicorn.Server(config)


def serve(
    given: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    model: str | None = None,
    device: str = "auto",
    log_requests: bool = True,
    log_texts: bool = False,
    site: str | None = None,
    listing: Listing | None = None,
    worklists: str | None = None,
    tell: Tell,
) -> None:
    """Serve indexes until the process is told to stop by SIGTERM or Ctrl-C; requests that run then are answered.

    Args:
        given: ``FOLDER`` or ``NAME=FOLDER`` of each.
        host: Address to listen at.
        port: Port; 0: one that is free.
        token: What clients must send.
        limits: Of a request.
        model: Where the model is, if it has moved; for one index.
        device: On which models run.
        log_requests: Whether the log has a line for each request; else for faults alone.
        log_texts: Whether these lines have the texts of requests.
        site: Folder of ``forebear export-site`` that the explorer shows.
        listing: Test rows that it lists.
        worklists: Folder in which the explorer's work lists are kept; None: each browser keeps its own.
        tell: Called with the line that says where it listens.

    Raises:
        ForebearError: Before anything is served: a limit, place, index or model is wrong.
    """
    limits = limits or Limits()
    limits.check()
    check_place(host, token)
    names = list(names_of(given))
    if listing is not None:
        listing.place(names)
    level = logging.INFO if log_requests else logging.WARNING
    with _logged_to_stderr(level), bound_socket(host, port) as bound:
        indexes, measures = open_indexes(given, model=model, device=device), Measures()
        explored = explored_of(indexes, limits, site=site, listing=listing, worklists=worklists)
        worker = Worker(indexes, limits, measures, explored.go_on)
        service = Service(indexes, worker, limits, measures, log_texts, explored)
        _serve_at(bound, host, service, token, tell)


def explored_of(
    indexes: ServedIndexes, limits: Limits, *, site: str | None, listing: Listing | None, worklists: str | None
) -> Explored:
    """What the explorer shows besides what it asks.

    Raises:
        InputError: The site is of none of the indexes, or of the one whose test rows are listed; or a work list cannot
            be read.
        MismatchError: The audit whose work list is opened is of another index.
        ForebearError: Test rows cannot be read, or do not fit the index.
    """
    digests = {one.current.digest: name for name, one in indexes.items()}
    opened = None if site is None else ExportedSite.open(Path(site), list(digests))
    if (
        opened is not None
        and listing is not None
        and digests[opened.facts["digest"]] == listing.place(list(indexes))[0]
    ):
        raise InputError("--site and --test: both list test rows of one index. Give one of the two.")
    by_name = {name: one.current.digest for name, one in indexes.items()}
    kept = None if worklists is None else WorkLists(Path(worklists), by_name)
    return Explored(opened, None if listing is None else ListedRows(listing, indexes, limits), kept)


def _serve_at(bound: socket.socket, host: str, service: Service, token: str | None, tell: Tell) -> None:
    """Serve open indexes at a socket until the process is told to stop."""
    indexes, worker, limits = service.indexes, service.worker, service.limits
    server = server_of(make_app(service, token), limits)

    def stop(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    worker.start()
    shown = f"[{host}]" if ":" in host else host
    tell(f"serving {', '.join(indexes)} at http://{shown}:{bound.getsockname()[1]} (Ctrl-C stops)")
    try:
        # In a context of its own: messages name options as Python does, which are the fields of a request.
        Context().run(server.run, sockets=[bound])
    finally:
        ended = worker.stop(limits.shutdown_seconds)
        for number, handler in before.items():
            signal.signal(number, handler)
    tell("stopped.")
    if not ended:
        os._exit(0)  # a batch that nobody waits for any more: torch cannot be interrupted, and must not hold the end


@contextmanager
def _logged_to_stderr(level: int) -> Iterator[None]:
    """Write the log to stderr as long as the server runs, unless the caller has it written elsewhere."""
    before = LOG.level, LOG.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    is_ours = not LOG.handlers
    LOG.setLevel(level)
    if is_ours:
        LOG.addHandler(handler)
        LOG.propagate = False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before[0])
        LOG.propagate = before[1]
