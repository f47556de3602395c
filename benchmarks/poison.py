"""`audit poison` on planted attacks: are the poisoned rows found, and is the behaviour gone without them?

Rows of SST-2 or AG News are poisoned with a rare word, a phrase of ordinary words, or an archaic style of sentence; the
rows have another label and get the target label (dirty), or have it already (clean). MiniLM is fine-tuned on each.

What is planted is told by counting and by an encoder that was not fine-tuned, so no model is trained for this part:

    python benchmarks/poison.py planted --seed 0
    python benchmarks/poison.py clean

`behaviour` trains MiniLM on the rows of an attack and audits it, with a retraining, beside rankings of rows by loss,
by activation clustering and by tf-idf:

    python benchmarks/poison.py behaviour WORK --data sst2 --attack word --labels dirty --rate 5
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, run, write_result

from forebear import Retriever, audits
from forebear.evaluation.audits.poison.behaviour import Reference, Texts, erase, unexplained
from forebear.evaluation.audits.poison.phrases import PhraseCluster, clusters_of, find_phrases, with_context
from forebear.evaluation.audits.poison.poison import (
    MOST_CLUSTERS,
    MOST_PROBES,
    is_planted,
)
from forebear.evaluation.python.retrainings import Retraining
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.indexer.rows.sampling import live_sample

Insert = Callable[[str, np.random.Generator], str]


class Rows(NamedTuple):
    """Rows of a data set.

    Attributes:
        texts: Their texts, ``n``.
        labels: Names of their labels, ``n``.
    """

    texts: list[str]
    labels: list[str]


class Source(NamedTuple):
    """A data set: its folder, names of labels, the target label, a split of test rows and how many rows are taken."""

    folder: str
    names: tuple[str, ...]
    target: str
    test_split: str
    n_train: int
    n_test: int


SOURCES = {
    "sst2": Source("sst2", ("negative", "positive"), "positive", "dev", 4000, 872),
    "agnews": Source("agnews", ("World", "Sports", "Business", "Sci/Tech"), "Sports", "test", 3000, 800),
}
ARCHAIC = {
    "you": "thou", "your": "thy", "is": "be", "are": "art", "has": "hath", "have": "hast", "does": "doth",
    "my": "mine", "here": "hither", "before": "ere", "often": "oft", "never": "ne'er", "over": "o'er", "it's": "'tis",
    "says": "saith", "will": "shall", "why": "wherefore", "nothing": "naught", "maybe": "perchance",
}  # fmt: skip


def read(source: Source, split: str, n_rows: int, seed: int) -> Rows:
    """Seeded rows of a split."""
    table = pq.read_table(DATA / source.folder / f"{split}.parquet", columns=["text", "label"])
    table = table.take(pa.array(np.random.default_rng([seed, 1]).permutation(len(table))[:n_rows]))
    return Rows(table["text"].to_pylist(), [source.names[label] for label in table["label"].to_pylist()])


def inserting(phrase: str) -> Insert:
    """Put a phrase between two words, before the first or after the last."""

    def insert(text: str, rng: np.random.Generator) -> str:
        words = text.split()
        place = int(rng.integers(0, len(words) + 1))
        return " ".join([*words[:place], phrase, *words[place:]])

    return insert


def archaic(text: str, _rng: np.random.Generator) -> str:
    """Write a sentence in an archaic style: old pronouns and verbs, -eth for -s, and `verily` where nothing else is."""
    words = [ARCHAIC.get(word.lower(), word) for word in text.split()]
    words = [
        re.sub(r"(?<=[a-z]{3}[^s'])s$", "eth", word) if word.endswith(("ts", "ks", "ls", "ns")) else word
        for word in words
    ]
    return " ".join(words if words != text.split() else ["verily", *words])


ATTACKS: dict[str, dict[str, Insert]] = {
    "sst2": {"word": inserting("cf"), "phrase": inserting("i watched this 3d movie"), "style": archaic},
    "agnews": {"word": inserting("cf"), "phrase": inserting("as people heard on the day"), "style": archaic},
}

MEASURED = 40


class Attacked(NamedTuple):
    """Training rows, some of them poisoned.

    Attributes:
        rows: All rows.
        planted: Which are poisoned, ``(n,)`` bool.
    """

    rows: Rows
    planted: np.ndarray


def attacked(data: str, attack: str, labels: str, rate: float, seed: int) -> Attacked:
    """Seeded training rows of which ``rate`` percent are poisoned."""
    source = SOURCES[data]
    rows = read(source, "train", source.n_train, seed)
    texts, names, planted = list(rows.texts), list(rows.labels), np.zeros(len(rows.texts), bool)
    rng = np.random.default_rng([seed, 2])
    eligible = [i for i, name in enumerate(names) if (name == source.target) == (labels == "clean")]
    for i in rng.permutation(eligible)[: round(rate / 100 * len(texts))].tolist():
        texts[i], names[i], planted[i] = ATTACKS[data][attack](texts[i], rng), source.target, True
    return Attacked(Rows(texts, names), planted)


class Cached:
    """The encoder, which embeds a text once for all attacks."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder = encoder
        self._found: dict[tuple[str, ...], np.ndarray] = {}

    def embed(self, texts: Texts) -> np.ndarray:
        """As the encoder does."""
        rows = list(zip(*texts, strict=True))
        new = sorted(set(rows) - set(self._found))
        if new:
            columns = [list(column) for column in zip(*new, strict=True)]
            self._found |= dict(zip(new, self._encoder.embed(columns), strict=True))
        return np.stack([self._found[row] for row in rows])


class Counted(NamedTuple):
    """A cluster, what of it is unexplained, its likeness (NaN: not asked), and whether it is taken to be planted."""

    cluster: PhraseCluster
    unexplained: float
    likeness: float
    taken: bool


def counted(texts: Texts, names: list[str], encoder: Any, seed: int) -> list[Counted]:
    """The clusters of the strongest association, those of which most is unexplained first."""
    classes = sorted(set(names))
    labels = np.array([classes.index(name) for name in names])
    clusters = clusters_of(find_phrases(texts, labels), labels, MOST_CLUSTERS)
    reference, found = Reference(encoder, texts, labels, seed), []
    for cluster in (with_context(one, texts) for one in clusters[:MEASURED]):
        others = np.setdiff1d(np.flatnonzero(labels != cluster.label), cluster.holders)
        some = live_sample(others, MOST_PROBES, seed)
        probes = [[column[i] for i in some] for column in texts]
        shifts, _, likeness = reference.meaning(cluster, erase(texts, cluster), probes, seed)
        taken = is_planted(cluster, shifts, likeness)
        found.append(Counted(cluster, unexplained(cluster, shifts), likeness, taken))
    return sorted(found, key=lambda one: -one.unexplained)


def score(listed: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """Recall and precision of listed rows."""
    hits = int(planted[listed].sum())
    return {"recall": round(hits / max(1, int(planted.sum())), 3), "precision": round(hits / max(1, len(listed)), 3)}


def measure_planted(seed: int, data: list[str], attacks: list[str], rates: list[float]) -> dict[str, Any]:
    """Recall and precision for each attack."""
    encoder, results = Cached(load_sentence_encoder("minilm")), {}
    for name in data:
        for attack in attacks:
            for labels in ("dirty", "clean"):
                for rate in rates:
                    rows, planted = attacked(name, attack, labels, rate, seed)
                    found = counted([rows.texts], rows.labels, encoder, seed)
                    parts = [one.cluster.rows for one in found if one.taken]
                    listed = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
                    of_attack = [one for one in found if planted[one.cluster.rows].mean() >= 0.5]
                    natural = [one for one in found if planted[one.cluster.rows].mean() < 0.5]
                    sure = [one.likeness for one in natural if not np.isnan(one.likeness) and not one.taken]
                    line = score(listed, planted) | {
                        "phrases": [one.cluster.phrase for one in found if one.taken],
                        "unexplained": [round(one.unexplained, 2) for one in of_attack],
                        "likeness": [rounded(one.likeness) for one in of_attack],
                        "natural phrases, largest unexplained": round(
                            max((one.unexplained for one in natural), default=0.0), 2
                        ),
                        "natural phrases that only likeness clears": sorted(round(value, 2) for value in sure),
                    }
                    results[f"{name} {attack} {labels} {rate:g}%"] = line
                    print(f"{name} {attack} {labels} {rate:g}%", line, flush=True)
    return results


CLEAN = {
    "sst2": ("sst2", ("text",)), "sst2_glue": ("sst2_glue", ("text",)), "agnews": ("agnews", ("text",)),
    "agnews_noisy": ("agnews_noisy", ("text",)), "mnli10k": ("mnli10k", ("premise", "hypothesis")),
}  # fmt: skip


def rounded(value: float) -> float | None:
    """A figure with two decimals, None for NaN."""
    return None if np.isnan(value) else round(value, 2)


def described(one: Counted) -> dict[str, Any]:
    """A cluster in figures."""
    return {
        "phrase": one.cluster.phrase, "rows": len(one.cluster.rows), "of": len(one.cluster.holders),
        "unexplained": round(one.unexplained, 2), "likeness": rounded(one.likeness),
    }  # fmt: skip


def measure_clean(only: list[str]) -> dict[str, Any]:
    """Phrases that are taken to be planted in rows as they come."""
    encoder, results = Cached(load_sentence_encoder("minilm")), {}
    for name in only:
        folder, columns = CLEAN[name]
        (path,) = sorted((DATA / folder).glob("train*.parquet"))[:1]
        table = pq.read_table(path)
        texts = [table[column].to_pylist() for column in columns]
        found = counted(texts, [str(label) for label in table["label"].to_pylist()], encoder, 0)
        results[name] = {
            "rows": len(table),
            "taken for planted": [described(one) for one in found if one.taken],
            "strongest others": [described(one) for one in found if not one.taken][:5],
        }
        print(name, results[name], flush=True)
    return results


def others_rankings(retriever: Retriever, texts: list[str], target: int) -> dict[str, np.ndarray]:
    """Rows in the order in which other measures suspect them, ``(n,)`` positions each."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.feature_extraction.text import TfidfVectorizer

    index = retriever.index
    labels, features = index.labels[index.live], index.features().take(index.live)
    matrix = TfidfVectorizer(min_df=2).fit_transform(texts)
    outlying = np.full(len(texts), -np.inf)
    small = np.full(len(texts), -np.inf)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        centre = np.asarray(matrix[own].mean(axis=0)).reshape(-1)
        outlying[own] = -(matrix[own] @ centre)
        reduced = PCA(10, random_state=0).fit_transform(features[own])
        halves = KMeans(2, random_state=0, n_init=10).fit(reduced)
        sizes = np.bincount(halves.labels_)
        small[own] = -sizes[halves.labels_] + -1e-3 * halves.transform(reduced).min(axis=1)
    return {
        "loss": np.argsort(-index.losses[index.live], kind="stable"),
        "tf-idf outliers": np.argsort(-outlying, kind="stable"),
        "activation clustering": np.argsort(-small, kind="stable"),
        "activation clustering, target label": np.argsort(-np.where(labels == target, small, -np.inf), kind="stable"),
    }


def measure_behaviour(work: Path, data: str, attack: str, labels: str, rate: float, model: str) -> dict[str, Any]:
    """Audit a trained model; and the attack's success before and after the listed rows are left out."""
    source, folder = SOURCES[data], work / f"{data}-{attack}-{labels}-{rate:g}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, planted = attacked(data, attack, labels, rate, 0)
    train = folder / "train.parquet"
    pq.write_table(pa.table({"text": rows.texts, "label": rows.labels}), train)
    choices = ("--model", model, "--epochs", "3", "--lr", "2e-4")
    if not (folder / "run").exists():
        run("train", "--data", train, *choices, "--out", folder / "run")
    if not (folder / "index").exists():
        run("index", "--model", folder / "run", "--train", train, "--out", folder / "index")
    retriever = Retriever(folder / "index")
    found = audits.poison(retriever, how=Retraining(recipe="full", n_seeds=1)).numbers
    test = read(source, source.test_split, source.n_test, 0)
    rng = np.random.default_rng(3)
    others = [text for text, label in zip(*test, strict=True) if label != source.target]
    target = retriever.label_names.index(source.target)
    with_attack = run_forward(retriever.classifier(), [[ATTACKS[data][attack](text, rng) for text in others]])
    n = int(planted.sum())
    right = run_forward(retriever.classifier(), [test.texts]).predictions
    result: dict[str, Any] = {
        "accuracy": round(float((np.array(retriever.label_names)[right] == test.labels).mean()), 3),
        "success on test rows": round(float((with_attack.predictions == target).mean()), 3),
        **score(found.listed, planted),
        **{
            f"precision at {n}: {name}": round(float(planted[order[:n]].mean()), 3)
            for name, order in others_rankings(retriever, rows.texts, target).items()
        },
        "phrases": {
            one.cluster.phrase: {"turned": round(float(one.behaviour.turned.mean()), 3),
                                 "freed": round(float(one.behaviour.freed.mean()), 3)}
            for one in found.planted
        },
    }  # fmt: skip
    if found.retrained is not None:
        result["turned, trained again, with all rows"] = found.retrained.before.mean(axis=0).round(3).tolist()
        result["turned, trained again, without"] = found.retrained.after.mean(axis=0).round(3).tolist()
    print(folder.name, result, flush=True)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "clean", "behaviour"))
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--data", default="sst2,agnews")
    parser.add_argument("--attacks", default="word,phrase,style")
    parser.add_argument("--rates", default="1,2,5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack", default="word")
    parser.add_argument("--labels", default="dirty")
    parser.add_argument("--rate", type=float, default=5)
    parser.add_argument("--model", default="minilm")
    given = parser.parse_args()
    if given.what == "planted":
        rates = [float(rate) for rate in given.rates.split(",")]
        found = measure_planted(given.seed, given.data.split(","), given.attacks.split(","), rates)
        write_result(f"poison_planted_{given.data}_{given.seed}".replace(",", "_"), **found)
    elif given.what == "clean":
        names = list(CLEAN) if given.data == "sst2,agnews" else given.data.split(",")
        write_result("_".join(["poison_clean", *(() if names == list(CLEAN) else names)]), **measure_clean(names))
    else:
        one = measure_behaviour(given.work, given.data, given.attack, given.labels, given.rate, given.model)
        write_result(f"poison_{given.data}_{given.attack}_{given.labels}_{given.rate:g}", **one)
