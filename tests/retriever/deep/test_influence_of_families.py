"""Influence beyond the head of other families than BERT: against a dense curvature by autograd of single rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error
from families import N_CLASSES, autograd, make_family, make_family_adapter
from tiny import labels, sentences

from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.retriever import Retriever

ROWS, GOLD, QUERIES = sentences(24), labels(24, N_CLASSES), sentences(3, seed=8)
DAMPING = 0.02
# A layer of each family that is used as BERT's are not.
SCOPES = {
    "deberta-v2": "layer:deberta.encoder.layer.1.attention.self.pos_key_proj",  # on positions that all rows share
    "gpt2": "layer:transformer.h.1.attn.c_attn",  # transformers' Conv1D
    "llama": "layer:model.layers.1.self_attn.k_proj",  # one key for two queries, rotated by position
    "bart": "layer:model.decoder.layers.1.encoder_attn.k_proj",  # of a decoder, on what the encoder says
    "bert": "adapter",
}


def by_row(classifier: Classifier, names: list[str], texts: list[str], classes: list[int]) -> np.ndarray:
    """Gradients of parameters, ``(n, p)`` float64."""
    found = autograd(classifier, names, texts, np.array(classes))
    return torch.cat([g.flatten(1) for g in found], dim=1).double().numpy()


def made(folder: Path, kind: str) -> Path:
    return make_family_adapter(folder, kind) if SCOPES[kind] == "adapter" else make_family(folder, kind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", SCOPES)
def test_if_and_rif_equal_a_dense_solve(kind, tmp_path):
    """<H^-1 g_q, g_n> and its cosine, H the mean over rows of the sum over classes of p_c g_c g_c^T, plus damping."""
    if SCOPES[kind] == "adapter":
        pytest.importorskip("peft", reason="needs peft: pip install 'forebear[peft]'")
    folder, scope = made(tmp_path / "model", kind), SCOPES[kind]
    options = BuildOptions(scopes=("head", scope), calibration_queries=0, curvature="none", precision="fp32")
    index = build_index(rows_from_texts(ROWS, GOLD), tmp_path / "index", choose_model(str(folder)).checkpoints, options)
    classifier = load_classifier(folder)
    names = [name for block in scope_of(classifier, scope).blocks for name in block.parameter_names]
    with torch.no_grad():
        logits = [classifier.model(**classifier.tokenizer(text, return_tensors="pt")).logits[0] for text in ROWS]
    p = torch.stack(logits).double().softmax(dim=1).numpy()
    h = DAMPING * np.eye(sum(classifier.model.get_parameter(name).numel() for name in names))
    for c in range(N_CLASSES):
        g = by_row(classifier, names, ROWS, [c] * len(ROWS))
        h += (g * p[:, c, None]).T @ g / len(ROWS)
    rows, asked = by_row(classifier, names, ROWS, GOLD), by_row(classifier, names, QUERIES, [1] * len(QUERIES))
    solved, solved_rows = np.linalg.solve(h, asked.T).T, np.linalg.solve(h, rows.T).T
    scores = solved @ rows.T
    lengths = [np.sqrt((s * g).sum(axis=1)) for s, g in ((solved, asked), (solved_rows, rows))]
    choices = {"curvature": "cg", "damping": str(DAMPING), "curvature_rows": 0, "tolerance": 1e-6}
    truths = {"if": scores}
    if scope != "adapter":  # whose many small layers take a minute: `rif` takes a solve a row
        truths["rif"] = scores / np.outer(*lengths)
    for method, truth in truths.items():
        found = Retriever(index).scores(QUERIES, method, scope=scope, target="LABEL_1", **choices)
        assert error(found, truth) <= 5e-4, method
