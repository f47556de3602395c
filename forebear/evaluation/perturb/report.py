"""The report of a perturbation: accuracy by number of changed rows, and every changed row (``changed.jsonl``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forebear.errors import OutputExistsError
from forebear.evaluation.common.statistics import mean_and_error
from forebear.evaluation.perturb.experiment import Measured, Perturbation, Turns
from forebear.evaluation.perturb.spec import RANDOM, STRATEGIES, Change
from forebear.evaluation.reports.charts import line_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table, check_folder
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.indexer.spans.text import Span
from forebear.retriever.answers.coverage import fit_lines
from forebear.retriever.retriever import Retriever

CHANGED_NAME = "changed.jsonl"
SHOWN_QUERIES = 8
UNCHANGED = "(unchanged)"


def check_out(folder: Path, *, force: bool) -> None:
    """Refuse a folder that holds a report or changed rows, unless they are to be replaced."""
    check_folder(folder, force=force)
    if (folder / CHANGED_NAME).exists() and not force:
        raise OutputExistsError(f"{folder} already holds {CHANGED_NAME}. Name another folder, or give --force.")


def perturb_report(
    perturbation: Perturbation, retriever: Retriever, retraining: dict[str, Any], provenance: dict[str, str]
) -> tuple[Report, dict[str, object]]:
    """The report of a perturbation, and its numbers for ``result.json``.

    Args:
        perturbation: The changes and the measurements.
        retriever: Over the index.
        retraining: Facts of the retraining, from :meth:`~forebear.evaluation.retraining.jobs.Retrainer.facts`.
        provenance: Provenance lines on test rows, command and WordNet; lines on the index are added to them.
    """
    index = retriever.index
    facts = {"index": str(index.folder), "index digest": index.manifest.digest()}
    facts["computed on"] = computed_line(retriever.models.computed_on())
    facts |= fit_lines(retriever.resolve(perturbation.spec.question)) | provenance
    facts |= {"retraining": f"{retraining['retrain']}. {retraining['note']}", "seeds": _listed(perturbation.seeds)}
    attack = perturbation.spec.what == "attack"
    report = Report(
        "Attack by changed training rows" if attack else "Fix by added training rows",
        _summary(perturbation),
        (*(_accuracy_table(perturbation, name) for name in perturbation.sets), _effect_table(perturbation)),
        tuple(_figure(perturbation, name) for name in perturbation.sets),
        tuple(_groups(perturbation, retriever)),
        facts,
    )
    result: dict[str, object] = {
        "what": perturbation.spec.what,
        "choices": asdict(perturbation.spec),
        "queries": perturbation.queries.numbers,
        "seeds": list(perturbation.seeds),
        "sets": perturbation.sets,
        "indexed_accuracy": perturbation.indexed,
        "unchanged": {name: _by_seed(perturbation.clean[name], 0) for name in perturbation.sets},
        "changed": {
            name: {
                rows: {str(n): _by_seed(measured[rows], i) for i, n in enumerate(perturbation.spec.rows)}
                for rows in perturbation.sets
            }
            for name, measured in perturbation.changed.items()
        },
        "retraining": retraining,
        "curvature_residual": perturbation.residual,
    }
    return report, result


def changed_lines(perturbation: Perturbation, retriever: Retriever) -> str:
    """Every change as one JSON object a line, random ones with their seed: the text of ``changed.jsonl``."""
    names = retriever.label_names
    sources: list[tuple[str, int | None, Turns]] = [(name, None, turns) for name, turns in perturbation.changes.items()]
    sources += [(RANDOM, seed, turns) for seed, turns in perturbation.random.items()]
    lines = [
        json.dumps(
            {
                "strategy": strategy, "seed": seed, "turn": turn, "query": change.query, "aim": change.aim,
                "salient": _salient(perturbation, change), "row": change.row, "label": names[change.label],
                "column": _column_name(retriever, change.span), "start": change.span.start, "end": change.span.end,
                "word": change.word, "substitute": change.substitute, "old": list(change.old), "new": list(change.new),
                "score": change.score, "effect": change.effect,
            },
            ensure_ascii=False, allow_nan=False,
        )
        for strategy, seed, turns in sources
        for turn, changes in enumerate(turns, 1)
        for change in changes
    ]  # fmt: skip
    return "".join(line + "\n" for line in lines)


def _column_name(retriever: Retriever, span: Span) -> str:
    """Name of the text column that a span is in."""
    return retriever.index.manifest.spec.text_columns[span.column]


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _by_seed(measured: Measured, amount: int) -> dict[str, list[float]]:
    return {"accuracy": measured.accuracy[amount].tolist(), "probability": measured.probability[amount].tolist()}


def _salient(perturbation: Perturbation, change: Change) -> str | None:
    """The word of the test row that a change is for."""
    if change.salient is None:
        return None
    (position,) = np.flatnonzero(perturbation.queries.numbers == change.query)
    span = change.salient
    return perturbation.queries.texts[span.column][position][span.start : span.end]


def _mean_and_error(
    perturbation: Perturbation, values: np.ndarray, strategy: str | None = None
) -> tuple[float, float | None]:
    """Mean over seeds and its standard error; the error is None where seeds make no difference.

    A recipe without randomness gives every seed the same outcome; only the random changes are drawn anew.
    """
    mean, error = mean_and_error(values)
    return mean, error if perturbation.seeded or strategy == RANDOM else None


def _rows_name(perturbation: Perturbation) -> str:
    """The name of the rows that the changes are for: an attack is on test rows, a fix for wrong dev rows."""
    return "test rows" if perturbation.spec.what == "attack" else "wrong dev rows"


def _summary(perturbation: Perturbation) -> str:
    """Two sentences on the accuracy on the first set."""
    name, most, attack = next(iter(perturbation.sets)), perturbation.spec.most, perturbation.spec.what == "attack"
    ends = {strategy: float(measured[name].accuracy[-1].mean()) for strategy, measured in perturbation.changed.items()}
    best = (min if attack else max)(perturbation.spec.strategies, key=lambda strategy: ends[strategy])
    before = float(perturbation.clean[name].accuracy.mean())
    difference = perturbation.changed[best][name].accuracy[-1] - perturbation.changed[RANDOM][name].accuracy[-1]
    mean, error = mean_and_error(difference)
    done = "replaced" if attack else "added"
    certain = "" if error is None else f" ± {error:.3f}"
    return (
        f"With {most} changed rows {done} for each of {len(perturbation.queries.numbers):,} "
        f"{_rows_name(perturbation)}, the accuracy on the {name} goes from {before:.3f} to {ends[best]:.3f} ({best}). "
        f"With as many random changes it is {ends[RANDOM]:.3f}: a difference of {mean:+.3f}{certain} over "
        f"{len(perturbation.seeds)} seed(s)."
    )


def _accuracy_table(perturbation: Perturbation, name: str) -> Table:
    q = len(perturbation.queries.numbers)
    done = "replaced" if perturbation.spec.what == "attack" else "added"
    clean = perturbation.clean[name]
    rows: list[list[Cell]] = [
        [
            UNCHANGED,
            0,
            *_mean_and_error(perturbation, clean.accuracy[0]),
            *_mean_and_error(perturbation, clean.probability[0]),
            None,
            None,
        ]
    ]
    for strategy, measured in perturbation.changed.items():
        for i, n in enumerate(perturbation.spec.rows):
            accuracy, probability = measured[name].accuracy[i], measured[name].probability[i]
            beside = perturbation.changed[RANDOM][name].accuracy[i]
            difference = (None, None) if strategy == RANDOM else mean_and_error(accuracy - beside)
            measures = [_mean_and_error(perturbation, values, strategy) for values in (accuracy, probability)]
            rows.append([strategy, n, *measures[0], *measures[1], *difference])
    return Table(
        f"Retrained, on the {name} ({perturbation.sets[name]:,})",
        ["strategy", "rows", "accuracy", "± acc.", "p(gold)", "± p", "− random", "± diff."],
        rows,
        f"Rows: training rows {done} for each of {q:,} {_rows_name(perturbation)}. Mean over "
        f"{len(perturbation.seeds)} seed(s) of the retraining, ± its standard error; the difference to as many random "
        "changes is paired by seed. "
        + (
            ""
            if perturbation.seeded
            else "This retraining has no randomness: seeds draw other random changes, no more. "
        )
        + f"Accuracy of the indexed model itself: {perturbation.indexed[name]:.3f}.",
    )


def _effect_table(perturbation: Perturbation) -> Table:
    attack = perturbation.spec.what == "attack"
    rows: list[list[Cell]] = []
    for strategy, turns in perturbation.changes.items():
        for aim in STRATEGIES[perturbation.spec.what][strategy]:
            changes = [c for turn in turns for c in turn if c.aim == aim.name]
            if changes:  # a replaced row's part goes, an added row's comes on top
                scores, effects = (np.array([getattr(c, name) for c in changes]) for name in ("score", "effect"))
                moved = effects if attack else scores + effects
                wanted = float((aim.sign * moved > 0).mean())
                rows.append([strategy, aim.name, len(changes), wanted, float(moved.mean())])
    done = "replacing the old row by the changed one" if attack else "adding the changed row"
    note = (
        f"Effect: by how much {done} moves the saliency of the asked row's word, times the number of training rows, to "
        "first order; the wanted way: the share of changes of which it has the right sign."
    )
    if perturbation.residual is not None:
        note += f" H^-1 was iterated to a relative residual of at most {perturbation.residual:.2g}."
    return Table(
        "Predicted effect of the changes", ["strategy", "aim", "changes", "the wanted way", "mean effect"], rows, note
    )


def _figure(perturbation: Perturbation, name: str) -> Figure:
    series, errors = {}, {}
    start = _mean_and_error(perturbation, perturbation.clean[name].accuracy[0])
    for strategy, measured in perturbation.changed.items():
        pairs = [start, *(_mean_and_error(perturbation, values, strategy) for values in measured[name].accuracy)]
        series[strategy] = [mean for mean, _ in pairs]
        errors[strategy] = [error for _, error in pairs]
    done = "replaced" if perturbation.spec.what == "attack" else "added"
    drawing = line_chart(
        (0, *perturbation.spec.rows), series, errors=errors, ylabel="accuracy",
        xlabel=f"training rows {done} for each of {len(perturbation.queries.numbers):,} {_rows_name(perturbation)}",
    )  # fmt: skip
    return Figure(f"Accuracy on the {name}", drawing, "Bars: standard error over seeds of the retraining.")


def _groups(perturbation: Perturbation, retriever: Retriever) -> Iterator[Group]:
    """Changes for up to ``SHOWN_QUERIES`` test rows, evenly spread, and as many of the random changes."""
    q = len(perturbation.queries.numbers)
    names, columns = retriever.label_names, retriever.index.manifest.spec.text_columns
    for i in np.unique(np.linspace(0, q - 1, min(q, SHOWN_QUERIES)).astype(int)).tolist():
        changes = [(strategy, c) for strategy, turns in perturbation.changes.items() for c in _of_query(turns, i)]
        right, wrong = names[perturbation.queries.right[i]], names[perturbation.queries.wrong[i]]
        texts = {name: column[i] for name, column in zip(columns, perturbation.queries.texts, strict=True)}
        salient = {word for _, c in changes if (word := _salient(perturbation, c))}
        facts: dict[str, Cell] = {
            "right": right,
            "wrong": wrong,
            "predicted": names[perturbation.queries.predictions[i]],
        }
        query_name = f"{'test' if perturbation.spec.what == 'attack' else 'dev'} row {perturbation.queries.numbers[i]}"
        yield Group(
            f"Changed for {query_name}",
            [_passage(strategy, c, columns, names) for strategy, c in changes],
            query=Passage(f"{query_name}: salient words marked", texts, salient, facts),
        )
    seed = perturbation.seeds[0]
    random_changes = perturbation.random[seed][0][:SHOWN_QUERIES]
    yield Group(f"Random changes, seed {seed}", [_passage(RANDOM, c, columns, names) for c in random_changes])


def _of_query(turns: Turns, query: int) -> list[Change]:
    return [turn[query] for turn in turns]


def _passage(strategy: str, change: Change, columns: tuple[str, ...], names: tuple[str, ...]) -> Passage:
    """A changed row, before and after."""
    texts: dict[str, str] = {}
    for number, name in enumerate(columns):
        if number == change.span.column:
            texts |= {f"{name}, before": change.old[number], f"{name}, after": change.new[number]}
        else:
            texts[name] = change.old[number]
    aim = "" if change.aim == strategy else f" · {change.aim}"
    facts: dict[str, Cell] = {"label": names[change.label], "change": f"{change.word} → {change.substitute}"}
    if change.effect is not None:
        facts |= {"score": change.score, "effect": change.effect}
    return Passage(f"row {change.row} · {strategy}{aim}", texts, {change.word, change.substitute}, facts)
