"""Han20 (influence functions for NLP and data artifacts) on MiniLM: Tables 1 to 4 and 6, Figures 2 and 3, section 5.1.

Influence of the last layer, H^-1 exact, with two dampings: 30, which the paper's LiSSA amounts to, and 0.1 of the mean
eigenvalue. ``python benchmarks/papers/han20.py [--small] [--parts removal,saliency,artifact] [--retrain head|top-4]``
"""

from __future__ import annotations

import argparse

import numpy as np
from setups import PAPER_DAMPING, asked, parsed, retrainer, source_of, store, test_rows
from tables import cell, table

from forebear import QuerySpec, Retriever
from forebear.evaluation.audits.artifacts.features import has_negation
from forebear.evaluation.audits.artifacts.hans import training_overlap
from forebear.evaluation.audits.artifacts.regression import regress_artifact
from forebear.evaluation.common.comparisons import defined_means
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.measures.saliency_consistency import (
    INFLUENCE_SHARES,
    OVERLAP_SHARES,
    ROLES,
    pooled_mean,
    saliency_consistency,
)
from forebear.evaluation.retraining.changes import seeds_of
from forebear.evaluation.retraining.removal import measure_removal
from forebear.evaluation.retraining.row_choice import SIDES, amounts_of, row_scores

DAMPINGS = (PAPER_DAMPING, "0.1x")
TESTS = {"sst2": "sst2/dev.parquet", "mnli10k": "hans_small/test.parquet"}
REMOVED = {
    "sst2": {"most positive": -6.00, "most negative": 0.17, "least influential": -1.30, "random": -1.67},
    "mnli10k": {"most positive": -11.62, "most negative": 2.01, "least influential": 1.01, "random": 0.13},
}
OVERLAPS = {
    "sst2": {
        "most negative": (75.6, 77.4, 80.0, 82.4),
        "median": (84.2, 86.7, 88.9, 89.1),
        "most positive": (65.2, 68.8, 71.4, 72.0),
    },
    "mnli10k": {
        "most negative": (33.0, 33.5, 37.5, 40.9),
        "median": (79.3, 78.0, 80.5, 84.0),
        "most positive": (46.0, 48.3, 49.9, 54.9),
    },
}
# Quadratic coefficients x 1e3 of lexical overlap and negation.
ARTIFACTS = {
    "HANS, predicted entailment": (3.28, None),
    "HANS, predicted non-entailment": (3.30, None),
    "MNLI": (0.65, None),
    "HANS, entailment": (3.05, -1.13),
    "the same, hypothesis negated": (0.53, 0.27),
}


def question(retriever: Retriever, damping: str) -> QuerySpec:
    return retriever.resolve(QuerySpec(methods=("if",), damping=damping))


def removal(name: str, retriever: Retriever, queries: QueryRows, sizes: argparse.Namespace) -> None:
    """Tables 1 and 2: change of the confidence without 10% of the rows, in percentage points."""
    scores = {damping: row_scores(retriever, queries, question(retriever, damping))["if"] for damping in DAMPINGS}
    trainer = retrainer(retriever, sizes.retrain, queries.texts)
    n_rows = len(retriever.index.live)
    found = measure_removal(
        trainer, scores, amounts_of([], [sizes.share], n_rows, []), seeds_of(trainer, sizes.seeds, 0)
    )
    paper = REMOVED[source_of(name)]
    rows = {
        side: [cell(defined_means(100 * found.changes[m, j, 0], axis=-2), paper[side]) for m in range(len(DAMPINGS))]
        for j, side in enumerate(SIDES.values())
    }
    random = cell(defined_means(100 * found.random[0], axis=-2), paper["random"])
    rows["random"] = [random, random]
    store(
        f"han20_removal_{name}_{sizes.retrain}", retriever,
        table("removed", [f"damping {damping}" for damping in DAMPINGS], rows),
        queries=len(queries), share=sizes.share, retrain=sizes.retrain, seeds=len(found.seeds), sampled=found.sampled,
    )  # fmt: skip


def saliency(name: str, retriever: Retriever, queries: QueryRows) -> None:
    """Figures 2 and 3: z-normalised influence by salient word piece. Tables 3 and 4: tops before and after removal."""
    influence, overlaps, paper = {}, {}, OVERLAPS[source_of(name)]
    for damping in DAMPINGS:
        found = saliency_consistency(retriever, queries, question(retriever, damping))
        for r, role in enumerate(ROLES):
            label = f"{role}, damping {damping}"
            influence[label] = [
                pooled(found.sums[0, r, s], found.counts[0, r, s]) for s in range(len(INFLUENCE_SHARES))
            ]
            overlaps[label] = [cell(100 * found.overlaps[0, r, d], paper[role][d]) for d in range(len(OVERLAP_SHARES))]
    for case, rows, shares, digits in (
        ("influence", influence, INFLUENCE_SHARES, 2), ("overlap", overlaps, OVERLAP_SHARES, 1)
    ):  # fmt: skip
        columns = [f"top {100 * float(share):g}%" for share in shares]
        store(
            f"han20_saliency_{case}_{name}", retriever, table("word piece", columns, rows, digits),
            queries=len(found.query_rows),
        )  # fmt: skip


def pooled(sums: np.ndarray, counts: np.ndarray) -> dict[str, object]:
    """A cell of the mean over all values of all queries."""
    mean, low, high = pooled_mean(sums, counts, 0)
    ours = None if mean is None else {"mean": mean, "error": None, "low": low, "high": high, "n": int(counts.sum())}
    return {"paper": None, "ours": ours}


def artifact(retriever: Retriever, sizes: argparse.Namespace) -> None:
    """Section 5.1 and Table 6: quadratic coefficient of artifact on influence, x 1e3, for each group of queries."""
    live = retriever.index.live
    hypotheses = retriever.index.text_lists(live)[1]
    features = (training_overlap(retriever)[live], np.array([float(has_negation(text)) for text in hypotheses]))
    hans, negated, natural = (
        test_rows(retriever, path, n)
        for path, n in (
            ("hans_small/test.parquet", 0), ("hans_negated/test.parquet", 0), ("mnli10k/dev.parquet", sizes.natural)
        )
    )  # fmt: skip
    entailment = retriever.label_names.index("entailment")
    rows = {}
    for damping in DAMPINGS:
        spec = question(retriever, damping)
        fits = [
            [regress_artifact(retriever, queries, spec, f) for f in features] for queries in (hans, negated, natural)
        ]
        predicted, gold = fits[0][0].predictions == entailment, hans.labels == entailment
        groups = (
            (fits[0], predicted),
            (fits[0], ~predicted),
            (fits[2], slice(None)),
            (fits[0], gold),
            (fits[1], slice(None)),
        )
        for (label, paper), (found, at) in zip(ARTIFACTS.items(), groups, strict=True):
            rows[f"{label}, damping {damping}"] = [
                cell(1000 * fit.coefficients[0, at, 0], number) for fit, number in zip(found, paper, strict=True)
            ]
    store(
        "han20_artifact", retriever, table("queries", ["overlap x 1e3", "negation x 1e3"], rows),
        queries={"HANS": len(hans), "negated": len(negated), "MNLI": len(natural)},
    )  # fmt: skip


def main() -> None:
    """See the module."""
    sizes = parsed(
        __doc__,
        {
            "data": ("sst2", "mnli10k"), "parts": ("removal", "saliency", "artifact"), "queries": 50, "natural": 50,
            "share": "0.1", "retrain": "head", "seeds": 5,
        },
        {"queries": 10, "natural": 20},
    )  # fmt: skip
    for name in sizes.data:
        retriever = asked(name)
        queries = test_rows(retriever, TESTS[source_of(name)], sizes.queries)
        if "removal" in sizes.parts:
            removal(name, retriever, queries, sizes)
        if "saliency" in sizes.parts:
            saliency(name, retriever, queries)
        if "artifact" in sizes.parts and name == "mnli10k":
            artifact(retriever, sizes)


if __name__ == "__main__":
    main()
