"""The end of every change to an index: curvature, search structures, hashes, manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.indexer.building.calibration.calibrate import (
    calibrate_scope,
    calibrate_spans,
    n_sampled,
)
from forebear.indexer.curvature.damping import Eigenvalues, absolute_damping
from forebear.indexer.curvature.ekfac import Ekfac
from forebear.indexer.curvature.head import (
    REFIT_L2,
    REPRESENTER_LAMBDA,
    HeadCurvature,
    fits_dense,
    refit_head,
)
from forebear.indexer.curvature.separate import SeparateHead
from forebear.indexer.gradients.earlier_rows import shard_file
from forebear.indexer.index import Index
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.sketches.fitting import gradient_files, sketch_folders
from forebear.indexer.storage.arrow import file_sha256, write_columns
from forebear.indexer.storage.journal import tidy
from forebear.indexer.storage.layout import (
    COLUMNS,
    SPANS,
    masked_folder,
    span_gradients,
    word_shards_folder,
    words_folder,
)
from forebear.indexer.storage.manifest import FORMAT_VERSION, Manifest
from forebear.indexer.storage.scan_table import build_derived
from forebear.indexer.words.store import merge_shards
from forebear.progress import Progress, counted


def finish(
    folder: Path,
    manifest: Manifest,
    retired: np.ndarray,
    progress: Progress,
    calibrate: Callable[[Index], dict[str, Any]] | None = None,
) -> Index:
    """Compute what follows from the shards and put the new manifest in force.

    Args:
        folder: The index; every shard that ``manifest`` names is written already.
        manifest: The new manifest, with its segments, shards and generation. ``curvature``, ``derived`` and ``files``
            are filled in here.
        retired: Retired row numbers, ascending.
        progress: Called with the stage.
        calibrate: Measures the calibration of the new index once all its other files are written; None keeps the
            calibration of ``manifest``.

    Returns:
        The index under its new manifest.
    """
    known = manifest.files
    names = [*_pass_files(manifest), *_merge_words(folder, manifest, progress)]
    if len(retired):
        names.append(f"retired/{manifest.generation:04d}.arrow")
        write_columns(folder / names[-1], {"row": retired.astype(np.int64)})
    manifest = manifest.with_files({name: known.get(name) or describe_file(folder, name) for name in names})
    # Without the curvature of before: its eigenvalues, which a relative damping is of, are those of other rows.
    index = Index(folder, replace(manifest, curvature={}), check=False)

    progress("curvature", 0, manifest.n_rows)
    curvature, curvature_files = _write_curvature(index)
    progress("curvature", manifest.n_rows, manifest.n_rows)
    progress("search structures", 0, manifest.n_rows)
    n_checkpoints = len(manifest.checkpoints)
    derived = build_derived(
        folder,
        generation=manifest.generation,
        live=index.live,
        features=[index.features(c) for c in range(n_checkpoints)],
        residuals=[index.residuals(c) for c in range(n_checkpoints)],
        etas=manifest.spec.etas,
        sentence=index.sentence() if "sbert" in manifest.spec.stores else None,
        factory=manifest.spec.ann,
        seed=manifest.spec.seed,
    )
    progress("search structures", manifest.n_rows, manifest.n_rows)
    new = [*curvature_files, *(facts["file"] for facts in derived.values())]
    files = manifest.files | {name: describe_file(folder, name) for name in new}
    for scope in manifest.spec.sketched_scopes:
        if manifest.spec.whitened:
            curvature[scope] = {"ekfac": ekfac_facts(index.ekfac(scope), manifest.spec.dampings)}
    final = replace(manifest, format=FORMAT_VERSION, curvature=curvature, derived=derived).with_files(files)
    if calibrate is not None:
        final = replace(final, calibration=calibrate(Index(folder, final, check=False)))
    final.write(folder)
    tidy(folder, final)
    return Index.open(folder)


def finish_build(folder: Path, manifest: Manifest, last: Classifier, progress: Progress) -> Index:
    """Make the index of a build whose shards are all written, and whose equal rows have equal numbers.

    Args:
        folder: The index.
        manifest: The manifest of the build, as far as it is known before.
        last: The model at the last checkpoint.
        progress: Called with the stage.
    """
    calibrate = calibration_by(last, manifest.calibration_queries or 0, progress)
    return finish(folder, manifest, np.empty(0, np.int64), progress, calibrate)


def calibration_by(
    classifier: Classifier, n_queries: int, progress: Progress
) -> Callable[[Index], dict[str, Any]] | None:
    """A function that calibrates every scope beyond the head with ``n_queries`` queries; None for 0 queries.

    Exact scores are in fp32, as those of answers are.
    """
    if not n_queries:
        return None
    classifier = replace(classifier, precision="fp32")

    def calibrate(index: Index) -> dict[str, Any]:
        calibration = {}
        by_spans = "spans" in index.manifest.spec.stores
        for name in index.manifest.spec.sketched_scopes:
            scope = index.scope(classifier, name)
            n_rows = n_sampled(index.manifest.n_live)
            if by_spans:
                n_rows += 2 * n_sampled(len(index.live_spans))
            on_rows = counted(progress, f"calibration {name}", n_rows)
            calibration[name] = calibrate_scope(index, classifier, scope, n_queries=n_queries, on_rows=on_rows)
            if by_spans:
                span_methods = calibrate_spans(index, classifier, scope, n_queries=n_queries, on_rows=on_rows)
                calibration[name]["methods"] |= span_methods
        return calibration

    return calibrate


def describe_file(folder: Path, name: str) -> dict[str, Any]:
    """sha256 and size of a file, as the manifest lists them."""
    path = folder / name
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _pass_files(manifest: Manifest) -> list[str]:
    """Files that the pass writes: the shards of every kind, and the files of the fits beyond the head."""
    shards = range(len(manifest.shards))
    return [f"{kind}/{shard_file(shard)}" for kind in shard_kinds(manifest) for shard in shards] + fit_files(manifest)


def shard_kinds(manifest: Manifest) -> list[str]:
    """Folders of the shards of every kind that stays in the index."""
    spec, last = manifest.spec, manifest.checkpoints[-1]
    kinds = ["rows", *(f"features/{c.name}" for c in manifest.checkpoints)]
    if manifest.columns:
        kinds.append(COLUMNS)
    if "sbert" in spec.stores:
        kinds.append("sentence")
    if "words" in spec.stores:
        kinds.append("tokens")
    if "spans" in spec.stores:
        kinds += [SPANS, masked_folder(last.name)]
    for scope in spec.sketched_scopes:
        for c in manifest.checkpoints:
            sketched = list(sketch_folders(spec, scope, c.name, last=c is last).values())
            if c is last and "spans" in spec.stores:
                sketched += [span_gradients(kind) for kind in sketched]
            kinds += map(manifest.fitted_name, sketched)
    return kinds


def fit_files(manifest: Manifest) -> list[str]:
    """The files of the fits beyond the head, which are made before any shard."""
    spec, last = manifest.spec, manifest.checkpoints[-1]
    return [
        manifest.fitted_name(name)
        for scope in spec.sketched_scopes
        for c in manifest.checkpoints
        for name in gradient_files(spec, scope, c.name, last=c is last)
    ]


def _merge_words(folder: Path, manifest: Manifest, progress: Progress) -> list[str]:
    """Merge the words of shards that are newer than the word stores; returns the files of all stores."""
    names: list[str] = []
    index = Index(folder, manifest, check=False)
    n_rows = manifest.n_rows
    for number, checkpoint in enumerate(manifest.checkpoints):
        for top in manifest.spec.words_tops:
            kind = words_folder(checkpoint.name, top)
            written = index.word_files(kind)
            old = index.words(top, number) if written else None
            before = old.n_rows if old is not None else 0
            if before == n_rows:
                names += written
                continue
            progress("words", 0, n_rows)
            shards = [
                folder / word_shards_folder(kind) / f"{i:05d}.arrow"
                for i, (start, _) in enumerate(manifest.shards)
                if start >= before
            ]
            names += merge_shards(folder, kind, manifest.generation, shards, old, n_rows)
            progress("words", n_rows, n_rows)
    return names


def ekfac_facts(ekfac: Ekfac, dampings: tuple[str, ...]) -> dict[str, Any]:
    """Facts for the manifest about the curvature of a scope beyond the head."""
    stored = [{"given": given, "damping": absolute_damping(given, ekfac)} for given in dampings]
    return _curvature_facts(ekfac, ekfac.n_rows, stored)


def _stored_factor(curvature: HeadCurvature | SeparateHead) -> np.ndarray:
    """The rows of the Cholesky factor; of separate outputs those of one factor below those of another."""
    if isinstance(curvature, SeparateHead):
        return curvature.factors.reshape(-1, curvature.factors.shape[-1])
    return curvature.factor


def _factorised(index: Index, hessian: np.ndarray, damping: float) -> HeadCurvature | SeparateHead:
    """H + damping I, factorised; in a new build the error says how to go on without a new pass."""
    try:
        return index.head.factorised(hessian, damping)
    except InputError as error:
        if index.manifest.generation:
            raise
        raise InputError(
            f"{error} The pass over the rows is kept: the same command with --resume and another --damping goes on. "
            "With --damping none no curvature is stored for `if` and `rif`; `if` is then asked with --curvature cg.",
            of="index",
        ) from error


def _curvature_facts(eigenvalues: Eigenvalues, n_rows: int, dampings: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of a curvature, whichever way H^-1 is had; the first damping is the default."""
    return {
        "damping": dampings[0]["damping"],
        "mean_eigenvalue": eigenvalues.mean_eigenvalue,
        "largest_eigenvalue": eigenvalues.largest_eigenvalue,
        "n_rows": n_rows,
        "dampings": dampings,
    }


def _write_curvature(index: Index) -> tuple[dict[str, Any], list[str]]:
    """Exact curvature of the head at the last checkpoint, over the live rows, and each row's self-influence."""
    manifest = index.manifest
    spec = manifest.spec
    facts: dict[str, Any] = {}
    files: list[str] = []
    features, residuals = index.features(), index.residuals()
    n_classes, loss = residuals.width, index.loss

    def save(name: str, columns: dict[str, np.ndarray]) -> str:
        file = f"curvature/head/{name}-{manifest.generation:04d}.arrow"
        write_columns(index.folder / file, columns)
        files.append(file)
        return file

    if spec.dampings and not fits_dense(n_classes, features.width, loss):
        stored = [{"given": given, "damping": absolute_damping(given, index.head)} for given in spec.dampings]
        facts["cg"] = _curvature_facts(index.head, manifest.n_live, stored)
    elif spec.dampings:
        hessian = index.head.hessian()
        spectrum = index.head.spectrum_of(hessian)
        stored = []
        for i, given in enumerate(spec.dampings):
            damping = absolute_damping(given, spectrum)
            curvature = _factorised(index, hessian, damping)
            self_influence = index.head.self_influence_under(curvature)
            stored.append(
                {
                    "given": given,
                    "damping": damping,
                    "cholesky": save(f"cholesky-{i}", {"factor": _stored_factor(curvature)}),
                    "self_influence": save(f"self-influence-{i}", {"self_influence": self_influence}),
                }
            )
        facts["exact"] = _curvature_facts(spectrum, manifest.n_live, stored)
    if spec.rep_refit:
        assert isinstance(loss, CrossEntropy)  # others are refused before the work
        f = features.take(index.live)
        targets = index.targets(index.live)
        weight = refit_head(
            f, loss.outputs_of_residuals(residuals.take(index.live), targets), loss.row_weights(targets)
        )
        refitted = []
        for start, block in features.blocks():
            logits = block.astype(np.float64) @ weight[:, :-1].T + weight[:, -1]
            targets = index.targets(np.arange(start, start + len(block)))
            refitted.append(loss.residuals_of_outputs(loss.outputs(logits), targets))
        file = save("representer", {"residual": np.concatenate(refitted)[index.head.first_equal_rows()]})
        facts["representer"] = {"lambda": REFIT_L2, "refit": True, "file": file}
    else:
        facts["representer"] = {"lambda": REPRESENTER_LAMBDA, "refit": False}
    return {"head": facts}, files
