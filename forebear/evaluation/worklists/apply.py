"""Decisions of a work list applied to the training file that its rows came from.

Rows are found by their number in the file and checked by what they say: a list of another file, or of this file as it
was before it changed, is refused at the first row that differs. Rows on which nobody decided stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forebear.errors import InputError, MismatchError, OutputExistsError
from forebear.evaluation.worklists.files import json_line
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.evaluation.worklists.placing import listed_texts, of_file, placed_rows, unplaced
from forebear.evaluation.worklists.training_files import Rewriting, check_out, ending_of, rewrite
from forebear.indexer.losses.loss import number_text
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
from forebear.indexer.rows.row_source import RowBlock, RowSource

_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of a row.

    Attributes:
        item: The row as the list has it, with the decision that was taken.
        file_row: Its number in the training file, from 0.
        line: The line at which it began there; None where the file has none.
        new_row: Its number in the new file; None where it is not there.
        before: Its label before.
        after: Its label now; None where the row is gone.
    """

    item: Item
    file_row: int
    line: int | None
    new_row: int | None
    before: str | None
    after: str | None

    def record(self) -> dict[str, Any]:
        """The change as a line of the log."""
        return {
            "row": self.item.row,
            "file_row": self.file_row,
            "line": self.line,
            "new_row": self.new_row,
            "decision": self.item.decision,
            "before": self.before,
            "after": self.after,
            "reason": self.item.reason,
            "note": self.item.note,
            "probability": self.item.probability,
            "texts": dict(self.item.texts),
        }


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a work list changed.

    Attributes:
        changes: Rows that were relabelled, removed or put apart, by their number in the file.
        n_kept: Rows that were decided to stay as they are.
        n_undecided: Rows of the list on which nobody decided.
        n_elsewhere: Rows of the list that came from other files.
        n_rows: Rows of the training file.
        n_written: Rows of the new file.
        files: The files that were written: rows, rows that were put apart where there are any, the log.
    """

    changes: tuple[Change, ...]
    n_kept: int
    n_undecided: int
    n_elsewhere: int
    n_rows: int
    n_written: int
    files: tuple[Path, ...]

    def count(self, decision: str) -> int:
        """Number of rows that changed by a decision."""
        return sum(change.item.decision == decision for change in self.changes)


def beside(out: Path, name: str) -> Path:
    """A file beside the new training file: ``fixed.csv`` has ``fixed.log.jsonl`` and ``fixed.quarantine.csv``."""
    stem = out.name[: len(out.name) - len(ending_of(out))]
    return out.with_name(f"{stem}.log.jsonl" if name == "log" else f"{stem}.{name}{out.name[len(stem) :]}")


def decided(work_list: WorkList, accept: float | None = None) -> dict[int, Item]:
    """One item a row, with its decision.

    Args:
        work_list: The list; a row may stand in several items.
        accept: Items on which nobody decided, and whose label is wrong with at least this probability, are relabelled
            as is suggested.

    Raises:
        InputError: Decisions on one row contradict each other, a label to relabel to is missing, or probabilities are
            asked for and there are none.
    """
    if accept is not None:
        if not 0 <= accept <= 1:
            raise InputError(f"--accept {accept}: expected a probability, 0 to 1.")
        if all(item.probability is None for item in work_list):
            raise InputError("--accept needs probabilities, and this list has none: decide in its column decision.")
    by_hand = {item.row for item in work_list if item.decision}
    found: dict[int, Item] = {}
    for listed_item in work_list:
        item = listed_item
        chance = item.probability if item.row not in by_hand and item.suggested else None
        if accept is not None and chance is not None and chance >= accept:
            item = replace(item, decision="relabel")
        if item.decision == "relabel" and item.suggested is None:
            raise InputError(
                f"row {item.row} is to be relabelled, and its suggested label is empty. Fill it in, or do without."
            )
        before = found.get(item.row)
        if before is None or (item.decision and not before.decision):
            found[item.row] = item
        elif item.decision and _outcome(item) != _outcome(before):
            raise InputError(
                f"row {item.row} is decided on twice: {' '.join(_outcome(before))}, and {' '.join(_outcome(item))}. "
                "Leave one of them."
            )
    return found


def _outcome(item: Item) -> tuple[str, ...]:
    return (item.decision, f"to {item.suggested}") if item.decision == "relabel" else (item.decision,)


def apply_work_list(
    work_list: WorkList, source: RowSource, train: Path, out: Path, *, accept: float | None = None, force: bool = False
) -> Applied:
    """Write the training file as a work list says, and a log of what changed.

    Args:
        work_list: Its rows are of ``source``, by their number in the file.
        source: The training rows, read as the index read them.
        train: The file that they come from.
        out: The new file, of the same form; ``fixed.csv`` gets ``fixed.log.jsonl`` beside it, and where rows are put
            apart ``fixed.quarantine.csv``.
        accept: See :func:`decided`.
        force: Overwrite files; rows that an earlier run put apart go.

    Raises:
        InputError: See :func:`decided`; a label is none of the file's; or a file to write is one that is read, as those
            of the work list are.
        MismatchError: A row does not say what the list has.
        OutputExistsError: A file is there already.
        DataError: The file cannot be read.
        StorageError: A file cannot be written.
    """
    log, apart = beside(out, "log"), beside(out, "quarantine")
    check_out(train, out, (log, apart), work_list.files)
    there = [str(path) for path in (out, log, apart) if path.exists()]
    if there and not force:
        raise OutputExistsError(f"{', '.join(there)} exists already. Name another file, or give --force.")
    mine, n_elsewhere = of_file(work_list, train)
    items = decided(mine, accept)
    lowest = (min((item.row for item in some), default=0) for some in (mine, work_list))
    placed = placed_rows(items.values(), source, is_first=len(set(lowest)) == 1)
    found = _check(placed, source, train)
    labels = _Labels(source, found, train)
    new = {row: labels.value(item) for row, item in placed.items() if item.decision == "relabel"}
    new = {row: value for row, value in new.items() if labels.name(value) != found.named.get(row)}
    quarantined = {row for row, item in placed.items() if item.decision == "quarantine"}
    gone = quarantined | {row for row, item in placed.items() if item.decision == "remove"}
    n_rows = source.n_rows + source.n_dropped
    if len(gone) == n_rows:
        raise InputError(f"all {n_rows:,} rows of {train} would go. Keep some.")
    change = Rewriting(
        label_column=source.label_column if new else None,  # others may be several
        labels={row: labels.raw(value) for row, value in new.items()}, left_out=gone, apart=quarantined, n_rows=n_rows,
    )  # fmt: skip
    read, changes = source.format("the file"), list[Change]()

    def log_of(lines: Mapping[int, int]) -> bytes:
        changes.extend(_changes(placed, gone, {row: labels.name(value) for row, value in new.items()}, found, lines))
        return "".join(json_line(change.record()) for change in changes).encode("utf-8", "replace")

    rewrite(
        train, out, change, delimiter=read.delimiter, encoding=read.encoding, apart=apart if quarantined else None,
        log=log, logged=log_of,
    )  # fmt: skip
    if not quarantined:
        apart.unlink(missing_ok=True)  # of an earlier run
    return Applied(
        changes=tuple(changes),
        n_kept=sum(bool(item.decision) for item in items.values()) - len(changes),
        n_undecided=sum(not item.decision for item in items.values()),
        n_elsewhere=n_elsewhere,
        n_rows=n_rows,
        n_written=n_rows - len(gone),
        files=(out, apart, log) if quarantined else (out, log),
    )


def _changes(
    placed: Mapping[int, Item], gone: Set[int], new: Mapping[int, str | None], found: _Found, lines: Mapping[int, int]
) -> list[Change]:
    changes, n_before = [], 0
    for row, item in placed.items():
        if row in gone or row in new:
            after = None if row in gone else new[row]
            place = None if row in gone else row - n_before
            changes.append(
                Change(
                    item=item,
                    file_row=row,
                    line=lines.get(row),
                    new_row=place,
                    before=found.named.get(row),
                    after=after,
                )
            )
        n_before += row in gone
    return changes


@dataclass(frozen=True)
class _Found:
    names: dict[str, set[Any]]  # labels of the file by the name that the list gives them
    named: dict[int, str]  # labels of rows of the list, as the list writes them
    raws: dict[Any, Any]  # what stands in the file for each label


def _check(placed: Mapping[int, Item], source: RowSource, train: Path) -> _Found:
    """Compare each row of the list with the file.

    Raises:
        MismatchError: A text or a label differs.
    """
    names: dict[str, set[Any]] = {}
    named: dict[int, str] = {}
    raws: dict[Any, Any] = {}
    unseen = set(placed)
    for row, item, texts, label in _rows(placed, source, raws):
        unseen.discard(row)
        _check_texts(item, row, texts, source, train)
        own = label_name(label, source)
        if own is None:
            continue
        named[row] = own
        if item.given is None:
            continue
        if item.given != own and not _same_numbers(item.given, own, source):
            known = {label_name(value, source) for value in source.label_values}
            if item.given in known or source.problem_type != SINGLE_LABEL:
                raise MismatchError(
                    f"row {item.row}: {train} has the label {own} in row {row} (from 0), the list {item.given}. Is the "
                    "file another one, or changed since the index was built? Give the file of the index."
                )
            named[row] = item.given
        if source.problem_type == SINGLE_LABEL:
            names.setdefault(item.given, set()).add(label)
    for row in sorted(unseen):
        raise MismatchError(
            f"row {placed[row].row}: row {row} (from 0) of {train} has no label, and the list gives it one. Give the "
            "file that the index was built from, as it was then."
        )
    of_label: dict[Any, str] = {}
    for name, labels in names.items():
        for label in labels:
            if of_label.setdefault(label, name) != name:
                raise MismatchError(
                    f"the label {label} of {train} is called {of_label[label]} and {name} in the list. Is the file "
                    "another one, or changed since the index was built? Give the file of the index."
                )
    return _Found(names, named, raws)


def _rows(
    placed: Mapping[int, Item], source: RowSource, raws: dict[Any, Any]
) -> Iterator[tuple[int, Item, tuple[str, ...], Any]]:
    """The listed rows of the file; ``raws`` gathers how each label stands there."""
    for block in source.blocks():
        if source.problem_type == SINGLE_LABEL and block.labels is not None and len(raws) < len(source.label_values):
            for label, raw in zip(block.labels, block.table.column(source.label_column).to_pylist(), strict=True):
                raws.setdefault(label, raw)
        for i, row in enumerate(_file_rows(block, source)):
            if row in placed:
                texts = tuple(column[i] for column in block.texts)
                yield row, placed[row], texts, None if block.labels is None else block.labels[i]


def _same_numbers(given: str, own: str, source: RowSource) -> bool:
    """Whether two labels are the same numbers, with commas or points before the decimals."""
    try:
        numbers = [[float(part.replace(",", ".")) for part in text.split(";")] for text in (given, own)]
    except ValueError:
        return False
    return source.problem_type == REGRESSION and numbers[0] == numbers[1]


def _file_rows(block: RowBlock, source: RowSource) -> list[int]:
    return [source.file_row(row) for row in range(block.start, block.start + len(block))]


def _check_texts(item: Item, row: int, texts: tuple[str, ...], source: RowSource, train: Path) -> None:
    of_list = listed_texts(item, source)
    same = item.digest == text_digest(texts) if item.digest is not None else of_list in (texts, ("\n".join(texts),))
    if same or (item.digest is None and not of_list):
        return
    raise MismatchError(
        f"row {item.row}: {train} has {_shown(texts)} in row {row} (from 0; {', '.join(source.text_columns)}), the "
        f"list {_shown(of_list)}. Give the file that the index was built from, as it was then.{unplaced(item, source)}"
    )


def _shown(texts: tuple[str, ...]) -> str:
    return " | ".join(repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...") for text in texts) or "other texts"


def label_name(label: Any, source: RowSource) -> str | None:
    """A label of a source as work lists write it; None for a row without one, and for several labels a row."""
    if label is None or isinstance(label, dict):
        return None
    if source.problem_type == REGRESSION:
        numbers = label if isinstance(label, list | tuple) else [label]
        return "; ".join(number_text(float(number)) for number in numbers)
    return source.label_names[label] if isinstance(label, int) and source.label_names else str(label)


class _Labels:
    """Labels of the file by the names that the list gives them."""

    def __init__(self, source: RowSource, found: _Found, train: Path) -> None:
        self._source, self._train, self._raws, names = source, train, found.raws, found.names
        known = {label_name(value, source): value for value in source.label_values}
        self._values: dict[str, Any] = {name: value for name, value in known.items() if name is not None}
        self._several = {name: labels for name, labels in names.items() if name not in self._values and len(labels) > 1}
        self._values |= {n: next(iter(of)) for n, of in names.items() if n not in self._values and len(of) == 1}

    def value(self, item: Item) -> Any:
        """The label that an item is to have."""
        source, wanted = self._source, item.suggested or ""
        if source.problem_type == REGRESSION and len(source.label_columns) == 1:
            try:
                return float(wanted.replace(",", "."))
            except ValueError as error:
                raise InputError(f"row {item.row} is to be relabelled {wanted!r}; expected a number.") from error
        if source.problem_type != SINGLE_LABEL or source.label_column is None:
            raise InputError(
                f"row {item.row} is to be relabelled, and {self._train} has several labels a row. Decide remove, "
                "quarantine or keep, and change labels in the file itself."
            )
        if wanted in self._several:
            several = listed(str(label) for label in self._several[wanted])
            raise InputError(
                f"row {item.row}: {wanted!r} is one of several labels of {self._train}: {several}. Write one."
            )
        if wanted not in self._values:
            raise InputError(
                f"row {item.row} is to be relabelled {wanted!r}; {self._train} has {listed(self._values)}. Write one "
                "of these, or name its numbers by --label-names."
            )
        return self._values[wanted]

    def name(self, value: Any) -> str | None:
        """The name of a label, as the list writes it."""
        by_value = {found: name for name, found in self._values.items()}
        return by_value.get(value, label_name(value, self._source))

    def raw(self, value: Any) -> Any:
        """What stands in the file for a label."""
        return self._raws.get(value, value)
