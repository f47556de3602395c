"""Work lists and their items: a training row each, what is doubted about it, why, and what was decided.

The columns are the same in Parquet, CSV and JSON Lines. ``text: NAME`` and ``evidence: NAME`` are one column for each
text and each figure; all others are in `FIRST` and `LAST`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from forebear.errors import InputError
from forebear.indexer.rows.row_source import texts_sha256

DECISIONS: Final = ("relabel", "remove", "quarantine", "keep")
OF_LABEL: Final = "probability of the label"  # the figure of the evidence: by the model
TEXT: Final = "text: "
EVIDENCE: Final = "evidence: "
FIRST: Final = ("row", "source", "source_row", "line")
MIDDLE: Final = ("given", "suggested")
LAST: Final = ("contradicting", "probability", "reason", "decision", "note", "digest")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A training row on a work list.

    Attributes:
        row: Its number in the index, from 0.
        texts: Its texts by text column, in the order of encoding; empty where the index holds none.
        given: Its label as people read it: the name of a class; of several labels their names, parted by
            semicolons; of numbers these. None where it is not known.
        suggested: Another label, written alike; None where none is suggested. What ``relabel`` writes.
        evidence: Named figures, all of them finite. What they mean is for the audit's page to say.
        contradicting: Numbers of the rows that contradict it.
        probability: That the given label is wrong, where that was measured, 0 to 1; else None.
        reason: Why the row is listed, in a sentence.
        decision: One of ``DECISIONS``, or empty while nobody has decided.
        note: Anything that the one who decided has to say.
        source: Name of the file that the row came from.
        source_row: Its number there, from 0; None where rows of the file were left out.
        line: The line of the file at which it begins, from 1, where that is known and the file has lines.
        digest: Of the texts, as :func:`text_digest` says it; None where the index holds none.
    """

    row: int
    texts: Mapping[str, str] = field(default_factory=dict)
    given: str | None = None
    suggested: str | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    contradicting: tuple[int, ...] = ()
    probability: float | None = None
    reason: str = ""
    decision: str = ""
    note: str = ""
    source: str | None = None
    source_row: int | None = None
    line: int | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no work list may hold.

        Raises:
            InputError: A number is out of range, or the decision is not known.
        """
        numbers = {"row": self.row, "source_row": self.source_row, "line": self.line}
        if wrong := [name for name, number in numbers.items() if number is not None and number < 0]:
            raise InputError(f"{wrong[0]} {numbers[wrong[0]]}: expected a number from 0.")
        if self.decision not in ("", *DECISIONS):
            raise InputError(
                f"row {self.row}: decision {self.decision!r}: expected {', '.join(DECISIONS)}, or nothing while it is "
                "open."
            )
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise InputError(f"row {self.row}: probability {self.probability}: expected 0 to 1, or nothing.")
        if unreal := [name for name, value in self.evidence.items() if not math.isfinite(value)]:
            raise InputError(
                f"row {self.row}: evidence {unreal[0]!r} is {self.evidence[unreal[0]]}; expected a number."
            )


@dataclass(frozen=True)
class WorkList:
    """Training rows to decide on, in the order in which they should be looked at.

    Attributes:
        items: The rows; one row may stand in several items.
        files: Those that it was read from; of a folder all that it might have been. None of them is overwritten.
    """

    items: tuple[Item, ...]
    files: tuple[Path, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the text columns, in the order of encoding."""
        return tuple(dict.fromkeys(name for item in self.items for name in item.texts))

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures of the evidence, in the order in which items first have them."""
        return tuple(dict.fromkeys(name for item in self.items for name in item.evidence))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the files."""
        texts = [TEXT + name for name in self.text_columns]
        return [*FIRST, *texts, *MIDDLE, *(EVIDENCE + name for name in self.figures), *LAST]

    def records(self) -> list[dict[str, Any]]:
        """The items as the files hold them: values by column, None where there is none."""
        columns = self.columns
        return [record_of(item, columns) for item in self.items]


def is_column(name: str) -> bool:
    """Whether a work list has such a column, or had before work lists were files."""
    return name in (*FIRST, *MIDDLE, *LAST, "text", "label", "evidence") or name.startswith((TEXT, EVIDENCE))


def record_of(item: Item, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """An item as a file holds it: its values by column, by default those that a list of it alone has."""
    texts = {TEXT + name: text for name, text in item.texts.items()}
    evidence = {EVIDENCE + name: value for name, value in item.evidence.items()}
    values = vars(item) | {"contradicting": list(item.contradicting)} | texts | evidence
    return {column: values.get(column) for column in (columns or WorkList((item,)).columns)}


def item_of(record: Mapping[str, Any]) -> Item:
    """The item that a record holds; a column that is missing is taken for empty, one that is not known is left out.

    Whole numbers may be written as ``12`` or ``12.0``, lists of rows as lists or as ``12; 45``; case and white space
    around a decision do not count. Lists that the explorer kept before work lists were files are read, too: ``label``
    is the given label there, ``evidence`` a sentence, ``probability`` what the model gives that label, ``wrong label``
    the decision to relabel and ``note`` none.

    Raises:
        InputError: There is no row number, or a value is not of its column's kind.
    """
    try:
        row = _whole(record.get("row"))
    except ValueError as error:
        raise InputError(f"row {record.get('row')!r}: expected the number of a training row.") from error
    if row is None:
        raise InputError("an item without a row number. Fill the column row, or take the line out.")
    of_label = "label" in record and "given" not in record
    try:
        said = [_text(record, name) for name in ("evidence", "reason")]
        decision = (_text(record, "decision") or "").strip().lower()
        return Item(
            row=row,
            texts={
                name.removeprefix(TEXT): str(text)
                for name, text in record.items()
                if (name.startswith(TEXT) or name == "text") and text is not None
            },
            given=_text(record, "given" if "given" in record else "label") or None,
            suggested=_text(record, "suggested") or None,
            evidence=_evidence(record, of_label=of_label),
            contradicting=_rows(record.get("contradicting")),
            probability=None if of_label else _number(record.get("probability")),
            reason="; ".join(part for part in said if part),
            decision={"wrong label": "relabel", "note": ""}.get(decision, decision),
            note=_text(record, "note") or "",
            source=_text(record, "source") or None,
            source_row=_whole(record.get("source_row")),
            line=_whole(record.get("line")),
            digest=_text(record, "digest") or None,
        )
    except ValueError as error:
        raise InputError(f"row {row}: {error}.") from error


def text_digest(texts: Iterable[str]) -> str:
    """A name for the texts of a row: same texts, same name, whatever the file's format."""
    return f"sha256:{texts_sha256(texts).hex()[:16]}"


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} {value!r}: expected text")
    return value


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r}: expected a number") from error


def _whole(value: Any) -> int | None:
    if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
        return int(value)
    number = _number(value)
    if number is None:
        return None
    if not number.is_integer():
        raise ValueError(f"{value!r}: expected a whole number")
    return int(number)


def _evidence(record: Mapping[str, Any], *, of_label: bool) -> dict[str, float]:
    figures = {name.removeprefix(EVIDENCE): value for name, value in record.items() if name.startswith(EVIDENCE)}
    if of_label:
        figures[OF_LABEL] = record.get("probability")
    return {name: number for name, value in figures.items() if (number := _number(value)) is not None}


def _rows(value: Any) -> tuple[int, ...]:
    if isinstance(value, int | float):
        value = [value]
    parts = value.strip("[] ").replace(",", " ").replace(";", " ").split() if isinstance(value, str) else value or ()
    if not isinstance(parts, list | tuple):
        raise ValueError(f"contradicting {value!r}: expected numbers of rows")
    return tuple(number for part in parts if (number := _whole(part)) is not None)
