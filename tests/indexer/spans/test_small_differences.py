"""What a span adds where that is next to nothing: norms, sketches and dots of g - g' against float64 autograd.

The mask token's embedding is moved towards that of the word it replaces, so that g - g' gets as small as wanted beside
g. The oracle runs the model in float64, one unpadded row at a time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import labels, make_tiny_model, sentences
from torch import nn

from forebear.indexer.curvature.ekfac import Ekfac, fit_ekfac
from forebear.indexer.gradients.vectors import dot
from forebear.indexer.gradients.whole import exact_dots, summed_gradients, whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import Scope, scope_of
from forebear.indexer.sketches.projector import PlainProjector, Projector, WhiteProjector, draw_bases
from forebear.indexer.sketches.reduction import Reduction
from forebear.indexer.sketches.sketch import Sketcher, sketch_rows

N_ROWS, N_QUERIES = 12, 3
ROUNDING = 4e-7  # of g: what one float32 forward and backward pass leaves uncertain
TEXTS, LABELS = sentences(N_ROWS, seed=3, low=6), np.array(labels(N_ROWS, 3))


@dataclass(frozen=True)
class Differences:
    """Entries whose g - g' is small, and what a float64 model says of them.

    Attributes:
        truth: g - g' by block, ``(n, n_out, n_in)`` float64.
        share: ||g - g'|| / ||g|| of each entry, ``(n,)``.
    """

    classifier: Classifier
    scope: Scope
    encoded: Encoded
    truth: dict[str, torch.Tensor]
    share: np.ndarray

    @property
    def norms(self) -> np.ndarray:
        return dot(self.truth, self.truth).sqrt().numpy()

    @property
    def limit(self) -> np.ndarray:
        """Relative error that is allowed to each entry."""
        return 3e-6 + ROUNDING / self.share


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("small") / request.param, request.param, 3)


# Of the size of g - g' beside g: medians are about .03, 4e-4 (the old norms were off by 56%), and down to 1e-5.
@pytest.fixture(scope="module", params=[1.0, 1e-2, 1e-3, 2.5e-4])
def small(request, folder) -> Differences:
    classifier = load_classifier(str(folder), device="cpu")
    rows = encode(classifier, [TEXTS])
    token, mask = rows[0]["input_ids"][2], classifier.tokenizer.mask_token_id
    weight = classifier.model.get_input_embeddings().weight.data
    towards = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight[mask] = weight[token] + request.param * towards / towards.norm() * weight.norm(dim=1).median()
    whole, masked = (
        [row | {"input_ids": [*row["input_ids"][:2], new, *row["input_ids"][3:]]} for row in rows]
        for new in (token, mask)
    )
    scope = scope_of(classifier, "all")
    model = copy.deepcopy(classifier.model).double()
    parameters = {block.name: model.get_parameter(f"{block.name}.weight") for block in scope.blocks}

    def gradients(row: dict[str, list[int]], label: int) -> dict[str, torch.Tensor]:
        logits = model(**{key: torch.tensor([value]) for key, value in row.items()}).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([label]))
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    both = [[gradients(row, y) for row, y in zip(some, LABELS, strict=True)] for some in (whole, masked)]
    g, others = ({n: torch.stack([row[n] for row in some]) for n in parameters} for some in both)
    truth = {n: g[n] - others[n] for n in parameters}
    share = (dot(truth, truth) / dot(g, g)).sqrt().numpy()
    return Differences(classifier, scope, Encoded(whole, masked), truth, share)


@pytest.fixture(scope="module")
def curvature(small) -> tuple[Ekfac, float]:
    found = fit_ekfac(small.classifier, small.scope, [TEXTS], seed=0, batch_tokens=1000)
    return found, 0.1 * found.mean_eigenvalue


def sketched(small: Differences, projector: Projector) -> tuple[np.ndarray, np.ndarray]:
    """Whole raw sketches and exact norms of the entries."""
    reduction = Reduction(np.eye(projector.width, dtype=np.float16), projector.squares, 0, 0)
    (found,), _ = sketch_rows(
        small.classifier, [Sketcher(projector, reduction)], small.encoded, LABELS, batch_tokens=1000
    )
    return found.coordinates * found.lengths[:, None], found.norms


def test_the_sizes_go_down_to_a_hundred_thousandth(folder, small):
    assert 3e-6 < np.median(small.share) < 0.1


def test_norms_and_sketches_are_those_of_the_difference(small):
    bases = draw_bases(small.classifier, small.scope, None, 0, "random")
    projector = PlainProjector(small.scope, bases)
    raw, norms = sketched(small, projector)
    assert (np.abs(norms / small.norms - 1) < small.limit).all()
    truth = projector.project_matrix({name: v.float() for name, v in small.truth.items()})[0].numpy()
    distance = np.linalg.norm(raw - truth, axis=1) / np.linalg.norm(truth, axis=1)
    assert (distance < 3 * small.limit).all()


def test_whitened_norms_are_those_of_the_difference(small, curvature):
    ekfac, damping = curvature
    _, norms = sketched(small, WhiteProjector("all", ekfac, damping, 0))
    solved = ekfac.to(torch.device("cpu"), torch.float64).solve(small.truth, damping)
    assert (np.abs(norms / dot(solved, small.truth).sqrt().numpy() - 1) < 3 * small.limit).all()


def test_whole_and_summed_gradients_are_those_of_the_difference(small):
    where = (small.classifier, small.scope, small.encoded, LABELS)
    found = whole_gradients(*where)
    apart = {name: found[name].double() - v for name, v in small.truth.items()}
    assert (dot(apart, apart).sqrt().numpy() / small.norms < 3 * small.limit).all()
    summed = summed_gradients(*where, np.zeros(N_ROWS, np.int64))
    total = {name: v.sum(dim=0, keepdim=True) for name, v in small.truth.items()}
    apart = {name: summed[name].double() - v for name, v in total.items()}
    assert float(dot(apart, apart).sqrt()) < 3 * float((small.limit * small.norms).sum())


def test_dots_are_those_of_the_difference(small):
    vectors = whole_gradients(small.classifier, small.scope, [TEXTS[:N_QUERIES]], LABELS[:N_QUERIES])
    found = exact_dots(small.classifier, small.scope, vectors, small.encoded, LABELS)
    wide = {name: v.double() for name, v in vectors.items()}
    truth = sum(torch.einsum("qij,nij->qn", wide[name], v) for name, v in small.truth.items())
    below = dot(wide, wide).sqrt()[:, None].numpy() * small.norms
    assert (np.abs(found - truth.numpy()) / below < 3 * small.limit).all()
