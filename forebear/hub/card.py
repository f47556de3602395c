"""The card of a published index: README.md, whose head the hub reads."""

from __future__ import annotations

import json
import re

from forebear.indexer.model.scope_names import HEAD
from forebear.indexer.storage.manifest import Manifest

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card_of(manifest: Manifest) -> str:
    """The card of an index: its model, data, stores, figures and digest, and how it is opened.

    Every figure is one of the manifest; the recall of candidates is that which its calibration measured.
    """
    sections = [_front(manifest), "# A forebear index", _about(manifest), "## Opening it", _opening(manifest)]
    sections += ["## Model", _table(_model(manifest)), "## Training rows", _rows(manifest)]
    sections += ["## What it holds", _table(_stores(manifest))]
    if recalls := _recalls(manifest):
        sections += ["## Recall of candidates", recalls]
    return "\n\n".join(sections) + "\n"


def _front(manifest: Manifest) -> str:
    """YAML that the hub reads; every value is written as JSON, which YAML contains."""
    lines = ["library_name: forebear", "tags: [forebear, training-data-attribution, text-classification]"]
    model = manifest.checkpoints[-1].path
    if _HUB_NAME.fullmatch(model):
        lines.append(f"base_model: {json.dumps(model, allow_nan=False)}")
    return "\n".join(["---", *lines, "---"])


def _about(manifest: Manifest) -> str:
    return (
        f"{manifest.n_live:,} training rows of a text classifier, indexed for training-data attribution: which of "
        f"these rows made the model predict what it does? Digest `{manifest.digest()}`."
    )


def _opening(manifest: Manifest) -> str:
    lines = [
        "```python", "from forebear import Index, Retriever", "",
        'index = Index.open("hf://USER/NAME")  # the name of this repository',
        f'answer = Retriever(index, model="{_model_place(manifest)}").retrieve(["a text"])', "```",
    ]  # fmt: skip
    text = "\n".join(lines)
    if manifest.without_texts:
        text += (
            "\n\nThe texts of the training rows were not published: results name rows by their number in the training "
            "file. Methods that send training rows through the model, or compare words, need the texts; those of the "
            "head, of stored features and of sentence embeddings do not."
        )
    return text


def _model_place(manifest: Manifest) -> str:
    path = manifest.checkpoints[-1].path
    return path if _HUB_NAME.fullmatch(path) else f"path/to/{path}"


def _model(manifest: Manifest) -> list[tuple[str, str]]:
    spec = manifest.spec
    rows = [(f"checkpoint {c.name}", f"{c.path}, sha256 of its weights `{c.sha256}`") for c in manifest.checkpoints]
    rows += [("tokenizer", f"sha256 `{spec.tokenizer_sha256}`"), ("classes", ", ".join(spec.label_names))]
    return [*rows, ("longest input", f"{spec.max_length} word pieces"), ("precision", spec.precision)]


def _rows(manifest: Manifest) -> str:
    lines = [
        ("text columns", ", ".join(manifest.spec.text_columns) + (" (left out)" if manifest.without_texts else "")),
        *((s.source, f"{s.n_rows:,} rows, sha256 of texts and labels `{s.rows_sha256}`") for s in manifest.segments),
        ("retired", f"{manifest.n_retired:,}"),
    ]
    if manifest.columns:
        lines.append(("columns beside them", ", ".join(manifest.columns)))
    return _table(lines)


def _stores(manifest: Manifest) -> list[tuple[str, str]]:
    spec = manifest.spec
    total = sum(facts["bytes"] for facts in manifest.files.values())
    lines = [("stores", ", ".join(spec.stores)), ("scopes", ", ".join(spec.scopes))]
    lines.append(("features", f"{manifest.feature_dim} a row and checkpoint"))
    for scope, solvers in manifest.curvature.items():
        lines += [
            (f"curvature of {scope}", f"{name}, damping {', '.join(d['given'] for d in found['dampings'])}")
            for name, found in solvers.items()
            if "dampings" in found
        ]
    for scope, error in manifest.self_check.get("errors", {}).items():
        lines.append((f"gradients of {scope} against autograd", f"largest relative error {error:.1e}"))
    lines.append(("size", f"{total:,} bytes, {total / manifest.n_rows:,.0f} a row"))
    lines.append(("built with", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())))
    return lines


def _recalls(manifest: Manifest) -> str:
    lines = []
    for scope, found in manifest.calibration.items():
        for method, known in found["methods"].items():
            if scope != HEAD and "margin_unit" in known:
                shares = {f"{float(recall):.2g}": f"{share:.2g}" for recall, share in known["candidates"].items()}
                listed = ", ".join(f"recall {recall}: {share} of the rows" for recall, share in shares.items())
                lines.append((f"{method} at {scope}", f"{listed}; stated by {known['n_stating']} training rows"))
    return _table(lines) if lines else ""


def _table(lines: list[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")

    return "\n".join(["| | |", "| --- | --- |", *(f"| {cell(name)} | {cell(value)} |" for name, value in lines)])
