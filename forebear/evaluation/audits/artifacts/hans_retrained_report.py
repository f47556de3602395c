"""What ``audit hans --retrain`` found, of one index or of several: the finding in words, tables, a figure, numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from forebear.evaluation.audits.artifacts.hans_retrained import ALL_ROWS, IN_DOMAIN, KINDS, Change, HansRetrained
from forebear.evaluation.common.statistics import Mean, mean_of
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Table
from forebear.evaluation.retraining.changes import IN_PLACE

ENTAILED, NOT_ENTAILED = KINDS.values()
MAIN = (ENTAILED, NOT_ENTAILED, IN_DOMAIN)
NOISE = "within the seeds' noise"
POINTS = 100.0  # percentage points in an accuracy of 1
_CONTROL = "The control is the same change of as many random other rows with the same labels, drawn anew for each seed."
_INTERVALS = (
    "95% intervals. Over seeds: what other seeds would say. Over test rows, whose seeds are averaged first: what other "
    "rows like these would say; rows of one template of HANS are much alike, so that the interval is rather too narrow."
)


def noise_of(interval: Mean | None) -> str:
    """What is said of a difference by its interval over seeds: that it rises, falls, or is within their noise."""
    if interval is None or interval.low is None or interval.high is None:
        return "not known (one seed)"
    if interval.low <= 0 <= interval.high:
        return NOISE
    return "rises" if interval.mean > 0 else "falls"


def retrained_summary(found: Mapping[str, HansRetrained], recipe: str, seed: int) -> str:
    """The finding: does non-entailment rise beyond the control, what does it cost, and is it more than noise?"""
    return " ".join(_said_of(found, place, recipe, seed) for place in range(len(next(iter(found.values())).changes)))


def _said_of(found: Mapping[str, HansRetrained], place: int, recipe: str, seed: int) -> str:
    one = next(iter(found.values()))
    change = one.changes[place]
    lead = _lead(found, change, recipe) if place == 0 else f"With {change.name}"
    if len(found) == 1:
        return f"{lead}, {_of_one(one, change, seed)}"
    means = {name: _over_indexes(found, change.name, ALL_ROWS, name) for name in one.groups}
    beyond = _over_indexes(found, change.name, change.control.name, NOT_ENTAILED)
    verdicts = [noise_of(r.over_seeds(change.name, change.control.name, NOT_ENTAILED, seed)) for r in found.values()]
    n = len(found)
    rising = f"By index, beyond the seeds' noise it rises in {verdicts.count('rises')} of {n}"
    costs = ", ".join(f"{name} {_points_and_error(means[name])}" for name in MAIN if name in means)
    return (
        f"{lead}: {costs} (means over {n} indexes, ± standard error). Against its control non-entailment changes by "
        f"{_points_and_error(beyond)}. {rising} and falls in {verdicts.count('falls')}."
    )


def _lead(found: Mapping[str, HansRetrained], change: Change, recipe: str) -> str:
    one = next(iter(found.values()))
    sizes = sorted({len(r.rows) for r in found.values()})
    rows = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    seeds = "" if not one.is_seeded else f", {len(one.seeds)} seed{'s' if len(one.seeds) > 1 else ''}"
    return f"Retrained ({recipe}{seeds}) without the shortcut's {rows} rows"


def _of_one(one: HansRetrained, change: Change, seed: int) -> str:
    before, after = (one.accuracy(name, NOT_ENTAILED) for name in (ALL_ROWS, change.name))
    gain = one.over_seeds(change.name, ALL_ROWS, NOT_ENTAILED, seed)
    beyond = one.over_seeds(change.name, change.control.name, NOT_ENTAILED, seed)
    excess = float(one.difference(change.name, change.control.name, NOT_ENTAILED).mean())
    verdict = {
        "rises": "Beyond the control it rises",
        "falls": "It does not rise beyond the control, but falls below it",
        NOISE: "It does not rise beyond the control by more than the seeds' noise",
    }.get(noise_of(beyond), "One seed cannot tell whether it rises beyond the control")
    costs = [
        f"{name} {_points(float(difference.mean()), interval)}"
        + (f", {NOISE}" if interval and noise_of(interval) == NOISE else "")
        for name in (ENTAILED, IN_DOMAIN)
        if name in one.groups
        for difference, interval in [
            (one.difference(change.name, ALL_ROWS, name), one.over_seeds(change.name, ALL_ROWS, name, seed))
        ]
    ]
    return (
        f"the model is right on {after:.1%} of the non-entailment rows, with all rows on {before:.1%} "
        f"({_points(after - before, gain)}). {verdict}: {_points(excess, beyond)}. What it costs: {'; '.join(costs)}."
    )


def _points(value: float, interval: Mean | None) -> str:
    between = ""
    if interval is not None and interval.low is not None and interval.high is not None:
        between = f", 95% interval over seeds {POINTS * interval.low:+.1f} to {POINTS * interval.high:+.1f}"
    return f"{POINTS * value:+.1f} points{between}"


def _points_and_error(mean: Mean) -> str:
    return f"{POINTS * mean.mean:+.1f}" + ("" if mean.error is None else f" ± {POINTS * mean.error:.1f}") + " points"


def _over_indexes(found: Mapping[str, HansRetrained], name: str, other: str, group: str) -> Mean:
    return mean_of([float(r.difference(name, other, group).mean()) for r in found.values()])


def retrained_tables(found: Mapping[str, HansRetrained], seed: int) -> list[Table]:
    """Accuracy by change of the training rows; gains over all rows and beyond the controls; by seed; over indexes.

    Args:
        found: By the name of the index.
        seed: Seed of the bootstrap.
    """
    tables = [_accuracy_table(found)]
    if len(found) > 1:
        tables.append(_index_table(found))
    note = f"In percentage points. {_INTERVALS}"
    gains = _difference_table("Gains over all rows", found, seed, f"{note} Paired by seed.", to_control=False)
    beyond = _difference_table("Gains beyond the control", found, seed, f"{note} {_CONTROL}", to_control=True)
    return [*tables, beyond, gains, _seed_table(found)]


def _names(one: HansRetrained) -> list[str]:
    return [ALL_ROWS, *(name for change in one.changes for name in (change.name, change.control.name))]


def _accuracy_table(found: Mapping[str, HansRetrained]) -> Table:
    one = next(iter(found.values()))
    groups = [name for name in MAIN if name in one.groups]
    lines: list[list[Cell]] = [
        [*_index(found, index), name, *(POINTS * r.accuracy(name, group) for group in groups)]
        for index, r in found.items()
        for name in _names(r)
    ]
    note = f"In percent, means over the seeds. {_CONTROL}"
    note += IN_PLACE if one.is_seeded else " The retraining has no randomness: seeds draw the control alone."
    return Table("Accuracy, retrained", [*_index_head(found), "training rows", *groups], lines, note)


def _index(found: Mapping[str, HansRetrained], index: str) -> list[Cell]:
    return [index] if len(found) > 1 else []


def _index_head(found: Mapping[str, HansRetrained]) -> list[str]:
    return ["index"] if len(found) > 1 else []


def _difference_table(
    title: str, found: Mapping[str, HansRetrained], seed: int, note: str, *, to_control: bool
) -> Table:
    lines: list[list[Cell]] = []
    for index, r in found.items():
        pairs = [(c.name, c.control.name if to_control else ALL_ROWS) for c in r.changes]
        if not to_control:
            pairs += [(c.control.name, ALL_ROWS) for c in r.changes]
        for group, mask in r.groups.items():
            for name, other in pairs:
                over_seeds, rows = r.over_seeds(name, other, group, seed), r.over_rows(name, other, group, seed)
                cells: list[Cell] = [*_index(found, index), group, name, int(mask.sum()), POINTS * rows.mean]
                between = [None, None] if over_seeds is None else [over_seeds.low, over_seeds.high]
                cells += [None if v is None else POINTS * v for v in (*between, rows.low, rows.high)]
                lines.append([*cells, _said(r, over_seeds)])
    heads = ["test rows", "training rows", "number", "gain", "seeds, 95% low", "seeds, 95% high"]
    heads += ["rows, 95% low", "rows, 95% high", "over seeds"]
    return Table(title, [*_index_head(found), *heads], lines, note)


def _said(r: HansRetrained, over_seeds: Mean | None) -> str:
    return "no seeds in it" if over_seeds is None and not r.is_seeded else noise_of(over_seeds)


def _seed_table(found: Mapping[str, HansRetrained]) -> Table:
    lines: list[list[Cell]] = [
        [*_index(found, index), seed, name, *(POINTS * float(r.right[name][i, r.groups[g]].mean()) for g in r.groups)]
        for index, r in found.items()
        for i, seed in enumerate(r.seeds)
        for name in _names(r)
    ]
    groups = next(iter(found.values())).groups
    heads = [*_index_head(found), "seed", "training rows", *groups]
    return Table("Accuracy by seed, retrained", heads, lines, "In percent.")


def _index_table(found: Mapping[str, HansRetrained]) -> Table:
    one, lines = next(iter(found.values())), list[list[Cell]]()
    for group in one.groups:
        for change in one.changes:
            for against, other in (("all rows", ALL_ROWS), ("its control", change.control.name)):
                mean = _over_indexes(found, change.name, other, group)
                numbers = [None if v is None else POINTS * v for v in (mean.mean, mean.error, mean.low, mean.high)]
                lines.append([group, change.name, against, *numbers])
    heads = ["test rows", "training rows", "against", "gain", "± gain", "95% low", "95% high"]
    note = (
        f"In percentage points; mean over the {len(found)} indexes, of each the mean over its seeds, ± standard error."
    )
    return Table("Gains over the indexes", heads, lines, f"{note} {_CONTROL}")


def retrained_figure(found: Mapping[str, HansRetrained], seed: int) -> Figure:
    """Gains over all rows by change of the training rows; error bars are 95% intervals over seeds, or over indexes."""
    one = next(iter(found.values()))
    groups = [name for name in MAIN if name in one.groups]
    series: dict[str, list[float]] = {}
    errors: dict[str, list[float | tuple[float, float] | None]] = {}
    for name in _names(one)[1:]:
        series[name], errors[name] = [], []
        for group in groups:
            mean = one.over_seeds(name, ALL_ROWS, group, seed)
            if len(found) > 1:
                mean = _over_indexes(found, name, ALL_ROWS, group)
                half = None if mean.error is None else POINTS * mean.error
            else:
                half = None if mean is None or mean.high is None else POINTS * (mean.high - mean.mean)
            gain = _over_indexes(found, name, ALL_ROWS, group).mean
            series[name].append(POINTS * gain)
            errors[name].append(half)
    bars = "standard errors over the indexes" if len(found) > 1 else "95% intervals over seeds"
    drawing = bar_chart(groups, series, errors=errors, xlabel="gain over all rows, percentage points", digits=1)
    return Figure("What retraining changes", drawing, f"Error bars, where drawn, are {bars}. {_CONTROL}")


def retrained_record(r: HansRetrained, seed: int) -> dict[str, Any]:
    """The numbers of one index for ``result.json``; accuracies are shares, gains differences of shares."""

    def gain(name: str, other: str, group: str) -> dict[str, Any]:
        over_seeds = r.over_seeds(name, other, group, seed)
        return {
            "by_seed": r.difference(name, other, group),
            "over_seeds": None if over_seeds is None else asdict(over_seeds),
            "over_rows": asdict(r.over_rows(name, other, group, seed)),
        }

    return {
        "rows": r.rows,
        "random_rows": r.drawn,
        "n_named": r.n_named,
        "seeds": r.seeds,
        "n_rows": {group: int(mask.sum()) for group, mask in r.groups.items()},
        "accuracy": {name: {group: r.accuracy(name, group) for group in r.groups} for name in _names(r)},
        "changes": [
            {
                "name": c.name,
                "weight": c.weight,
                "over_all_rows": {group: gain(c.name, ALL_ROWS, group) for group in r.groups},
                "control_over_all_rows": {group: gain(c.control.name, ALL_ROWS, group) for group in r.groups},
                "beyond_control": {group: gain(c.name, c.control.name, group) for group in r.groups},
            }
            for c in r.changes
        ],
    }
