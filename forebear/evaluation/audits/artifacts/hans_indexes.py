"""The page of ``audit hans``: of one index its audit, of several their audits side by side; with what retraining does.

A mean over indexes stands beside its standard error, which is what other models trained like these would change it by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forebear.errors import InputError
from forebear.evaluation.audits.artifacts.hans import HansAudit, hans_report, telling_method
from forebear.evaluation.audits.artifacts.hans_kinds import KINDS
from forebear.evaluation.audits.artifacts.hans_retrained import HansRetrained
from forebear.evaluation.audits.artifacts.hans_retrained_report import (
    retrained_figure,
    retrained_record,
    retrained_summary,
    retrained_tables,
)
from forebear.evaluation.common.statistics import mean_and_error, mean_of
from forebear.evaluation.reports.charts import MAX_SERIES, bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.reports.side_by_side import join_tables
from forebear.indexer.rows.row_source import RowSource
from forebear.retriever.retriever import Retriever

FIRST_TABLES = 2  # of an audit; then those of retraining


@dataclass(frozen=True, kw_only=True, eq=False)
class Hans:
    """The numbers of ``audit hans``, by the name of the index: of its folder, or its path where folders share a name.

    Attributes:
        audits: The audits.
        retrained: What retrained models answer; empty where none was trained.
    """

    audits: Mapping[str, HansAudit]
    retrained: Mapping[str, HansRetrained]


def names_of(retrievers: Sequence[Retriever]) -> list[str]:
    """A name for each index, in their order; no two are the same.

    Raises:
        InputError: There is no index, or one is named twice.
    """
    folders = [retriever.index.folder for retriever in retrievers]
    if not folders:
        raise InputError("no index is given; expected one or more.")
    if twice := [folder for folder, n in Counter(folder.resolve() for folder in folders).items() if n > 1]:
        raise InputError(f"the index {twice[0]} is named twice; expected different ones.")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def hans_page(
    found: Hans,
    retrievers: Mapping[str, Retriever],
    sources: Mapping[str, RowSource],
    command: str,
    facts: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``.

    Args:
        found: The numbers.
        retrievers: By the name of the index.
        sources: The test rows as each index reads them.
        command: What repeats the report.
        facts: How models were trained again, as ``Retrainer.facts`` says it; empty where none was.
        seed: Seed of the retrainings and of bootstraps.
    """
    pages = {name: hans_report(audit, retrievers[name], sources[name], command) for name, audit in found.audits.items()}
    if len(pages) == 1:
        ((report, result),) = pages.values()
    else:
        report, result = _side_by_side(found.audits, pages)
    if not found.retrained:
        return report, result
    recipe, note = (next(iter(facts.values()))[key] for key in ("retrain", "note"))
    seeds = [", ".join(map(str, r.seeds)) for r in found.retrained.values()]
    remarks = [
        f" Of {name} {r.n_asked:,} rows of the shortcut are asked for; its audit names {r.n_named:,}, which are taken. "
        "A larger top names more."
        for name, r in found.retrained.items()
        if r.n_asked is not None and r.n_asked > r.n_named
    ]
    audited = ", ".join(f"{audit.accuracy[1] or 0.0:.1%}" for audit in found.audits.values())
    remarks.insert(0, f" As audited, before any retraining, the right answers on non-entailment rows are {audited}.")
    tables, more = retrained_tables(found.retrained, seed), list(report.tables)
    lines = {"retraining": f"{recipe}. {note}", "seeds": "; of the next index ".join(seeds)}
    report = replace(
        report,
        summary=f"{report.summary} {retrained_summary(found.retrained, recipe, seed)}{''.join(remarks)}",
        tables=(*more[:FIRST_TABLES], *tables, *more[FIRST_TABLES:]),
        figures=(*report.figures, retrained_figure(found.retrained, seed)),
        provenance={**report.provenance, **lines},
    )
    records = {name: {**facts[name], **retrained_record(r, seed)} for name, r in found.retrained.items()}
    return report, {**result, "retrained": records if len(records) > 1 else next(iter(records.values()))}


def _side_by_side(
    audits: Mapping[str, HansAudit], pages: Mapping[str, tuple[Report, dict[str, Any]]]
) -> tuple[Report, dict[str, Any]]:
    """The audits of several indexes on one page."""
    results = {name: result for name, (_, result) in pages.items()}
    overview = [_accuracy_table(audits), _overlap_table(audits)]
    kinds = [_kind_table(column, results) for column in KINDS if all(column in r["by"] for r in results.values())]
    titles = dict.fromkeys(table.title for report, _ in pages.values() for table in report.tables)
    details: list[Table] = []
    for title in titles:
        named = [(name, t) for name, (report, _) in pages.items() for t in report.tables if t.title == title]
        joined = join_tables(title, named)
        details += [joined] if joined else [replace(table, title=f"{name}: {title}") for name, table in named]
    groups = [
        replace(group, title=f"{name}: {group.title}") for name, (report, _) in pages.items() for group in report.groups
    ]
    own = {"index", "index digest", "computed on"}  # what differs from index to index
    provenance: dict[str, str] = {}
    for name, (report, _) in pages.items():
        provenance |= {f"{name}: {key}" if key in own else key: value for key, value in report.provenance.items()}
    names = list(audits)
    report = Report(
        f"HANS audit: lexical overlap, {len(names)} indexes",
        _summary(audits),
        (*overview, *kinds, *details),
        (_figure(audits),),
        groups,
        provenance,
    )
    means = {m: _mean_record([results[name]["methods"][m]["top_k"] for name in names]) for m in _shared(audits)}
    accuracy = {
        kind: _mean_record([results[name]["accuracy"][kind] for name in names])
        for kind in ("entailment", "non_entailment")
        if all(results[name]["accuracy"][kind] is not None for name in names)
    }
    return report, {"indexes": results, "over_indexes": {"top_k": means, "accuracy": accuracy}}


def _mean_record(values: Sequence[float]) -> dict[str, Any]:
    return asdict(mean_of(values))


def _shared(audits: Mapping[str, HansAudit]) -> list[str]:
    """Methods that all audits have, in the order of the first."""
    first, *others = audits.values()
    return [name for name in first.methods if all(name in other.methods for other in others)]


def _line(label: str, values: Sequence[float | None]) -> list[Cell]:
    """A line of a table of indexes: their values, the mean and its standard error where all have one."""
    given = [value for value in values if value is not None]
    mean, error = mean_and_error(given) if len(given) == len(values) else (None, None)
    return [label, *values, mean, error]


def _top_overlap(audit: HansAudit, method: str) -> float | None:
    if method not in audit.methods:
        return None
    return float(audit.mean_overlap(audit.overlap.shape[2])[:, audit.methods.index(method)].mean())


def _accuracy_table(audits: Mapping[str, HansAudit]) -> Table:
    lines = [
        _line("right on entailment rows", [audit.accuracy[0] for audit in audits.values()]),
        _line("right on non-entailment rows", [audit.accuracy[1] for audit in audits.values()]),
        _line("wrong “entailment”s", [float(audit.n_queries) for audit in audits.values()]),
    ]
    n_rows = next(iter(audits.values())).n_rows
    note = f"{n_rows[0]:,} entailment and {n_rows[1]:,} non-entailment rows. Right: share of right answers."
    return Table("Answers by index", ["measure", *audits, "mean", "± mean"], lines, note)


def _overlap_table(audits: Mapping[str, HansAudit]) -> Table:
    methods = dict.fromkeys(name for audit in audits.values() for name in audit.methods)
    lines = [_line("(all rows)", [audit.all_rows_overlap for audit in audits.values()])]
    lines += [_line(name, [_top_overlap(audit, name) for audit in audits.values()]) for name in methods]
    k = next(iter(audits.values())).overlap.shape[2]
    return Table(
        f"Overlap of the top {k} by index",
        ["method", *audits, "mean", "± mean"],
        lines,
        f"Mean lexical overlap of the top {k} training rows of wrong “entailment”s; the first line is what random rows "
        "give. ± mean: standard error over the indexes. Errors over test rows are in a table further down.",
    )


def _kind_table(column: str, results: Mapping[str, dict[str, Any]]) -> Table:
    by_index = [result["by"][column] for result in results.values()]
    values = dict.fromkeys(value for kinds in by_index for value in kinds)
    lines = [
        _line(value, [kinds[value]["accuracy"] if value in kinds else None for kinds in by_index]) for value in values
    ]
    note = "Share of right answers. ± mean: standard error over the indexes."
    return Table(f"Right answers by {column} and index", [column, *results, "mean", "± mean"], lines, note)


def _figure(audits: Mapping[str, HansAudit]) -> Figure:
    methods = _shared(audits)
    of_index = {name: [_top_overlap(audit, m) or 0.0 for m in methods] for name, audit in audits.items()}
    k = next(iter(audits.values())).overlap.shape[2]
    ordinary = mean_and_error([audit.all_rows_overlap for audit in audits.values()])[0]
    xlabel = f"mean lexical overlap of the top {k} training rows"
    if len(of_index) <= MAX_SERIES:
        drawing = bar_chart(methods, of_index, reference=("all rows", ordinary), xlabel=xlabel)
        return Figure(
            "Overlap by method and index", drawing, "Bars past the dashed line: rows that share the shortcut."
        )
    pairs = [mean_and_error(values) for values in zip(*of_index.values(), strict=True)]
    series = {"mean over indexes": [mean for mean, _ in pairs]}
    errors = {"mean over indexes": [error for _, error in pairs]}
    drawing = bar_chart(methods, series, errors=errors, reference=("all rows", ordinary), xlabel=xlabel)
    return Figure("Overlap by method, mean over indexes", drawing, "Error bars are standard errors over the indexes.")


def _summary(audits: Mapping[str, HansAudit]) -> str:
    """The finding in two sentences."""
    wrong = [f"{audit.n_queries:,}" for audit in audits.values()]
    n_rows = next(iter(audits.values())).n_rows[1]
    taken = f"{', '.join(wrong[:-1])} and {wrong[-1]} of {n_rows:,} non-entailment rows are taken for entailment"
    telling = [audit.methods[telling_method(audit)] for audit in audits.values()]
    tops = [_top_overlap(audit, method) for audit, method in zip(audits.values(), telling, strict=True)]
    mean, error = mean_and_error([top for top in tops if top is not None])
    ordinary = mean_and_error([audit.all_rows_overlap for audit in audits.values()])[0]
    by = telling[0] if len(set(telling)) == 1 else ", ".join(telling)
    k = next(iter(audits.values())).overlap.shape[2]
    return (
        f"{taken} (by index: {', '.join(audits)}). Of the top {k} training rows behind them, by {by}, "
        f"{mean:.2f} ± {error or 0.0:.2f} of the hypothesis' words are in the premise (mean over {len(audits)} indexes "
        f"± standard error), of all training rows {ordinary:.2f}."
    )
