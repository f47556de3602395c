"""Wrong labels: every measure of ``audit mislabelled``, and their combination, beside cleanlab on equal probabilities.

AG News with the labels of human annotators, and SST-2 and MNLI with flips planted in 5, 10 and 20% of the rows: between
any two labels, or (``class``) from each label to the next, from the last four times as often as from the first. MiniLM
is trained on the wrong labels, too; no true label is seen but by the evaluation. cleanlab runs in an environment of its
own, which also sees this one's packages: name its interpreter. Cases that are done are not done again.

    python benchmarks/wrong_labels.py [--cases agnews_noisy,sst2-class-10] [--parts train,table] [--cleanlab PYTHON]
        [--seed 1]

A seed chooses the rows, the flips and the training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, ROOT, write_json, write_result

RESAMPLES = 300
RUNS = ROOT / "runs" / "bench" / "wrong-labels"
NEWS, NLI = ("World", "Sports", "Business", "Sci/Tech"), ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Data:
    """A data set: its folder, texts and labels, the rows that are taken, and how the model is trained."""

    folder: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    n_rows: int
    learning_rate: float = 5e-5
    epochs: int = 3
    freeze_below: int | None = None


DATA_SETS = {
    "agnews_noisy": Data("agnews_noisy", ("text",), NEWS, 5000, epochs=2, freeze_below=3),
    "sst2": Data("sst2", ("text",), ("negative", "positive"), 1500, freeze_below=3),
    "mnli": Data("mnli10k", ("premise", "hypothesis"), NLI, 2000, 1e-4),
}
FLIPS = ("class-10", "random-20", "class-20", "random-10", "class-5", "random-5")
CASES = ("agnews_noisy", *(f"{data}-{flips}" for flips in FLIPS for data in ("sst2", "mnli")))


def flipped(labels: np.ndarray, n_classes: int, rate: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Labels of which some are wrong; see the top of the file."""
    n_wrong, wrong = round(rate * len(labels)), labels.copy()
    if kind == "random":
        rows = rng.choice(len(labels), n_wrong, replace=False)
        wrong[rows] = (labels[rows] + rng.integers(1, n_classes, n_wrong)) % n_classes
    else:
        weights = np.linspace(0.4, 1.6, n_classes)[labels]
        rows = rng.choice(len(labels), n_wrong, replace=False, p=weights / weights.sum())
        wrong[rows] = (labels[rows] + 1) % n_classes
    return wrong


def folder_of(case: str, seed: int) -> Path:
    """Where a case's run, index and figures are."""
    return RUNS / (f"{case}-{seed}" if seed else case)


def rows_of(case: str, seed: int) -> tuple[Data, pa.Table]:
    """The training rows of a case: texts, the label that is trained on, and the true one."""
    name, _, flips = case.partition("-")
    data = DATA_SETS[name]
    table = pq.read_table(DATA / data.folder / "train.parquet")
    table = table.take(np.sort(np.random.default_rng(seed).choice(len(table), data.n_rows, replace=False)))
    truth = np.asarray(table["label"]).astype(int)
    if flips:
        kind, percent = flips.split("-")
        rng = np.random.default_rng([int(percent), kind == "class", *([seed] if seed else [])])
        wrong = flipped(truth, len(data.labels), int(percent) / 100, kind, rng)
    else:
        wrong = np.asarray(table["noisy_label"]).astype(int)
    return data, pa.table({**{text: table[text] for text in data.texts}, "label": wrong, "truth": truth})


def train(case: str, seed: int) -> None:
    """Train on the wrong labels, and index the rows by all checkpoints."""
    from forebear import Index, TrainOptions, open_rows
    from forebear import train as fine_tune

    folder = folder_of(case, seed)
    if (folder / "index" / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data, table = rows_of(case, seed)
    file = folder / "train.parquet"
    pq.write_table(table, file)
    started = time.perf_counter()
    kept = {"text_columns": data.texts, "label_column": "label", "label_names": data.labels}
    options = TrainOptions(
        learning_rate=data.learning_rate, epochs=data.epochs, freeze_below=data.freeze_below, seed=seed
    )
    fine_tune(open_rows(str(file), **kept), "minilm", folder / "run", options, force=True)
    trained = time.perf_counter()
    Index.build(folder / "run", str(file), folder / "index", checkpoints=("all",), force=True, **kept)
    for number in range(1, data.epochs):
        shutil.rmtree(folder / "run" / "checkpoints" / f"epoch-{number}")
    print(f"{case}: trained in {trained - started:.0f} s, indexed in {time.perf_counter() - trained:.0f} s", flush=True)


PEER = """
import sys, numpy as np
from cleanlab import Datalab
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores as scores
data = np.load(sys.argv[1]); y, p = data["labels"], data["p"]
lab = Datalab({"y": y}, label_name="y"); lab.find_issues(pred_probs=p, issue_types={"label": {}})
found = lab.get_issues("label"); own = scores(y, p, method="self_confidence")
ways = {"cleanlab self-confidence": -own, "cleanlab normalised margin": -scores(y, p, method="normalized_margin"),
        "cleanlab adjusted self-confidence": -scores(y, p, method="self_confidence", adjust_pred_probs=True)}
for name in ("prune_by_noise_rate", "confident_learning"):
    ways["find_label_issues " + name] = find_label_issues(y, p, filter_by=name) * 2.0 - own
ways["Datalab"] = found["is_label_issue"].to_numpy() * 2.0 - found["label_score"].to_numpy()
np.savez(sys.argv[2], **ways)
"""


def by_cleanlab(python: str, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Suspicion of each row by cleanlab, from the same out-of-fold probabilities; issues that it finds stand first."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, labels=labels, p=probabilities / probabilities.sum(axis=1, keepdims=True))
        subprocess.run([python, "-c", PEER, given, found], check=True, stdout=subprocess.DEVNULL)
        return dict(np.load(found))


def figures(values: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """AUC, average precision, precision at the number of wrong rows."""
    from scipy.stats import rankdata

    n_wrong, n_right = wrong.sum(), (~wrong).sum()
    area = (rankdata(values)[wrong].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * n_right)
    hits = wrong[np.argsort(-values, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.array([area, precision[hits].mean(), hits[:n_wrong].mean()])


def calibration_error(probability: np.ndarray, wrong: np.ndarray) -> float:
    """Mean distance of the probability from the share of wrong rows, over ten parts of equal size by probability."""
    parts = np.array_split(np.argsort(probability, kind="stable"), 10)
    return float(sum(len(p) * abs(probability[p].mean() - wrong[p].mean()) for p in parts) / len(wrong))


def table(case: str, seed: int, python: str | None) -> dict[str, Any]:
    """The figures of a case: of each measure, and by how much the evidence is above it, with 95% intervals."""
    from forebear import QuerySpec, Retriever
    from forebear.evaluation.audits.rows.suspects import suspects
    from forebear.evaluation.common.label_evidence.estimates import (
        checkpoint_probabilities,
        first_equal,
        geometric_mean,
    )
    from forebear.evaluation.common.label_evidence.evidence import trained_refits

    folder = folder_of(case, seed)
    rows = pq.read_table(folder / "train.parquet")
    labels, truth = (np.asarray(rows[name]).astype(int) for name in ("label", "truth"))
    wrong = labels != truth
    retriever = Retriever(folder / "index")
    index, spec = retriever.index, QuerySpec(methods=("gd", "if"))
    started = time.process_time()
    found = suspects(retriever, spec)
    taken = time.process_time() - started
    assert found.suspicion is not None and found.probability is not None
    ways = {
        "evidence": found.suspicion,
        **dict(zip(found.names, found.values, strict=True)),
        "mean rank": -found.combined,
    }
    if python:
        last, equal = len(index.manifest.checkpoints) - 1, first_equal(index, index.live)
        models = [checkpoint_probabilities(index, index.live, number) for number in range(last + 1)]
        _, refits = trained_refits(index, index.live, models, equal)
        ways |= by_cleanlab(python, labels, geometric_mean(refits))
    rng = np.random.default_rng(0)
    kinds = (np.flatnonzero(wrong), np.flatnonzero(~wrong))
    draws = [rng.permutation(np.concatenate([rng.choice(k, len(k)) for k in kinds])) for _ in range(RESAMPLES)]
    of_evidence = np.array([figures(found.suspicion[draw], wrong[draw]) for draw in draws])
    measures = {}
    for name, values in ways.items():
        own = of_evidence if name == "evidence" else np.array([figures(values[draw], wrong[draw]) for draw in draws])
        low, high = np.quantile(own if name == "evidence" else of_evidence - own, [0.025, 0.975], axis=0)
        measures[name] = {
            "auc, average precision, precision at n": figures(values, wrong).round(4).tolist(),
            "interval" if name == "evidence" else "evidence above it": [low.round(4).tolist(), high.round(4).tolist()],
        }
    planted = np.zeros(len(wrong), bool)
    planted[rng.permutation(kinds[0])[: len(kinds[0]) // 2]] = True
    measured = suspects(retriever, spec, planted=planted).probability
    assert measured is not None
    first = found.order[: int(wrong.sum())]
    first = first[wrong[first]]
    return {
        "rows": len(wrong),
        "wrong": float(wrong.mean()),
        "expected wrong": float(found.probability.mean()),
        "calibration error": calibration_error(found.probability, wrong),
        "half of the wrong rows planted": {
            "calibration error, estimated": calibration_error(found.probability[~planted], wrong[~planted]),
            "calibration error, measured": calibration_error(measured[~planted], wrong[~planted]),
        },
        "suggestion is the true label": float((found.suggested[first] == truth[first]).mean()),
        "wrong of the first 20": int(wrong[found.order[:20]].sum()),
        "processor seconds": round(taken, 1),
        "measures": measures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--parts", default="train,table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cleanlab", help="interpreter of an environment with cleanlab[datalab]")
    args = parser.parse_args()
    cases = args.cases.split(",")
    for case in cases if "train" in args.parts else ():
        train(case, args.seed)
    if "table" in args.parts:
        tables = {}
        for case in cases:
            kept = folder_of(case, args.seed) / "table.json"
            if not kept.exists():
                write_json(kept, table(case, args.seed, args.cleanlab))
            tables[case] = json.loads(kept.read_text())
        write_result(f"wrong_labels_{args.seed}" if args.seed else "wrong_labels", cases=tables)


if __name__ == "__main__":
    main()
