"""Answers say in how many steps H^-1 was solved, and how well: as columns, in files and on the screen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from forebear.cli.main import run
from forebear.indexer.model.forward import run_forward

DAMPING, TOLERANCE = 0.01, 1e-6


def dense_steps(world) -> list[int]:
    """Steps of conjugate gradients with the whole matrix, from the probabilities and features of the index."""
    index, live = world.index, world.index.live
    n_classes = len(index.manifest.spec.label_names)
    f = index.features().take(live).astype(np.float64)
    p = index.residuals().take(live).astype(np.float64) + np.eye(n_classes)[index.labels[live]]
    of_rows = ((np.diag(a) - np.outer(a, a), np.outer(b, b)) for a, b in zip(p, f, strict=True))
    matrix = sum(np.kron(left, right) for left, right in of_rows) / len(f) + DAMPING * np.eye(n_classes * f.shape[1])
    steps = []
    queries = world.retriever.retrieve(world.queries, methods=["gd"], top=1).to_pylist()
    forward = run_forward(world.retriever.classifier(), [world.queries])
    targets = [next(q["target"] for q in queries if q["query"] == i) for i in range(len(world.queries))]
    for i, target in enumerate(targets):
        logits = forward.logits[i].astype(np.float64)
        p_query = np.exp(logits - logits.max())
        slope = p_query / p_query.sum() - np.eye(n_classes)[index.manifest.spec.label_names.index(target)]
        r = np.kron(slope, forward.features[i].astype(np.float64))
        d, x, n = r, np.zeros_like(r), 0
        length = np.linalg.norm(r)
        while np.linalg.norm(r) > TOLERANCE * length:
            alpha = (r @ r) / (d @ matrix @ d)
            x, rest = x + alpha * d, r - alpha * matrix @ d
            d, r, n = rest + (rest @ rest) / (r @ r) * d, rest, n + 1
        steps.append(n)
    return steps


def test_cg_takes_the_steps_of_cg_with_the_whole_matrix(bert_world):
    asked = {"curvature": "cg", "damping": str(DAMPING), "tolerance": TOLERANCE}
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["if", "gd"], top=2, **asked).to_pylist()
    found = {(row["query"], row["method"]): row["iterations"] for row in table}
    steps = dense_steps(bert_world)
    assert [found[i, "if"] for i in range(len(steps))] == steps
    assert min(steps) > 1
    assert {found[i, "gd"] for i in range(len(steps))} == {None}
    assert all((row["residual"] is None) == (row["iterations"] is None) for row in table)
    assert max(row["residual"] for row in table if row["method"] == "if") <= TOLERANCE


@pytest.mark.parametrize("end", [".jsonl", ".csv"])
def test_steps_stand_in_files_and_on_the_screen(bert_world, tmp_path, capsys, end):
    out = tmp_path / f"answers{end}"
    ask = ["retrieve", "--index", str(bert_world.index.folder), "--text", "a good film", "--method", "if", "--top", "1"]
    lissa = ["--curvature", "lissa", "--lissa", "damping=0.01,scale=10,batch_rows=4,depth=7,repeats=2"]
    assert run([*ask, *lissa]) == 0
    assert " in 14 iterations" in " ".join(capsys.readouterr().out.split())
    assert run([*ask, *lissa, "--out", str(out), "--quiet"]) == 0
    text = out.read_text().splitlines()
    if end == ".jsonl":
        assert [json.loads(line)["iterations"] for line in text] == [14, 14]
    else:
        header, *rows = (line.replace('"', "").split(",") for line in text)
        assert {row[header.index("iterations")] for row in rows} == {"14"}
