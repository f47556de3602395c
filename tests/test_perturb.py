"""Substitutions against brute force over all candidates by plain autograd, and their effect against retraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_wordnet import write_wordnet
from tiny import labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, Retriever, build_index, rows_from_texts
from forebear.evaluation.perturb_choice import Chooser
from forebear.evaluation.perturb_spec import STRATEGIES, PerturbSpec, Queries, make_queries
from forebear.evaluation.wordnet import WordNet
from forebear.indexer.runs import choose_model

TEXTS, LABELS = sentences(40, seed=3, low=3), labels(40)
TESTS, GOLD = sentences(9, seed=21, low=3, high=6), np.array(labels(9, seed=4))
WORDS = {
    "noun": [("n1", ["film", "story", "scene"], []), ("n2", ["film", "plot"], []), ("n3", ["doctor", "lawyer"], [])],
    "verb": [("v1", ["saw", "thanked"], [])],
    "adj": [
        ("a1", ["good", "bright", "fine"], [(1, "a2", 1)]),
        ("a2", ["bad", "dull"], []),
        ("a3", ["slow", "sad", "cold"], [(1, "a4", 1)]),
        ("a4", ["fast", "happy"], []),
        ("a5", ["red", "blue", "green"], []),
    ],
    "adv": [("r1", ["near", "not"], [])],
}  # "near" and "not" are stop words


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("perturb")


@pytest.fixture(scope="module")
def wordnet_folder(folder) -> Path:
    return write_wordnet(folder / "wordnet", WORDS, {})


@pytest.fixture(scope="module")
def wordnet(wordnet_folder) -> WordNet:
    return WordNet(wordnet_folder)


@pytest.fixture(scope="module")
def retriever(folder) -> Retriever:
    """Over an index of the head and all layers."""
    model = make_tiny_model(folder / "bert", "bert")
    options = BuildOptions(scopes=("head", "all"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=0)
    return Retriever(
        build_index(rows_from_texts(TEXTS, LABELS), folder / "index", choose_model(str(model)).checkpoints, options)
    )


@pytest.fixture(scope="module")
def queries(retriever) -> Queries:
    return make_queries(retriever, [TESTS], GOLD)


class Slow:
    """v . g of any text, H = I, by two and one backward passes of a float64 model; shares no code with the package."""

    def __init__(self, path: str, scope: str) -> None:
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float64
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        linear = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        self.weights = [self.model.classifier.weight] if scope == "head" else linear

    def saliency(self, text: str, target: int, *, graph: bool = False) -> torch.Tensor:
        """s of each word piece."""
        leaf: list[torch.Tensor] = []

        def grow(_module, args):
            leaf.append(args[0].detach().requires_grad_(True))
            return (leaf[0], *args[1:])

        hook = self.model.bert.encoder.layer[0].register_forward_pre_hook(grow)
        p = self.model(**self.tokenizer(text, return_tensors="pt")).logits.softmax(dim=1)[0, target]
        hook.remove()
        (at_input,) = torch.autograd.grad(p, leaf[0], create_graph=graph)
        return at_input[0].sum(dim=1)

    def most_salient(self, text: str, target: int) -> int:
        """Position of the word, [CLS] and [SEP] left out; one piece a word."""
        return 1 + int(self.saliency(text, target)[1:-1].argmax())

    def vector(self, text: str, target: int) -> torch.Tensor:
        s = self.saliency(text, target, graph=True)[self.most_salient(text, target)]
        found = torch.autograd.grad(s, self.weights, materialize_grads=True)
        return -torch.cat([g.flatten() for g in found])

    def gradient(self, text: str, label: int, unknown: int | None = None) -> torch.Tensor:
        inputs = self.tokenizer(text, return_tensors="pt")
        if unknown is not None:
            inputs["input_ids"][0, 1 + unknown] = self.tokenizer.unk_token_id
        loss = torch.nn.functional.cross_entropy(self.model(**inputs).logits, torch.tensor([label]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights)])


def slow_choice(slow, queries, wordnet, strategy, what, most):
    """All substitutions of every word of the rows taken: (query, row) -> {(word number, substitute): effect}."""
    aims, taken, out = STRATEGIES[what][strategy], set(), []
    stop = ("near", "not")
    for turn in range(most):
        aim = aims[turn % len(aims)]
        for i in range(len(queries.numbers)):
            target = int((queries.right if aim.of == "right" else queries.wrong)[i])
            v = slow.vector(TESTS[queries.numbers[i]], target)
            old = [float(v @ slow.gradient(t, y)) for t, y in zip(TEXTS, LABELS, strict=True)]
            order = sorted(range(len(TEXTS)), key=lambda n, old=old: -old[n] if aim.proponents else old[n])

            def replaceable(n):
                words = TEXTS[n].split()
                others = [wordnet.substitutes(w, antonyms=what == "fix") for w in words]
                return {j: o for j, (w, o) in enumerate(zip(words, others, strict=True)) if o and w not in stop}

            row = next(n for n in order if n not in taken and replaceable(n))
            taken.add(row)
            effects, drops = {}, {}
            for j, others in replaceable(row).items():
                drops[j] = old[row] - float(v @ slow.gradient(TEXTS[row], LABELS[row], unknown=j))
                for other in others:
                    words = TEXTS[row].split()
                    words[j] = other
                    effects[j, other] = float(v @ slow.gradient(" ".join(words), LABELS[row])) - old[row]
            sign = 1 if aim.proponents else -1
            first = max(drops, key=lambda j, drops=drops, sign=sign: sign * drops[j])
            out.append((int(queries.numbers[i]), row, aim, old[row], effects, first))
    return out


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize(
    ("what", "strategy"),
    [("attack", "lower-right"), ("attack", "combined"), ("fix", "raise-right"), ("fix", "combined")],
)
def test_the_choice_is_the_best_of_all_substitutions(retriever, queries, wordnet, scope, what, strategy):
    some = queries.take(np.array([1, 4, 6]))
    spec = PerturbSpec(
        what=what, strategies=(strategy,), rows=(1, 2), random_words=99, scope=scope, curvature="identity"
    )
    turns = Chooser(retriever, spec, some, wordnet).choose(strategy)
    slow = Slow(retriever.index.manifest.checkpoints[-1].path, scope)
    truth = slow_choice(slow, some, wordnet, strategy, what, 2)
    found = [change for turn in turns for change in turn]
    assert [(c.query, c.row, c.aim) for c in found] == [(q, row, aim.name) for q, row, aim, *_ in truth]
    for change, (_, row, aim, score, effects, _) in zip(found, truth, strict=True):
        scale = max(map(abs, [score, *effects.values()]))
        number = len(change.old[0][: change.span.start].split())
        assert change.score == pytest.approx(score, abs=1e-4 * scale)
        assert change.effect == pytest.approx(effects[number, change.substitute], abs=1e-4 * scale)
        best = max(aim.sign * e for e in effects.values())
        assert aim.sign * change.effect == pytest.approx(best, abs=1e-4 * scale)
        words = TEXTS[row].split()
        assert change.word == words[number]
        words[number] = change.substitute
        assert (change.old, change.new) == ((TEXTS[row],), (" ".join(words),))
        assert change.label == LABELS[row]


def test_without_random_words_only_the_most_responsible_one_is_replaced(retriever, queries, wordnet):
    some = queries.take(np.arange(4))
    spec = PerturbSpec(what="attack", strategies=("lower-right",), rows=(1,), random_words=0, curvature="identity")
    (turn,) = Chooser(retriever, spec, some, wordnet).choose("lower-right")
    slow = Slow(retriever.index.manifest.checkpoints[-1].path, "head")
    truth = slow_choice(slow, some, wordnet, "lower-right", "attack", 1)
    assert [len(c.old[0][: c.span.start].split()) for c in turn] == [first for *_, first in truth]


def test_a_change_moves_the_saliency_as_predicted_by_retraining(folder, wordnet):
    """The head, trained to its minimum with L2 = the damping, is trained again on the changed rows."""
    l2 = 0.05
    path = make_tiny_model(folder / "convex", "bert", scale=3.0)
    slow = Slow(str(path), "head")
    head = slow.model.classifier

    def train(texts: list[str]) -> None:
        """W minimises mean cross-entropy + l2 / 2 ||W||^2; the bias stays."""
        caught: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _m, args: caught.append(args[0].detach()))
        for text in texts:
            slow.model(**slow.tokenizer(text, return_tensors="pt"))
        hook.remove()
        f = torch.cat(caught)
        w = torch.zeros_like(head.weight, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, history_size=40)

        def closure():
            optimizer.zero_grad()
            logits = f @ w.T + head.bias.detach()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)) + l2 / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            head.weight.copy_(w)

    train(TEXTS)
    slow.model.float().save_pretrained(path)
    slow.model.double()
    options = BuildOptions(dampings=(str(l2),))
    index = build_index(
        rows_from_texts(TEXTS, LABELS), folder / "convex-index", choose_model(str(path)).checkpoints, options
    )
    retriever = Retriever(index)
    queries = make_queries(retriever, [TESTS], GOLD)
    predicted, found = [], []
    for strategy in ("lower-right", "raise-wrong"):
        spec = PerturbSpec(what="attack", strategies=(strategy,), rows=(1,))
        (turn,) = Chooser(retriever, spec, queries, wordnet).choose(strategy)
        for i, change in enumerate(turn):
            target = int((queries.right if strategy == "lower-right" else queries.wrong)[i])
            train(TEXTS)
            at = slow.most_salient(TESTS[i], target)
            before = float(slow.saliency(TESTS[i], target)[at])
            train([*TEXTS[: change.row], change.new[0], *TEXTS[change.row + 1 :]])
            found.append(float(slow.saliency(TESTS[i], target)[at]) - before)
            predicted.append(change.effect / len(TEXTS))
    assert np.corrcoef(predicted, found)[0, 1] > 0.9
    large = np.abs(predicted) > 0.2 * np.abs(predicted).max()
    assert (np.sign(np.array(predicted)[large]) == np.sign(np.array(found)[large])).all()
    assert np.sum(np.multiply(predicted, found)) / np.sum(np.square(predicted)) == pytest.approx(1, abs=0.3)


def test_no_row_is_taken_twice_and_few_are_the_first_of_many(retriever, queries, wordnet):
    spec = PerturbSpec(what="attack", strategies=("combined",), rows=(1, 3))
    turns = Chooser(retriever, spec, queries, wordnet).choose("combined")
    rows = [c.row for turn in turns for c in turn]
    assert len(set(rows)) == len(rows) == 3 * len(GOLD)
    assert [[c.aim for c in turn] for turn in turns] == [
        [aim] * len(GOLD) for aim in ("lower-right", "raise-wrong", "lower-right")
    ]
    fewer = PerturbSpec(what="attack", strategies=("combined",), rows=(1,))
    assert Chooser(retriever, fewer, queries, wordnet).choose("combined") == turns[:1]


def test_random_changes_are_seeded_and_of_rows_that_can_be_changed(retriever, queries, wordnet):
    spec = PerturbSpec(what="attack", strategies=("lower-right",), rows=(1, 2))
    chooser = Chooser(retriever, spec, queries, wordnet)
    turns = chooser.choose_random(0)
    changes = [c for turn in turns for c in turn]
    assert [len(turn) for turn in turns] == [len(GOLD)] * 2
    assert len({c.row for c in changes}) == len(changes)
    assert chooser.choose_random(0) == turns != chooser.choose_random(1)
    for c in changes:
        assert c.substitute in wordnet.synonyms(c.word)
        assert c.new[0] == c.old[0][: c.span.start] + c.substitute + c.old[0][c.span.end :]
        assert (c.query, c.effect, c.score) == (None, None, None)


def test_what_means_nothing_is_refused(retriever, queries, wordnet):
    def chooser(asked=queries, **choices):
        return Chooser(
            retriever, PerturbSpec(**{"what": "attack", "strategies": ("lower-right",), **choices}), asked, wordnet
        )

    with pytest.raises(InputError, match="--strategy raise-right: expected one or more of lower-right, raise-wrong"):
        chooser(strategies=("raise-right",))
    for rows in ((), (0,), (2, 1), (1, 1)):
        with pytest.raises(InputError, match=r"--rows .*: expected numbers from 1 up, ascending"):
            chooser(rows=rows)
    with pytest.raises(InputError, match="--random-words -1"):
        chooser(random_words=-1)
    with pytest.raises(InputError, match="top-1"):
        chooser(scope="top-1")
    many = chooser(rows=(10,))
    with pytest.raises(InputError, match="9 test rows with 10 rows each take 90 training rows; the index has fewer"):
        many.choose("lower-right")
    with pytest.raises(InputError, match=r"90 random changes: only \d+ training rows"):
        many.choose_random(0)
    with pytest.raises(InputError, match="test row 1 is empty"):
        chooser(make_queries(retriever, [["a film", " "]], np.array([0, 1])))
