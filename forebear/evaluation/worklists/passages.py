"""Items of a work list as passages of a page."""

from __future__ import annotations

from typing import Final

from forebear.evaluation.reports.report import Cell, Passage
from forebear.evaluation.worklists.items import Item, WorkList

SHOWN_ITEMS: Final = 20


def passages_of(work_list: WorkList, n_shown: int) -> list[Passage]:
    """The first items: texts, the label that is given and the one that is suggested, figures; the reason as a note."""
    return [_passage(number, item) for number, item in enumerate(work_list.items[:n_shown], start=1)]


def _passage(number: int, item: Item) -> Passage:
    facts: dict[str, Cell] = {"label": item.given}
    if item.suggested is not None:
        facts["suggested"] = item.suggested
    if item.probability is not None:
        facts["probability that the label is wrong"] = item.probability
    facts |= item.evidence
    if item.contradicting:
        facts["contradicting rows"] = ", ".join(map(str, item.contradicting))
    return Passage(f"{number}. row {item.row}", item.texts, frozenset(), facts, item.reason)
