"""``audit mislabelled``: training rows suspected of a wrong label, without knowing any true one.

Each measure ranks the rows, 1 the most suspicious: influence on itself (||g||^2 for ``gd``, <H^-1 g, g> for ``if``),
the loss, and the disagreement of neighbours (share of the k nearest rows, by cosine of the features, with another
label). The list is ordered by the mean of these ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import listed_values, matrix_figure, provenance, question_record, spearman
from forebear.evaluation.common.neighbours import label_disagreement, nearest_rows
from forebear.evaluation.common.passages import NO_LABEL, row_columns, row_passages
from forebear.evaluation.measures.mislabelled import LOSS, NEIGHBOURS, approximations, note_on, self_influence
from forebear.evaluation.reports.report import Cell, Group, Report, Table
from forebear.indexer.index import Index
from forebear.retriever.answers.groups import Grouping
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

SHOWN_ROWS = 10
MOST_GROUPS = 50
CONTRADICTING = 3  # neighbours and opponents named for each suspect


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Suspicion of each live row by several measures.

    Attributes:
        names: Measures, ``m`` of them: the self-influence methods, ``loss``, ``neighbours``.
        rows: Row numbers, ``(n,)``.
        values: ``(m, n)``; larger: more suspicious.
        ranks: ``(m, n)``, 1 the most suspicious; equal values share their mean rank.
        neighbours: The k nearest other rows, nearest first, ``(n, k)``.
        majority: Most frequent label of the neighbours, ``(n,)``; the row's own label wins a tie, then the lower id.
        suggested: Suggested label, ``(n,)``: the prediction where it is not the row's label, else the majority where
            that is not, else -1.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    values: np.ndarray
    ranks: np.ndarray
    neighbours: np.ndarray
    majority: np.ndarray
    suggested: np.ndarray

    @property
    def combined(self) -> np.ndarray:
        """Mean of a row's ranks by all measures, ``(n,)``."""
        return np.asarray(self.ranks.mean(axis=0))

    @property
    def order(self) -> np.ndarray:
        """Positions of the rows, the most suspicious first; ties go to the lower row number."""
        return np.argsort(self.combined, kind="stable")


def suspects(retriever: Retriever, spec: QuerySpec | Question, *, n_neighbours: int = 10) -> Suspects:
    """Rank every live row by each measure.

    Args:
        retriever: Over the index; no model is run.
        spec: Methods whose self-influence is stored (``gd``, ``if``, ``tracin``), scope, damping.
        n_neighbours: k of the disagreement of neighbours.

    Raises:
        InputError: A method's self-influence is not stored, or there are not as many neighbours.
    """
    from scipy.stats import rankdata

    question = retriever.resolve(spec)
    index = retriever.index
    live, labels = index.live, index.labels
    values = {name: influences[live] for name, influences in self_influence(question).items()}
    neighbours, _ = nearest_rows(index, live, n_neighbours)
    values[LOSS] = index.losses[live].astype(np.float64)
    values[NEIGHBOURS] = label_disagreement(labels, live, neighbours)
    stacked = np.stack(list(values.values()))
    majority = majority_label(labels[neighbours], labels[live], len(retriever.label_names))
    predictions = index.predictions[live]
    other_majority = np.where(majority != labels[live], majority, NO_LABEL)
    return Suspects(
        names=tuple(values),
        rows=live,
        values=stacked,
        ranks=rankdata(-stacked, axis=1),
        neighbours=neighbours,
        majority=majority,
        suggested=np.where(predictions != labels[live], predictions, other_majority),
    )


def majority_label(neighbours: np.ndarray, row_labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Most frequent class among ``(n, k)`` labels; a row's own ``(n,)`` wins a tie, then the lower id."""
    counts = np.stack([(neighbours == c).sum(axis=1) for c in range(n_classes)], axis=1)
    return np.asarray((2 * counts + (np.arange(n_classes) == row_labels[:, None])).argmax(axis=1))


def opponents_of(retriever: Retriever, spec: QuerySpec, rows: np.ndarray) -> tuple[np.ndarray, str]:
    """The rows that speak most against the labels of some training rows, ``(m, <= CONTRADICTING)``.

    Each row is the query with its gold label, by the first method; a row is not its own opponent. Beside the opponents,
    a note for the report where some of them do not speak against the label.
    """
    index = retriever.index
    k = min(CONTRADICTING, index.manifest.n_live - 1)
    opponent_spec = QuerySpec(
        methods=spec.methods[:1], scope=spec.scope, curvature=spec.curvature, damping=spec.damping, top=k + 1,
        target="gold",
    )  # fmt: skip
    answers = retriever.answer_block(0, index.text_lists(rows), index.targets(rows), opponent_spec)
    ranking = answers.rankings[opponent_spec.methods[0]][1]
    is_other = ~own_places(ranking.rows, rows)
    note = note_of(opponent_spec.methods[0], SIDES[1], ranking.scores[is_other])
    return ranking.rows[is_other].reshape(len(rows), -1), note


def own_places(found_rows: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
    """The place to leave out of each query's ``(m, k + 1)`` rows: the query's own row, or else the last; bool."""
    is_own = found_rows == query_rows[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return np.asarray(is_own)


def groups_table(suspected: Suspects, grouping: Grouping, positions: np.ndarray) -> Table:
    """How many of the suspects each group of rows has, those with most of them first.

    Args:
        suspected: Suspicion of each live row.
        grouping: The live rows, parted by a column.
        positions: The rows that are listed as suspects, among all.
    """
    m, numbers = len(grouping), grouping.numbers
    rows, listed = (np.bincount(some, minlength=m) for some in (numbers, numbers[positions]))
    ranks = np.bincount(numbers, suspected.combined, m) / rows
    order = np.lexsort((-listed / rows, -listed))[:MOST_GROUPS]
    names = grouping.names
    lines: list[list[Cell]] = [
        [names[g], int(rows[g]), int(listed[g]), listed[g] / rows[g], listed[g] / len(positions), float(ranks[g])]
        for g in order.tolist()
    ]
    n = len(numbers)
    return Table(
        f"Suspects by {grouping.column}",
        [grouping.column, "rows", "suspects", "share of its rows", "share of the suspects", "mean of mean ranks"],
        lines,
        f"Suspects: the {len(positions):,} rows listed, {len(positions) / n:.1%} of all {n:,}; a group with a larger "
        f"share of its rows among them has more than its part. The first {len(lines):,} of {m:,} groups, most suspects "
        "first.",
    )


def suspects_report(
    suspected: Suspects,
    retriever: Retriever,
    spec: QuerySpec | Question,
    top: int,
    command: str,
    grouping: Grouping | None = None,
) -> tuple[Report, dict[str, Any]]:
    """The report of the ``top`` most suspicious rows, and the numbers of all for ``result.json``; counts by group.

    Raises:
        InputError: ``top`` is less than 1.
    """
    question = retriever.resolve(spec)
    if top < 1:
        raise InputError(f"--top {top}: expected at least 1.")
    n, approximate = len(suspected.rows), approximations(question)
    positions = suspected.order[:top]
    opponents, signs = opponents_of(retriever, question.spec, suspected.rows[positions])
    texts = retriever.index.texts(suspected.rows[positions])
    others = row_columns(retriever.index, suspected.rows[positions])
    lines = [_line(suspected, retriever.index, int(p), opponents[i]) for i, p in enumerate(positions)]
    measures = [f"rank by {name}" for name in suspected.names]
    head = ["row", "mean rank", "label", "suggested", "prediction", "neighbours' majority", *suspected.names, *measures]
    table = Table(
        "Rows suspected of a wrong label",
        [*head, "contradicting neighbours", "strongest opponents", *others, *(f"text: {name}" for name in texts)],
        [
            [*line, *(cells[i] for cells in others.values()), *(column[i].as_py() for column in texts.values())]
            for i, line in enumerate(lines)
        ],
        f"The first {len(positions):,} of {n:,} rows by the mean of their ranks by {len(suspected.names)} measures (1: "
        "the most suspicious), all counting the same. Suggested: the prediction where it is another label, else that "
        f"of most neighbours. Contradicting: the nearest of the {suspected.neighbours.shape[1]} neighbours with "
        f"another label. Opponents: by {question.spec.methods[0]}, against the row's own label. {signs}".rstrip(),
    )
    by_group = () if grouping is None else (groups_table(suspected, grouping, positions),)
    wrong = int((suspected.suggested[positions] != NO_LABEL).sum())
    agreement = [[float(spearman(a[None], b[None])[0]) for b in suspected.values] for a in suspected.values]
    spearmans = [[None if np.isnan(value) else value for value in row] for row in agreement]
    figure = matrix_figure(
        "Do the measures order the rows alike?", suspected.names, spearmans, low=-1.0,
        caption="Spearman correlation over all rows. Measures that agree count as many times in the mean rank.",
    )  # fmt: skip
    report = Report(
        "Suspected wrong labels",
        f"Row {suspected.rows[positions[0]]} is the most suspicious of {n:,}. Of the first {len(positions):,}, "
        f"{wrong:,} have another label by the model or by most of their neighbours. {note_on(approximate)}".rstrip(),
        (*by_group, table),
        (figure,),
        tuple(_group(suspected, retriever, int(p), opponents[i], i) for i, p in enumerate(positions[:SHOWN_ROWS])),
        provenance(retriever, spec, command, rows=n, neighbours=suspected.neighbours.shape[1]),
    )
    result = {
        "question": question_record(retriever, spec),
        "rows": suspected.rows,
        "mean_rank": suspected.combined,
        "values": {name: listed_values(values) for name, values in zip(suspected.names, suspected.values, strict=True)},
        **({"self_influence": approximate} if approximate else {}),
        "suggested": [None if c == NO_LABEL else retriever.label_names[c] for c in suspected.suggested],
        "listed": suspected.rows[positions],
        "opponents": opponents,
        **(
            {"groups": [dict(zip(one.columns, row, strict=True)) for one in by_group for row in one.rows]}
            if by_group
            else {}
        ),
        "spearman": dict(zip(suspected.names, spearmans, strict=True)),
        "neighbours": suspected.neighbours.shape[1],
    }
    return report, result


def _contradicting(suspected: Suspects, index: Index, position: int) -> np.ndarray:
    """The nearest neighbours of a row that have another label."""
    near = suspected.neighbours[position]
    return np.asarray(near[index.labels[near] != index.labels[suspected.rows[position]]][:CONTRADICTING])


def _line(suspected: Suspects, index: Index, position: int, opponents: np.ndarray) -> list[Cell]:
    names = index.manifest.spec.label_names
    row, suggested = int(suspected.rows[position]), int(suspected.suggested[position])
    return [
        row,
        float(suspected.combined[position]),
        names[index.labels[row]],
        None if suggested == NO_LABEL else names[suggested],
        names[index.predictions[row]],
        names[suspected.majority[position]],
        *(float(value) for value in suspected.values[:, position]),
        *(float(value) for value in suspected.ranks[:, position]),
        ", ".join(map(str, _contradicting(suspected, index, position))) or None,
        ", ".join(map(str, opponents)),
    ]


def _group(suspected: Suspects, retriever: Retriever, position: int, opponents: np.ndarray, rank: int) -> Group:
    """A suspect, and the rows that contradict it."""
    index, names = retriever.index, retriever.label_names
    row, suggested = int(suspected.rows[position]), int(suspected.suggested[position])
    hint = "" if suggested == NO_LABEL else f"suggested: {names[suggested]}"
    rows = {"neighbour": _contradicting(suspected, index, position), "opponent": opponents}
    numbered = [(kind, int(number)) for kind, numbers in rows.items() for number in numbers]
    passages = row_passages(
        retriever, [number for _, number in numbered], [f"{kind} · row {number}" for kind, number in numbered]
    )
    heading = f"mean rank {suspected.combined[position]:.1f} · row {row}"
    (query,) = row_passages(retriever, [row], [heading], notes=[hint])
    return Group(f"{rank + 1}. Row {row}, labelled {names[index.labels[row]]}", passages, query=query)
