"""The report of :mod:`~forebear.evaluation.measures.agreement`."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.passages import rank_headings, row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import difference_table, mean_of
from forebear.evaluation.measures.agreement import POOL_ROWS, RANDOM_ROWS, RANDOM_SPANS, Agreement, Shown
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever


def agreement_report(
    found: Agreement, retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question, seed: int, command: str
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    question = retriever.resolve(spec)
    tables: list[Table] = []
    series: dict[str, list[float]] = {}
    errors: dict[str, list[float | None]] = {}
    for k, top in enumerate(found.at):
        columns = found.columns(k)
        found_means = {name: mean_of(values, seed) for name, values in columns.items()}
        rows: list[list[Cell]] = [[name, m.mean, m.error, m.low, m.high] for name, m in found_means.items()]
        tables.append(
            Table(
                f"{found.name}@{top}",
                ["method", "mean", "±", "95% low", "95% high"],
                rows,
                _note(found, queries, question),
            )
        )
        if len(found.methods) > 1:
            mine = {name: columns[name] for name in found.methods}
            tables.append(difference_table(f"{found.name}@{top}, paired", mine, seed))
        series[f"{found.name}@{top}"] = [m.mean for m in found_means.values()]
        errors[f"{found.name}@{top}"] = [m.error for m in found_means.values()]
    means = {name: float(values.mean()) for name, values in found.columns(0).items()}
    best = max(found.methods, key=means.__getitem__)
    title = "Semantic agreement" if found.measure == "semantic" else "Label agreement"
    by_spans = any(method.name == best and method.spans for method in question.methods)
    control = RANDOM_SPANS if by_spans and RANDOM_SPANS in means else RANDOM_ROWS
    report = Report(
        f"{title} of the top rows",
        f"{best} agrees most with its queries: {found.name}@{found.at[0]} {means[best]:.1f}, where "
        f"{control.strip('()')} give {means[control]:.1f}.",
        tables,
        [Figure(title, bar_chart(list(means), series, errors=errors, xlabel=f"{found.name}, percent", digits=1))],
        [_group(one, best, retriever) for one in found.shown],
        provenance(
            retriever, spec, command, test_rows=queries.source, queries=len(queries), left_out=len(queries.left_out),
            seed=seed,
        ),
    )  # fmt: skip
    names = retriever.label_names
    result = {
        "measure": found.name,
        "methods": list(found.methods),
        "at": list(found.at),
        "mean": {name: found.values[:, i].mean(axis=0) for i, name in enumerate(found.methods)},
        "controls": {name: values.mean(axis=0) for name, values in found.controls.items()},
        "per_query": {name: found.values[:, i] for i, name in enumerate(found.methods)},
        "controls_per_query": found.controls,
        "query_rows": found.rows,
        "query_rows_left_out": queries.left_out,
        "largest_residuals": found.residuals,
        "targets": [names[y] for y in found.targets],
        "seed": seed,
        "question": question_record(retriever, spec),
    }
    return report, result


def _note(found: Agreement, queries: QueryRows, question: Question) -> str:
    kind = (
        "Mean cosine of what the top K rows and the query (or their spans) say, times 100"
        if found.measure == "semantic"
        else f"Share of the top K rows that bear the query's label (its target: {question.spec.target}), in percent"
    )
    control = (
        f"(random …): at most {POOL_ROWS:,} random rows or spans, of which each query draws K"
        if found.measure == "semantic"
        else "(random …): the share of that label among all live rows, or all spans of live rows"
    )
    left = (
        f" {len(queries.left_out):,} sampled test rows hold no span and are left out." if len(queries.left_out) else ""
    )
    unread = (
        f" {found.n_unread:,} spans of training rows are not read by the model (cut by truncation, or blank)."
        if found.n_unread
        else ""
    )
    solved = "".join(
        f" H^-1 of {name} is solved to a relative residual of {r:.1e}." for name, r in found.residuals.items()
    )
    return (
        f"{kind}; mean over {len(queries):,} queries, ± its standard error; 95% interval. {control}."
        f"{left}{unread}{solved}"
    )


def _group(one: Shown, method: str, retriever: Retriever) -> Group:
    index = retriever.index
    names = index.manifest.spec.text_columns
    rows = np.array([row for row, _, _ in one.found[method]])
    columns = index.text_lists(rows)
    scores = [score for _, _, score in one.found[method]]
    facts: list[dict[str, Cell]] = [
        {} if span is None else {"span": columns[span.column][i][span.start : span.end]}
        for i, (_, span, _) in enumerate(one.found[method])
    ]
    passages = row_passages(retriever, rows, rank_headings(rows, scores), facts=facts)
    asked = dict(zip(names, one.texts, strict=True))
    own: dict[str, Cell] = (
        {} if one.span is None else {"span": one.texts[one.span.column][one.span.start : one.span.end]}
    )
    query = Passage(f"test row {one.row}", asked, facts=own)
    intro = note_of(method, SIDES[0], scores)
    return Group(f"What {method} finds for test row {one.row}", passages, intro, query)
