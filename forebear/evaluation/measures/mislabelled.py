"""``mislabelled``: does a row's influence on itself tell wrong labels? (Koh and Liang 2017; beyond the five papers)

Self-influence is a row's score with itself as the query, of its gold label: ||g||^2 for ``gd``, summed over checkpoints
with eta for ``tracin``, <H^-1 g, g> for ``if``, all from what the index stores. Beside it the loss, and the
disagreement of neighbours: the share of the k nearest other rows, by cosine of the features, that have another label;
of several labels or numbers a row, the mean over these neighbours of the summed differences of targets.

Large values are taken for wrong labels. AUC is the chance that a wrongly labelled row stands above a rightly labelled
one, ties counting half. In precision@k, ties are ordered by row number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forebear.errors import DataError, InputError, MismatchError
from forebear.evaluation.common.comparisons import listed_values, provenance
from forebear.evaluation.common.label_evidence.evidence import EVIDENCE, VOTERS, label_evidence
from forebear.evaluation.common.neighbours import label_disagreement, nearest_up_to
from forebear.evaluation.common.passages import row_passages
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.rows.labels import label_map
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.sketches.estimates import GradientStore
from forebear.ratio import ratio
from forebear.retriever.answers.coverage import CLASS_BLOCKS
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.wording import worded

LOSS, NEIGHBOURS = "loss", "neighbours"  # the baselines' names
SHOWN_ROWS = 10
_BLOCK_ROWS = 1024
_RESAMPLES = 200
ROUNDED = "numbers in bf16"
_IN_HALF = "rounded: the index was built in bf16."
_BY_CLASS_BLOCKS = (
    "an approximation, by class blocks: the head has too many classes for one matrix H, so that the blocks of H "
    "between two classes are left out."
)


@dataclass(frozen=True, kw_only=True)
class Mislabelled:
    """How well each measure tells wrong labels.

    Attributes:
        names: Methods, then the baselines, ``m``.
        values: The measure of each live row, ``(m, n)``; larger: more suspicious.
        wrong: Whether a live row is labelled wrongly, ``(n,)`` bool.
        rows: Row numbers of the live rows, ``(n,)``.
        true_labels: Class ids of the rows, ``(n,)``, where a column gives them.
    """

    names: tuple[str, ...]
    values: np.ndarray
    wrong: np.ndarray
    rows: np.ndarray
    true_labels: np.ndarray | None


def self_influence(question: Question) -> dict[str, np.ndarray]:
    """A row's score with itself, for every row ``(N,)`` float64 by method, from what is stored.

    Raises:
        InputError: A method whose self-influence is not stored, or tells nothing: a cosine with itself is always 1.
    """
    index, influences = question.index, {}
    for method in question.methods:
        scope = question.scope_of(method)
        if (
            method.representation != "head"
            or method.metric != "dot"
            or method.by_model
            or method.query == "representer"
        ):
            raise InputError(f"{method.name}: its self-influence is not stored. Give gd, if or tracin (--method).")
        index.check_scope(scope)
        if method.query == "preconditioned":
            solver = question.curvature.at(scope)
            if solver == "exact":
                influences[method.name] = index.head.self_influence(question.curvature.damping)
            elif scope == "head" and question.curvature.by_class_blocks:
                influences[method.name] = index.head.blockwise_self_influence(question.curvature.absolute(index, scope))
            elif solver == "ekfac":
                influences[method.name] = _stored(question, scope).norms.astype(np.float64) ** 2
            else:
                raise InputError(f"{method.name}: its self-influence is stored for --curvature exact or ekfac alone.")
            continue
        last = len(index.manifest.checkpoints) - 1
        weights = (
            {i: c.eta for i, c in enumerate(index.manifest.checkpoints)} if method.all_checkpoints else {last: 1.0}
        )
        influences[method.name] = sum(
            (eta * _squared_norms(index, scope, number) for number, eta in weights.items()),
            np.zeros(index.manifest.n_rows),
        )
    return influences


def approximations(question: Question) -> dict[str, str]:
    """Methods of a question whose self-influence is approximate, and how.

    Heads of many classes have no other; and an index may hold estimates between bounds.
    """
    found = {}
    is_rounded = question.index.manifest.spec.precision != "fp32"
    for method in question.methods:
        scope = question.scope_of(method)
        if scope != "head" and is_rounded:
            found[method.name] = ROUNDED
        elif method.query != "preconditioned":
            continue
        elif scope == "head":
            if question.curvature.by_class_blocks:
                found[method.name] = CLASS_BLOCKS
        elif question.curvature.at(scope) == "ekfac" and (store := _stored(question, scope)).norm_bounds is not None:
            norms, least, most = (n**2 for n in store.norms_within(question.index.live))
            widths = ratio(most - least, norms)
            apart = f"{np.median(widths):.0%} apart (largest {widths.max():.0%})"
            found[method.name] = f"leading directions, within bounds {apart}"
    return found


def _stored(question: Question, scope: str) -> GradientStore:
    """The store whose norms are the square roots of the rows' self-influence by ``if``."""
    number, _ = question.index.ekfac_damping(scope, question.curvature.damping)
    return question.index.gradients(scope, damping=number)


def note_on(approximate: Mapping[str, str]) -> str:
    """A sentence for a report, on what :func:`approximations` found; empty without any."""
    notes = []
    for how in dict.fromkeys(approximate.values()):
        names = ", ".join(name for name in approximate if approximate[name] == how)
        estimated = f"estimated from the curvature's {how}; an index of --whitening whole has it exactly."
        said = {CLASS_BLOCKS: _BY_CLASS_BLOCKS, ROUNDED: _IN_HALF}.get(how, estimated)
        notes.append(f"Self-influence by {names} is {worded(said)}")
    return " ".join(notes)


def _squared_norms(index: Index, scope: str, checkpoint: int) -> np.ndarray:
    """||g_n||^2 of every row over a scope, ``(N,)`` float64."""
    if scope != "head":
        return np.asarray(index.gradients(scope, checkpoint).norms.astype(np.float64) ** 2)
    out = np.empty(index.manifest.n_rows)
    for start in range(0, len(out), _BLOCK_ROWS):
        block = np.arange(start, min(start + _BLOCK_ROWS, len(out)))
        f, r = (m.take(block).astype(np.float64) for m in (index.features(checkpoint), index.residuals(checkpoint)))
        out[block] = (f**2).sum(axis=1) * (r**2).sum(axis=1)
    return out


def true_labels_of(index: Index, source: RowSource) -> np.ndarray:
    """True class ids of the index's rows, ``(N,)``, from the training file opened with the column of true labels.

    Raises:
        MismatchError: The file's texts are not the index's.
        DataError: Its labels are not the model's.
    """
    manifest = index.manifest
    if source.n_rows != manifest.n_rows:
        raise MismatchError(
            f"{source.name} has {source.n_rows} rows, {index.folder} has {manifest.n_rows}. Give the file that the "
            "index was built from (--train)."
        )
    spec = manifest.spec
    mapping = label_map(source, spec.label_names, spec.label_mode, problem_type=spec.problem_type)
    parts = []
    for block in source.blocks():
        texts = index.text_lists(np.arange(block.start, block.start + len(block)))
        if texts != [list(column) for column in block.texts]:
            raise MismatchError(
                f"{source.name}: its rows {block.start} to {block.start + len(block) - 1} are not those of "
                f"{index.folder}. Give the file that the index was built from (--train), and its --text-columns."
            )
        assert block.labels is not None
        parts.append(mapping(block.labels, block.start))
    return np.concatenate(parts)


def wrong_rows_of(path: Path, n_rows: int) -> np.ndarray:
    """Whether each row is labelled wrongly, ``(N,)`` bool, from a text file of row numbers, one a line.

    Raises:
        DataError: The file cannot be read, or holds something else than row numbers.
    """
    wrong = np.zeros(n_rows, bool)
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a text file of row numbers, one a line.") from error
    for line in lines:
        if not line.isascii() or not line.isdigit() or int(line) >= n_rows:
            raise DataError(f"{path} holds {line!r}; expected row numbers from 0 to {n_rows - 1}, one a line.")
        wrong[int(line)] = True
    return wrong


def mislabelled(
    retriever: Retriever,
    spec: QuerySpec | Question,
    wrong: np.ndarray,
    *,
    true_labels: np.ndarray | None = None,
    n_neighbours: int = 10,
) -> Mislabelled:
    """Measure every live row by self-influence and by the baselines.

    Args:
        retriever: Over the index.
        spec: Methods (``gd``, ``if``, ``tracin`` and the like), scope, damping.
        wrong: Whether a row is labelled wrongly, ``(N,)`` bool.
        true_labels: Class ids of all rows, ``(N,)``, where they are known; the report shows them.
        n_neighbours: k of the disagreement of neighbours.

    Raises:
        DataError: No row is labelled wrongly, or all are: there is nothing to tell apart.
        InputError: A method's self-influence is not stored, or there are not as many neighbours.
    """
    question = retriever.resolve(spec)
    index = retriever.index
    live = index.live
    if not 1 <= n_neighbours < len(live):
        raise InputError(f"--neighbours {n_neighbours}: expected 1 to {len(live) - 1}, the other rows.")
    if wrong[live].all() or not wrong[live].any():
        raise DataError(
            f"{int(wrong[live].sum())} of {len(live)} rows are labelled wrongly; expected some, not all. If the column "
            "of true labels is the one that the model was trained on, name the other."
        )
    values = {name: influences[live] for name, influences in self_influence(question).items()}
    values[LOSS] = index.losses[live].astype(np.float64)
    has_one_label = index.loss.problem_type == SINGLE_LABEL
    near, cosines = nearest_up_to(retriever.models, live, n_neighbours, VOTERS if has_one_label else 0)
    values[NEIGHBOURS] = label_disagreement(index.labels, live, near[:, :n_neighbours])
    if has_one_label:
        evidence = label_evidence(index, live, near[:, :VOTERS], cosines[:, :VOTERS])
        values |= {**evidence.measures, EVIDENCE: evidence.suspicion}
    return Mislabelled(
        names=tuple(values),
        values=np.stack(list(values.values())),
        wrong=wrong[live],
        rows=live,
        true_labels=None if true_labels is None else true_labels[live],
    )


def auc_and_interval(values: np.ndarray, wrong: np.ndarray, seed: int) -> list[Cell]:
    """Area under the ROC curve (ties count half), and its 95% interval by resampling rows of each kind.

    There is no interval where only one row is labelled wrongly, or only one rightly: each resample would be that row.
    """
    above, below = values[wrong], values[~wrong]
    auc = _area(above, below)
    if min(len(above), len(below)) < 2:
        return [auc, None, None]
    rng = np.random.default_rng(seed)
    drawn = [
        _area(above[rng.integers(0, len(above), len(above))], below[rng.integers(0, len(below), len(below))])
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [auc, float(low), float(high)]


def _area(above: np.ndarray, below: np.ndarray) -> float:
    """Area under the ROC curve: U of Mann and Whitney, as a share of all pairs."""
    from scipy.stats import mannwhitneyu

    # The asymptotic p is the cheapest one; it is not used.
    return float(mannwhitneyu(above, below, method="asymptotic").statistic / (len(above) * len(below)))


def precision_at(values: np.ndarray, wrong: np.ndarray, k: int) -> float:
    """Share of wrong rows among the k of largest value; equal values are ordered by row number."""
    return float(wrong[np.argsort(-values, kind="stable")[:k]].mean())


def mislabelled_report(
    measured: Mislabelled,
    retriever: Retriever,
    spec: QuerySpec | Question,
    tops: Sequence[int],
    seed: int,
    command: str,
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; precision@k for each of ``tops`` and the number of wrong rows.

    Raises:
        InputError: A k is less than 1 or more than all rows.
    """
    n, n_wrong = len(measured.rows), int(measured.wrong.sum())
    bad = [k for k in tops if not 1 <= k <= n]
    if bad:
        raise InputError(f"--top {bad[0]}: expected 1 to {n}, the live rows.", of="evaluate mislabelled")
    depths = sorted({*tops, n_wrong})
    rows: list[list[Cell]] = []
    areas: dict[str, float] = {}
    for name, values in zip(measured.names, measured.values, strict=True):
        cells = auc_and_interval(values, measured.wrong, seed)
        areas[name] = float(cells[0] or 0.0)
        rows.append([name, *cells, *(precision_at(values, measured.wrong, k) for k in depths)])
    best = max(areas, key=lambda name: areas[name])
    approximate = approximations(retriever.resolve(spec))
    table = Table(
        "Telling wrong labels",
        ["measure", "AUC", "95% low", "95% high", *(f"precision@{k:,}" for k in depths)],
        rows,
        f"{n_wrong:,} of {n:,} rows ({n_wrong / n:.1%}) are labelled wrongly: a measure that tells nothing has an AUC "
        "of 0.5 and that precision. 95% bootstrap interval, rows resampled.",
    )
    drawing = bar_chart(list(areas), {"AUC": list(areas.values())}, xlabel="AUC", reference=("chance", 0.5), digits=3)
    report = Report(
        "Wrong labels",
        f"{best} tells wrong labels best, with an AUC of {areas[best]:.3f}; the loss reaches {areas[LOSS]:.3f}, the "
        f"disagreement of neighbours {areas[NEIGHBOURS]:.3f}. {note_on(approximate)}".rstrip(),
        (table,),
        (Figure("AUC", drawing),),
        (_suspects(measured, retriever, measured.names.index(best)),),
        provenance(retriever, spec, command, rows=n, wrong_labels=n_wrong, seed=seed),
    )
    result = {
        "measures": {
            name: {
                "auc": row[1],
                "auc_low": row[2],
                "auc_high": row[3],
                "precision": dict(zip(depths, row[4:], strict=True)),
            }
            for name, row in zip(measured.names, rows, strict=True)
        },
        "n_rows": n,
        "n_wrong": n_wrong,
        "values": {name: listed_values(values) for name, values in zip(measured.names, measured.values, strict=True)},
        **({"self_influence": approximate} if approximate else {}),
        "rows": measured.rows,
        "wrong": measured.wrong,
        "seed": seed,
    }
    return report, result


def _suspects(measured: Mislabelled, retriever: Retriever, measure: int) -> Group:
    """The rows of largest value, with both labels where the true ones are known."""
    order = np.argsort(-measured.values[measure], kind="stable")[:SHOWN_ROWS]
    rows = measured.rows[order]
    truth, names = measured.true_labels, retriever.label_names
    true_texts = None if truth is None else retriever.index.loss.texts(truth[order], names)
    passages = row_passages(
        retriever,
        rows,
        [
            f"rank {i} · row {row} · {measured.values[measure][position]:.4g}"
            for i, (position, row) in enumerate(zip(order, rows, strict=True), 1)
        ],
        facts=None if true_texts is None else [{"true label": text} for text in true_texts],
        notes=["wrong label" if measured.wrong[position] else "" for position in order],
    )
    return Group(f"The most suspicious rows by {measured.names[measure]}", passages)
