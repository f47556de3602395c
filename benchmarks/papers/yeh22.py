"""Yeh22 (first is better than last) on MiniLM: Table 4 (deletion curves) and Table 1 (cancellation).

``python benchmarks/papers/yeh22.py [--small] [--data sst2|agnews|agnews_1k] [--parts deletion,no-overlap,cancellation]
[--retrain head|top-K|full]``. The paper retrains all layers; ``head`` is a stand-in. Table 1 of the paper is of a small
convolutional network (``yeh22_cnn.py``): this one is of MiniLM's layers, and only the order can be compared.
"""

from __future__ import annotations

import argparse

from setups import asked, dev_rows, parsed, retrainer, store, test_rows
from tables import cell, table

from forebear import QuerySpec, Retriever
from forebear.evaluation.measures.cancellation import cancellation as measure_cancellation
from forebear.evaluation.retraining.changes import seeds_of
from forebear.evaluation.retraining.deletion_curve import measure_deletion
from forebear.evaluation.retraining.row_choice import least_overlap, row_scores

# AUC-DEL+ and AUC-DEL- on AG News (BERT-small), and on Toxicity (RoBERTa) where the rows share no words.
DELETION = {
    "if": (-0.018, 0.033), "rep": (-0.016, 0.028), "tracin-last": (-0.021, 0.028), "tracin-we": (-0.166, 0.130),
    "tracin-we-topk": (-0.174, 0.131), "tracin-tfidf": (-0.090, 0.072), "tracin-we-common": (-0.017, 0.023),
}  # fmt: skip
NO_OVERLAP = {
    "if": (-0.009, 0.008), "rep": (-0.008, 0.007), "tracin-last": (-0.006, 0.010), "tracin-we": (-0.018, 0.026),
    "tracin-we-topk": (-0.016, 0.026), "tracin-we-nocommon": (0.003, 0.001), "tracin-we-common": (-0.008, 0.015),
}  # fmt: skip
# Cancellation and 100 times the mean cosine of two gradients: first and last layer, all parameters, weights, biases.
CANCELLATION = {
    ("word embeddings", "embedding"): (1863, 3.5), ("head", "weight"): (2966, 23), ("all", "all"): (2368, None),
    ("weight", "weight"): (2555, None), ("bias", "bias"): (16789, None),
}  # fmt: skip


def deletion(name: str, retriever: Retriever, sizes: argparse.Namespace, *, no_overlap: bool) -> None:
    """Table 4: change of the gold class's probability without the top k proponents and opponents, averaged over k."""
    paper = NO_OVERLAP if no_overlap else DELETION
    queries = test_rows(retriever, dev_rows(name), sizes.queries)
    assert queries.labels is not None
    spec = retriever.resolve(QuerySpec(methods=tuple(paper), target="gold"))
    n_candidates = len(retriever.index.live) // 10
    trainer = retrainer(retriever, sizes.retrain, queries.texts)
    found = measure_deletion(
        trainer,
        row_scores(retriever, queries, spec),
        queries.labels,
        sizes.remove,
        seeds_of(trainer, sizes.seeds, 0),
        candidates=least_overlap(retriever, queries, n_candidates) if no_overlap else None,
    )
    rows = {
        method: [cell(found.auc[m, side], paper[method][side]) for side in range(2)]
        for m, method in enumerate(found.methods)
    }
    kind = "no_overlap" if no_overlap else "deletion"
    store(
        f"yeh22_{kind}_{name}_{sizes.retrain}", retriever, table("method", ["AUC-DEL+", "AUC-DEL-"], rows, 3),
        queries=len(queries), removed=sizes.remove, retrain=sizes.retrain, seeds=len(found.seeds),
        candidates=found.n_candidates, sampled=found.sampled,
    )  # fmt: skip


def cancellation(sizes: argparse.Namespace) -> None:
    """Table 1: how far gradients cancel, and the mean cosine of two rows' gradients, by kind and layer."""
    retriever = asked("sst2", "epochs")
    found = measure_cancellation(retriever, n_rows=sizes.rows)
    rows = {}
    for g, group in enumerate(found.groups):
        if group.level == "tensor":
            continue
        ratio, cosine = CANCELLATION.get((group.name, group.kind), (None, None))
        label = group.name if group.level != "layer" else f"{group.name}, {group.kind}"
        rows[label] = [cell(found.values[:, g], ratio), cell(100 * found.cosines[:, g].mean(keepdims=True), cosine)]
    store(
        "yeh22_cancellation_sst2", retriever, table("parameters", ["C", "100 x cosine"], rows, 1),
        rows=len(found.rows), checkpoints=found.checkpoints,
    )  # fmt: skip


def main() -> None:
    """See the module."""
    sizes = parsed(
        __doc__,
        {
            "data": ("sst2",), "parts": ("deletion", "no-overlap", "cancellation"), "queries": 30, "rows": 200,
            "remove": tuple(range(10, 101, 10)), "retrain": "head", "seeds": 5,
        },
        {"queries": 5, "rows": 50, "remove": (20, 100)},
    )  # fmt: skip
    for name in sizes.data:
        for part in ("deletion", "no-overlap"):
            if part in sizes.parts:
                deletion(name, asked(name, "words"), sizes, no_overlap=part == "no-overlap")
    if "cancellation" in sizes.parts:
        cancellation(sizes)


if __name__ == "__main__":
    main()
