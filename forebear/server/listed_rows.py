"""Test rows that the explorer lists without an exported site: predicted at the start, explained when asked for.

While no request waits, they are explained one by one, in a random order, so that a training row's page says what it
drives, and a proponent's card for which share of the test rows it comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.explain.explanation import Explanation
from forebear.evaluation.explorer.asking import ask
from forebear.evaluation.explorer.records import (
    Drives,
    Known,
    Record,
    add_hub_shares,
    explain_row,
    page_record,
    predicted_lines,
)
from forebear.evaluation.explorer.site import site_facts
from forebear.indexer.rows.row_source import RowSource
from forebear.progress import Progress
from forebear.server.limits import Limits
from forebear.server.served_indexes import Opened, ServedIndexes, same_model

MOST_EXPLAINED = 2000  # test rows, of a random order, that are explained while no request waits
MOST_PLACES = 200_000  # of training rows in their rankings, which are kept
OTHER_MODEL = "the index has another model than when the server was started. Start it again."


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Which test rows are listed, and what is asked of them.

    Attributes:
        test: A file or hub name; ``NAME=FILE`` where several indexes are served.
        open_rows: Opens it, as :func:`~forebear.indexer.rows.opening.open_rows` does.
        methods: Methods; none: those of ``explain``.
        top: Rows at each end.
        hubs: Folder of an audit of hubs.
        progress: Gives what is told how far the predictions are.
    """

    test: str
    open_rows: Callable[..., RowSource]
    methods: Sequence[str] = ()
    top: int = 5
    hubs: str | None = None
    progress: Callable[[], AbstractContextManager[Progress]]

    def place(self, names: Sequence[str]) -> tuple[str, str]:
        """The name of the index, and the file.

        Raises:
            InputError: Several indexes are served, and none of them is named.
        """
        name, _, file = self.test.partition("=")
        if file and name in names:
            return name, file
        if len(names) > 1:
            raise InputError(
                f"--test {self.test}: several indexes are served. Say which one the test rows are for, as in "
                f"--test {names[0]}={self.test}."
            )
        return names[0], self.test


class ListedRows:
    """The test rows of one index. What explains them is for the thread that computes.

    Attributes:
        name: Of the index.
        lines: One a test row, as the list shows them.
    """

    def __init__(self, listing: Listing, indexes: ServedIndexes, limits: Limits) -> None:
        """Open the test rows, and predict them.

        Raises:
            ForebearError: They cannot be read or do not fit the index, or the question is beyond the limits.
        """
        self.name, file = listing.place(list(indexes))
        self._served = indexes[self.name]
        self._first = self._opened = self._served.current
        choices: dict[str, Any] = {"methods": list(listing.methods), "top": listing.top}
        rows = partial(listing.open_rows, file)
        asked = ask(self._first.retriever, rows, hubs=listing.hubs, **choices)
        limits.check_question(asked.question, 1)
        self._asked = replace(asked, test=replace(asked.test, table=None))
        self._known = Known.of(self._asked)
        with listing.progress() as progress:
            self.lines = predicted_lines(self._asked, self._known, progress)
        n_places = 2 * listing.top * len(asked.question.methods)
        self._n_explained = min(MOST_EXPLAINED, max(1, MOST_PLACES // n_places))
        self._begin()

    @property
    def n_explained(self) -> int:
        """Test rows that are explained so far."""
        return self._drives.n_tests

    def fits(self, opened: Opened) -> bool:
        """Whether the predictions are those of an index as it is now: its model is still the same."""
        return opened.name == self.name and same_model(self._first.index.manifest, opened.index.manifest)

    def facts(self, opened: Opened) -> Record:
        """What the pages say of the test rows; nothing of those of another index, or where it has another model now."""
        if not self.fits(opened):
            return {}
        return self._facts | {"digest": opened.digest, "explains": True, "first_rows": []}

    def page(self, opened: Opened, number: int) -> Record:
        """The page of a test row.

        Raises:
            InputError: There is no such test row, or the index has another model now.
        """
        self._turn_to(opened)
        if number >= len(self.lines):
            raise InputError(f"test row {number}: expected 0 to {len(self.lines) - 1}.")
        page = page_record(self._asked, self._known, number, self._explain(number))
        if self._asked.hubs is None:
            add_hub_shares(page, self._drives)
        return page

    def drives(self, opened: Opened) -> tuple[Drives, Mapping[str, int]]:
        """The predictions that training rows drive, as far as they are known, and of how many test rows that is."""
        self._turn_to(opened)
        return self._drives, {"n_explained": self.n_explained, "n_tests": len(self.lines)}

    def go_on(self) -> bool:
        """Explain the next test row; whether there is another one."""
        opened = self._served.current
        if not self.fits(opened):
            return False
        self._turn_to(opened)
        number = next((number for number in self._next if number not in self._explained), None)
        if number is not None:
            self._explain(number)
        return number is not None

    def _explain(self, number: int) -> Explanation:
        explanation = explain_row(self._asked, number)
        if number not in self._explained:
            self._explained.add(number)
            self._drives.add(number, explanation)
        return explanation

    def _turn_to(self, opened: Opened) -> None:
        """Ask the index as it is now; what was found in another state of it is forgotten.

        An audit of hubs is of the index as it was. Test rows are not compared again with rows that are new.
        """
        if not self.fits(opened):
            raise InputError(f"test rows of {opened.name} are not listed: {OTHER_MODEL}")
        if opened is self._opened:
            return
        question = opened.retriever.resolve(self._asked.question.spec)
        self._asked = replace(self._asked, retriever=opened.retriever, question=question, hubs=None)
        live = set(opened.index.live.tolist())
        self._known = replace(self._known, leak_of={n: k for n, k in self._known.leak_of.items() if k.row in live})
        self.lines = [line | {"duplicate": line["number"] in self._known.leak_of} for line in self.lines]
        self._opened = opened
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet of what training rows drive."""
        order = np.random.default_rng(0).permutation(len(self.lines))
        self._next = iter(order[: self._n_explained].tolist())
        self._explained: set[int] = set()
        self._drives = Drives()
        self._facts = site_facts(self._asked, name=self.name)
