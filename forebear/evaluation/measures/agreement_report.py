"""The report of :mod:`~forebear.evaluation.measures.agreement`."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import rank_headings, row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import difference_table, mean_of
from forebear.evaluation.measures.agreement import POOL_ROWS, RANDOM_ROWS, RANDOM_SPANS, Agreement, Shown
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever


def agreement_report(agreement: Agreement, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    retriever, question, queries, seed = inputs.retriever, inputs.question, inputs.queries, inputs.seed
    tables: list[Table] = []
    series: dict[str, list[float]] = {}
    errors: dict[str, list[float | None]] = {}
    for k, top in enumerate(agreement.at):
        columns = agreement.columns(k)
        means_at_k = {name: mean_of(values, seed) for name, values in columns.items()}
        rows: list[list[Cell]] = [[name, m.mean, m.error, m.low, m.high] for name, m in means_at_k.items()]
        tables.append(
            Table(
                f"{agreement.name}@{top}",
                ["method", "mean", "±", "95% low", "95% high"],
                rows,
                _note(agreement, queries, question),
            )
        )
        if len(agreement.methods) > 1:
            method_values = {name: columns[name] for name in agreement.methods}
            tables.append(difference_table(f"{agreement.name}@{top}, paired", method_values, seed))
        series[f"{agreement.name}@{top}"] = [m.mean for m in means_at_k.values()]
        errors[f"{agreement.name}@{top}"] = [m.error for m in means_at_k.values()]
    means = {name: float(values.mean()) for name, values in agreement.columns(0).items()}
    best = max(agreement.methods, key=means.__getitem__)
    title = "Semantic agreement" if agreement.measure == "semantic" else "Label agreement"
    by_spans = any(method.name == best and method.spans for method in question.methods)
    control = RANDOM_SPANS if by_spans and RANDOM_SPANS in means else RANDOM_ROWS
    report = Report(
        f"{title} of the top rows",
        f"{best} agrees most with its queries: {agreement.name}@{agreement.at[0]} {means[best]:.1f}, where "
        f"{control.strip('()')} give {means[control]:.1f}.",
        tables,
        [Figure(title, bar_chart(list(means), series, errors=errors, xlabel=f"{agreement.name}, percent", digits=1))],
        [_group(query, best, retriever) for query in agreement.shown],
        inputs.provenance(left_out=len(queries.left_out), seed=seed),
    )  # fmt: skip
    names = retriever.label_names
    result = {
        "measure": agreement.name,
        "methods": list(agreement.methods),
        "at": list(agreement.at),
        "mean": {name: agreement.values[:, i].mean(axis=0) for i, name in enumerate(agreement.methods)},
        "controls": {name: values.mean(axis=0) for name, values in agreement.controls.items()},
        "per_query": {name: agreement.values[:, i] for i, name in enumerate(agreement.methods)},
        "controls_per_query": agreement.controls,
        "query_rows": agreement.rows,
        "query_rows_left_out": queries.left_out,
        "largest_residuals": agreement.residuals,
        "targets": [names[y] for y in agreement.targets],
        "seed": seed,
        "question": inputs.record(),
    }
    return report, result


def _note(agreement: Agreement, queries: QueryRows, question: Question) -> str:
    kind = (
        "Mean cosine of what the top K rows and the query (or their spans) say, times 100"
        if agreement.measure == "semantic"
        else f"Share of the top K rows that bear the query's label (its target: {question.spec.target}), in percent"
    )
    control = (
        f"(random …): at most {POOL_ROWS:,} random rows or spans, of which each query draws K"
        if agreement.measure == "semantic"
        else "(random …): the share of that label among all live rows, or all spans of live rows"
    )
    left_out = (
        f" {len(queries.left_out):,} sampled test rows hold no span and are left out." if len(queries.left_out) else ""
    )
    unread = (
        f" {agreement.n_unread:,} spans of training rows are not read by the model (cut by truncation, or blank)."
        if agreement.n_unread
        else ""
    )
    solved = "".join(
        f" H^-1 of {name} is solved to a relative residual of {r:.1e}." for name, r in agreement.residuals.items()
    )
    return (
        f"{kind}; mean over {len(queries):,} queries, ± its standard error; 95% interval. {control}."
        f"{left_out}{unread}{solved}"
    )


def _group(shown: Shown, method: str, retriever: Retriever) -> Group:
    index = retriever.index
    names = index.manifest.spec.text_columns
    rows = np.array([row for row, _, _ in shown.results[method]])
    columns = index.text_lists(rows)
    scores = [score for _, _, score in shown.results[method]]
    facts: list[dict[str, Cell]] = [
        {} if span is None else {"span": columns[span.column][i][span.start : span.end]}
        for i, (_, span, _) in enumerate(shown.results[method])
    ]
    passages = row_passages(retriever, rows, rank_headings(rows, scores), facts=facts)
    query_texts = dict(zip(names, shown.texts, strict=True))
    query_facts: dict[str, Cell] = (
        {} if shown.span is None else {"span": shown.texts[shown.span.column][shown.span.start : shown.span.end]}
    )
    query = Passage(f"test row {shown.row}", query_texts, facts=query_facts)
    intro = note_of(method, SIDES[0], scores)
    return Group(f"What {method} finds for test row {shown.row}", passages, intro, query)
