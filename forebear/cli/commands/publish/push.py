"""``forebear push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.options.groups import grouped
from forebear.cli.screen.console import OUT, Command, size
from forebear.errors import InputError

HELP = """Publish an index on the model hub, with a card that says what it holds; or write that folder to look at it.

The texts of the training rows stay here unless --with-texts is given. Who opens the index needs the model, too:
--model-name says where it is.

Examples:

    forebear push runs/mine-index runs/mine-published

    forebear push runs/mine-index hf://me/mine-index --model-name me/mine-model

    forebear retrieve --index hf://me/mine-index --text "a fine film"
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("push", help=HELP, cls=Command)(push)


@grouped()
def push(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="hf://user/name[@branch], or a new folder.")],
    with_texts: Annotated[
        bool, typer.Option("--with-texts", help="Publish the training rows' texts and other columns, too.")
    ] = False,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="Hub name of the model, for those who open the index.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
) -> None:
    """Publish an index."""
    from forebear.hub.published import write_published
    from forebear.indexer.index import Index
    from forebear.indexer.storage.files import HUB

    opened = Index.open(index)
    if target.startswith(HUB):
        url = opened.push_to_hub(target, with_texts=with_texts, model=model_name, private=private, message=message)
        OUT.print(f"published: {url}")
        return
    if private or message is not None:
        raise InputError(f"{target} is a folder: --private and --message are of a repository, hf://user/name.")
    manifest = write_published(opened, Path(target), with_texts=with_texts, model=model_name)
    written = sum(facts["bytes"] for facts in manifest.files.values())
    held = "with the texts" if with_texts else "without the texts of its rows"
    OUT.print(f"{target}: {len(manifest.files)} files, {size(written)}, {held}; README.md is the card.")
