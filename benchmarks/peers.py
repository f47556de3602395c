"""Other libraries asked the same questions in the same process, by turns with forebear, and how far the scores agree.

The first 2,000 training rows of SST-2, the first development rows as queries, MiniLM, one checkpoint; the loss of the
predicted label for queries, of the gold label for training rows. A case a definition:

* ``peers_exact``: dots of whole gradients of all linear layers. captum's TracInCP, a loop in torch.
* ``peers_projected``: the same from what was stored. bergson's hooks and projection, with our loss in its place.
* ``peers_ekfac``: <H^-1 g_q, g_n> by EK-FAC, same rows, same damping. kronfluence.
* ``peers_head``: dots of gradients of the head. captum's TracInCPFast, torch with FAISS, dattri's TracIn on features;
  and <H^-1 g_q, g_n> with the exact Hessian, by dattri.

Slow ways are timed on ``--sample`` rows; agreement is over all. A peer that cannot be imported, or that fails, is named
with its reason in the result. ``make bench-peers`` installs them in an environment of their own, beside what ``.venv``
has: none of them is a requirement of forebear, and bergson asks for more than it imports.

    python benchmarks/peers.py [--rows 2000] [--sample 48] [--queries 4] [--fit-rows 500] [--threads 1]
                               [--only exact,projected,ekfac,head]
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, by_turns, count_processor_seconds, ratio, write_result
from peer_libraries import (
    BATCH,
    BATCH_TOKENS,
    MODEL,
    Bergson,
    Dattri,
    Kronfluence,
    Question,
    Way,
    captum,
    captum_fast,
    loop,
)

from forebear import BuildOptions, Retriever, build_index, choose_model, rows_from_texts
from forebear.indexer.curvature.ekfac import fit_ekfac
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import sketch_rows

CANDIDATES, TOP = 20, 10
DAMPING_SHARE = 0.01  # of the largest eigenvalue of EK-FAC
HEAD_DAMPING = 0.001
PEERS_PYTHON = ROOT / "runs" / "bench" / "peers-venv" / "bin" / "python"


def attempt(run: Callable[[], Any], peer: str, without: dict[str, str]) -> Any:
    """The result of a peer's call; None where it failed, whose reason is then noted."""
    try:
        return run()
    except Exception as error:
        without[peer] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(f"{peer}: {without[peer]}", flush=True)
        return None


def agreement(found: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """A peer's scores against ours, both ``(q, n)``: figures of the worst query."""
    from scipy.stats import spearmanr

    ranks = [spearmanr(a, b).statistic for a, b in zip(found, ours, strict=True)]
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :TOP] for scores in (found, ours)]
    errors = np.abs(found - ours).max(axis=1) / np.abs(ours).max(axis=1)
    return {
        "spearman": float(min(ranks)),
        "top 10": float(min(len(np.intersect1d(a, b)) / TOP for a, b in zip(*best, strict=True))),
        "error": float(errors.max()),
    }


def write(
    case: str,
    question: Question,
    taken: Mapping[str, list[float]],
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    without: dict[str, str],
    **facts: Any,
) -> None:
    """Write a case: seconds of every way over those of ``forebear``, and how the peers' scores agree with ours."""
    agreements = {way: agreement(*pair) for way, pair in scores.items()}
    peers = [way for way in taken if not way.startswith("forebear")]
    ours = {way: "forebear, if" if way.endswith(", if") else "forebear" for way in peers}
    write_result(
        case, larger=("over_forebear",), recalls=("agreement",),
        rows=len(question.rows), queries=len(question.asked), without=without,
        versions={name: version(name) for name in ("captum", "dattri", "bergson", "kronfluence", "faiss-cpu")},
        seconds={way: float(np.median(some)) for way, some in taken.items()},
        over_forebear={way: ratio(taken[way], taken[ours[way]]) for way in peers},
        agreement={f"{w} {name}": a[name] for w, a in agreements.items() for name in ("spearman", "top 10")},
        largest_error={way: found["error"] for way, found in agreements.items()},
        **facts,
    )  # fmt: skip


def version(name: str) -> str | None:
    """The version of a library, if it is there."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# exact dots of whole gradients


def exact_case(question: Question) -> None:
    """Every score exact: one question of all queries."""
    without = {"dattri": "its gradients go through one flat vector of all weights: none came in 60 s for 4 rows"}
    makers = {"captum batch 1": captum(1), "captum sample-wise": captum(BATCH), "torch loop": loop}
    ways: dict[str, Way] = {"forebear": lambda n: question.dots("all", n)}
    for name, make in makers.items():
        way = attempt(functools.partial(make, question), name, without)
        if way is not None and attempt(functools.partial(way, BATCH), name, without) is not None:
            ways[name] = way
    sample = question.n_sample
    taken = by_turns({name: functools.partial(way, sample) for name, way in ways.items()}, 3)
    scores = {}
    for name, way in ways.items():
        if name not in ("forebear", "captum batch 1"):  # which is captum by another loop over batches
            scores[name] = way(None), question.exact
    if "captum batch 1" in ways:
        scores["captum batch 1"] = ways["captum batch 1"](sample), question.exact[:, :sample]
    write("peers_exact", question, taken, scores, without, timed_rows=sample, gram_error=gram_error(question))


def gram_error(question: Question, n: int = 4) -> float:
    """Largest relative error of our dots among the first rows, against float64 products of their gradients."""
    scope, texts, gold = scope_of(question.classifier, "all"), question.texts[:n], question.labels[:n]
    whole = whole_gradients(question.classifier, scope, [texts], gold)
    gram = sum((g.flatten(1).double() @ g.flatten(1).double().T).numpy() for g in whole.values())
    found = exact_dots(question.classifier, scope, whole, [texts], gold)
    return float((np.abs(found - gram).max(axis=1) / np.abs(gram).max(axis=1)).max())


# scores from what was stored


def projected_case(question: Question) -> None:
    """A pass that stores, and a question of all queries to what it stored."""
    without: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions(scopes=("head", "all"), curvature="none", dampings=(), calibration_queries=0)
        source = rows_from_texts(question.texts, question.labels.tolist(), label_names=("negative", "positive"))
        index = build_index(source, Path(scratch) / "index", choose_model(str(MODEL)).checkpoints, options)
        retriever = Retriever(index)
        name = index.manifest.checkpoints[-1].name
        opened = open_sketchers(index.folder, question.classifier, index.manifest.spec, "all", name, last=True)
        sample, sketchers = question.n_sample, list(opened.values())

        def our_pass() -> Any:
            some = [question.texts[:sample]], question.labels[:sample]
            return sketch_rows(question.classifier, sketchers, *some, batch_tokens=BATCH_TOKENS)

        def ask(**choices: Any) -> Any:
            return retriever.retrieve(question.queries, methods=["gd"], scope="all", top=TOP, **choices).to_pandas()

        passes = {"forebear": our_pass}
        asks = {"forebear": lambda: ask(exact="none"), "forebear, 20 candidates": lambda: ask(candidates=CANDIDATES)}
        peer, scores = attempt(lambda: Bergson(question, Path(scratch)), "bergson", without), {}
        if peer and attempt(lambda: peer.gradients(True, sample), "bergson", without) is not None:
            stored = peer.gradients(True, None)
            passes["bergson"] = lambda: peer.gradients(True, sample)
            asks["bergson"] = lambda: peer.gradients(False, None) @ stored.T
            scores["bergson"] = asks["bergson"](), question.exact
        found = {way: recall(asks[way](), question.exact) for way in asks if way != "bergson"}
        passes_taken, taken = by_turns(passes, 3), by_turns(asks, 5)
        write(
            "peers_projected", question, taken, scores, without, pass_rows=sample,
            pass_seconds={way: float(np.median(some)) for way, some in passes_taken.items()},
            pass_over_forebear=without or ratio(passes_taken["bergson"], passes_taken["forebear"])._asdict(),
            recall_at_10_of_ours=found,
            bytes_a_row={
                "forebear": sum(
                    facts["bytes"]
                    for path, facts in index.manifest.files.items()
                    if path.startswith("gradients/all/epoch") and Path(path).name[0].isdigit()
                )
                / len(question.rows),
                **({} if without else {"bergson": stored.nbytes / len(stored)}),
            },
        )  # fmt: skip


def recall(answers: Any, exact: np.ndarray) -> float:
    """Of answers at both ends, against exact scores; the worst query's worst end."""
    found = []
    for (query, side), some in answers.groupby(["query", "side"]):
        signed = exact[query] if str(side).startswith("pro") else -exact[query]
        found.append(len(set(np.argsort(-signed)[: len(some)]) & set(some["row"])) / len(some))
    return float(min(found))


# EK-FAC


def ekfac_case(question: Question) -> None:
    """The fit on the first rows, and scores of all rows under one damping."""
    without: dict[str, str] = {}
    scope = scope_of(question.classifier, "all")
    kept: dict[str, Any] = {}

    def fit() -> None:
        texts = question.texts[: question.n_fit]
        kept["ekfac"] = fit_ekfac(question.classifier, scope, [texts], seed=0, batch_tokens=BATCH_TOKENS)

    fits_taken = by_turns({"forebear": fit}, 1, warm=False)
    if peer := attempt(lambda: Kronfluence(question), "kronfluence", without):
        theirs = attempt(lambda: by_turns({"kronfluence": peer.fit}, 1, warm=False), "kronfluence", without)
        peer, fits_taken = peer if theirs else None, {**fits_taken, **(theirs or {})}
    damping = DAMPING_SHARE * kept["ekfac"].largest_eigenvalue

    def score(n_rows: int | None) -> np.ndarray:
        vectors = whole_gradients(question.classifier, scope, [question.queries], question.targets)
        solved = kept["ekfac"].solve(vectors, damping)
        return exact_dots(question.classifier, scope, solved, [question.texts[:n_rows]], question.labels[:n_rows])

    ways, sample = {"forebear": lambda: score(question.n_sample)}, question.n_sample
    if peer:
        ways["kronfluence"] = lambda: peer.score(sample, damping)
    taken = by_turns(ways, 3)
    scores = {"kronfluence": (peer.score(len(question.rows), damping), score(None))} if peer else {}
    write(
        "peers_ekfac", question, taken, scores, without, timed_rows=sample, fit_rows=question.n_fit, damping=damping,
        fit_seconds={way: some[0] for way, some in fits_taken.items()},
    )  # fmt: skip


# the head


def head_case(question: Question) -> None:
    """Dots and influence at the head: a question of all queries to what was stored, at both ends."""
    import faiss

    without: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = rows_from_texts(question.texts, question.labels.tolist(), label_names=("negative", "positive"))
        options = BuildOptions(dampings=(str(HEAD_DAMPING),))
        index = build_index(source, Path(scratch) / "index", choose_model(str(MODEL)).checkpoints, options)
        retriever, model = Retriever(index), question.model()

        def run(of_rows: bool) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
            """Features, labels and gradients by transformers alone."""
            given: list[torch.Tensor] = []
            residuals, gold = [], []
            hook = model.classifier.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
            for ids, mask, labels in question.loader(None if of_rows else 0, 64):
                with torch.no_grad():
                    probabilities = model(ids, mask).logits.softmax(1)
                residuals.append(probabilities - torch.nn.functional.one_hot(labels, 2))
                gold.append(labels)
            hook.remove()
            features = torch.cat(given)
            return features, torch.cat(gold), (torch.cat(residuals)[:, :, None] * features[:, None]).flatten(1).numpy()

        *rows, gradients = run(True)
        flat = faiss.IndexFlatIP(gradients.shape[1])
        flat.add(gradients)

        def torch_and_faiss() -> Any:
            asked = run(False)[2]
            return flat.search(asked, TOP), flat.search(-asked, TOP)

        def ask(method: str) -> Any:
            return retriever.retrieve(question.queries, methods=[method], top=TOP, damping=str(HEAD_DAMPING))

        ways: dict[str, Callable[[], Any]] = {"forebear": lambda: ask("gd"), "torch and faiss": torch_and_faiss}
        ours = {"gd": retriever.scores(question.queries, "gd")}
        ours["if"] = retriever.scores(question.queries, "if", damping=str(HEAD_DAMPING))
        asked = run(False)
        scores = {"torch and faiss": (asked[2] @ gradients.T, ours["gd"])}
        makers = {
            "captum": lambda: captum_fast(question), "dattri": lambda: Dattri(model, tuple(rows), asked[:2]).dots,
            "dattri, if": lambda: functools.partial(Dattri(model, tuple(rows), asked[:2]).influence, HEAD_DAMPING),
        }  # fmt: skip
        for name, make in makers.items():
            way = attempt(make, name, without)
            found = way and attempt(way, name, without)
            if found is not None:
                ways[name], scores[name] = way, (found, ours["if" if name.endswith("if") else "gd"])
        if "dattri, if" in ways:
            ways["forebear, if"] = lambda: ask("if")
        write("peers_head", question, by_turns(ways, 5), scores, without, damping_of_if=HEAD_DAMPING)


CASES = {"exact": exact_case, "projected": projected_case, "ekfac": ekfac_case, "head": head_case}


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 2000, "sample": 48, "queries": 4, "fit-rows": 500, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", default=",".join(CASES))
    given = parser.parse_args()
    if PEERS_PYTHON.is_file() and Path(sys.prefix) != PEERS_PYTHON.parent.parent:
        return subprocess.run([PEERS_PYTHON, *sys.argv], check=False).returncode
    torch.set_num_threads(given.threads)
    if given.threads == 1:
        count_processor_seconds()
    warnings.simplefilter("ignore")
    question = Question(given.rows, given.queries, given.sample, given.fit_rows)
    for name in given.only.split(","):
        CASES[name](question)
    return 0


if __name__ == "__main__":
    sys.exit(main())
