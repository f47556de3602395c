"""``audit mislabelled``: training rows suspected of a wrong label, without knowing any true one.

Measures: influence on itself (||g||^2 for ``gd``, <H^-1 g, g> for ``if``), the loss, the disagreement of neighbours
(share of the k nearest rows, by cosine of the features, with another label); of one label a row also those of
:mod:`forebear.evaluation.common.label_evidence.evidence`, whose estimate that the label is wrong orders the list.
Several labels or numbers a row are ordered by the mean of their ranks by the measures, 1 the most suspicious.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.rows.doubts import Doubts, doubts
from forebear.evaluation.common.comparisons import listed_values, matrix_figure, provenance, question_record, spearman
from forebear.evaluation.common.label_evidence.evidence import OUT_OF_FOLD, VOTERS, label_evidence
from forebear.evaluation.common.label_evidence.planted import calibrated
from forebear.evaluation.common.neighbours import label_disagreement, nearest_up_to
from forebear.evaluation.common.passages import NO_LABEL, row_cells, row_passages
from forebear.evaluation.measures.mislabelled import LOSS, NEIGHBOURS, approximations, note_on, self_influence
from forebear.evaluation.reports.report import Cell, Group, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION, SINGLE_LABEL
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
        names: Measures, ``m`` of them: the self-influence methods, ``loss``, ``neighbours``; of one label a row those
            of :class:`~forebear.evaluation.common.label_evidence.evidence.LabelEvidence`.
        rows: Row numbers, ``(n,)``.
        values: ``(m, n)``; larger: more suspicious.
        ranks: ``(m, n)``, 1 the most suspicious; equal values share their mean rank.
        neighbours: The k nearest other rows, nearest first, ``(n, k)``.
        doubts: What speaks against each row's label, and what is suggested instead.
        suspicion: The logit of the chance that each row's label is wrong, by all evidence, ``(n,)``, by which rows are
            ordered; None for several labels or numbers a row.
        probability: The probability itself, likewise: the estimated one, or measured where rows were planted.
        written: How often each true label, a line, is written as each label, ``(c, c)``, likewise.
        planted: Whether each row's label was made wrong on purpose, ``(n,)`` bool, where probabilities were measured on
            such rows; None: they are estimated.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    values: np.ndarray
    ranks: np.ndarray
    neighbours: np.ndarray
    doubts: Doubts
    suspicion: np.ndarray | None = None
    probability: np.ndarray | None = None
    written: np.ndarray | None = None
    planted: np.ndarray | None = None

    @property
    def majority(self) -> np.ndarray:
        """Most frequent label of the neighbours; see :class:`Doubts`."""
        return self.doubts.majority

    @property
    def suggested(self) -> np.ndarray:
        """Suggested label, of one label a row by all evidence; see :class:`Doubts`."""
        return self.doubts.suggested

    @property
    def chance(self) -> str:
        """What the probability is called: an estimate is no probability that was measured."""
        return "estimated probability" if self.planted is None else "probability"

    @property
    def combined(self) -> np.ndarray:
        """Mean of a row's ranks by all measures, ``(n,)``."""
        return np.asarray(self.ranks.mean(axis=0))

    @property
    def order(self) -> np.ndarray:
        """Positions of the rows, the most suspicious first, none that was planted; ties go to the lower row number.

        By the suspicion, also where probabilities were measured; without one by the mean rank.
        """
        order = np.argsort(self.combined if self.suspicion is None else -self.suspicion, kind="stable")
        return order if self.planted is None else order[~self.planted[order]]


def suspects(
    retriever: Retriever, spec: QuerySpec | Question, *, n_neighbours: int = 10, planted: np.ndarray | None = None
) -> Suspects:
    """Measure every live row.

    Args:
        retriever: Over the index; no model is run.
        spec: Methods whose self-influence is stored (``gd``, ``if``, ``tracin``), scope, damping.
        n_neighbours: k of the disagreement of neighbours.
        planted: Whether the label of each row of the index was made wrong on purpose before the training, ``(N,)``
            bool: probabilities are then measured on these rows, and the rows are not listed.

    Raises:
        InputError: A method's self-influence is not stored, or there are not as many neighbours; or too few rows are
            planted, or rows do not have one label each.
    """
    from scipy.stats import rankdata

    question = retriever.resolve(spec)
    index = retriever.index
    live, labels = index.live, index.labels
    values = {name: influences[live] for name, influences in self_influence(question).items()}
    has_one_label = index.loss.problem_type == SINGLE_LABEL
    near, cosines = nearest_up_to(retriever.models, live, n_neighbours, VOTERS if has_one_label else 0)
    neighbours = near[:, :n_neighbours]
    values[LOSS] = index.losses[live].astype(np.float64)
    values[NEIGHBOURS] = label_disagreement(labels, live, neighbours)
    doubted = doubts(index, live, neighbours)
    found: dict[str, Any] = {}
    if has_one_label:
        evidence = label_evidence(index, live, near[:, :VOTERS], cosines[:, :VOTERS])
        values |= evidence.measures
        suspicion, probability = evidence.suspicion, evidence.estimated
        if planted is not None:
            planted = planted[live]
            probability = calibrated(evidence.estimated, planted)
        found = {"suspicion": suspicion, "probability": probability, "written": evidence.written, "planted": planted}
        is_suggested = doubted.is_suggested | (evidence.chances.argmax(axis=1) != labels[live])
        suggested = np.where(is_suggested, evidence.suggested, NO_LABEL)
        doubted = replace(doubted, suggested=suggested, is_suggested=is_suggested)
    elif planted is not None:
        raise InputError("--planted needs one label a row; expected an index of single labels.", of="audit mislabelled")
    stacked = np.stack(list(values.values()))
    return Suspects(
        names=tuple(values),
        rows=live,
        values=stacked,
        ranks=rankdata(-stacked, axis=1),
        neighbours=neighbours,
        doubts=doubted,
        **found,
    )


def opponents_of(retriever: Retriever, spec: QuerySpec, rows: np.ndarray) -> tuple[np.ndarray, str]:
    """The rows that speak most against the labels of some training rows, ``(m, <= CONTRADICTING)``.

    Each row is the query with its gold label; of one label a row by the gradients' cosine, else by the first method. A
    row is not its own opponent. Beside the opponents, a note for the report where some do not speak against the label.
    """
    index = retriever.index
    k = min(CONTRADICTING, index.manifest.n_live - 1)
    method = _opposing(index, spec)
    opponent_spec = QuerySpec(
        methods=(method,), scope=spec.scope, curvature=spec.curvature, damping=spec.damping, top=k + 1,
        target="gold",
    )  # fmt: skip
    answers = retriever.answer_block(0, index.text_lists(rows), index.targets(rows), opponent_spec)
    ranking = answers.rankings[method][1]
    is_other = ~own_places(ranking.rows, rows)
    note = note_of(method, SIDES[1], ranking.scores[is_other])
    return ranking.rows[is_other].reshape(len(rows), -1), note


def _opposing(index: Index, spec: QuerySpec) -> str:
    return "gc" if index.loss.problem_type == SINGLE_LABEL else spec.methods[0]


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
    given = row_cells(retriever.index, suspected.rows[positions])
    lines = [_line(suspected, retriever.index, int(p), opponents[i]) for i, p in enumerate(positions)]
    several = suspected.doubts.doubted is not None
    chance = [] if suspected.probability is None else [suspected.chance]
    head = ["row", *chance, "mean rank", "label", *(["doubted"] if several else []), "suggested", "prediction"]
    head += ["neighbours' majority", *suspected.names]
    table = Table(
        "Rows suspected of a wrong label",
        [*head, "contradicting neighbours", "strongest opponents", *given],
        [[*line, *(cells[i] for cells in given.values())] for i, line in enumerate(lines)],
        f"The first {len(positions):,} of {n:,} rows by {_order(suspected)} Mean rank: of their ranks by "
        f"{len(suspected.names)} measures, 1 the most suspicious. {_suggestion(suspected, retriever.index)} "
        f"Contradicting: the nearest of the {suspected.neighbours.shape[1]} neighbours "
        f"{_contradiction(retriever.index)}. Opponents: by "
        f"{_opposing(retriever.index, question.spec)}, against the row's own label. {signs}".rstrip(),
    )
    by_group = () if grouping is None else (groups_table(suspected, grouping, positions),)
    wrong = int(suspected.doubts.is_suggested[positions].sum())
    names = retriever.label_names
    agreement = [[float(spearman(a[None], b[None])[0]) for b in suspected.values] for a in suspected.values]
    spearmans = [[None if np.isnan(value) else value for value in row] for row in agreement]
    figure = matrix_figure(
        "Do the measures order the rows alike?", suspected.names, spearmans, low=-1.0,
        caption="Spearman correlation over all rows. Measures that agree count as many times in the mean rank.",
    )  # fmt: skip
    report = Report(
        "Suspected wrong labels",
        f"Row {suspected.rows[positions[0]]} is the most suspicious of {n:,}. {_expected(suspected)}"
        f"{_found(suspected, wrong, len(positions), retriever.index)} {note_on(approximate)}".rstrip(),
        (table, *by_group),
        (figure,),
        tuple(_group(suspected, retriever, int(p), opponents[i], i) for i, p in enumerate(positions[:SHOWN_ROWS])),
        provenance(retriever, spec, command, rows=n, neighbours=suspected.neighbours.shape[1]),
    )
    chance_key = suspected.chance.replace(" ", "_")
    result = {
        "question": question_record(retriever, spec),
        "rows": suspected.rows,
        "mean_rank": suspected.combined,
        **({} if suspected.probability is None else {chance_key: listed_values(suspected.probability)}),
        **({} if suspected.written is None else {"written": suspected.written}),
        "values": {name: listed_values(values) for name, values in zip(suspected.names, suspected.values, strict=True)},
        **({"self_influence": approximate} if approximate else {}),
        "suggested": retriever.index.loss.texts(suspected.suggested, names),
        **({} if suspected.doubts.doubted is None else {"doubted": [names[k] for k in suspected.doubts.doubted]}),
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


def _expected(suspected: Suspects) -> str:
    """How many rows are expected to be labelled wrongly, and by what."""
    if suspected.probability is None:
        return ""
    if suspected.planted is None:
        return (
            f"By estimate {suspected.probability.mean():.1%} of the labels are wrong; of people's errors such an "
            "estimate has found several times too few. "
        )
    return (
        f"By estimate {suspected.probability[~suspected.planted].mean():.1%} of the labels that were not planted are "
        f"wrong; which ones is measured on {suspected.planted.sum():,} planted flips. "
    )


def _order(suspected: Suspects) -> str:
    if suspected.probability is None:
        return "mean rank."
    measured = "" if suspected.planted is None else " The probability shown is measured on planted flips."
    refits, left_out = "refitted heads, ", ""
    if OUT_OF_FOLD not in suspected.names:
        refits, left_out = "", " Left out: refitted heads, which would take too long with so many labels."
    return (
        f"the estimated probability that the label is wrong: by Bayes' rule from the model's checkpoints, {refits}"
        f"the nearest rows, and how often each label is written for each other.{measured}{left_out}"
    )


def contradicting_neighbours(suspected: Suspects, position: int) -> np.ndarray:
    """The nearest neighbours of a row that contradict its label."""
    near = suspected.neighbours[position]
    return np.asarray(near[suspected.doubts.contradicting[position]][:CONTRADICTING])


def _found(suspected: Suspects, wrong: int, n: int, index: Index) -> str:
    """How many of the first ``n`` rows have another label suggested; of numbers every row has."""
    if index.loss.problem_type == REGRESSION:
        return ""
    by = "by the model or by most of their neighbours"
    if suspected.suspicion is not None:
        by = "by the model, by most of their neighbours or by all evidence"
    return f"Of the first {n:,}, {wrong:,} have another label {by}."


def _suggestion(suspected: Suspects, index: Index) -> str:
    """What is suggested for a row, in words."""
    if index.loss.problem_type == REGRESSION:
        return "Suggested: the prediction. Majority: the median of the neighbours."
    if suspected.doubts.doubted is not None:
        return (
            "Doubted: the label whose probability is farthest from what the row says. Suggested: the row's labels with "
            "this one changed, where the prediction or most neighbours have it otherwise."
        )
    return "Suggested: the likeliest other label, where the prediction, most neighbours or all evidence is another one."


def _contradiction(index: Index) -> str:
    of_kind = {MULTI_LABEL: "that have the doubted label otherwise", REGRESSION: "that are nearer to the prediction"}
    return of_kind.get(index.loss.problem_type, "with another label")


def _text(index: Index, targets: np.ndarray, position: int) -> str | None:
    return index.loss.texts(targets[[position]], index.manifest.spec.label_names)[0]


def _line(suspected: Suspects, index: Index, position: int, opponents: np.ndarray) -> list[Cell]:
    row, doubted = suspected.rows[[position]], suspected.doubts.doubted
    return [
        int(row[0]),
        *([] if suspected.probability is None else [float(suspected.probability[position])]),
        float(suspected.combined[position]),
        *index.label_texts(row),
        *([] if doubted is None else [index.manifest.spec.label_names[doubted[position]]]),
        _text(index, suspected.suggested, position),
        *index.prediction_texts(row),
        _text(index, suspected.majority, position),
        *(float(value) for value in suspected.values[:, position]),
        ", ".join(map(str, contradicting_neighbours(suspected, position))) or None,
        ", ".join(map(str, opponents)),
    ]


def _group(suspected: Suspects, retriever: Retriever, position: int, opponents: np.ndarray, rank: int) -> Group:
    """A suspect, and the rows that contradict it."""
    index, row = retriever.index, int(suspected.rows[position])
    suggested = _text(index, suspected.suggested, position)
    hint = "" if suggested is None else f"suggested: {suggested}"
    rows = {"neighbour": contradicting_neighbours(suspected, position), "opponent": opponents}
    numbered = [(kind, int(number)) for kind, numbers in rows.items() for number in numbers]
    passages = row_passages(
        retriever, [number for _, number in numbered], [f"{kind} · row {number}" for kind, number in numbered]
    )
    heading = f"mean rank {suspected.combined[position]:.1f} · row {row}"
    if suspected.probability is not None:
        heading = f"{suspected.chance} {suspected.probability[position]:.2f} · row {row}"
    (query,) = row_passages(retriever, [row], [heading], notes=[hint])
    return Group(f"{rank + 1}. Row {row}, labelled {index.label_texts(np.array([row]))[0]}", passages, query=query)
