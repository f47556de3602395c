"""Every kernel that runs a model, on the pretended device: what the host waits for, sends and launches, a batch.

``PYTHONPATH=tests/support python tests/device/device_kernels.py`` prints a table by line of the package;
``tests/device/test_waits.py`` holds the budgets. A batch is one forward pass of the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pretended
import torch
from tiny import labels, make_tiny_model, sentences

from forebear.evaluation.retraining.recipe_top import _cut, train_top
from forebear.indexer.curvature.ekfac import fit_ekfac, fit_factors
from forebear.indexer.curvature.products import GaussNewton, HessianProduct
from forebear.indexer.curvature.solvers import conjugate_gradients, lissa
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.gradients.whole import exact_dots, summed_gradients, whole_gradients
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.network.layers import encoder_layers
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.sketches.projector import PlainProjector, WhiteProjector, draw_bases
from forebear.indexer.sketches.reduction import RawSketches, fit_reduction
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.text import Span
from forebear.indexer.training.course import Course
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.words.gradients import WordGradients
from forebear.progress import no_progress
from forebear.retriever.saliency.gradients import saliency_gradients
from forebear.retriever.saliency.maps import saliency

N, TOKENS, N_QUERIES = 24, 64, 6
TEXTS, TARGETS = [sentences(N, low=3)], np.array(labels(N))


@dataclass(frozen=True)
class Counts:
    """Counts of one kernel.

    Attributes:
        batches: Forward passes.
        waits: Times that the host waited, by line.
        sent: Bytes sent to the device, by line.
        launches: Operations, by line.
    """

    batches: int
    waits: dict[str, int]
    sent: dict[str, int]
    launches: dict[str, int]

    def of_a_batch(self, name: str) -> float:
        """``waits``, ``sent`` or ``launches`` of a batch."""
        return float(sum(getattr(self, name).values()) / max(1, self.batches))


@contextmanager
def counted(model: torch.nn.Module, ledger: pretended.Ledger) -> Iterator[list[int]]:
    """Count from here on; the list gets a number for each forward pass."""
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    ledger.clear()
    try:
        yield passes
    finally:
        hook.remove()


class Kernels:
    """The kernels, by name, over one tiny model."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.name = folder, str(make_tiny_model(folder / "model"))
        self.classifier = load_classifier(self.name, device=device)
        self.scope = scope_of(self.classifier, "all")
        c, scope = self.classifier, self.scope
        self.factors = fit_factors(c, scope, TEXTS, seed=0, batch_tokens=TOKENS)
        ekfac = fit_ekfac(c, scope, TEXTS, seed=0, batch_tokens=TOKENS, factors=self.factors)
        self.projectors = {
            "plain": PlainProjector(scope, draw_bases(c, scope, self.factors, 0, "mixed")),
            "whitened": WhiteProjector("all", ekfac, 0.1, 0),
        }
        self.sketchers = {}
        for kind, projector in self.projectors.items():
            raw = RawSketches(projector, N, c.device)
            self._pass([raw])
            self.sketchers[kind] = Sketcher(projector, fit_reduction(raw.out, projector, width=16, bits=64, seed=0))
        self.vectors = whole_gradients(c, scope, [TEXTS[0][:N_QUERIES]], TARGETS[:N_QUERIES])
        self.encoded = encode(c, TEXTS)
        self.watched: Callable[[torch.nn.Module], Any] = lambda _model: nullcontext()  # of kernels with their own model

    def _pass(self, collectors: list[Any], texts: Any = TEXTS, targets: np.ndarray = TARGETS) -> None:
        run_pass(self.classifier, texts, labels_seed(self.classifier.loss, targets), collectors, batch_tokens=TOKENS)

    def sketch(self, *kinds: str, words: int | None = None) -> list[np.ndarray]:
        """A pass with sketches, as a build runs it; gives the norms, which do not depend on the bases."""
        found = [self.sketchers[kind].collector(N, self.classifier.device) for kind in kinds]
        others = [] if words is None else [WordGradients(self.classifier, words, N, "fp16")]
        self._pass([*found, *others])
        for collector in others:
            collector.rows()
        return [collector.rows().norms for collector in found]

    def words(self, *tops: int) -> list[Any]:
        """A pass with word gradients."""
        found = [WordGradients(self.classifier, top, N, "fp16") for top in tops]
        self._pass(found)
        return [collector.rows(0) for collector in found]

    def spans(self) -> np.ndarray:
        """A pass over differences of rows and their masked versions."""
        spans = [Span(0, 0, len(text.split()[0])) for text in TEXTS[0]]
        masked, _ = mask_spans(self.classifier, TEXTS, spans)
        collector = self.sketchers["plain"].collector(N, self.classifier.device)
        self._pass([collector], masked)
        return collector.rows().norms

    def dots(self, n_wanted: int | None = None) -> np.ndarray:
        """Exact dots with all queries, or with each query's own rows."""
        wanted = None
        if n_wanted is not None:
            wanted = np.zeros((N_QUERIES, N), bool)
            for q in range(N_QUERIES):
                wanted[q, np.random.default_rng(q).permutation(N)[:n_wanted]] = True
        found = exact_dots(self.classifier, self.scope, self.vectors, TEXTS, TARGETS, wanted=wanted)
        return found if wanted is None else found[wanted]

    def sums(self) -> Any:
        """Sums of gradients by group."""
        return summed_gradients(self.classifier, self.scope, TEXTS, TARGETS, np.arange(N) % 3)

    def gauss_newton(self) -> Any:
        """One product."""
        return GaussNewton(self.classifier, self.scope, TEXTS, seed=0, batch_tokens=TOKENS)(self.vectors)

    def hessian(self) -> Any:
        """One product."""
        return HessianProduct(self.classifier, self.scope, TEXTS, TARGETS, batch_tokens=TOKENS)(self.vectors)

    def cg(self) -> Any:
        """Two iterations."""
        product = GaussNewton(self.classifier, self.scope, TEXTS, seed=0, batch_tokens=TOKENS)
        return conjugate_gradients(product, self.vectors, 0.1, tolerance=1e-12, max_iterations=2)

    def lissa(self) -> Any:
        """Three steps."""
        product = HessianProduct(self.classifier, self.scope, TEXTS, TARGETS, batch_tokens=TOKENS)
        return lissa(product, self.vectors, damping=0.01, scale=1e4, depth=3, batch_rows=8, n_rows=N)

    def retrain_top(self) -> None:
        """An epoch of the last layer, on stored states."""
        classifier = replace(self.classifier, model=load_classifier(self.name, device=str(self.device)).model)
        layers, n_layers = encoder_layers(classifier.model, classifier.name)
        _cut(classifier, layers, n_layers - 1)
        with self.watched(classifier.model):
            states = [torch.randn(len(row["input_ids"]), 16) for row in self.encoded]
            options = TrainOptions(epochs=2, batch_size=8, learning_rate=1e-4)
            train_top(classifier, states, torch.from_numpy(TARGETS), options, [len(s) for s in states])

    def train(self) -> None:
        """An epoch of steps as the loop of ``forebear train`` takes them."""
        classifier = load_classifier(self.name, device=str(self.device))
        model = classifier.model.requires_grad_(True).train()
        options = TrainOptions(epochs=1, batch_size=4, learning_rate=1e-4)
        rows = [{**row, "labels": int(label)} for row, label in zip(self.encoded, TARGETS, strict=True)]
        course = Course(classifier, rows, self.folder, options, None, no_progress, saves=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with self.watched(model):
            for start in range(0, N, 4):
                batch = course.collate(rows[start : start + 4])
                batch = {key: values.to(self.device, non_blocking=True) for key, values in batch.items()}
                course.loss(model, batch).backward()
                course.begin_update(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                course.end_step()
            course.end_epoch()

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.classifier.device

    def run(self, name: str, ledger: pretended.Ledger) -> Counts:
        """Run a kernel and count."""
        kernel = KERNELS[name]
        if name in OWN_MODEL:
            passes: list[int] = []

            @contextmanager
            def watched(model: torch.nn.Module) -> Iterator[None]:
                with counted(model, ledger) as found:
                    yield
                passes.extend(found)

            self.watched = watched
            kernel(self)
        else:
            with counted(self.classifier.model, ledger) as passes:
                kernel(self)
        return Counts(len(passes), dict(ledger.waits), dict(ledger.sent), dict(ledger.launches))


def _embed(kernels: Kernels) -> np.ndarray:
    encoder = load_sentence_encoder(kernels.name, device=str(kernels.device))
    with kernels.watched(encoder.model):
        return encoder.embed(TEXTS, batch_tokens=TOKENS)


def _weighted_hessian(kernels: Kernels) -> Any:
    plain = kernels.classifier
    kernels.classifier = replace(plain, loss=CrossEntropy((1.0, 2.0)))
    try:
        return kernels.hessian()
    finally:
        kernels.classifier = plain


def _saliency_gradients(kernels: Kernels) -> Any:
    words = [Span(0, 0, len(text.split()[0])) for text in TEXTS[0][:N_QUERIES]]
    return saliency_gradients(kernels.classifier, kernels.scope, [TEXTS[0][:N_QUERIES]], TARGETS[:N_QUERIES], words)


def _factors(kernels: Kernels) -> Any:
    return fit_factors(kernels.classifier, kernels.scope, TEXTS, seed=0, batch_tokens=TOKENS)


KERNELS: dict[str, Callable[[Kernels], Any]] = {
    "forward": lambda k: run_forward(k.classifier, TEXTS, batch_tokens=TOKENS),
    "sentences": _embed,
    "sketch": lambda k: k.sketch("plain"),
    "sketch, whitened": lambda k: k.sketch("whitened"),
    "sketch, both, words": lambda k: k.sketch("plain", "whitened", words=3),
    "words": lambda k: k.words(0),
    "words, top": lambda k: k.words(3),
    "spans": lambda k: k.spans(),
    "factors": _factors,
    "eigenvalues": lambda k: fit_ekfac(
        k.classifier, k.scope, TEXTS, seed=0, batch_tokens=TOKENS, factors=k.factors
    ).solve(k.vectors, 0.1),
    "whole gradients": lambda k: whole_gradients(k.classifier, k.scope, Encoded(k.encoded), TARGETS),
    "sums": lambda k: k.sums(),
    "dots": lambda k: k.dots(),
    "dots, wanted": lambda k: k.dots(8),
    "Gauss-Newton": lambda k: k.gauss_newton(),
    "Hessian": lambda k: k.hessian(),
    "Hessian, weighted": _weighted_hessian,
    "cg": lambda k: k.cg(),
    "lissa": lambda k: k.lissa(),
    "saliency": lambda k: saliency(k.classifier, TEXTS, TARGETS, batch_tokens=TOKENS),
    "saliency gradients": _saliency_gradients,
    "retrain top": lambda k: k.retrain_top(),
    "train": lambda k: k.train(),
}  # fmt: skip
OWN_MODEL = ("sentences", "retrain top", "train")


def measure(names: list[str]) -> dict[str, Counts]:
    """Counts of some kernels."""
    pretended.register()
    with tempfile.TemporaryDirectory() as folder, pretended.entered() as ledger:
        kernels = Kernels(Path(folder), pretended.NAME)
        return {name: kernels.run(name, ledger) for name in names}


def main() -> None:
    """Print the counts, by line where they are large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(KERNELS))
    parser.add_argument("--lines", type=int, default=3, help="lines of the package shown for each kernel")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.names)
    if arguments.json:
        print(json.dumps({name: [c.of_a_batch(n) for n in ("waits", "sent", "launches")] for name, c in found.items()}))
        return
    for name, counts in found.items():
        waits, sent, launches = (counts.of_a_batch(n) for n in ("waits", "sent", "launches"))
        print(f"{name:20} {counts.batches:4} batches {waits:8.1f} waits {sent:9.0f} bytes {launches:7.0f} launches")
        most = sorted(counts.waits.items(), key=lambda item: -item[1])[: arguments.lines]
        for line, n in most:
            print(f"    {n / counts.batches:7.2f} {line}")


if __name__ == "__main__":
    main()
