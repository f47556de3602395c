"""``forebear serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from forebear.cli.options.groups import Options, Shown, grouped, values_of
from forebear.cli.options.model import Device, MovedModel
from forebear.cli.options.question import Methods, Top
from forebear.cli.options.report import Hubs, Quiet
from forebear.cli.options.rows import MaybeTestOptions
from forebear.cli.screen.console import Command, listed, progress_bar, say
from forebear.errors import InputError

HELP = """Answer questions over HTTP: one process holds indexes and models open, and many clients ask at once.

Requests that ask the same at the same time are computed together. An index that is appended to or retired from is
opened anew, without a restart. At / is the explorer, for browsers, which lists the rows of --test. docs/server.md has
the routes, limits and measures.

Examples:

    forebear serve my-index

    forebear serve reviews=runs/sst2-index nli=runs/nli-index --port 8080

    forebear serve my-index --test dev.csv --worklists runs/marked

    forebear serve reviews=runs/sst2-index nli=runs/nli-index --test nli=dev.tsv --method gc,if

    forebear serve my-index --site runs/site

    forebear serve my-index --host 0.0.0.0 --token-file token.txt --model-texts 0
"""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options, panel="Place"):
    """Where it listens, and to whom."""

    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; any but this machine's own needs a token.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="Port; 0: any that is free.", min=0, max=65535)] = 8000
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file",
            help="File with the token that clients must send.",
            show_default="the variable FOREBEAR_TOKEN, else none",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LimitOptions(Options, panel="Limits"):
    """What one request may ask for."""

    texts: Annotated[int, typer.Option("--max-texts", help="Texts of a request.")] = 256
    model_texts: Annotated[
        int,
        typer.Option(
            "--model-texts",
            help="Texts of a request whose methods run the model over training rows (scopes beyond the head, spans, "
            "saliency); 0 refuses these methods.",
        ),
    ] = 8
    queue: Annotated[int, typer.Option("--queue", help="Requests that wait for an index; one more gets 429.")] = 256
    batch_texts: Annotated[
        int, typer.Option("--batch-texts", help="Texts that are computed together, of several requests.")
    ] = 64
    request_seconds: Annotated[
        float, typer.Option("--request-seconds", help="Time of a request; one that takes longer gets 504.")
    ] = 60.0


@dataclass(frozen=True, kw_only=True)
class ExplorerOptions(Options, panel="Explorer"):
    """What the explorer shows, and keeps."""

    site: Annotated[
        str | None,
        typer.Option(
            "--site", help="Folder of `forebear export-site`, whose test rows the explorer lists.", show_default=False
        ),
    ] = None
    worklists: Annotated[
        str | None,
        typer.Option(
            "--worklists",
            help="Folder in which rows that are marked are kept for all, NAME.jsonl for each index.",
            show_default="each browser keeps its own",
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", help=HELP, cls=Command)(serve)


@grouped(methods=Shown("tracin-we-topk where the index holds words, and gc"), top=5)
def serve(
    indexes: Annotated[
        list[str], typer.Argument(metavar="INDEX...", help="Index folders, or NAME=FOLDER: the name to ask it by.")
    ],
    place: PlaceOptions,
    limits: LimitOptions,
    explorer: ExplorerOptions,
    test: MaybeTestOptions,
    methods: Methods = None,
    top: Top = 5,
    hubs: Hubs = None,
    model: MovedModel = None,
    device: Device = "auto",
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write what clients ask to the log, too.")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve indexes until Ctrl-C or SIGTERM."""
    try:
        from forebear.server import running
        from forebear.server.limits import Limits
        from forebear.server.listed_rows import Listing
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise InputError(
            f"forebear serve needs {error.name}, which is not installed. Install it: pip install 'forebear[serve]'."
        ) from error
    token = running.token_of(place.token_file)
    listing = None
    if test.test is not None:
        listing = Listing(
            test=test.test, open_rows=test.open, methods=listed(methods), top=top, hubs=hubs, progress=progress_bar
        )
    elif methods or hubs:
        raise InputError("--method and --hubs are asked of test rows. Give a file of them by --test.")
    running.serve(
        indexes,
        host=place.host,
        port=place.port,
        token=token,
        limits=Limits(**values_of(limits)),
        model=model,
        device=device,
        log_requests=log_texts or not quiet,
        log_texts=log_texts,
        **values_of(explorer),
        listing=listing,
        tell=say,
    )
