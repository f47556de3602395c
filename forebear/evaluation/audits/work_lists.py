"""The training rows that audits name, as work lists: what could be done about each, and why it is listed.

No list says that a row is wrong: a reason says what was found, and a suggestion is made only where the rows themselves
make it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np

from forebear.evaluation.audits.artifacts.features import Feature
from forebear.evaluation.audits.artifacts.hans import HansAudit, shortcut_rows, telling_method
from forebear.evaluation.audits.artifacts.regression import ArtifactRegression
from forebear.evaluation.audits.rows.duplicates import DuplicateGroup
from forebear.evaluation.audits.rows.errors import ErrorGroup
from forebear.evaluation.audits.rows.hubs import Hubs
from forebear.evaluation.audits.rows.suspects import Suspects, contradicting_neighbours
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.index import Index
from forebear.retriever.answers.results import SIDES, Answers
from forebear.retriever.question.spec import QuerySpec

MOST_BEHIND: Final = 100  # rows listed as being behind predictions
_PREDICTED: Final = "predicted"


def duplicates_list(groups: Sequence[DuplicateGroup], index: Index) -> WorkList:
    """Rows of groups: all of those whose labels differ, else those that could go while the first one stays.

    Where most rows of a group have one label, it is suggested for the others. The figure is the least similarity of the
    links that join the group.
    """
    rows: list[int] = []
    reasons: list[str] = []
    suggested: list[str | None] = []
    others: list[list[int]] = []
    weakest: list[float] = []
    for group in groups:
        members = group.rows.tolist()
        labels = index.label_texts(group.rows)
        (most, n_most), *rest = Counter(labels).most_common()
        majority = most if not rest or n_most > rest[0][1] else None
        alike = {"same texts": "the same texts", "same words": "the same words"}.get(group.kind, "similar words")
        for place, (row, label) in enumerate(zip(members, labels, strict=True)):
            if group.conflict:
                apart = [other for other, its in zip(members, labels, strict=True) if its != label]
                reasons.append(f"{len(apart)} of the {len(members) - 1} other rows with {alike} have another label")
                others.append(apart)
                suggested.append(None if majority in (None, label) else majority)
            elif place:
                reasons.append(f"row {members[0]} has {alike} and the same label; one of them could go")
                others.append([])
                suggested.append(None)
            else:
                continue
            rows.append(row)
            weakest.append(group.weakest)
    figures = {"weakest link": weakest}
    return list_rows(index, rows, reasons, suggested=suggested, evidence=figures, contradicting=others)


def errors_list(groups: Sequence[ErrorGroup], answers: Answers, index: Index, spec: QuerySpec) -> WorkList:
    """Rows that support mistakes, by the first method: those behind most mistakes first.

    Asked about the predictions, proponents support the mistakes; about another label, opponents do.
    """
    method, ends = next(iter(answers.rankings.items()))
    side = 0 if spec.target == _PREDICTED else 1
    ranking = ends[side]
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for g in range(len(groups)):
        for rank, row in enumerate(ranking.rows[g].tolist(), start=1):
            places[row].append((g, rank))
    sizes = {row: sum(len(groups[g].members) for g, _ in found) for row, found in places.items()}
    rows = sorted(places, key=lambda row: (-sizes[row], min(rank for _, rank in places[row]), row))
    reasons = [
        "; ".join(
            f"{SIDES[side]} {rank} by {method} of {len(groups[g].members):,} mistakes {groups[g].name}"
            for g, rank in places[row]
        )
        for row in rows
    ]
    best = [
        max(abs(float(ranking.scores[g, rank - 1])) / len(groups[g].members) for g, rank in places[row]) for row in rows
    ]
    figures = {"mistakes": np.array([sizes[row] for row in rows]), "largest score a mistake": np.array(best)}
    return list_rows(index, rows, reasons, evidence=figures)


def hubs_list(counted: Hubs, index: Index) -> WorkList:
    """Rows that come up for more queries than chance allows, by any method; those of the largest share first."""
    largest = counted.counts.max(axis=0)
    order = np.argsort(-largest, kind="stable")
    order = order[largest[order] >= counted.hub_count]
    shares = counted.shares[:, order]
    reasons = [
        "in the top "
        f"{counted.top} of {', '.join(f'{s:.1%} of the queries by {m}' for m, s in _hub_shares(counted, column))}; "
        f"where no row is preferred, of {counted.expected:.2%}"
        for column in order.tolist()
    ]
    figures = {f"share by {name}": share for name, share in zip(counted.methods, shares, strict=True)}
    return list_rows(index, counted.rows[order], reasons, evidence=figures)


def _hub_shares(counted: Hubs, column: int) -> list[tuple[str, float]]:
    counts, shares = counted.counts[:, column], counted.shares[:, column]
    return [
        (name, float(s)) for name, n, s in zip(counted.methods, counts, shares, strict=True) if n >= counted.hub_count
    ]


def hans_list(audit: HansAudit, index: Index, n_rows: int = MOST_BEHIND) -> WorkList:
    """The first of the :func:`shortcut_rows`: at the top for wrong "entailment"s by the method that tells most."""
    m, rows = telling_method(audit), shortcut_rows(audit, index)[:n_rows]
    counts, overlaps = audit.counts[m], audit.row_overlap
    k = audit.overlap.shape[2]
    reasons = [
        f"in the top {k} by {audit.methods[m]} of {counts[row]:,} of {audit.n_queries:,} pairs wrongly taken for "
        f"entailment; {overlaps[row]:.0%} of its hypothesis' words are in its premise"
        for row in rows.tolist()
    ]
    figures = {"wrong entailments": counts[rows], "overlap": overlaps[rows]}
    return list_rows(index, rows, reasons, evidence=figures)


def artifact_list(found: ArtifactRegression, feature: Feature, values: np.ndarray, index: Index) -> WorkList:
    """Rows that hold more of the artifact than the mean row and are the most influential ones of test rows.

    Args:
        found: The regressions.
        feature: What was measured.
        values: The artifact of each live row, ``(n,)``.
        index: The index.
    """
    n_queries, _, k = found.ends.shape
    top = np.searchsorted(index.live, found.ends[:, 0].reshape(-1))
    counts = np.bincount(top, minlength=len(index.live))
    order = np.argsort(-counts, kind="stable")
    order = order[(counts[order] > 0) & (values[order] > values.mean())][:MOST_BEHIND]
    reasons = [
        f"one of the {k} strongest proponents by {found.methods[0]} of {counts[i]:,} of {n_queries:,} test rows; its "
        f"{feature.name} is {values[i]:.3g}, the mean {values.mean():.3g}"
        for i in order.tolist()
    ]
    figures = {"test rows": counts[order], feature.name: values[order]}
    return list_rows(index, index.live[order], reasons, evidence=figures)


def suspects_list(suspected: Suspects, index: Index, opponents: np.ndarray) -> WorkList:
    """The rows whose ``opponents``, ``(m, <= CONTRADICTING)``, are given as a work list: the first m suspects.

    An estimated probability is among the evidence; the item's own is one that was measured.
    """
    positions = suspected.order[: len(opponents)]
    rows, k = suspected.rows[positions], suspected.neighbours.shape[1]
    suggested = index.loss.texts(suspected.suggested[positions], index.manifest.spec.label_names)
    chances = None if suspected.probability is None else suspected.probability[positions]
    is_measured = suspected.planted is not None
    figures = {} if chances is None or is_measured else {suspected.chance: chances}
    figures |= {"mean rank": suspected.combined[positions]}
    figures |= dict(zip(suspected.names, suspected.values[:, positions], strict=True))
    n_against = suspected.doubts.contradicting[positions].sum(axis=1)
    reasons = [
        f"the model predicts {prediction}; {n} of the {k} nearest rows contradict the label"
        for prediction, n in zip(index.prediction_texts(rows), n_against.tolist(), strict=True)
    ]
    given = index.label_texts(rows)
    against = [
        [
            *contradicting_neighbours(suspected, p).tolist(),
            *(row for row, label in zip(some.tolist(), index.label_texts(some), strict=True) if label != own),
        ]
        for p, own, some in zip(positions.tolist(), given, opponents, strict=True)
    ]
    return list_rows(
        index,
        rows,
        reasons,
        suggested=suggested,
        evidence=figures,
        contradicting=[list(dict.fromkeys(some)) for some in against],
        probabilities=chances if is_measured else None,
    )
