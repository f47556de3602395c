"""``cancellation``: do the gradients of the training rows cancel out? (Yeh22, Table 1 and section 3.2)

    C(W) = sum_c G(W)_c / sum_c ||W_{c+1} - W_c||,   G(W)_c = sum over rows of eta_c ||dL_n/dW_c||

over the checkpoints c of the index that have a successor; eta_c is the index's. The larger C, the less of what the rows
pull at a weight moves it, and the less a sum of its gradients says of any one row. Beside it the mean cosine of two
rows' gradients, over all pairs: the larger, the more alike the rows look to this weight.

The sums over rows are those over a sample, times N / n. Gradients are taken by plain autograd, one row at a time, in
eval mode, of the gold labels. A cosine with a zero vector is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import INTERVAL_COLUMNS, interval_cells, listed_values
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_line, repeatable
from forebear.indexer.model.device.memory import refusing_lack
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.layers import encoder_layers
from forebear.indexer.rows.sampling import live_sample
from forebear.progress import Progress, counted, no_progress
from forebear.ratio import ratio
from forebear.retriever.retriever import Retriever

KINDS = ("embedding", "weight", "bias", "norm")


@dataclass(frozen=True)
class Group:
    """Parameters whose gradient counts as one vector.

    Attributes:
        level: ``all``; ``kind``: all of a kind; ``layer``: those of a kind in one layer; ``tensor``: one alone.
        name: Name of the layer or tensor, or "all".
        kind: One of ``KINDS``, or "all".
        parameters: Dotted names of the parameters.
    """

    level: str
    name: str
    kind: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """Cancellation and alignment of gradients.

    Attributes:
        groups: The groups of parameters, ``g`` of them.
        values: Each sampled row's part of C, times N: their mean is C, ``(n, g)``; NaN where no checkpoint moved the
            weights (they were frozen).
        moved: sum_c ||W_{c+1} - W_c||, ``(g,)``.
        cosines: Mean cosine of two rows' gradients at each checkpoint c, ``(c, g)``; NaN where all gradients are 0.
        rows: Row numbers of the sample, ``(n,)``.
        checkpoints: Names of the checkpoints that have a successor.
        etas: Weights of these checkpoints.
    """

    groups: tuple[Group, ...]
    values: np.ndarray
    moved: np.ndarray
    cosines: np.ndarray
    rows: np.ndarray
    checkpoints: tuple[str, ...]
    etas: tuple[float, ...]


def parameter_groups(classifier: Classifier) -> tuple[Group, ...]:
    """All parameters together, by kind, by layer and kind, and one by one; a shared parameter counts once."""
    model: Any = classifier.model
    prefix, n_layers = encoder_layers(model, classifier.name)
    words = model.get_input_embeddings()
    names = [name for name, _ in model.named_parameters()]
    kinds, layers = {}, {}
    for name in names:
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.LayerNorm):
            kinds[name] = "norm"
        elif isinstance(module, nn.Embedding):
            kinds[name] = "embedding"
        else:
            kinds[name] = "bias" if parameter == "bias" else "weight"
        number = next((i for i in range(n_layers) if name.startswith(f"{prefix}.{i}.")), None)
        if number is not None:
            layers[name] = f"layer {number}"
        elif module is words:
            layers[name] = "word embeddings"
        elif owner == classifier.head_name:
            layers[name] = "head"
        else:
            base = name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name.split(".")
            layers[name] = "other embeddings" if base else "pooler"
    by_kind = [
        Group("kind", kind, kind, tuple(n for n in names if kinds[n] == kind))
        for kind in KINDS
        if kind in kinds.values()
    ]
    by_layer = [
        Group("layer", layer, kind, tuple(n for n in names if (layers[n], kinds[n]) == (layer, kind)))
        for layer, kind in dict.fromkeys((layers[n], kinds[n]) for n in names)
    ]
    single = [Group("tensor", name, kinds[name], (name,)) for name in names]
    return (Group("all", "all", "all", tuple(names)), *by_kind, *by_layer, *single)


def row_gradient_norms(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    labels: np.ndarray,
    groups: Sequence[Group],
    on_rows: Callable[[int], None] = lambda _n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Length of each row's gradient over each group, and the mean cosine of two rows' gradients.

    Args:
        classifier: The model whose gradients are taken; it is not changed.
        texts: Texts of the rows, one list a text column, each of ``n`` texts, two or more.
        labels: Gold classes, ``(n,)``.
        groups: Groups of parameters, ``g`` of them.
        on_rows: Called with the number of rows just done.

    Returns:
        ``(n, g)`` and ``(g,)`` float64; a cosine is NaN where all gradients of a group are 0.
    """
    model = copy.deepcopy(classifier.model).requires_grad_(True)
    parameters = dict(model.named_parameters())
    directions = [{name: torch.zeros_like(parameters[name]) for name in group.parameters} for group in groups]
    norms = np.zeros((len(labels), len(groups)))
    for n, row in enumerate(encode(classifier, texts)):
        subject = f"the gradient of sampled row {n}"
        with repeatable(classifier.device), refusing_lack(subject, classifier.device, "Give a smaller model"):
            with classifier.arithmetic():
                logits = model(**pad_batch(classifier.tokenizer, [row], classifier.device)).logits.float()
            residual, _ = classifier.loss.residual_and_loss(logits.detach().double().cpu().numpy(), labels[n : n + 1])
            loss_slope = torch.from_numpy(residual).to(logits)
            derivatives = torch.autograd.grad(
                logits, list(parameters.values()), grad_outputs=loss_slope, allow_unused=True
            )
        gradients = {name: g for name, g in zip(parameters, derivatives, strict=True) if g is not None}
        squares = {name: float((g.double() ** 2).sum()) for name, g in gradients.items()}
        for i, group in enumerate(groups):
            norms[n, i] = np.sqrt(sum(squares.get(name, 0.0) for name in group.parameters))
            if norms[n, i] > 0:
                for name in gradients.keys() & directions[i].keys():
                    directions[i][name].add_(gradients[name], alpha=1 / norms[n, i])
        on_rows(1)
    total = np.array([sum(float((d.double() ** 2).sum()) for d in direction.values()) for direction in directions])
    n_nonzero = (norms > 0).sum(axis=0)
    pairs = len(labels) * (len(labels) - 1)
    return norms, np.where(n_nonzero > 0, (total - n_nonzero) / pairs, np.nan)


def distance_moved(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], groups: Sequence[Group]
) -> np.ndarray:
    """||W_{c+1} - W_c|| of each group, ``(g,)``, from the parameters by name."""
    squares = {name: float(((after[name] - value).detach().double() ** 2).sum()) for name, value in before.items()}
    return np.array([np.sqrt(sum(squares[name] for name in group.parameters)) for group in groups])


def cancellation(
    retriever: Retriever, *, n_rows: int = 100, seed: int = 0, progress: Progress = no_progress
) -> Cancellation:
    """Measure how far gradients cancel, for each layer, over the index's checkpoints.

    Args:
        retriever: Over an index of two or more checkpoints.
        n_rows: Training rows, a seeded sample; 0 for all.
        seed: Random seed of the sample.
        progress: Called with the rows done.

    Raises:
        InputError: The index has one checkpoint, or there are fewer than two rows.
    """
    index = retriever.index
    checkpoints = index.manifest.checkpoints
    if len(checkpoints) < 2:
        raise InputError(
            f"{index.folder} has one checkpoint; cancellation needs how far the weights moved between two or more. "
            "Build it with --checkpoints all."
        )
    if n_rows < 0 or n_rows == 1:
        raise InputError(f"--rows {n_rows}: expected 2 or more training rows, or 0 for all of them.")
    rows = live_sample(index.live, n_rows, seed)
    if len(rows) < 2:
        raise InputError(f"{index.folder} has {len(rows)} live row(s); cancellation compares 2 or more.")
    groups = parameter_groups(retriever.classifier())
    texts, labels = index.text_lists(rows), index.targets(rows)
    first = checkpoints[:-1]
    on_rows = counted(progress, "gradients", len(first) * len(rows))
    pulled, moved, cosines = np.zeros((len(rows), len(groups))), np.zeros(len(groups)), []
    for c, checkpoint in enumerate(first):
        norms, cosine = row_gradient_norms(retriever.classifier(c), texts, labels, groups, on_rows)
        pulled += checkpoint.eta * norms
        cosines.append(cosine)
        before, after = (dict(retriever.classifier(number).model.named_parameters()) for number in (c, c + 1))
        moved += distance_moved(before, after, groups)
    values = len(index.live) * ratio(pulled, moved, np.nan)
    return Cancellation(
        groups=groups, values=values, moved=moved, cosines=np.array(cosines), rows=rows,
        checkpoints=tuple(c.name for c in first), etas=tuple(c.eta for c in first),
    )  # fmt: skip


def cancellation_report(
    measured: Cancellation, retriever: Retriever, seed: int, command: str
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    index = retriever.index
    cosines = measured.cosines.mean(axis=0)
    lines: dict[str, list[list[Cell]]] = {"all": [], "kind": [], "layer": []}
    for g, group in enumerate(measured.groups):
        if group.level == "tensor":  # hundreds: in result.json alone
            continue
        cosine = None if np.isnan(cosines[g]) else float(cosines[g])
        lines[group.level].append([group.name, group.kind, *interval_cells(measured.values[:, g], seed), cosine])
    columns = ["parameters", "kind", "C", *INTERVAL_COLUMNS[1:], "cosine"]
    note = (
        f"C = sum of eta ||dL/dW|| over all {len(index.live):,} rows, from a sample of {len(measured.rows):,}, over "
        f"the distance that the weights moved; checkpoints {', '.join(measured.checkpoints)}. ± standard error over "
        "the sampled rows, 95% interval. Cosine: mean over pairs of rows, and over the checkpoints. A dash: the "
        "weights were frozen, or get no gradient."
    )
    tables = (
        Table("Cancellation by kind", columns, lines["all"] + lines["kind"], note),
        Table("Cancellation by layer", columns, lines["layer"], note),
    )
    shown = [row for row in lines["all"] + lines["layer"] if row[1] in ("all", "embedding", "weight") and row[2]]
    labels = [str(row[0]) for row in shown]
    figures = []
    if shown:
        values = [float(row[2] or 0.0) for row in shown]
        figures.append(Figure("Cancellation of weights", bar_chart(labels, {"C": values}, xlabel="C")))
        alike = [float(row[6] or 0.0) for row in shown]
        drawing = bar_chart(labels, {"cosine": alike}, xlabel="mean cosine of two rows' gradients", digits=3)
        figures.append(Figure("Alignment of gradients", drawing))
    by_kind = {str(row[0]): row[2] for row in lines["kind"]}
    weight, bias = by_kind.get("weight"), by_kind.get("bias")
    summary = "C of weights or of biases is undefined: they did not move."
    if isinstance(weight, float) and isinstance(bias, float):
        summary = f"C is {bias:.3g} for the biases of linear layers and {weight:.3g} for their weights."
    provenance = {
        "index": str(index.folder),
        "index digest": index.manifest.digest(),
        "computed on": computed_line(retriever.models.computed_on()),
        "rows": f"{len(measured.rows)} of {len(index.live)}",
        "seed": str(seed),
        "command": command,
    }
    result = {
        "checkpoints": list(measured.checkpoints),
        "eta": list(measured.etas),
        "groups": [
            {
                "level": group.level,
                "name": group.name,
                "kind": group.kind,
                "cancellation": listed_values(measured.values[:, g].mean()),
                "moved": measured.moved[g],
                "cosine": listed_values(measured.cosines[:, g]),
                "per_row": listed_values(measured.values[:, g]),
            }
            for g, group in enumerate(measured.groups)
            if group.level != "tensor"
        ],
        "tensors": {
            group.name: {
                "cancellation": listed_values(measured.values[:, g].mean()),
                "cosine": listed_values(cosines[g]),
            }
            for g, group in enumerate(measured.groups)
            if group.level == "tensor"
        },
        "training_rows": measured.rows,
        "seed": seed,
    }
    return Report("Cancellation of gradients", summary, tables, figures, provenance=provenance), result
