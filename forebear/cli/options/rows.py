"""Opening rows for a command: the user is told what the source says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebear.cli.screen.console import listed, warn

if TYPE_CHECKING:
    from forebear.indexer.rows.row_source import RowSource


def open_rows_aloud(
    path: str,
    *,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    unlabelled: str,
    need_labels: bool,
    classes: Sequence[str] = (),
) -> RowSource:
    """Open rows, and warn of those that were left out, have no label or no words.

    Args:
        path: A file, folder or hub name.
        text_columns: As the list option gives them.
        label_column: Its name, or None.
        label_names: As the list option gives them.
        unlabelled: refuse, drop or keep.
        need_labels: Whether rows without a label are refused, or left out.
        classes: The model's class names, where it is known.
    """
    from forebear.indexer.rows.row_source import open_rows

    source = open_rows(
        path,
        text_columns=listed(text_columns) or None,
        label_column=label_column,
        label_names=listed(label_names) or None,
        need_labels=need_labels,
        unlabelled=unlabelled,
        classes=classes,
    )
    for remark in source.remarks():
        warn(remark)
    return source
