"""The ``forebear`` command."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from forebear.cli.commands import demo, explain, flip, index, inspect, perturb, report, retrieve, train
from forebear.cli.commands.audit import hans as audit
from forebear.cli.commands.audit import worklists
from forebear.cli.commands.evaluate import group as evaluate
from forebear.cli.commands.publish import push, serve, site
from forebear.cli.screen.console import ERR, OUT, be_quiet, note, warn
from forebear.cli.workers import end_with_parent, stop_workers
from forebear.errors import ForebearError, is_out_of_memory
from forebear.progress import Listener, heard_by
from forebear.wording import at_command_line

INTERRUPTED = 130
INTERRUPTED_LINE = (
    "interrupted. What was finished stays: retrainings go on with the same command, forebear index and retrieve with "
    "--resume."
)

app = typer.Typer(
    name="forebear",
    help="Which training rows made a text classifier predict this? Train, index once, then ask.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        from forebear import __version__

        OUT.print(f"forebear {__version__}")
        raise typer.Exit


@app.callback()
def forebear(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """What may stand before a command."""


for module in (
    demo,
    train,
    index,
    retrieve,
    explain,
    flip,
    audit,
    worklists,
    evaluate,
    perturb,
    report,
    site,
    serve,
    inspect,
    push,
):
    module.register(app)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    end_with_parent()
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command and return its exit code; every error becomes one line on stderr."""
    be_quiet(False)  # until the command's own options are read
    try:
        with at_command_line(), heard_by(Listener(warn, note)):
            return _run(args)
    finally:
        stop_workers()


def _run(args: list[str]) -> int:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries need no mention, only the outcome
    try:
        code = app(args=args, prog_name="forebear", standalone_mode=False)
    except ForebearError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED_LINE, INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # the reader of the pipe has ended: print nothing more
        return 0
    except OSError as error:
        if is_out_of_memory(error):
            return _fail(_memory_line(error), 2)
        full = error.errno == errno.ENOSPC
        return _fail(
            f"{error.filename or 'disk'}: {error.strerror or error}" + (" (the disk is full)" if full else ""), 1
        )
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line parser
            return _fail(_usage_line(error), 2)
        if os.environ.get("FOREBEAR_DEBUG"):
            raise
        if is_out_of_memory(error):
            return _fail(_memory_line(error), 2)
        return _fail(f"{type(error).__name__}: {error}. This is a bug in forebear; FOREBEAR_DEBUG=1 shows where.", 1)
    if code == INTERRUPTED:
        return _fail(INTERRUPTED_LINE, INTERRUPTED)
    return int(code or 0)


def _memory_line(error: Exception) -> str:
    """One line on a lack of memory that no command foresaw."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"memory does not suffice ({said[0].rstrip('.')}). Let other programs end, give smaller sizes (--batch-tokens, "
        "--max-length, --batch-size, --top, where the command takes them), or use --device cpu or a larger machine."
    )


def _usage_line(error: Exception) -> str:
    """One line: the parser's message, the usage of the command, and how to get its help."""
    message = error.format_message().strip()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context is None:
        return f"{message} See forebear --help."
    end = "" if message.endswith((".", "?")) else "."
    pieces = context.command.collect_usage_pieces(context)
    usage = (
        f" Usage: {context.command_path} {' '.join(pieces)}" if len(pieces) > 1 else ""
    )  # it takes more than options
    return f"{message}{end}{usage} See {context.command_path} --help."


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    ERR.print(f"error: {line}", markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
