"""Options that name what is explained: test rows of a file, or one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from forebear.cli.options.rows import TEXT, MaybeTestOptions, Pair
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class QueryOptions(MaybeTestOptions):
    """What is explained: rows of a file, or one text."""

    text: Annotated[str | None, TEXT] = None
    pair: Pair = None

    def check(self, target: str) -> None:
        """Refuse options that contradict each other, before anything is opened."""
        if (self.test is None) == (self.text is None):
            raise InputError("give either --test FILE or --text '...' (with --pair for pairs).")
        if self.text is not None and target == "gold":
            raise InputError("--target gold needs labels: give labelled rows by --test, or name a label by --target.")
        if self.pair is not None and self.text is None:
            raise InputError("--pair is the second text of --text; give both.")

    def open_rows(self, retriever: Retriever, *, need_labels: bool) -> RowSource:
        """The test rows: those of the file, or the one text."""
        from forebear.indexer.rows.opening import rows_from_texts

        if self.text is not None:
            return rows_from_texts([self.text] if self.pair is None else [(self.text, self.pair)])
        assert self.test is not None
        return self.open(
            self.test, classes=retriever.label_names, need_labels=need_labels, like=retriever.index.manifest.row_format
        )
