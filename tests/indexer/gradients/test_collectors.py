"""Every collector of the package, driven through a lack of memory at every point of a batch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from tiny import labels, sentences

import forebear
from forebear.errors import NotEnoughMemoryError
from forebear.indexer.curvature import eigenbasis, ekfac, products
from forebear.indexer.gradients import whole as gradients
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import ArrayCollector, Collector, RowCollector, labels_seed, run_pass
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode_with_places
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.sketches import norms, reduction, sketch
from forebear.indexer.sketches.projector import PlainProjector, draw_bases
from forebear.indexer.words import gradients as words
from forebear.retriever.saliency import maps as saliency

N_ROWS = 9
TEXTS = sentences(N_ROWS, seed=4)
LABELS = np.array(labels(N_ROWS))
CPU = torch.device("cpu")


def package_classes() -> list[type]:
    """Every class that a module of the package defines."""
    found = []
    for module in pkgutil.walk_packages(forebear.__path__, "forebear."):
        members = vars(importlib.import_module(module.name)).values()
        found += [c for c in members if inspect.isclass(c) and c.__module__ == module.name]
    return found


BASES = (Collector, RowCollector, ArrayCollector)
COLLECTORS = [c for c in package_classes() if issubclass(c, Collector) and c not in BASES]


class Maker:
    """Makes a new collector of each class, ready for a pass over the rows."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.scope = scope_of(classifier, "all")
        factors = ekfac.fit_factors(classifier, self.scope, [TEXTS], seed=0, batch_tokens=1000)
        self.ekfac = ekfac.fit_ekfac(classifier, self.scope, [TEXTS], seed=0, batch_tokens=1000, factors=factors)
        self.projector = PlainProjector(self.scope, draw_bases(classifier, self.scope, None, 0, "random"))
        raw = reduction.RawSketches(self.projector, N_ROWS, CPU)
        run_pass(classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [raw], batch_tokens=1000)
        self.reduction = reduction.fit_reduction(raw.out, self.projector, width=4, bits=16, seed=0)
        self.whitening = eigenbasis.Whitening(self.ekfac, 0.1)
        self.held = eigenbasis.hold_gradients(classifier, self.scope, self.whitening, [TEXTS[:2]], LABELS[:2])
        self.vectors = gradients.whole_gradients(classifier, self.scope, [TEXTS[:2]], LABELS[:2])

    def __call__(self, kind: type[Collector]) -> Collector:
        scope, weight = self.scope, self.classifier.head.weight
        makers = {
            gradients._Gradients: lambda: gradients._Gradients(scope, N_ROWS, weight),
            gradients._Sums: lambda: gradients._Sums(scope, np.arange(N_ROWS) % 2, weight),
            gradients._Dots: lambda: gradients._Dots(scope, self.vectors, N_ROWS, None),
            ekfac._Factors: lambda: ekfac._Factors(scope, CPU),
            ekfac._Eigenvalues: lambda: ekfac._Eigenvalues(scope, self.ekfac.parts),
            eigenbasis.HeldGradients: lambda: eigenbasis.HeldGradients(scope, self.whitening),
            eigenbasis._Pairs: lambda: eigenbasis._Pairs(self.held, self.whitening, N_ROWS, weight),
            ekfac._SelfInfluence: lambda: ekfac._SelfInfluence(scope, self.ekfac, 0.1, N_ROWS),
            products._Outer: lambda: products._Outer(scope, self.vectors),
            norms._Squares: lambda: norms._Squares(scope, N_ROWS, CPU),
            reduction.RawSketches: lambda: reduction.RawSketches(self.projector, N_ROWS, CPU),
            sketch.Sketches: lambda: sketch.Sketches(self.projector, self.reduction, N_ROWS, CPU),
            words.WordGradients: lambda: words.WordGradients(self.classifier, 0, N_ROWS, "fp16"),
            saliency._Saliencies: lambda: saliency._Saliencies(
                self.classifier,
                saliency.GRADIENT_X_INPUT,
                [len(ids) for ids in encode_with_places(self.classifier, [TEXTS])[1]["input_ids"]],
            ),
        }
        if kind not in makers:
            pytest.fail(f"{kind.__module__}.{kind.__name__} is a collector that this test cannot make: add it here.")
        return makers[kind]()


@pytest.fixture(scope="module")
def make(tiny_model) -> Maker:
    return Maker(load_classifier(tiny_model(), device="cpu"))


def numbers_of(value: object) -> list[np.ndarray]:
    """All arrays that a result holds, in the order of its attributes."""
    if isinstance(value, torch.Tensor):
        return [value.numpy()]
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [a for one in value.values() for a in numbers_of(one)]
    if isinstance(value, list | tuple):
        return [a for one in value for a in numbers_of(one)]
    if is_dataclass(value):
        return [a for field in fields(value) for a in numbers_of(getattr(value, field.name))]
    return []


def result_of(collector: Collector) -> list[np.ndarray]:
    """What a collector gathered: by ``rows`` where it has that, else its public attributes."""
    if hasattr(collector, "rows"):
        return numbers_of(collector.rows())
    if isinstance(collector, eigenbasis.HeldGradients):
        places = np.argsort(collector.order)
        return [collector.whole(block, torch.empty(0)).numpy()[places] for block in collector.scope.blocks]
    public = {k: v for k, v in vars(collector).items() if not k.startswith("_") and k != "scope"}
    return numbers_of(public)


def gather(make: Maker, collectors: list[Collector]) -> list[np.ndarray]:
    run_pass(make.classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), collectors, batch_tokens=1000)
    return [a for collector in collectors for a in result_of(collector)]


class Failing(Collector):
    """A second collector of the pass, which runs out of memory once: at its nth layer, or at the batch's end."""

    def __init__(self, like: Collector, at: int | str) -> None:
        self.scope, self._at, self.n_failures = like.scope, at, 0

    def _fail(self) -> None:
        self.n_failures += 1
        if self.n_failures == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def begin(self, positions: list[int]) -> None:
        self._arrived = 0

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        if self._arrived == self._at:
            self._fail()
        self._arrived += 1

    def end(self, positions: list[int]) -> tuple[torch.Tensor, ...]:
        if self._at == "end":
            self._fail()
        return ()

    def keep(self, positions: list[int]) -> None:
        pass


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = np.abs(b.astype(np.float64)).max()
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=2e-3 * scale)


def test_whatever_looks_like_a_collector_is_one():
    assert len(COLLECTORS) >= 10
    others = [c for c in package_classes() if hasattr(c, "on_layer") and not issubclass(c, Collector)]
    assert others == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", COLLECTORS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("first", [False, True], ids=["fails-before", "fails-after"])
def test_a_lack_of_memory_at_a_layer_or_at_the_end_changes_no_result(make, kind, first):
    wanted = gather(make, [make(kind)])
    n_layers = len(make(kind).scope.blocks)
    for at in [*range(2 * first, n_layers, 4), n_layers - 1, "end"]:  # other layers before and after the collector
        collector = make(kind)
        failing = Failing(collector, at)
        found = gather(make, [collector, failing] if first else [failing, collector])
        assert failing.n_failures >= 1
        assert_same(found[: len(wanted)] if first else found, wanted)


@pytest.mark.parametrize("kind", COLLECTORS, ids=lambda c: c.__name__)
def test_a_lack_of_memory_in_a_collector_itself_changes_no_result(make, kind, monkeypatch):
    wanted = gather(make, [make(kind)])
    for where in ("begin", "on_layer", "end"):
        collector, own, calls = make(kind), getattr(kind, where), []

        def once(*args, own=own, calls=calls, collector=collector):
            calls.append(args)
            found = own(collector, *args)
            if len(calls) == 1:
                raise MemoryError
            return found

        monkeypatch.setattr(collector, where, once)
        assert_same(gather(make, [collector]), wanted)
        assert len(calls) > 1


def test_a_lack_of_memory_when_a_batch_is_kept_ends_the_pass(make, monkeypatch):
    collector = make(gradients._Sums)

    def fail(positions):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(collector, "keep", fail)
    with pytest.raises(NotEnoughMemoryError, match="what is gathered from the rows does not fit"):
        gather(make, [collector])
