"""The methods by words, by slow loops over plain transformers models in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tiny import WORDS, labels, make_tiny_model, sentences
from torch import nn

from forebear import BuildOptions, Retriever, build_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model

ETAS = (0.5, 0.25)
TOP = 4  # positions kept a row
ALL = ["tracin-we", "tracin-we-topk", "tracin-we-common", "tracin-we-nocommon", "tracin-tfidf"]
GRADIENTS = ALL[:4]
MODES = ("none", "rerank", "full")
NAMES = ["LABEL_0", "LABEL_1", "LABEL_2"]
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class World:
    """An index of both word stores, and what oracles need as plain lists."""

    models: tuple[str, ...]
    texts: list
    labels: list[int]
    queries: list
    retriever: Retriever


def build(out: Path, paths, texts, gold, *, how=None, **changes) -> Retriever:
    options = {"stores": ("features", "words"), "words_tops": (0, TOP), "dampings": (), "shard_rows": 9}
    source = rows_from_texts(list(texts), list(gold), label_names=NAMES[: load(paths[-1])[0].num_labels])
    chosen = choose_model(None, paths, ETAS[: len(paths)]).checkpoints
    return Retriever(build_index(source, out, chosen, BuildOptions(**(options | changes)), **(how or {})))


@cache
def make_world(folder: Path, kind: str, pairs: bool, precision: str) -> World:
    """Repeated words, a text beyond the limit of 40 pieces, unknown words, padding written as text, no text at all."""
    paths = tuple(str(make_tiny_model(folder / f"{kind}-{seed}", kind, 3, seed)) for seed in (0, 1))
    pad = load(paths[0])[1].pad_token
    odd = ["good good dull good", " ".join(WORDS * 2), "xyzzy film qwert", f"good {pad} film {pad}"]
    texts, queries = [*sentences(16, seed=3), *odd, ""], [*sentences(2, seed=9), *odd]
    if pairs:
        texts, queries = (list(zip(x, sentences(len(x), seed=4), strict=True)) for x in (texts, queries))
    gold, name = labels(len(texts), 3), f"{kind}-{pairs}-{precision}"
    return World(paths, texts, gold, queries, build(folder / name, paths, texts, gold, words_precision=precision))


@cache
def load(path: str):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def inputs_of(path: str, text) -> dict[str, torch.Tensor]:
    texts = [text] if isinstance(text, str) else text
    return dict(load(path)[1](*texts, return_tensors="pt", truncation=True, max_length=40))


def ids_of(path: str, text) -> list[int]:
    return inputs_of(path, text)["input_ids"][0].tolist()


@cache
def predicted(path: str, text) -> int:
    with torch.no_grad():
        return int(load(path)[0](**inputs_of(path, text)).logits.argmax())


@cache
def gradients(path: str, text, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By autograd: dL/de at each position ``(t, e)``, dL/dE ``(V, e)``, p - y ``(c,)``."""
    model, caught = load(path)[0], []
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    logits = model(**inputs_of(path, text)).logits
    hook.remove()
    loss = nn.functional.cross_entropy(logits, torch.tensor([label]))
    deltas, matrix, residual = torch.autograd.grad(loss, [caught[0], table.weight, logits])
    return deltas[0].numpy(), matrix.numpy(), residual[0].numpy()


@cache
def allowed(path: str, method: str) -> set[int]:
    """Tokens that take part."""
    tokenizer = load(path)[1]
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    common = ends | {t for word, t in tokenizer.get_vocab().items() if word in ENGLISH_STOP_WORDS}
    every = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    return {"tracin-we-common": ends, "tracin-we-nocommon": every - common}.get(method, every)


@cache
def kept(path: str, text, label: int, method: str) -> list[tuple[int, np.ndarray]]:
    """Token and gradient of the positions that take part: all, or those of the longest gradients."""
    found = list(zip(ids_of(path, text), gradients(path, text, label)[0], strict=True))
    found = [(token, delta) for token, delta in found if token in allowed(path, method)]
    return sorted(found, key=lambda one: -np.linalg.norm(one[1]))[:TOP] if method == "tracin-we-topk" else found


@cache
def by_token(paths: tuple[str, ...], left, right, method: str) -> dict[int, float]:
    """What each shared token contributes to the score of two rows, ``(text, label)`` each: all pairs of positions."""
    found: dict[int, float] = {}
    for path, eta in zip(paths, ETAS, strict=False):
        for token, mine in kept(path, *left, method):
            for other, theirs in kept(path, *right, method):
                if token == other:
                    found[token] = found.get(token, 0.0) + eta * float(mine @ theirs)
    return found


def tfidf(path: str, texts: list, fitted: list) -> list[dict[int, float]]:
    """Unit tf-idf vectors of ``texts``; documents are counted in ``fitted``. Special tokens are no terms."""
    special = load(path)[1].all_special_ids
    documents = Counter(token for text in fitted for token in set(ids_of(path, text)))
    out = []
    for text in texts:
        row = Counter(token for token in ids_of(path, text) if token not in special)
        weights = {t: c * (np.log((1 + len(fitted)) / (1 + documents[t])) + 1) for t, c in row.items()}
        out.append({t: w / np.sqrt(sum(x * x for x in weights.values())) for t, w in weights.items()})
    return out


def errors_dot(paths, left, right) -> float:
    """Sum of eta <p_q - y_q, p_n - y_n>."""
    products = (gradients(path, *left)[2] @ gradients(path, *right)[2] for path in paths)
    return sum(eta * float(product) for eta, product in zip(ETAS, products, strict=False))


def truth_of(world: World, method: str, *, normalise: bool = False, targets=None) -> list[list[dict[int, float]]]:
    """Contributions by token of every query and row."""
    paths, lefts = world.models, world.queries
    lefts = list(zip(lefts, targets or [predicted(paths[-1], text) for text in lefts], strict=True))
    rights = list(zip(world.texts, world.labels, strict=True))
    if method == "tracin-tfidf":
        u, v = (tfidf(paths[-1], some, world.texts) for some in (world.queries, world.texts))
        found = [
            [{t: errors_dot(paths, a, b) * x[t] * y[t] for t in x if t in y} for b, y in zip(rights, v, strict=True)]
            for a, x in zip(lefts, u, strict=True)
        ]
        own = [[errors_dot(paths, x, x) for x in some] for some in (lefts, rights)]
    else:
        found = [[by_token(paths, a, b, method) for b in rights] for a in lefts]
        own = [[sum(by_token(paths, x, x, method).values()) for x in some] for some in (lefts, rights)]
    below = np.sqrt(np.outer(*own)) if normalise else np.ones((len(lefts), len(rights)))
    return [
        [{t: part / b for t, part in words.items()} for words, b in zip(*row, strict=True)]
        for row in zip(found, below, strict=True)
    ]


def totals(parts: list[list[dict[int, float]]]) -> np.ndarray:
    return np.array([[sum(words.values()) for words in row] for row in parts])


def ask(retriever: Retriever, queries, methods=ALL, **choices) -> list[dict]:
    return retriever.retrieve(queries, methods=methods, **choices).to_pylist()


def ends_of(results: list[dict], query: int, method: str) -> list[list[dict]]:
    """The rows of an answer, proponents and opponents."""
    mine = [r for r in results if (r["query"], r["method"]) == (query, method)]
    return [[r for r in mine if r["side"] == side] for side in ("proponent", "opponent")]


def assert_ends(results, scores: np.ndarray, method: str, top: int, *, rows=None, tolerance=TOLERANCE) -> None:
    """Both ends of the rankings by ``scores`` ``(q, n)``, ties by the lower row number."""
    rows = range(scores.shape[1]) if rows is None else rows
    for q, values in enumerate(scores):
        for sign, found in zip((-1, 1), ends_of(results, q, method), strict=True):
            order = sorted(range(len(values)), key=lambda at, v=sign * values: (v[at], at))[:top]
            assert [r["row"] for r in found] == [rows[at] for at in order], (method, q, sign)
            assert [r["rank"] for r in found] == list(range(1, len(order) + 1))
            assert np.abs(values[order] - [r["score"] for r in found]).max() <= tolerance * np.abs(values).max()
