"""An index whose passes are in bf16: what is stored is rounded, exact scores are those of float64 autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, Retriever, build_index
from forebear.evaluation.measures.mislabelled import approximations
from forebear.indexer.building import preflight
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.reduction import RawSketches
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.spec import QuerySpec

N_ROWS, DAMPING = 40, 0.1
TEXTS, LABELS = sentences(N_ROWS, seed=8), labels(N_ROWS, 3)
QUERIES = sentences(4, seed=80)
OPTIONS = BuildOptions(
    precision="bf16", scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, dampings=(f"{DAMPING}x",),
    calibration_queries=N_ROWS, device="cpu",
)  # fmt: skip
Gradients = dict[str, np.ndarray]  # (n, n_out, n_in) by layer


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("half")
    model = str(make_tiny_model(folder / "model", n_classes=3, seed=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "has_half_products", lambda _device: True)  # emulated where they are not
        build_index(rows_from_texts(TEXTS, LABELS), folder / "index", choose_model(None, [model], [1.0]).checkpoints,
                    OPTIONS)  # fmt: skip
    return Retriever(folder / "index", device="cpu")


def autograd(retriever: Retriever, texts: list[str], wanted: list[int]) -> Gradients:
    """Loss gradients of the scope's layers in float64, one row at a time."""
    path = retriever.index.checkpoint_paths[-1]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    names = list(retriever.index.ekfac("top-1").parts)
    weights = [model.get_submodule(name).weight for name in names]
    rows = []
    for text, label in zip(texts, wanted, strict=True):
        logits = model(**tokenizer(text, return_tensors="pt")).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        rows.append([g.numpy() for g in torch.autograd.grad(loss, weights)])
    return {name: np.stack(of_layer) for name, of_layer in zip(names, zip(*rows, strict=True), strict=True)}


def products(one: Gradients, two: Gradients) -> np.ndarray:
    return sum(np.einsum("qoi,noi->qn", one[name], two[name]) for name in one)


def squares(gradients: Gradients) -> np.ndarray:
    return sum((g**2).sum(axis=(1, 2)) for g in gradients.values())


def whitened(retriever: Retriever, gradients: Gradients) -> Gradients:
    """H^-1/2 G, in the eigenbasis of the index's EK-FAC."""
    parts = retriever.index.ekfac("top-1").parts
    values = {name: part.eigenvalues.double().numpy() for name, part in parts.items()}
    damping = DAMPING * np.concatenate([v.ravel() for v in values.values()]).mean()
    turned = {}
    for name, part in parts.items():
        left, right = part.left.double().numpy(), part.right.double().numpy()
        turned[name] = (left.T @ gradients[name] @ right) / np.sqrt(values[name] + damping)
    return turned


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("method", ["gd", "gc", "if", "rif"])
def test_exact_scores_are_those_of_float64_autograd_though_the_index_is_rounded(retriever, method):
    q, n = autograd(retriever, QUERIES, [1] * len(QUERIES)), autograd(retriever, TEXTS, LABELS)
    stored = retriever.index.gradients("top-1").norms
    assert 1e-5 < relative(stored, np.sqrt(squares(n))) < 3e-2
    if method in ("if", "rif"):
        q, n = whitened(retriever, q), whitened(retriever, n)
    expected = products(q, n)
    if method in ("gc", "rif"):
        expected /= np.sqrt(np.outer(squares(q), squares(n)))
    asked = {"scope": "top-1", "target": "LABEL_1"}
    assert relative(retriever.scores(QUERIES, method, **asked), expected) < 1e-4
    found = retriever.retrieve(QUERIES, methods=[method], top=3, candidates=N_ROWS, **asked).to_pandas()
    for (query, side), ranked in found.groupby(["query", "side"]):
        sign = 1 if side.startswith("prop") else -1
        best = np.argsort(-sign * expected[int(query)], kind="stable")[:3]
        assert relative(ranked["score"].to_numpy(), expected[int(query)][best]) < 1e-4


def test_raw_sketches_of_a_pass_in_bf16_are_near_those_of_float64_gradients(retriever):
    models, index = retriever.models, retriever.index
    classifier, spec, name = models.classifier(), index.manifest.spec, index.manifest.checkpoints[-1].name
    assert classifier.precision == "bf16"
    (plain, _) = open_sketchers(index.fit_folder, classifier, spec, "top-1", name, last=True).values()
    projector = plain.projector
    collector = RawSketches(projector, N_ROWS, torch.device("cpu"))
    run_pass(classifier, [TEXTS], labels_seed(classifier.loss, np.array(LABELS)), [collector], batch_tokens=64)
    gradients = autograd(retriever, TEXTS, LABELS)
    expected = np.zeros((N_ROWS, projector.width))
    for layer, basis in projector.bases.items():
        left, right = basis.left.double().numpy(), basis.right.double().numpy()
        expected[:, projector.places[layer]] = (left @ gradients[layer] @ right.T).reshape(N_ROWS, -1)
    cosines = (collector.out * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert (cosines > 0.9995).all()
    assert (cosines < 0.9999999).any()


def test_what_is_stored_is_said_to_be_rounded(retriever):
    question = retriever.resolve(QuerySpec(methods=("gd", "if"), scope="top-1"))
    assert approximations(question) == dict.fromkeys(("gd", "if"), "numbers in bf16")


def test_a_device_without_products_of_bf16_is_refused(tmp_path, monkeypatch):
    model = str(make_tiny_model(tmp_path / "model", n_classes=3))
    monkeypatch.setattr(preflight, "has_half_products", lambda _device: False)
    with pytest.raises(InputError, match=r'^precision="bf16": cpu has no products of such numbers, .*"fp32"\.$'):
        build_index(
            rows_from_texts(TEXTS, LABELS), tmp_path / "index", choose_model(None, [model], [1.0]).checkpoints, OPTIONS
        )
