"""``audit duplicates``: training rows that say the same, first those with different labels; and test rows among them.

Two rows are linked when their texts are equal, hold the same words in the same order (case, punctuation and white
space aside), have word sets of large Jaccard similarity, or are neighbours of large cosine whose words overlap too.
Groups are the connected components. Cosines alone do not count: a fine-tuned model maps all rows of a class close
together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from scipy import sparse

from forebear.errors import InputError
from forebear.evaluation.audits.rows.near_words import WordSets, near_pairs, stacked, word_sets, words_of
from forebear.evaluation.common.neighbours import nearest_rows
from forebear.evaluation.common.passages import row_cells, row_columns, row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.reports.report import Cell, Group, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.rows.row_source import texts_sha256
from forebear.retriever.question.models import Models
from forebear.retriever.retriever import Retriever

KINDS: Final = ("same texts", "same words", "similar")
SHOWN_GROUPS = 8
SHOWN_ROWS = 20  # of a group
SHOWN_LEAKS = 100
_BLOCK_ROWS = 65_536
Texts = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Least similarities of linked rows.

    Attributes:
        jaccard: Least Jaccard similarity of the word sets of two rows; where rows have two texts, of each text.
        cosine: Least cosine of neighbours.
        cosine_jaccard: Least Jaccard similarity of neighbours with that cosine. Cosines add links only where it is
            smaller than ``jaccard``.
        neighbours: Number of nearest rows of each row whose cosines are compared; 0: no cosines.
    """

    jaccard: float = 0.8
    cosine: float = 0.95
    cosine_jaccard: float = 0.5
    neighbours: int = 10

    def check(self) -> None:
        """Refuse thresholds out of range.

        Raises:
            InputError: A similarity is not above 0 and at most 1, or the number of neighbours is negative.
        """
        for name in ("jaccard", "cosine", "cosine_jaccard"):
            if not 0 < getattr(self, name) <= 1:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: expected a similarity above 0, at most 1.")
        if self.neighbours < 0:
            raise InputError(
                f"--neighbours {self.neighbours}: expected a number of rows, or 0 for none.", of="audit duplicates"
            )


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Rows that are linked to one another.

    Attributes:
        rows: Row numbers, ascending.
        kind: The strictest of ``same texts``, ``same words``, ``similar`` that holds for all rows of the group.
        weakest: Least Jaccard similarity of the links that join the group; 1 unless the kind is ``similar``.
        conflict: Whether their labels differ.
    """

    rows: np.ndarray
    kind: str
    weakest: float
    conflict: bool


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A test row that stands among the training rows too, and the training row most like it."""

    test_row: int
    row: int
    kind: str
    jaccard: float


def duplicates(models: Models, thresholds: Thresholds) -> list[DuplicateGroup]:
    """Groups of two or more live rows; conflicting labels first, then the largest, then the lowest row number.

    The comparison by words is complete: no pair of at least ``thresholds.jaccard`` is missed. Cosines are those of
    sentence embeddings where the index stores them, else of features.
    """
    thresholds.check()
    index, live = models.index, models.index.live
    seen = _read_rows(_live_blocks(index), _Numbering())
    links = [_equal_links(seen), near_pairs(seen.sets, thresholds.jaccard)]
    if thresholds.neighbours and thresholds.cosine_jaccard < thresholds.jaccard:
        links.append(_cosine_links(models, seen.sets, thresholds))
    first, second, similarity = (np.concatenate(values) for values in zip(*links, strict=True))
    n = len(live)
    graph = sparse.coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    n_groups, number = sparse.csgraph.connected_components(graph, directed=False)
    weakest = np.ones(n_groups)
    np.minimum.at(weakest, number[first], _best_links(first, second, similarity))
    order = np.argsort(number, kind="stable")
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    groups = []
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            kind = _kind_of(seen, members)
            least = float(weakest[number[members[0]]]) if kind == KINDS[2] else 1.0
            conflict = len(np.unique(index.labels[live[members]], axis=0)) > 1
            groups.append(DuplicateGroup(rows=live[members], kind=kind, weakest=least, conflict=conflict))
    return sorted(groups, key=lambda g: (not g.conflict, -len(g.rows), int(g.rows[0])))


@dataclass
class _Numbering:
    """Numbers given so far: to rows by the digest of their texts and of their words, and to words by column."""

    same: dict[bytes, int] = field(default_factory=dict)
    words: dict[bytes, int] = field(default_factory=dict)
    vocabulary: dict[tuple[int, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class _ComparedRows:
    """Rows as they are compared; the texts themselves are not held.

    Attributes:
        same: A number for each row, ``(n,)``; rows with equal texts have equal numbers.
        words: A number for each row, ``(n,)``; rows with the same words in the same order have equal numbers.
        sets: Word sets of the rows.
    """

    same: np.ndarray
    words: np.ndarray
    sets: WordSets


def _read_rows(blocks: Iterable[Texts], known: _Numbering) -> _ComparedRows:
    """Read rows block by block, and number them by their texts and words."""
    same: list[int] = []
    words: list[int] = []
    sets: list[WordSets] = []
    for texts in blocks:
        for row in zip(*texts, strict=True):
            ordered = [" ".join(words_of(text)) or text for text in row]  # a text without words stays as it is
            same.append(known.same.setdefault(texts_sha256(row), len(known.same)))
            words.append(known.words.setdefault(texts_sha256(ordered), len(known.words)))
        sets.append(word_sets(texts, known.vocabulary))
    return _ComparedRows(np.array(same), np.array(words), stacked(sets))


def _live_blocks(index: Index) -> Iterator[Texts]:
    for start in range(0, len(index.live), _BLOCK_ROWS):
        yield index.text_lists(index.live[start : start + _BLOCK_ROWS])


def _equal_links(seen: _ComparedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Links from each row to the first row with the same words: positions of both, similarity 1."""
    _, first, number = np.unique(seen.words, return_index=True, return_inverse=True)
    second = np.setdiff1d(np.arange(len(number)), first)
    return first[number[second]], second, np.ones(len(second))


def _cosine_links(models: Models, sets: WordSets, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Links between neighbours of large cosine whose words overlap: positions of both rows, Jaccard similarity."""
    index, live = models.index, models.index.live
    k = min(thresholds.neighbours, len(live) - 1)
    if not k:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    representation = "sentence" if "sbert" in index.manifest.spec.stores else "feature"
    neighbours, cosines = nearest_rows(models, live, k, representation=representation)
    i, c = np.nonzero(cosines >= thresholds.cosine)
    j = np.searchsorted(live, neighbours[i, c])
    jaccard = sets.jaccard(i, sets, j)
    kept = jaccard >= thresholds.cosine_jaccard
    return i[kept], j[kept], jaccard[kept]


def _best_links(first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """The similarity of each link; where several links join the same two rows, the largest."""
    if not len(first):
        return similarity
    pairs = np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1)
    _, number = np.unique(pairs, axis=0, return_inverse=True)
    best = np.zeros(number.max() + 1)
    np.maximum.at(best, number.reshape(-1), similarity)
    return np.asarray(best[number.reshape(-1)])


def _kind_of(seen: _ComparedRows, members: np.ndarray) -> str:
    for kind, numbers in zip(KINDS[:2], (seen.same, seen.words), strict=True):
        if len(np.unique(numbers[members])) == 1:
            return kind
    return KINDS[2]


def leaks(index: Index, test: QueryRows, thresholds: Thresholds) -> list[Leak]:
    """Test rows that are equal to a live training row, hold the same words, or similar ones; by test row.

    Texts and words alone are compared, not cosines. Of several training rows the most similar is named; of equally
    similar ones, the lowest row number.
    """
    thresholds.check()
    live, known = index.live, _Numbering()
    train = _read_rows(_live_blocks(index), known)
    tested = _read_rows([test.texts], known)
    leak_of: dict[int, Leak] = {}
    for kind, numbers, test_numbers in (
        (KINDS[0], train.same, tested.same),
        (KINDS[1], train.words, tested.words),
    ):
        first = dict(zip(*(values.tolist() for values in np.unique(numbers, return_index=True)), strict=True))
        for q, number in enumerate(test_numbers.tolist()):
            if q not in leak_of and number in first:
                leak_of[q] = Leak(test_row=q, row=int(live[first[number]]), kind=kind, jaccard=1.0)
    best: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for q, i, jaccard in zip(*near_pairs(tested.sets, thresholds.jaccard, train.sets), strict=True):
        best[int(q)] = max(best[int(q)], (float(jaccard), -int(i)))
    for q, (jaccard, i) in best.items():
        leak_of.setdefault(q, Leak(test_row=q, row=int(live[-i]), kind=KINDS[2], jaccard=jaccard))
    return [leak_of[q] for q in sorted(leak_of)]


def duplicates_report(
    groups: list[DuplicateGroup],
    retriever: Retriever,
    thresholds: Thresholds,
    top: int,
    command: str,
    test: QueryRows | None = None,
    leaked: Sequence[Leak] = (),
) -> tuple[Report, dict[str, Any]]:
    """The report, with the rows of the first ``top`` groups, and the numbers for ``result.json``.

    Raises:
        InputError: ``top`` is less than 1.
    """
    if top < 1:
        raise InputError(f"--top {top}: expected at least 1.")
    index = retriever.index
    n = index.manifest.n_live
    counts: list[list[Cell]] = []
    for kind in KINDS:
        of_kind = [g for g in groups if g.kind == kind]
        rows = sum(len(g.rows) for g in of_kind)
        counts.append([kind, len(of_kind), rows, rows - len(of_kind), sum(g.conflict for g in of_kind)])
    lines: list[list[Cell]] = []
    for number, group in enumerate(groups[:top], start=1):
        columns = row_cells(index, group.rows)
        labels = index.label_texts(group.rows)
        for i, row in enumerate(group.rows):
            cells: list[Cell] = [number, int(row), labels[i], group.conflict, group.kind]
            cells += [len(group.rows), group.weakest]
            lines.append([*cells, *(column[i] for column in columns.values())])
    text_heads = list(row_cells(index, np.empty(0, np.int64)))
    tables = [
        Table(
            "Duplicates by kind",
            ["kind", "groups", "rows", "surplus rows", "groups of different labels"],
            counts,
            "Same words: in the same order, case, punctuation and white space aside. Similar: word sets of a Jaccard "
            f"similarity of at least {thresholds.jaccard:g}, or neighbours of a cosine of at least "
            f"{thresholds.cosine:g} and a Jaccard similarity of at least {thresholds.cosine_jaccard:g}. Surplus: what "
            "would go if one row of each group stayed.",
        ),
        Table(
            "Groups",
            ["group", "row", "label", "labels differ", "kind", "rows", "weakest link", *text_heads],
            lines,
            f"The first {min(top, len(groups)):,} of {len(groups):,} groups, different labels first. Weakest link: "
            "least Jaccard similarity of two rows that are linked; the ends of a chain of links may be less similar.",
        ),
    ]
    conflicts = [g for g in groups if g.conflict]
    in_conflict = sum(len(g.rows) for g in conflicts)
    summary = (
        f"{sum(len(g.rows) for g in groups):,} of {n:,} rows are in {len(groups):,} groups of duplicates; "
        f"{len(conflicts):,} of those, {in_conflict:,} rows, hold different labels."
    )
    provenance = {"index": str(index.folder), "index digest": index.manifest.digest(), "rows": f"{n:,}"}
    result: dict[str, Any] = {
        "n_rows": n,
        "thresholds": asdict(thresholds),
        "groups": [{"rows": g.rows, "kind": g.kind, "weakest": g.weakest, "conflict": g.conflict} for g in groups],
    }
    if test is not None:
        tables += _leak_tables(test, leaked, retriever)
        share = len(leaked) / len(test.texts[0])
        summary += f" {len(leaked):,} of {len(test.texts[0]):,} test rows ({share:.1%}) are among the training rows."
        provenance["test rows"] = test.source
        result["leaks"] = [asdict(leak) for leak in leaked]
        result["n_test_rows"] = len(test.texts[0])
    shown = tuple(
        Group(
            f"Group {i}: {len(group.rows)} rows, {group.kind}" + (", different labels" if group.conflict else ""),
            row_passages(
                retriever,
                group.rows[:SHOWN_ROWS],
                [f"{k} of {len(group.rows)} · row {row}" for k, row in enumerate(group.rows[:SHOWN_ROWS], start=1)],
            ),
        )
        for i, group in enumerate(groups[:SHOWN_GROUPS], start=1)
    )
    return Report("Duplicates", summary, tables, (), shown, {**provenance, "command": command}), result


def _leak_tables(test: QueryRows, leaked: Sequence[Leak], retriever: Retriever) -> list[Table]:
    """How many test rows of each kind are found, and the first of them."""
    index = retriever.index
    n = len(test.texts[0])
    gold: Sequence[str | None] = [None] * n
    if test.labels is not None:
        gold = index.loss.texts(test.labels, retriever.label_names)
    rows = np.array([leak.row for leak in leaked], np.int64)
    labels, differs = index.label_texts(rows), np.zeros(len(rows), bool)
    if test.labels is not None:  # by the numbers, of which a text may show a part
        apart = test.labels[[leak.test_row for leak in leaked]] != index.labels[rows]
        differs = apart.any(axis=tuple(range(1, apart.ndim)))
    counts: list[list[Cell]] = []
    for kind in KINDS:
        of_kind = [i for i, leak in enumerate(leaked) if leak.kind == kind]
        of_other_label = None
        if test.labels is not None:
            of_other_label = sum(gold[leaked[i].test_row] is not None and bool(differs[i]) for i in of_kind)
        counts.append([kind, len(of_kind), len(of_kind) / n, of_other_label])
    lines: list[list[Cell]] = []
    for leak, label in zip(leaked[:SHOWN_LEAKS], labels, strict=False):
        cells: list[Cell] = [leak.test_row, leak.row, leak.kind, leak.jaccard, gold[leak.test_row], label]
        both = [column[leak.test_row] for column in test.texts]
        both += [c[0].as_py() for c in index.texts(np.array([leak.row])).values()]
        lines.append([*cells, *(c[0] for c in row_columns(index, [leak.row]).values()), *both])
    columns = index.manifest.spec.text_columns
    heads = ["test row", "row", "kind", "Jaccard", "test label", "label"]
    heads += row_columns(index, [])
    heads += [f"test text: {name}" for name in columns] + [f"text: {name}" for name in columns]
    note = f"The first {len(lines):,} of {len(leaked):,}. By texts and words, not by cosines."
    return [
        Table("Test rows among the training rows", ["kind", "test rows", "share", "of another label"], counts),
        Table("Test rows and the training rows most like them", heads, lines, note),
    ]
