"""What a build does for each scope beyond the head: curvature, bases and reductions, fitted on a sample of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forebear.indexer.curvature.damping import absolute_damping, refuse_lost_damping
from forebear.indexer.curvature.ekfac import (
    Ekfac,
    KroneckerFactors,
    curvature_seeds,
    fit_ekfac,
    fit_factors,
    read_ekfac,
    write_ekfac,
)
from forebear.indexer.gradients.gradient_pass import SeedOf, labels_seed, run_pass
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.sketches.leading import WIDEST, LeadingEnergies, LeadingProjector, bounds_width
from forebear.indexer.sketches.projector import (
    PlainProjector,
    Projector,
    SideBases,
    WhiteProjector,
    draw_bases,
    n_principal,
    read_plain_projector,
    write_bases,
)
from forebear.indexer.sketches.reduction import RawSketches, fit_reduction, read_reduction, scaled, write_reduction
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.storage.layout import BASES_NAME, MAP_NAME, curvature_name, gradient_folder
from forebear.indexer.storage.manifest import IndexSpec

FIT_ROWS = 2048  # rows on which curvature and reductions are fitted
BASIS_ROWS = 512  # rows for the leading directions, where no curvature is fitted


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A seeded sample of training rows.

    Attributes:
        texts: One list a text column.
        labels: Gold classes, ``(n,)``.
    """

    texts: list[list[str]]
    labels: np.ndarray

    def first(self, n: int) -> list[list[str]]:
        """Texts of ``n`` of them."""
        return [column[:n] for column in self.texts]


def sample_rows(n_rows: int, seed: int) -> np.ndarray:
    """Which of ``n_rows`` rows what is fitted is fitted on, ascending."""
    return np.asarray(np.sort(np.random.default_rng(seed).permutation(n_rows)[:FIT_ROWS]))


def open_sketchers(
    folder: Path, classifier: Classifier, spec: IndexSpec, scope: str, checkpoint: str, *, last: bool
) -> dict[str, Sketcher]:
    """Sketchers of a scope whose files are written, by the folder of their shards."""
    kinds = sketch_folders(spec, scope, checkpoint, last=last)
    return _open_sketchers(folder, classifier, spec, scope, checkpoint, kinds)


def open_sketcher(
    folder: Path, classifier: Classifier, spec: IndexSpec, scope: str, checkpoint: str, damping: int | None = None
) -> Sketcher:
    """The sketcher of gradients at a checkpoint, or, with a damping's number, of gradients whitened with it."""
    kind = gradient_folder(scope, checkpoint, damping)
    return _open_sketchers(folder, classifier, spec, scope, checkpoint, {damping: kind})[kind]


def _open_sketchers(
    folder: Path,
    classifier: Classifier,
    spec: IndexSpec,
    scope: str,
    checkpoint: str,
    kinds: Mapping[int | None, str],
) -> dict[str, Sketcher]:
    """Sketchers of some kinds, whose folders are given by the number of the damping, by folder."""
    reductions = {number: read_reduction(folder / kind / MAP_NAME) for number, kind in kinds.items()}
    leading = {number: reduction.from_plain for number, reduction in reductions.items()}
    projectors = _open_projectors(folder, classifier, spec, scope, checkpoint, leading)
    return {kind: Sketcher(projectors[number], reductions[number]) for number, kind in kinds.items()}


def _open_projectors(
    folder: Path,
    classifier: Classifier,
    spec: IndexSpec,
    scope: str,
    checkpoint: str,
    leading: Mapping[int | None, bool],
) -> dict[int | None, Projector]:
    """The maps to raw sketches, from written files: None of gradients, numbers of dampings of whitened ones.

    They share what they make of a layer in a pass, if all are shown the same factors.

    Args:
        folder: Folder of all fits of the index.
        classifier: The model at the checkpoint.
        spec: The index's choices.
        scope: Name of the scope.
        checkpoint: Name of the checkpoint.
        leading: Which maps are wanted, and whether whitened ones are made from the plain one.
    """
    dtype, device = classifier.head.weight.dtype, classifier.device
    bases = folder / gradient_folder(scope, checkpoint) / BASES_NAME
    plain = read_plain_projector(bases, scope, device, dtype, rounded=spec.precision == "bf16")
    if list(leading) == [None]:
        return {None: plain}
    ekfac = read_ekfac(folder / curvature_name(scope)).to(device, dtype)
    energies = LeadingEnergies(plain, ekfac) if any(leading.values()) else None

    def projector(number: int | None) -> Projector:
        if number is None:
            return plain
        damping = absolute_damping(spec.dampings[number], ekfac)
        if leading[number]:
            assert energies is not None
            return LeadingProjector(energies, damping)
        return WhiteProjector(scope, ekfac, damping, spec.seed)

    return {number: projector(number) for number in leading}


def _whitens_leading(folder: Path, spec: IndexSpec, scope: str, damping: int | None) -> bool:
    """Whether leading directions alone are whitened one by one, because the damping is above most eigenvalues.

    Only a mixed basis has leading directions, and random ones for what is left of the gradients.
    """
    if damping is None or spec.whitening != "leading" or spec.sketch_basis != "mixed":
        return False
    ekfac = read_ekfac(folder / curvature_name(scope))
    return bounds_width(ekfac, absolute_damping(spec.dampings[damping], ekfac)) <= WIDEST


def check_dampings(ekfac: Ekfac, classifier: Classifier, spec: IndexSpec, scope: str) -> None:
    """Refuse dampings that are lost in rounding beside the scope's eigenvalues, before they are used.

    Raises:
        InputError: A damping is too small beside the largest eigenvalue.
    """
    for given in spec.dampings:
        damping = absolute_damping(given, ekfac)
        refuse_lost_damping(damping, ekfac.largest_eigenvalue, classifier.head.weight.dtype, scope)


def fit_sketchers(
    folder: Path,
    classifier: Classifier,
    spec: IndexSpec,
    checkpoint: str,
    sample: Callable[[], Sample],
    *,
    last: bool,
    stage: Callable[[str, int], Callable[[int], None]],
) -> dict[str, Sketcher]:
    """Sketchers of every sketched scope at a checkpoint; those that are not in the folder yet are fitted.

    Args:
        folder: Folder of all fits of the index.
        classifier: The model at the checkpoint.
        spec: The index's choices.
        checkpoint: Name of the checkpoint.
        sample: Reads the sample of training rows.
        last: Whether the checkpoint is the model that is explained: only it has curvature.
        stage: Announces a stage and its number of rows; returns a function that is called with the number of rows done
            since its last call.

    Returns:
        The sketchers, by the folder of their shards.
    """
    sketchers: dict[str, Sketcher] = {}
    for scope in spec.sketched_scopes:
        _fit_scope(folder, classifier, spec, scope, checkpoint, sample, last=last, stage=stage)
        sketchers |= open_sketchers(folder, classifier, spec, scope, checkpoint, last=last)
    return sketchers


def _fit_scope(
    folder: Path,
    classifier: Classifier,
    spec: IndexSpec,
    name: str,
    checkpoint: str,
    sample: Callable[[], Sample],
    *,
    last: bool,
    stage: Callable[[str, int], Callable[[int], None]],
) -> None:
    """Fit and write the curvature, bases and reductions of a scope at a checkpoint, as far as they are missing."""
    if all((folder / file).is_file() for file in gradient_files(spec, name, checkpoint, last=last)):
        return
    rows = sample()
    scope = scope_of(classifier, name, with_bias=spec.with_bias)
    factors: KroneckerFactors | Ekfac | None = None
    raw: RawSketches | None = None
    bases_file = folder / gradient_folder(name, checkpoint) / BASES_NAME

    def fitted_factors(texts: Sequence[Sequence[str]]) -> KroneckerFactors:
        return fit_factors(
            classifier, scope, texts, seed=spec.seed, batch_tokens=spec.batch_tokens,
            targets=rows.labels[: len(texts[0])], on_rows=stage(f"directions {name} {checkpoint}", len(texts[0])),
        )  # fmt: skip

    def bases_of(factors: KroneckerFactors | Ekfac | None) -> dict[str, SideBases]:
        return draw_bases(classifier, scope, factors, spec.seed, spec.sketch_basis)

    def raw_sketches(eigenbasis: Ekfac) -> Sequence[RawSketches]:
        nonlocal raw
        projector = PlainProjector(scope, bases_of(eigenbasis), n_principal(spec.sketch_basis))
        raw = RawSketches(projector, len(rows.labels), classifier.device)
        return [raw]

    seed_of: SeedOf = labels_seed(classifier.loss, rows.labels)
    if last and spec.whitened:
        directions = curvature_seeds(classifier.loss, classifier.n_classes, len(rows.labels), spec.seed, rows.labels)
        # Of two classes, or of one number, every loss gradient is a multiple of that of the one direction, and raw
        # sketches are made unit vectors: the pass that gathers eigenvalues gathers them, too.
        together = len(classifier.loss.basis(classifier.n_classes)) == 1
        if together:
            (seed_of,) = directions
        if not (folder / curvature_name(name)).is_file():
            ekfac = fit_ekfac(
                classifier, scope, rows.texts, seed=spec.seed, batch_tokens=spec.batch_tokens, targets=rows.labels,
                factors=fitted_factors(rows.texts), beside=raw_sketches if together else lambda _: (),
                on_rows=stage(f"curvature {name}", len(rows.labels)),
            )  # fmt: skip
            write_ekfac(folder / curvature_name(name), ekfac)
        factors = read_ekfac(folder / curvature_name(name))
        check_dampings(factors, classifier, spec, name)
    if not bases_file.is_file():
        if factors is None and spec.sketch_basis != "random":  # the same rows as without an interruption
            factors = fitted_factors(rows.first(BASIS_ROWS))
        write_bases(bases_file, scope, bases_of(factors), spec.sketch_basis)
    _fit_reductions(folder, classifier, spec, name, checkpoint, rows, stage, last=last, raw=raw, seed_of=seed_of)


def _fit_reductions(
    folder: Path,
    classifier: Classifier,
    spec: IndexSpec,
    name: str,
    checkpoint: str,
    rows: Sample,
    stage: Callable[[str, int], Callable[[int], None]],
    *,
    last: bool,
    raw: RawSketches | None,
    seed_of: SeedOf,
) -> None:
    """Fit the second reduction of every representation of a scope, in one pass for all but ``raw``, the plain one."""
    kinds = sketch_folders(spec, name, checkpoint, last=last)
    leading = {number: _whitens_leading(folder, spec, name, number) for number in kinds}
    projectors = _open_projectors(folder, classifier, spec, name, checkpoint, leading)
    n_rows = len(rows.labels)
    of_plain = [n for n, p in projectors.items() if isinstance(p, LeadingProjector)]
    collectors: dict[int | None, RawSketches] = {} if raw is None else {None: raw}
    missing = {n: projectors[n] for n in projectors if n not in of_plain and n not in collectors}
    more = {n: RawSketches(p, n_rows, classifier.device) for n, p in missing.items()}
    if more:
        run_pass(
            classifier, rows.texts, seed_of, list(more.values()), batch_tokens=spec.batch_tokens,
            on_rows=stage(f"reduction {name} {checkpoint}", n_rows),
        )  # fmt: skip
    collectors |= more
    for number in sorted(projectors, key=lambda n: (n is None, n in of_plain)):  # the plain ones serve to the end
        projector = projectors[number]
        if isinstance(projector, LeadingProjector):
            unit = scaled(collectors[None].out, projector.weights)
        else:
            unit = collectors[number].out if number is None else collectors.pop(number).out
        bits = spec.sketch_bits if number is None else spec.white_bits
        reduction = fit_reduction(unit, projector, width=spec.sketch_dim, bits=bits, seed=spec.seed)
        write_reduction(folder / kinds[number] / MAP_NAME, reduction)


def gradient_files(spec: IndexSpec, scope: str, checkpoint: str, *, last: bool) -> tuple[str, ...]:
    """Files of the fits of a scope at a checkpoint: bases, reductions and curvature."""
    names = [f"{gradient_folder(scope, checkpoint)}/{name}" for name in (BASES_NAME, MAP_NAME)]
    if last and spec.whitened:
        names.append(curvature_name(scope))
        names += [f"{gradient_folder(scope, checkpoint, i)}/{MAP_NAME}" for i in range(len(spec.dampings))]
    return tuple(names)


def sketch_folders(spec: IndexSpec, scope: str, checkpoint: str, *, last: bool) -> dict[int | None, str]:
    """Folders of a scope's shards at a checkpoint, by the number of the damping; None for plain gradients."""
    numbers = (None, *(range(len(spec.dampings)) if last and spec.whitened else ()))
    return {number: gradient_folder(scope, checkpoint, number) for number in numbers}
