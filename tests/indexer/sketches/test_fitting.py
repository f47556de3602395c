"""What is fitted on a sample of the rows, against plain autograd gradients; and after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import labels, make_tiny_model, sentences

from forebear import BuildOptions, build_index
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches.fitting import Sample, fit_sketchers
from forebear.indexer.sketches.projector import read_plain_projector
from forebear.indexer.sketches.reduction import read_reduction
from forebear.indexer.storage.layout import BASES_NAME, MAP_NAME, gradient_folder
from forebear.indexer.training.model_choice import choose_model

N, SCOPE, WIDTH = 60, "all", 8
TEXTS = sentences(N, seed=21)


@pytest.fixture(scope="module", params=[2, 3])
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    model = str(make_tiny_model(folder / "model", n_classes=request.param))
    gold = labels(N, request.param)
    options = BuildOptions(
        scopes=("head", SCOPE), sketch_dim=WIDTH, dampings=("1%", "100x"), calibration_queries=0, device="cpu"
    )
    index = build_index(
        rows_from_texts(TEXTS, gold), folder / "index", choose_model(None, [model], [1.0]).checkpoints, options
    )
    return index, model, gold


def folders(index):
    checkpoint = index.manifest.checkpoints[-1].name
    return {damping: index.fit_folder / gradient_folder(SCOPE, checkpoint, damping) for damping in (None, 0, 1)}


def test_coordinates_are_the_principal_ones_of_the_loss_gradients_of_the_labels(built):
    """With two classes they are gathered along the curvature's one direction at the logits, being multiples of it."""
    index, model, gold = built
    classifier = load_classifier(model, device="cpu")
    classifier.model.requires_grad_(True)
    folder = folders(index)[None]
    projector = read_plain_projector(folder / BASES_NAME, SCOPE, torch.device("cpu"), torch.float32)
    weights = [classifier.model.get_submodule(name).weight for name in projector.bases]
    raw = []
    for text, label in zip(TEXTS, gold, strict=True):
        loss = torch.nn.functional.cross_entropy(
            classifier.model(**classifier.tokenizer(text, return_tensors="pt")).logits, torch.tensor([label])
        )
        parts = zip(projector.bases.values(), torch.autograd.grad(loss, weights), strict=True)
        raw.append(torch.cat([(b.left @ g @ b.right.T).flatten() for b, g in parts]).double().numpy())
    raw = np.stack(raw)
    principal = np.linalg.svd(raw / np.linalg.norm(raw, axis=1, keepdims=True), full_matrices=False)[2][:WIDTH]
    found = read_reduction(folder / MAP_NAME).basis.astype(np.float64)
    assert found.shape == principal.shape
    np.testing.assert_allclose(np.abs(np.sum(found * principal, axis=1)), 1.0, atol=5e-3)


def test_a_fit_that_was_interrupted_ends_with_the_same_files(built):
    index, model, gold = built
    kept = {damping: (folder / MAP_NAME).read_bytes() for damping, folder in folders(index).items()}
    for missing in ((None, 0, 1), (0,), (1,)):
        for damping in missing:
            (folders(index)[damping] / MAP_NAME).unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("forebear.indexer.curvature.ekfac.run_pass", None)  # the curvature is not fitted again
            fit_sketchers(
                index.fit_folder, load_classifier(model, device="cpu"), index.manifest.spec,
                index.manifest.checkpoints[-1].name, lambda: Sample(texts=[TEXTS], labels=np.array(gold)), last=True,
                stage=lambda *_: lambda _: None,
            )  # fmt: skip
        for damping, folder in folders(index).items():
            assert (folder / MAP_NAME).read_bytes() == kept[damping]
