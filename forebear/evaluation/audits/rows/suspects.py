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
from forebear.evaluation.common.passages import NO_LABEL, row_passages
from forebear.evaluation.measures.mislabelled import LOSS, NEIGHBOURS, self_influence
from forebear.evaluation.reports.report import Cell, Group, Report, Table
from forebear.indexer.index import Index
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

SHOWN_ROWS = 10
CONTRADICTING = 3  # neighbours and opponents named for each suspect


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Live rows, and how suspicious each measure finds them.

    Attributes:
        names: Self-influence methods, ``loss``, ``neighbours``: ``m``.
        rows: Row numbers, ``(n,)``.
        values: ``(m, n)``; larger: more suspicious.
        ranks: ``(m, n)``, 1 the most suspicious; equal values share their mean rank.
        neighbours: The k nearest other rows, nearest first, ``(n, k)``.
        majority: Most frequent label of those, ``(n,)``; the row's own wins a tie, then the lower class id.
        suggested: The prediction where it is another label, else the majority where that is, else -1, ``(n,)``.
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
    values = {name: found[live] for name, found in self_influence(question).items()}
    neighbours, _ = nearest_rows(index, live, n_neighbours)
    values[LOSS] = index.losses[live].astype(np.float64)
    values[NEIGHBOURS] = label_disagreement(labels, live, neighbours)
    stacked = np.stack(list(values.values()))
    majority = majority_label(labels[neighbours], labels[live], len(retriever.label_names))
    predictions = index.predictions[live]
    other = np.where(majority != labels[live], majority, NO_LABEL)
    return Suspects(
        names=tuple(values),
        rows=live,
        values=stacked,
        ranks=rankdata(-stacked, axis=1),
        neighbours=neighbours,
        majority=majority,
        suggested=np.where(predictions != labels[live], predictions, other),
    )


def majority_label(neighbours: np.ndarray, own: np.ndarray, n_classes: int) -> np.ndarray:
    """Most frequent class among ``(n, k)`` labels; a row's own ``(n,)`` wins a tie, then the lower id."""
    counts = np.stack([(neighbours == c).sum(axis=1) for c in range(n_classes)], axis=1)
    return np.asarray((2 * counts + (np.arange(n_classes) == own[:, None])).argmax(axis=1))


def opponents_of(retriever: Retriever, spec: QuerySpec, rows: np.ndarray) -> tuple[np.ndarray, str]:
    """The rows that speak most against the labels of some training rows, ``(m, <= CONTRADICTING)``.

    Opponents by the first method, each row being asked about with its gold label; a row is not its own opponent.
    With them, what must be said of those that do not speak against the label.
    """
    index = retriever.index
    k = min(CONTRADICTING, index.manifest.n_live - 1)
    asked = QuerySpec(
        methods=spec.methods[:1], scope=spec.scope, curvature=spec.curvature, damping=spec.damping, top=k + 1,
        target="gold",
    )  # fmt: skip
    answers = retriever.answer_block(0, index.text_lists(rows), index.labels[rows].astype(np.int64), asked)
    found = answers.found[asked.methods[0]][1]
    others = ~own_places(found.rows, rows)
    note = note_of(asked.methods[0], SIDES[1], found.scores[others])
    return found.rows[others].reshape(len(rows), -1), note


def own_places(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Where each line's own row stands among ``(m, k + 1)`` row numbers, or else the last place: one a line, bool."""
    is_own = found == own[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return np.asarray(is_own)


def suspects_report(
    found: Suspects, retriever: Retriever, spec: QuerySpec | Question, top: int, command: str
) -> tuple[Report, dict[str, Any]]:
    """The report of the ``top`` most suspicious rows, and the numbers of all for ``result.json``.

    Raises:
        InputError: ``top`` is less than 1.
    """
    question = retriever.resolve(spec)
    if top < 1:
        raise InputError(f"--top {top}: expected at least 1.")
    n = len(found.rows)
    at = found.order[:top]
    opponents, signs = opponents_of(retriever, question.spec, found.rows[at])
    texts = retriever.index.texts(found.rows[at])
    lines = [_line(found, retriever.index, int(p), opponents[i]) for i, p in enumerate(at)]
    measures = [f"rank by {name}" for name in found.names]
    head = ["row", "mean rank", "label", "suggested", "prediction", "neighbours' majority", *found.names, *measures]
    table = Table(
        "Rows suspected of a wrong label",
        [*head, "contradicting neighbours", "strongest opponents", *(f"text: {name}" for name in texts)],
        [[*line, *(column[i].as_py() for column in texts.values())] for i, line in enumerate(lines)],
        f"The first {len(at):,} of {n:,} rows by the mean of their ranks by {len(found.names)} measures (1: the most "
        "suspicious), all counting the same. Suggested: the prediction where it is another label, else that of most "
        f"neighbours. Contradicting: the nearest of the {found.neighbours.shape[1]} neighbours with another label. "
        f"Opponents: by {question.spec.methods[0]}, against the row's own label. {signs}".rstrip(),
    )
    wrong = int((found.suggested[at] != NO_LABEL).sum())
    agreement = [[float(spearman(a[None], b[None])[0]) for b in found.values] for a in found.values]
    plain = [[None if np.isnan(value) else value for value in row] for row in agreement]
    figure = matrix_figure(
        "Do the measures order the rows alike?", found.names, plain, low=-1.0,
        caption="Spearman correlation over all rows. Measures that agree count as many times in the mean rank.",
    )  # fmt: skip
    report = Report(
        "Suspected wrong labels",
        f"Row {found.rows[at[0]]} is the most suspicious of {n:,}. Of the first {len(at):,}, {wrong:,} have another "
        "label by the model or by most of their neighbours.",
        (table,),
        (figure,),
        tuple(_group(found, retriever, int(p), opponents[i], i) for i, p in enumerate(at[:SHOWN_ROWS])),
        provenance(retriever, spec, command, rows=n, neighbours=found.neighbours.shape[1]),
    )
    result = {
        "question": question_record(retriever, spec),
        "rows": found.rows,
        "mean_rank": found.combined,
        "values": {name: listed_values(values) for name, values in zip(found.names, found.values, strict=True)},
        "suggested": [None if c == NO_LABEL else retriever.label_names[c] for c in found.suggested],
        "listed": found.rows[at],
        "opponents": opponents,
        "spearman": dict(zip(found.names, plain, strict=True)),
        "neighbours": found.neighbours.shape[1],
    }
    return report, result


def _contradicting(found: Suspects, index: Index, position: int) -> np.ndarray:
    """The nearest neighbours of a row that have another label."""
    near = found.neighbours[position]
    return np.asarray(near[index.labels[near] != index.labels[found.rows[position]]][:CONTRADICTING])


def _line(found: Suspects, index: Index, position: int, opponents: np.ndarray) -> list[Cell]:
    names = index.manifest.spec.label_names
    row, suggested = int(found.rows[position]), int(found.suggested[position])
    return [
        row,
        float(found.combined[position]),
        names[index.labels[row]],
        None if suggested == NO_LABEL else names[suggested],
        names[index.predictions[row]],
        names[found.majority[position]],
        *(float(value) for value in found.values[:, position]),
        *(float(value) for value in found.ranks[:, position]),
        ", ".join(map(str, _contradicting(found, index, position))) or None,
        ", ".join(map(str, opponents)),
    ]


def _group(found: Suspects, retriever: Retriever, position: int, opponents: np.ndarray, rank: int) -> Group:
    """A suspect, and the rows that contradict it."""
    index, names = retriever.index, retriever.label_names
    row, suggested = int(found.rows[position]), int(found.suggested[position])
    hint = "" if suggested == NO_LABEL else f"suggested: {names[suggested]}"
    rows = {"neighbour": _contradicting(found, index, position), "opponent": opponents}
    numbered = [(kind, int(number)) for kind, numbers in rows.items() for number in numbers]
    passages = row_passages(
        retriever, [number for _, number in numbered], [f"{kind} · row {number}" for kind, number in numbered]
    )
    heading = f"mean rank {found.combined[position]:.1f} · row {row}"
    (query,) = row_passages(retriever, [row], [heading], notes=[hint])
    return Group(f"{rank + 1}. Row {row}, labelled {names[index.labels[row]]}", passages, query=query)
