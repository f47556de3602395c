"""``audit hans``: do the rows behind a wrong "entailment" share the lexical-overlap shortcut? (Pez21, Table 2)

HANS rows that the model takes for entailment although they are not are the queries. For each method: the mean
lexical overlap of the training rows at the top of the ranking, beside that of all training rows. A method
that shows the artifact brings up rows of high overlap. Where the rows name their heuristic, subcase or template, so do
the tables. Memory is bounded: of each row only its numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forebear.errors import DataError, InputError
from forebear.evaluation.audits.artifacts.hans_kinds import KINDS, Breakdown, kind_numbers, kind_table
from forebear.evaluation.audits.artifacts.lexical_overlap import lexical_overlap, premise_first
from forebear.evaluation.common.passages import rank_headings, row_passages
from forebear.evaluation.common.statistics import INTERVALS, mean_and_error, mean_of
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.labels import collapse_to_binary_nli, nli_id
from forebear.indexer.rows.row_source import RowBlock, RowSource
from forebear.retriever.answers.results import SIDES, Answers
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

ENTAILMENT, NON_ENTAILMENT = 0, 1
SHOWN_QUERIES = 5
SHOWN_ROWS = 5
BLOCK_ROWS = 512
_ROUNDING = 1e-6  # of overlaps, which are kept in float32


@dataclass(frozen=True, kw_only=True)
class Example:
    """A mispredicted row and the rows at the top for each method."""

    row: int
    texts: tuple[str, ...]
    top: dict[str, list[tuple[int, float]]]  # method -> (training row, score)


@dataclass(frozen=True, kw_only=True)
class HansAudit:
    """The audit's numbers.

    Attributes:
        methods: Names of the methods, ``m``.
        overlap: Lexical overlap of the top training rows, ``(queries, m, k)``.
        counts: How many queries have each training row among their top k, by row number, ``(m, n)``.
        row_overlap: Lexical overlap of each training row, by row number, ``(n,)``.
        hub_share: Share of the queries whose top row is one and the same, ``(m,)``. Near 1, a method gives every
            query the same answer, which explains none of them.
        all_rows_overlap: Mean overlap of all live training rows: what random rows would give.
        accuracy: Share of right answers among (entailment, non-entailment) rows; None where there are none.
        n_rows: Number of (entailment, non-entailment) rows.
        breakdowns: Counts by heuristic, subcase and template, as far as the rows have these columns.
        examples: A few queries, spread over the file.
    """

    methods: tuple[str, ...]
    overlap: np.ndarray
    counts: np.ndarray
    row_overlap: np.ndarray
    hub_share: np.ndarray
    all_rows_overlap: float
    accuracy: tuple[float | None, float | None]
    n_rows: tuple[int, int]
    breakdowns: tuple[Breakdown, ...]
    examples: tuple[Example, ...]

    @property
    def n_queries(self) -> int:
        """Number of rows mispredicted as entailment."""
        return len(self.overlap)

    def mean_overlap(self, top: int) -> np.ndarray:
        """Mean overlap of the top rows, one number a query and method, ``(queries, m)``."""
        return np.asarray(self.overlap[:, :, :top].mean(axis=2))


def audit_hans(
    retriever: Retriever,
    source: RowSource,
    methods: Sequence[str] | None = None,
    *,
    top: int = 10,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> HansAudit:
    """Measure the overlap of the rows behind every row mispredicted as entailment.

    Args:
        retriever: Over an index of premise and hypothesis pairs.
        source: HANS, or rows like it, labelled entailment and non-entailment (or with three NLI labels).
        methods: Names from the method table; by default all methods that score rows from what the index stores.
        top: k, the number of training rows at the top of each query's ranking.
        progress: Called with the stage, rows done and rows in all.

    Raises:
        InputError: The model or the rows have no NLI labels.
        DataError: No row is mispredicted as entailment.
    """
    question, merge = check_hans(retriever, source, methods, top)
    row_overlap = training_overlap(retriever)
    overlaps: list[np.ndarray] = []
    first_rows: list[np.ndarray] = []
    examples: list[Example] = []
    counts = np.zeros((len(question.spec.methods), len(row_overlap)), np.int64)
    right, total = np.zeros(2, np.int64), np.zeros(2, np.int64)
    breakdowns: dict[str, Breakdown] = {}
    stride = max(1, source.n_rows // SHOWN_QUERIES)
    progress("rows", 0, source.n_rows)
    for block in source.blocks(BLOCK_ROWS):
        gold = gold_entailment(source, block)
        forward = run_forward(retriever.classifier(), block.texts, first_row=block.start)
        predicted = merge[forward.predictions]
        for kind in (ENTAILMENT, NON_ENTAILMENT):
            total[kind] += int((gold == kind).sum())
            right[kind] += int(((gold == kind) & (predicted == kind)).sum())
        is_query = (gold == NON_ENTAILMENT) & (predicted == ENTAILMENT)
        for column in KINDS:
            if column in block.table.column_names:
                breakdowns.setdefault(column, Breakdown(column)).add(block.table, gold == predicted, is_query)
        wrong = np.flatnonzero(is_query)
        if len(wrong):
            texts = [[column[i] for i in wrong] for column in block.texts]
            answers = retriever.answer_block(block.start, texts, None, question, forward=forward.take(wrong))
            rows = np.stack([answers.rankings[name][0].rows for name in question.spec.methods], axis=1)
            overlaps.append(row_overlap[rows].astype(np.float32))
            first_rows.append(rows[:, :, 0])
            for m in range(len(counts)):
                counts[m] += np.bincount(rows[:, m].reshape(-1), minlength=len(row_overlap))
            for j, i in enumerate(wrong):
                if len(examples) < SHOWN_QUERIES and block.start + i >= len(examples) * stride:
                    examples.append(_example(block, int(i), answers, j))
        progress("rows", block.start + len(block), source.n_rows)
    if not overlaps:
        raise DataError(
            f"{source.name}: none of the {total[NON_ENTAILMENT]} non-entailment rows is predicted as entailment by the "
            f"model of {retriever.index.folder}. There is nothing to explain: it does not take this shortcut here."
        )
    return HansAudit(
        methods=question.spec.methods,
        overlap=np.concatenate(overlaps),
        counts=counts,
        row_overlap=row_overlap,
        hub_share=np.array([np.bincount(rows).max() / len(rows) for rows in np.concatenate(first_rows).T]),
        all_rows_overlap=float(row_overlap[retriever.index.live].mean()),
        accuracy=(_share(right[0], total[0]), _share(right[1], total[1])),
        n_rows=(int(total[0]), int(total[1])),
        breakdowns=tuple(breakdowns.values()),
        examples=tuple(examples),
    )


def check_hans(
    retriever: Retriever, source: RowSource, methods: Sequence[str] | None, top: int
) -> tuple[Question, np.ndarray]:
    """Refuse what :func:`audit_hans` cannot work on.

    Returns:
        The question; and whether each class of the model is entailment (0) or not (1), ``(c,)``.

    Raises:
        InputError: See :func:`audit_hans`.
    """
    folder, names = retriever.index.folder, retriever.label_names
    question = retriever.resolve(QuerySpec(methods=tuple(methods or retriever.row_methods()), top=top))
    retriever.check_texts(source)
    if len(source.text_columns) != 2:
        raise InputError(f"audit hans needs pairs of texts; {source.name} has {', '.join(source.text_columns)}.")
    merge = collapse_to_binary_nli(names)
    if merge is None:
        raise InputError(f"audit hans needs a model with NLI labels; that of {folder} has {', '.join(names)}.")
    if top > (n_live := retriever.index.manifest.n_live):
        raise InputError(f"--top {top}: {folder} has {n_live:,} live rows. Give a smaller number.")
    return question, merge


def shortcut_rows(audit: HansAudit, index: Index) -> np.ndarray:
    """Training rows that teach the shortcut, as far as the audit names them, ``(m,)``.

    Those labelled entailment, of more than the ordinary overlap, that are in the top of a wrong "entailment" by the
    method that tells most; first those in the tops of most wrong entailments, of equal ones the lower row number.
    """
    counts, overlaps = audit.counts[telling_method(audit)], audit.row_overlap
    merge = collapse_to_binary_nli(index.manifest.spec.label_names)
    assert merge is not None  # checked by the audit
    is_entailed = (index.labels >= 0) & (merge[index.labels] == ENTAILMENT)
    order = np.argsort(-counts, kind="stable")
    return np.asarray(order[((counts > 0) & (overlaps > audit.all_rows_overlap) & is_entailed)[order]])


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _example(block: RowBlock, i: int, answers: Answers, j: int) -> Example:
    top = {
        name: [(int(r), float(s)) for r, s in zip(ends[0].rows[j], ends[0].scores[j], strict=True)][:SHOWN_ROWS]
        for name, ends in answers.rankings.items()
    }
    return Example(row=block.start + i, texts=tuple(column[i] for column in block.texts), top=top)


def training_overlap(retriever: Retriever) -> np.ndarray:
    """Lexical overlap of every training row, ``(n,)``, by row number."""
    n_rows = retriever.index.manifest.n_rows
    out, names = np.empty(n_rows), retriever.index.manifest.spec.text_columns
    for start in range(0, n_rows, 65_536):
        rows = np.arange(start, min(start + 65_536, n_rows))
        out[rows] = lexical_overlap(*premise_first(retriever.index.text_lists(rows), names))
    return out


def gold_entailment(source: RowSource, block: RowBlock) -> np.ndarray:
    """0 (entailment) or 1 (non-entailment) for each row, by the label's name.

    Raises:
        InputError: The labels have no NLI names.
    """
    labels = block.labels
    if labels is None:
        raise InputError(f"{source.name} has no labels. Name their column by --label-column.")
    if None in labels:
        row = source.file_row(block.start + labels.index(None))
        raise InputError(f"{source.name}: row {row} (from 0) has no label. Leave such rows out by --unlabelled drop.")
    names = [source.label_names[i] if isinstance(i, int) and source.label_names else str(i) for i in labels]
    ids = [nli_id(name) for name in names]
    if None in ids:
        row = source.file_row(block.start + ids.index(None))
        raise InputError(
            f"{source.name}: row {row} (from 0) has the label {names[ids.index(None)]!r}; expected "
            "entailment and non-entailment (or neutral, contradiction). Name integers by --label-names "
            "entailment,non-entailment."
        )
    return np.array(ids, dtype=np.int64)


def hans_report(
    audit: HansAudit, retriever: Retriever, source: RowSource, command: str
) -> tuple[Report, dict[str, object]]:
    """The report of an audit, and its numbers for ``result.json``."""
    k = audit.overlap.shape[2]
    top_overlap = audit.mean_overlap(k)
    top_means = top_overlap.mean(axis=0)
    best = telling_method(audit)
    by_kind = [kind_table(kind, audit.methods, top_overlap, k) for kind in audit.breakdowns]
    provenance = {
        "test rows": source.name,
        "index": str(retriever.index.folder),
        "index digest": retriever.index.manifest.digest(),
        "computed on": computed_line(retriever.models.computed_on()),
        "target": "predicted (entailment)",
        "95% intervals": INTERVALS,
        "command": command,
    }
    report = Report(
        "HANS audit: lexical overlap",
        _summary(audit, audit.methods[best], float(top_means[best])),
        (_overlap_table(audit), _accuracy_table(audit), *by_kind),
        (_overlap_figure(audit),),
        tuple(_group(example, audit.methods[best], retriever) for example in audit.examples),
        provenance,
    )
    result: dict[str, object] = {
        "methods": {name: _statistics(audit, i) for i, name in enumerate(audit.methods)},
        "all_rows": audit.all_rows_overlap,
        "n_queries": audit.n_queries,
        "accuracy": {"entailment": audit.accuracy[0], "non_entailment": audit.accuracy[1]},
        "n_rows": {"entailment": audit.n_rows[0], "non_entailment": audit.n_rows[1]},
        "top": k,
        "by": {kind.column: kind_numbers(kind, audit.methods, top_overlap) for kind in audit.breakdowns},
    }
    return report, result


def telling_method(audit: HansAudit) -> int:
    """The method of highest overlap among those that do not give most queries the same row."""
    top_means = audit.mean_overlap(audit.overlap.shape[2]).mean(axis=0)
    specific = audit.hub_share <= 0.5
    return int(np.where(specific, top_means, -1.0).argmax()) if specific.any() else int(top_means.argmax())


def _summary(audit: HansAudit, best: str, overlap: float) -> str:
    """The finding in two sentences."""
    mistakes = f"{audit.n_queries:,} of {audit.n_rows[1]:,} non-entailment rows are taken for entailment."
    ordinary = f"{audit.all_rows_overlap:.2f}"
    low = _statistics(audit, audit.methods.index(best))["top_k_low"]
    if low is None or low <= audit.all_rows_overlap + _ROUNDING:
        return (
            f"{mistakes} No method surely brings up training rows of more than the ordinary overlap, {ordinary}: "
            f"{best} those of {overlap:.2f}."
        )
    return (
        f"{mistakes} The training rows behind them overlap more than others: {overlap:.2f} of the hypothesis' words "
        f"are in the premise among the top {audit.overlap.shape[2]} by {best}, {ordinary} among all training rows."
    )


def _statistics(audit: HansAudit, method: int) -> dict[str, float | None]:
    """Mean overlap of the top 1 and top k, their standard errors, the latter's interval, and the hub share."""
    k = audit.overlap.shape[2]
    first, first_error = mean_and_error(audit.mean_overlap(1)[:, method])
    top_overlap = audit.mean_overlap(k)[:, method]
    mean, error = mean_and_error(top_overlap)
    interval = mean_of(top_overlap)
    return {
        "top_1": first,
        "top_1_error": first_error,
        "top_k": mean,
        "top_k_error": error,
        "top_k_low": interval.low,
        "top_k_high": interval.high,
        "hub_share": float(audit.hub_share[method]) if audit.n_queries > 1 else None,
    }


def _overlap_table(audit: HansAudit) -> Table:
    k = audit.overlap.shape[2]
    ordinary = audit.all_rows_overlap
    rows: list[list[Cell]] = [["(all rows)", ordinary, None, ordinary, None, None, None, None]]
    rows += [[name, *_statistics(audit, i).values()] for i, name in enumerate(audit.methods)]
    return Table(
        "Lexical overlap of the rows behind a wrong “entailment”",
        ["method", "top 1", "± top 1", f"top {k}", f"± top {k}", "95% low", "95% high", "same row"],
        rows,
        f"Share of the hypothesis' word types found in the premise; mean over {audit.n_queries:,} queries, ± its "
        f"standard error; 95% interval of top {k}. The first line is what random rows give. Same row: "
        "share of the queries that have one and the same row at the top; near 1 the method explains none of them.",
    )


def _accuracy_table(audit: HansAudit) -> Table:
    kinds = zip(("entailment", "non-entailment"), audit.n_rows, audit.accuracy, strict=True)
    return Table("Accuracy", ["rows", "number", "right"], [list(kind) for kind in kinds])


def _overlap_figure(audit: HansAudit) -> Figure:
    k = audit.overlap.shape[2]
    series, errors = {}, {}
    for top in dict.fromkeys((1, k)):
        pairs = [mean_and_error(values) for values in audit.mean_overlap(top).T]
        series[f"top {top}"] = [mean for mean, _ in pairs]
        errors[f"top {top}"] = [error for _, error in pairs]
    drawing = bar_chart(
        audit.methods,
        series,
        errors=errors,
        reference=("all rows", audit.all_rows_overlap),
        xlabel="mean lexical overlap of the top training rows",
    )
    return Figure("Overlap by method", drawing, "Bars past the dashed line: rows that share the shortcut come up.")


def _group(example: Example, method: str, retriever: Retriever) -> Group:
    index = retriever.index
    names = index.manifest.spec.text_columns
    shared = set(example.texts[0].lower().split()) & set(example.texts[1].lower().split())
    query = Passage(f"test row {example.row}", dict(zip(names, example.texts, strict=True)), shared)
    rows = np.array([row for row, _ in example.top[method]])
    scores = [score for _, score in example.top[method]]
    premises, hypotheses = premise_first(index.text_lists(rows), names)
    passages = row_passages(
        retriever,
        rows,
        rank_headings(rows, scores),
        facts=[{"overlap": float(overlap)} for overlap in lexical_overlap(premises, hypotheses)],
        highlighted=[
            set(p.lower().split()) & set(h.lower().split()) for p, h in zip(premises, hypotheses, strict=True)
        ],
    )
    intro = note_of(method, SIDES[0], scores)
    return Group(f"Why “entailment” for test row {example.row}? By {method}", passages, intro, query)
