"""Scores in the curvature's eigenbasis against dense solves of plain autograd gradients, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import labels, sentences

from forebear.indexer.curvature.eigenbasis import Whitening, held_numbers, hold_gradients, score_pairs
from forebear.indexer.curvature.ekfac import fit_ekfac
from forebear.indexer.gradients.dots import gram
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of

TEXTS, LABELS = sentences(9, seed=11), np.array(labels(9, 3))
QUERIES, ASKED = sentences(4, seed=12), np.array([2, 0, 1, 1])


def autograd_gradients(classifier, scope, texts, targets) -> dict[str, np.ndarray]:
    """Loss gradients of weights, a row at a time, ``(n, n_out, n_in)`` float64 by layer."""
    found: dict[str, list[np.ndarray]] = {block.name: [] for block in scope.blocks}
    weights = [classifier.model.get_submodule(block.name).weight for block in scope.blocks]
    for text, target in zip(texts, targets, strict=True):
        logits = classifier.model(**classifier.tokenizer(text, return_tensors="pt")).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(target)]))
        for block, g in zip(scope.blocks, torch.autograd.grad(loss, weights), strict=True):
            found[block.name].append(g.double().numpy())
    return {name: np.stack(gs) for name, gs in found.items()}


@pytest.mark.parametrize(("share", "rounding"), [(0.1, 1e-5), (1e-3, 1e-4)])  # of float32, over the damping
def test_scores_in_the_eigenbasis_equal_dense_solves(tiny_model, share, rounding):
    classifier = load_classifier(tiny_model(n_classes=3), device="cpu")
    classifier.model.requires_grad_(True)
    scope = scope_of(classifier, "all")
    ekfac = fit_ekfac(classifier, scope, [TEXTS], seed=0, batch_tokens=100)
    damping = share * ekfac.mean_eigenvalue
    repeated = [*TEXTS, TEXTS[3]]  # an equal row is run once
    gold = np.append(LABELS, LABELS[3])
    found = score_pairs(classifier, scope, Whitening(ekfac, damping), ([QUERIES], ASKED), ([repeated], gold))
    plain = score_pairs(classifier, scope, None, ([QUERIES], ASKED), ([repeated], gold))

    rows, queries = (autograd_gradients(classifier, scope, *of) for of in ((repeated, gold), (QUERIES, ASKED)))
    wanted, of_rows, of_queries = np.zeros((2, 4, 10)), np.zeros(10), np.zeros((2, 4))
    for name, part in ekfac.parts.items():
        g, q = (x[name].reshape(len(x[name]), -1) for x in (rows, queries))
        basis = np.kron(part.left.double().numpy(), part.right.double().numpy())
        h = (basis * part.eigenvalues.double().numpy().reshape(-1)) @ basis.T + damping * np.eye(len(basis))
        wanted += np.stack([q @ g.T, np.linalg.solve(h, q.T).T @ g.T])
        of_rows += np.einsum("np,pn->n", g, np.linalg.solve(h, g.T))
        of_queries += np.stack([(q * q).sum(axis=1), np.einsum("np,pn->n", q, np.linalg.solve(h, q.T))])
    scale = np.abs(wanted).max(axis=2, keepdims=True)
    assert (np.abs(found.dots - wanted) / scale).max() <= rounding
    assert (np.abs(plain.dots - wanted[:1]) / scale[:1]).max() <= 1e-5
    np.testing.assert_allclose(found.rows[0], of_rows, rtol=rounding)
    np.testing.assert_allclose(found.queries, of_queries, rtol=rounding)
    np.testing.assert_allclose(plain.queries, of_queries[:1], rtol=1e-5)
    assert plain.rows.shape == (0, 10)
    for same in (found.dots, found.rows, plain.dots):
        assert (same[..., 9] == same[..., 3]).all()


def test_queries_are_held_as_what_takes_less(tiny_model):
    classifier = load_classifier(tiny_model(n_classes=3), device="cpu")
    scope = scope_of(classifier, "all")
    for text, n_pieces in (("the", 3), (" ".join(["the"] * 40), 42)):
        held = hold_gradients(classifier, scope, None, [[text]], np.array([0]))
        ((_, parts),) = held._parts
        n_held = sum(
            x.numel() if isinstance(x, torch.Tensor) else x.inputs.numel() + x.deltas.numel() for x in parts.values()
        )
        assert n_held <= held_numbers(scope.blocks, n_pieces) <= scope.size
    assert held_numbers(scope.blocks, 42) == scope.size > held_numbers(scope.blocks, 3)


def test_differences_of_two_versions_are_scored_as_rows_are(tiny_model):
    classifier = load_classifier(tiny_model(n_classes=3), device="cpu")
    classifier.model.requires_grad_(True)
    scope = scope_of(classifier, "all")
    ekfac = fit_ekfac(classifier, scope, [TEXTS], seed=0, batch_tokens=100)
    others = sentences(9, seed=13)
    both = Encoded(encode(classifier, [TEXTS]), minus=encode(classifier, [others]))
    dots = score_pairs(classifier, scope, Whitening(ekfac, 0.1), ([QUERIES], ASKED), (both, LABELS)).dots
    rows, versions, queries = (
        autograd_gradients(classifier, scope, *of) for of in ((TEXTS, LABELS), (others, LABELS), (QUERIES, ASKED))
    )
    wanted = sum(np.einsum("qij,nij->qn", queries[name], rows[name] - versions[name]) for name in ekfac.parts)
    assert np.abs(dots[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("n", [5, 192, 400])
def test_a_gram_matrix_is_the_product_with_the_transpose(n):
    x = torch.from_numpy(np.random.default_rng(n).normal(size=(37, n)))
    np.testing.assert_allclose(gram(x).numpy(), x.numpy().T @ x.numpy(), rtol=1e-12, atol=1e-12)


def test_live_positions_are_those_at_which_a_row_has_an_output_gradient():
    rng = np.random.default_rng(0)
    inputs, deltas = (torch.from_numpy(rng.normal(size=(3, 6, n))) for n in (4, 5))
    deltas[:, 1] = 0.0
    deltas[:, 4:] = 0.0
    deltas[0, 3] = 0.0  # of one row alone
    factors = LayerFactors(inputs, deltas)
    live = factors.live()
    assert live.inputs.shape == (3, 3, 4)
    np.testing.assert_allclose(live.gradients(), np.einsum("bto,bti->boi", deltas, inputs), rtol=1e-12)
    assert live.live() is live
    assert LayerFactors(inputs, torch.zeros_like(deltas)).live().gradients().abs().max() == 0.0
