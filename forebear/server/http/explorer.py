"""The explorer at ``/``: its page, and what the page asks of the server besides ``/v1/explain``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response

from forebear.errors import InputError
from forebear.evaluation.explorer.site import PAGE, SCRIPTS, SITE, STYLE, front_end
from forebear.server.explored import Explored
from forebear.server.http.answers import MEDIA_TYPE, dumped
from forebear.server.http.questions import Name
from forebear.server.served_indexes import ServedIndexes
from forebear.server.worklists import WorkLists

OPEN_FILES = ("/", *(f"/{name}" for name in (*SCRIPTS, STYLE, SITE)))  # which hold nothing of any index
IS_SERVED = b"forebear.served = true;\n"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# No page of another site may frame these pages or read what they load.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
Row = Annotated[int, Path(ge=0, le=2**62)]
Record = Callable[[str, int], Awaitable[dict[str, Any]]]  # of a row of an index, by its name


def explorer_routes(indexes: ServedIndexes, explored: Explored, describe: Record, explain: Record) -> APIRouter:
    """``/`` and its files, and ``/explorer``.

    Args:
        indexes: By name.
        explored: Test rows, a site and work lists.
        describe: Gives the record of a training row, from the thread that computes.
        explain: The same of a test row that is listed.
    """
    router = APIRouter(tags=["explorer"])

    def as_json(content: bytes) -> Response:
        return Response(content, media_type=MEDIA_TYPE, headers=_HEADERS)

    def serve_file(path: str, name: str, content: bytes) -> None:
        kind = _TYPES[PurePath(name).suffix]

        @router.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

    for name, content in (front_end() | {SITE: IS_SERVED}).items():
        serve_file("/" if name == PAGE else f"/{name}", name, content)

    @router.get("/explorer/site")
    async def site(index: Name | None = None) -> Response:
        """What the pages say of an index, by default the first, and whether a site of its test rows is served."""
        names = list(indexes)
        return as_json(dumped(explored.facts(indexes.named(index or names[0]).current, names)))

    @router.get("/explorer/records/{kind}/{number}")
    async def records(
        kind: Literal["tests", "predictions", "rows"], number: Row, index: Name | None = None
    ) -> Response:
        """Some records of the test rows, as ``forebear export-site`` writes them."""
        opened = indexes.named(index or next(iter(indexes))).current
        found = await asyncio.to_thread(explored.records, opened, kind, number)
        return as_json(found if isinstance(found, bytes) else dumped(found))

    @router.get("/explorer/tests/{number}")
    async def test(number: Row, index: Name | None = None) -> Response:
        """The page of a test row that is listed; it is explained now."""
        return as_json(dumped(await explain(indexes.named(index).name, number)))

    @router.get("/explorer/rows/{row}")
    async def row(row: Row, index: Name | None = None) -> Response:
        """The record of a live training row."""
        return as_json(dumped(await describe(indexes.named(index).name, row)))

    @router.get("/explorer/worklist")
    async def worklist(index: Name | None = None) -> Response:
        """The training rows that are marked, by number."""
        return as_json(dumped(await asyncio.to_thread(kept().entries, indexes.named(index).name)))

    @router.put("/explorer/worklist/{row}", status_code=204)
    async def put(row: Row, marked: dict[str, Any], index: Name | None = None) -> None:
        """Mark a training row: the columns of a work list, docs/work-lists.md."""
        if marked.get("row") != row:
            raise InputError(f"row {marked.get('row')!r}: expected {row}, as in the path.")
        await asyncio.to_thread(kept().put, indexes.named(index).name, marked)

    @router.delete("/explorer/worklist/{row}", status_code=204)
    async def drop(row: Row, index: Name | None = None) -> None:
        """Take a training row off the list."""
        await asyncio.to_thread(kept().drop, indexes.named(index).name, row)

    def kept() -> WorkLists:
        if explored.worklists is None:
            raise InputError("no work list is kept by this server. Give a folder by --worklists.")
        return explored.worklists

    return router
