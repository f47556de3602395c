"""The report of the linear datamodeling score: methods and baselines, with and without the class balance."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    defined,
    defined_mean,
    interval_cells,
    listed_values,
)
from forebear.evaluation.common.power import FOR_A_VERDICT, compare, no_verdict
from forebear.evaluation.common.statistics import difference_table
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import RetrainingInputs
from forebear.evaluation.retraining.lds.baselines import SENTENCE
from forebear.evaluation.retraining.lds.measure import Lds
from forebear.evaluation.retraining.lds.settings import Settings

MOST_PAIRED = 8  # methods of which every pair is compared
MOST_BARS = 24  # of the drawing
BALANCE_OUT = "class balance taken out"


def lds_report(lds: Lds, settings: Settings, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    seed = inputs.seed
    values = lds.values if lds.is_balanced else lds.balance_out
    tables = [_table(lds, settings, seed)]
    if lds.is_balanced:
        tables += _against_best_baseline("Compared with the best baseline", lds, lds.values, settings, seed)
    else:
        title = "Compared with the best baseline"
        tables += _against_best_baseline(f"{title}, {BALANCE_OUT}", lds, lds.balance_out, settings, seed)
        tables += _against_best_baseline(f"{title}, class balance and all", lds, lds.values, settings, seed)
    of_methods = values[: len(lds.methods)]
    whole = ~np.isnan(of_methods).any(axis=0)
    if 1 < len(lds.methods) <= MOST_PAIRED and whole.any():
        pairs = {name: row[whole] for name, row in zip(lds.methods, of_methods, strict=True)}
        tables.append(difference_table("Methods compared", pairs, seed))
    provenance = inputs.retraining_provenance(lds.residuals, lds.sampled) | settings.provenance()
    provenance["draws"] = str(lds.draws)
    report = Report(
        "Linear datamodeling score",
        f"{_summary(lds, values, seed)} {inputs.retrainer.recipe.note}",
        tables,
        [_figure(lds, values)],
        provenance=provenance,
    )
    names = (*lds.methods, *lds.baselines)
    result = {
        **inputs.retraining_record(lds.residuals, lds.sampled),
        **settings.record(inputs.retriever),
        "draws": vars(lds.draws),
        "subsets": lds.subsets,
        "class_counts": lds.class_counts.tolist(),
        "baselines": lds.baselines,
        "lds": {name: listed_values(row) for name, row in zip(names, lds.values, strict=True)},
        "lds_balance_out": {name: listed_values(row) for name, row in zip(names, lds.balance_out, strict=True)},
        "agreement": _listed(lds.agreement),
        "agreement_balance_out": _listed(lds.agreement_balance_out),
        "ceiling": _listed(lds.ceiling),
        "ceiling_balance_out": _listed(lds.ceiling_balance_out),
        "outputs": listed_values(lds.outputs),
    }
    return report, result


def _listed(values: np.ndarray | None) -> Any:
    return None if values is None else listed_values(values)


def _table(lds: Lds, settings: Settings, seed: int) -> Table:
    names = (*lds.methods, *lds.baselines)
    lines = [(_places(lds, settings, i), lds.values[i], lds.balance_out[i]) for i in range(len(names))]
    blank: list[Cell] = [None, None] if settings.are_several else []
    if lds.agreement is not None and lds.ceiling is not None:
        assert lds.agreement_balance_out is not None
        assert lds.ceiling_balance_out is not None
        lines.append((["(one seed against another)", *blank], lds.agreement, lds.agreement_balance_out))
        lines.append((["(noise ceiling)", *blank], lds.ceiling, lds.ceiling_balance_out))
    rows: list[list[Cell]] = []
    for place, values, balance_out in lines:
        mean, _, low, high = interval_cells(balance_out, seed)
        rows.append([*place, *interval_cells(values, seed), mean, low, high, int(np.isnan(balance_out).sum())])
    return Table(
        "Linear datamodeling score",
        [
            *_columns(settings), *INTERVAL_COLUMNS, "balance out", "balance out low", "balance out high", "undefined",
        ],
        rows,
        _note(lds),
    )  # fmt: skip


def _note(lds: Lds) -> str:
    balance = (
        "The draws all keep equally many rows of each class, so there is no class balance to take out: these columns "
        "repeat the others."
        if lds.is_balanced
        else "Balance out: the same with the class balance taken out, that is with the ranks of sums and outputs both "
        "regressed on the ranks of the numbers of kept rows of each class."
    )
    ceiling = (
        ""
        if lds.agreement is None
        else " Noise ceiling: what scores without error would reach, from how well two seeds agree (Spearman and "
        "Brown)."
    )
    left_out = (
        ""
        if SENTENCE in lds.baselines or not lds.baselines
        else f" {SENTENCE} is left out: neither the index nor this machine has an un-tuned encoder."
    )
    return (
        f"Spearman's correlation over {len(lds.subsets):,} random draws of the rows ({lds.draws}) between summed "
        "scores of the kept rows and the retrained log-odds of the target class, averaged over "
        f"{len(lds.seeds)} seed(s); mean over queries, ± its standard error, 95% interval over queries. {balance} "
        "Undefined: queries whose sums or outputs are all equal, or all explained by the class balance; left out. In "
        f"parentheses: baselines, which know nothing of gradients.{left_out}{ceiling}"
    )


def _columns(settings: Settings) -> list[str]:
    return ["method", "scope", "damping"] if settings.are_several else ["method"]


def _places(lds: Lds, settings: Settings, number: int) -> list[Cell]:
    """The cells that name a method or a baseline."""
    names = (*lds.methods, *lds.baselines)
    if not settings.are_several:
        return [names[number]]
    if number >= len(lds.methods):
        return [names[number], None, None]
    setting = tuple(settings)[number]
    return [setting.method, setting.scope, setting.damping]


def _best_baseline(lds: Lds, values: np.ndarray) -> int | None:
    """Place of the baseline of highest mean among methods and baselines; None where all are undefined."""
    means = {i: defined_mean(values[i]) for i in range(len(lds.methods), len(values))}
    known = {i: mean for i, mean in means.items() if mean is not None}
    return max(known, key=known.__getitem__) if known else None


def _against_best_baseline(title: str, lds: Lds, values: np.ndarray, settings: Settings, seed: int) -> list[Table]:
    """A table of each method's difference to the best baseline; none where no baseline is defined."""
    best = _best_baseline(lds, values)
    if best is None:
        return []
    rows: list[list[Cell]] = []
    for i in range(len(lds.methods)):
        shared = ~np.isnan(values[[i, best]]).any(axis=0)
        if not shared.any():
            rows.append([*_places(lds, settings, i), None, None, None, None, 0, None])
            continue
        d, needed = compare(values[i, shared], values[best, shared], seed)
        rows.append([*_places(lds, settings, i), d.mean, d.low, d.high, d.p, d.n, needed])
    name = lds.baselines[best - len(lds.methods)]
    return [
        Table(
            title,
            [*_columns(settings), "− best baseline", "95% low", "95% high", "p", "queries", "queries for a verdict"],
            rows,
            f"Best baseline: {name}, of the highest mean here. Mean difference over the same queries, its 95% "
            f"interval, and p of Wilcoxon's signed-rank test. {FOR_A_VERDICT.format(unit='queries')} More queries "
            "take no more retrainings.",
        )
    ]


def _summary(lds: Lds, values: np.ndarray, seed: int) -> str:
    n = len(lds.subsets)
    means = [defined_mean(row) for row in values[: len(lds.methods)]]
    known = [i for i, mean in enumerate(means) if mean is not None]
    taken_out = "" if lds.is_balanced else f", {BALANCE_OUT}"
    if not known:
        return f"Undefined for every method: scores or outputs are all equal over {n:,} random draws."
    top = max(known, key=lambda i: means[i] or 0.0)
    text = f"{lds.methods[top]} foretells retrained outputs best: {means[top]:.3f} over {n:,} random draws{taken_out}"
    best = _best_baseline(lds, values)
    if best is None:
        return f"{text}."
    name = lds.baselines[best - len(lds.methods)]
    text += f"; the best baseline, {name}, reaches {defined_mean(values[best]):.3f}."
    shared = ~np.isnan(values[[top, best]]).any(axis=0)
    if not shared.any():
        return text
    d, needed = compare(values[top, shared], values[best, shared], seed)
    if d.low is None or d.high is None or not d.low <= 0 <= d.high:
        return text
    return f"{text} {no_verdict(needed, 'queries')}"


def _figure(lds: Lds, values: np.ndarray) -> Figure:
    names = (*lds.methods, *lds.baselines)
    cells = [interval_cells(row, 0) for row in values]
    drawn = [i for i in range(len(names)) if cells[i][0] is not None] or [0]
    left_out = len(drawn) - MOST_BARS
    if left_out > 0:
        drawn = sorted(sorted(drawn, key=lambda i: -float(cells[i][0] or 0.0))[:MOST_BARS])
    means = [float(cells[i][0] or 0.0) for i in drawn]
    errors = [None if cells[i][1] is None else float(cells[i][1] or 0.0) for i in drawn]
    ceiling = lds.ceiling if lds.is_balanced else lds.ceiling_balance_out
    top = None if ceiling is None else defined(ceiling)
    reference = None if top is None or not len(top) else ("noise ceiling", float(top.mean()))
    drawing = bar_chart(
        [names[i] for i in drawn], {"LDS": means}, errors={"LDS": errors}, reference=reference,
        xlabel="mean Spearman's correlation",
    )  # fmt: skip
    taken_out = "" if lds.is_balanced else f" With the {BALANCE_OUT}."
    most = f" The {MOST_BARS} highest." if left_out > 0 else ""
    return Figure("LDS by method", drawing, f"Mean over queries, bars: standard error.{taken_out}{most}")
