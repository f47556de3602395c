"""``randomized``: do scores depend on what the model has learned? (Pez21, Table 1)

A method that ranks rows alike for the trained model and for one with random weights says nothing about training:
Spearman's correlation between the two should be near 0.

Where predictions are explained, two targets are tried. ``same``: both models are asked about the trained model's
prediction. Gradients then share the sign that the labels alone give them, for any model. ``own``: each is asked about
its own prediction; a random model mostly predicts one class, so that this sign turns with the query.

The random model has the same architecture and tokenizer. The sampled training rows are indexed under it in a temporary
folder, with its own curvature, from these rows alone. It has one checkpoint, so ``tracin`` is ``gd`` there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    defined_mean,
    defined_means,
    interval_cells,
    listed_values,
    spearman,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, refuse_methods, score_queries
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.indexer.building.build import build_index
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import own_random_numbers
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.network.pretrained import quiet_transformers
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.sampling import live_sample
from forebear.indexer.training.model_choice import CheckpointPath
from forebear.progress import Progress, no_progress
from forebear.retriever.question.methods import pick_methods
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.question.targets import choose_targets
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import residuals_of


@dataclass(frozen=True, kw_only=True)
class Randomized:
    """Correlations of the trained model's scores with random models'.

    Attributes:
        methods: Names of the methods, ``m``.
        targets: ``same`` and ``own``, ``t``; ``same`` alone where the target is not the prediction.
        values: For each target, random model, query and method, ``(t, s, q, m)``; NaN where one of the two models gives
            all rows the same score.
        seeds: Random seeds of the random models, ``s``.
        rows: Training rows that were scored, ``(n,)``.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    targets: tuple[str, ...]
    values: np.ndarray
    seeds: tuple[int, ...]
    rows: np.ndarray
    residuals: dict[str, float]


def save_random_model(classifier: Classifier, folder: Path, seed: int) -> None:
    """Save a classifier of the same architecture and tokenizer with weights as the library initialises them."""
    from transformers import AutoModelForSequenceClassification

    model: Any = classifier.model
    with quiet_transformers(), own_random_numbers(classifier.device):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32).save_pretrained(folder)
    classifier.tokenizer.save_pretrained(folder)


def random_retriever(retriever: Retriever, spec: QuerySpec, rows: np.ndarray, seed: int, folder: Path) -> Retriever:
    """Index training rows under a random model in an empty folder, as the index itself was built."""
    index, classifier = retriever.index, retriever.classifier()
    stored = index.manifest.spec
    save_random_model(classifier, folder / "model", seed)
    methods = pick_methods(spec.methods)
    scopes = {spec.scope_of(method) for method in methods if method.representation == "head"} - {"head"}
    by_words = any(method.by_words for method in methods)
    options = BuildOptions.of(
        index.manifest,
        stores=("features", "words") if by_words else ("features",),
        scopes=("head", *sorted(scopes)),
        calibration_queries=0,
        keep_columns=(),
        label_mode=None,  # labels are classes already
        ann=None,
        batch_tokens="auto",
        shard_rows=BuildOptions.shard_rows,
        device=str(classifier.device),
    )
    columns = index.text_lists(rows)
    texts: list[Any] = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    names = stored.label_names
    source = rows_from_texts(texts, index.labels[rows].tolist(), text_columns=stored.text_columns, label_names=names)
    checkpoint = CheckpointPath(name="random", path=str(folder / "model"), eta=1.0)
    built = build_index(source, folder / "index", [checkpoint], options)
    return Retriever(built, device=str(classifier.device))


def randomized_correlations(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    *,
    n_rows: int = 500,
    seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress = no_progress,
) -> Randomized:
    """Spearman's correlation of each query's scores with those by randomly initialised models.

    Args:
        retriever: Over the trained model's index.
        queries: Test rows.
        spec: Methods, scope, target, curvature.
        n_rows: Training rows, a seeded sample; 0 for all.
        seed: Random seed of the sample.
        seeds: Random seed of each random model.
        progress: Called with the random models done.

    Raises:
        InputError: A method does not depend on the model, or there are fewer than two rows or no seeds.
    """
    trained_question = retriever.resolve(spec)
    refuse_methods(
        trained_question,
        lambda method: method.representation == "sentence",
        "does not depend on the model that is explained: its correlation would be 1.",
    )
    spec = trained_question.spec
    if n_rows < 0 or n_rows == 1:
        raise InputError(f"--rows {n_rows}: expected 2 or more training rows, or 0 for all of them.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {', '.join(map(str, seeds)) or 'none'}: expected one or more, each once.")
    rows = live_sample(retriever.index.live, n_rows, seed)
    if len(rows) < 2:
        raise InputError(f"{retriever.index.folder} has {len(rows)} live row(s); a rank correlation takes 2 or more.")
    predictions = run_forward(retriever.classifier(), queries.texts).predictions
    targets = choose_targets(spec.target, predictions, queries.labels, retriever.label_names, retriever.index.loss)
    relabelled, same_target = replace(queries, labels=targets), replace(spec, target="gold")
    trained = score_queries(retriever, relabelled, same_target, rows)
    specs = {"same": same_target} | ({"own": spec} if spec.target == "predicted" else {})
    values = np.empty((len(specs), len(seeds), len(queries), len(spec.methods)))
    progress("random models", 0, len(seeds))
    for s, random_seed in enumerate(seeds):
        with tempfile.TemporaryDirectory(prefix="forebear-random-") as folder:
            random_model = random_retriever(retriever, same_target, rows, random_seed, Path(folder))
            for t, question in enumerate(specs.values()):
                untrained = score_queries(random_model, relabelled, question)
                for m, name in enumerate(spec.methods):
                    values[t, s, :, m] = spearman(trained[name], untrained[name])
        progress("random models", s + 1, len(seeds))
    return Randomized(
        methods=spec.methods, targets=tuple(specs), values=values, seeds=tuple(seeds), rows=rows,
        residuals=residuals_of(trained),
    )  # fmt: skip


def randomized_report(randomized: Randomized, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    queries, seed = inputs.queries, inputs.seed
    rows: list[list[Cell]] = []
    means: dict[str, list[float]] = {target: [] for target in randomized.targets}
    worst: tuple[float, str, str] | None = None
    for m, name in enumerate(randomized.methods):
        for t, target in enumerate(randomized.targets):
            correlations = randomized.values[t, :, :, m]
            by_query = defined_means(correlations, axis=0)
            cells = interval_cells(by_query, seed)
            rows.append(
                [
                    name,
                    target,
                    *cells,
                    *(defined_mean(of_model) for of_model in correlations),
                    int(np.isnan(correlations).sum()),
                ]
            )
            mean = defined_mean(by_query)
            means[target].append(mean or 0.0)
            if mean is not None and (worst is None or abs(mean) > abs(worst[0])):
                worst = (mean, name, target)
    table = Table(
        "Spearman correlation of trained and random models' scores",
        ["method", "target", *INTERVAL_COLUMNS, *(f"seed {number}" for number in randomized.seeds), "undefined"],
        rows,
        f"Near 0 is good. Mean over {len(queries):,} queries (of each the mean over {len(randomized.seeds)} random "
        f"models), ± its standard error, 95% interval over the queries; over {len(randomized.rows):,} training rows. "
        "Target same: the trained model's prediction for both; own: each model's own. "
        "Undefined: queries x models where a method gives all rows one score, which has no order.",
    )
    summary = "No method has a correlation: each gives all rows one score."
    if worst is not None:
        mean, name, target = worst
        summary = f"Farthest from 0 is {name}: {mean:.2f} with random models' scores, when the target is the {target}."
    drawing = bar_chart(randomized.methods, means, xlabel="mean Spearman correlation")
    report = Report(
        "Randomized models",
        summary,
        (table,),
        (Figure("Trained against random models", drawing, "0 where it is undefined."),),
        provenance=inputs.provenance(
            randomized.residuals, rows=len(randomized.rows), seed=seed,
            random_models=", ".join(map(str, randomized.seeds)),
        ),
    )  # fmt: skip
    result = {
        "methods": list(randomized.methods),
        "seeds": list(randomized.seeds),
        "targets": list(randomized.targets),
        "per_query": listed_values(randomized.values),
        "query_rows": queries.rows,
        "training_rows": randomized.rows,
        "seed": seed,
        "question": inputs.record(randomized.residuals),
    }
    return report, result
