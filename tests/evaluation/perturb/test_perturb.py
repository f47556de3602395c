"""Substitutions against brute force over all candidates by plain autograd, and their effect against retraining."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences, write_jsonl
from tiny_wordnet import write_wordnet

from forebear import BuildOptions, InputError, Retriever, build_index, rows_from_texts
from forebear.cli.main import run
from forebear.evaluation.perturb.choice import Chooser
from forebear.evaluation.perturb.spec import STRATEGIES, PerturbationQueries, PerturbSpec, make_queries
from forebear.evaluation.perturb.wordnet import WordNet
from forebear.indexer.model.forward import run_forward
from forebear.indexer.training.model_choice import choose_model

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
def queries(retriever) -> PerturbationQueries:
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
            target = int((queries.right if aim.label == "right" else queries.wrong)[i])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "strategy", "scope"),
    [
        ("attack", "lower-right", "head"),
        ("attack", "combined", "head"),
        ("fix", "raise-right", "head"),
        ("fix", "combined", "head"),
        ("attack", "lower-right", "all"),  # the scope decides the scores, the strategy what is made of them
        ("fix", "combined", "all"),
    ],
)
def test_the_choice_is_the_best_of_all_substitutions(retriever, queries, wordnet, what, strategy, scope):
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


@pytest.mark.slow
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
    (alone,) = Chooser(retriever, fewer, queries, wordnet).choose("combined")
    # Products of fewer rows may round their last bits otherwise.
    assert [replace(c, score=0.0, effect=0.0) for c in alone] == [replace(c, score=0.0, effect=0.0) for c in turns[0]]
    np.testing.assert_allclose(
        [(c.score, c.effect) for c in alone], [(c.score, c.effect) for c in turns[0]], rtol=1e-4, atol=1e-7
    )


def test_pairs_of_three_classes(make_world, wordnet):
    """The wrong label is the runner-up or the prediction; a change leaves the other text as it is."""
    world = make_world("bert", 3, True, 1)
    texts = [list(column) for column in zip(*world.queries, strict=True)]
    gold = np.array(world.query_labels)
    queries = make_queries(world.retriever, texts, gold)
    p = run_forward(world.retriever.classifier(), texts).probabilities
    for i, y in enumerate(gold):
        assert queries.wrong[i] == max((c for c in range(3) if c != y), key=lambda c, i=i: p[i, c])
    spec = PerturbSpec(what="attack", strategies=("raise-wrong",), rows=(3,))
    turns = Chooser(world.retriever, spec, queries, wordnet).choose("raise-wrong")
    changes = [c for turn in turns for c in turn]
    assert {c.span.column for c in changes} == {0, 1}
    for c in changes:
        assert c.old == world.texts[c.row]
        other = 1 - c.span.column
        assert c.new[other] == c.old[other]
        assert c.new[c.span.column] == _with(c.old[c.span.column], c)


def _with(text: str, change) -> str:
    assert text[change.span.start : change.span.end] == change.word
    return text[: change.span.start] + change.substitute + text[change.span.end :]


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
        assert c.new[0] == _with(c.old[0], c)
        assert (c.query, c.effect, c.score) == (None, None, None)


def test_what_means_nothing_is_refused(retriever, queries, wordnet):
    def chooser(asked=queries, **choices):
        return Chooser(
            retriever, PerturbSpec(**{"what": "attack", "strategies": ("lower-right",), **choices}), asked, wordnet
        )

    with pytest.raises(
        InputError, match=r'strategies=\("raise-right",\): expected one or more of lower-right, raise-wrong'
    ):
        chooser(strategies=("raise-right",))
    for rows in ((), (0,), (2, 1), (1, 1)):
        with pytest.raises(InputError, match=r"rows=\(.*\): expected numbers from 1 up, ascending"):
            chooser(rows=rows)
    with pytest.raises(InputError, match="seed=-1: expected 0 or more"):
        chooser(seed=-1)
    with pytest.raises(InputError, match="random_words=-1"):
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


@pytest.fixture(scope="module")
def files(folder, wordnet_folder) -> list[str]:
    """Options of both commands: labelled rows, the index, WordNet."""
    write_jsonl(folder / "test.jsonl", text=TESTS, label=GOLD.tolist())
    write_jsonl(folder / "dev.jsonl", text=TEXTS[:20], label=[1 - y for y in LABELS[:20]])
    return ["--test", f"{folder / 'test.jsonl'}", "--wordnet", f"{wordnet_folder}", "--retrain", "head", "--quiet"]


def run_attack(folder: Path, files: list[str], out: Path, *more: str) -> int:
    asked = ["perturb", "attack", "--index", f"{folder / 'index'}", *files, "--queries", "4", "--rows", "1,2"]
    return run([*asked, "--seeds", "2", "--out", f"{out}", *more])


def read_changed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "changed.jsonl").read_text().splitlines()]


def refitted(retriever, texts: list[str], gold: list[int]) -> np.ndarray:
    """Gold probability of each test by scikit-learn's regression over the model's features, bias penalised alike."""
    from sklearn.linear_model import LogisticRegression

    def features(of: list[str]) -> np.ndarray:
        f = run_forward(retriever.classifier(), [of]).features.astype(np.float64)
        return np.hstack([f, np.ones((len(f), 1))])

    # Two softmax weights w and -w have twice the penalty of the one 2w that scikit-learn fits.
    model = LogisticRegression(C=2 / (0.01 * len(gold)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(features(texts), gold).predict_proba(features(TESTS))[np.arange(len(TESTS)), GOLD]


def test_attack_replaces_the_rows_of_all_queries_and_reports_both_sets(retriever, folder, files, tmp_path):
    assert run_attack(folder, files, tmp_path, "--strategy", "lower-right", "combined") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    changed = read_changed(tmp_path)
    at = np.array(result["queries"])
    assert len(at) == 4
    assert result["sets"] == {"attacked rows": 4, "test rows": 9}

    def check(measured: dict, seed: int, p: np.ndarray) -> None:
        assert measured["accuracy"][seed] == (p > 0.5).mean()
        assert measured["probability"][seed] == pytest.approx(p.mean(), abs=1e-6)

    unchanged = refitted(retriever, TEXTS, LABELS)
    check(result["unchanged"]["test rows"], 0, unchanged)
    for strategy, seed in (("lower-right", 0), ("combined", 1), ("random", 0), ("random", 1)):
        mine = [c for c in changed if c["strategy"] == strategy and c["seed"] in (None, seed)]
        assert [c["turn"] for c in mine] == [1] * 4 + [2] * 4
        for n in (1, 2):
            texts = list(TEXTS)
            for c in mine[: 4 * n]:
                assert texts[c["row"]] == c["old"][0]
                texts[c["row"]] = c["new"][0]
                assert c["old"][0][c["start"] : c["end"]] == c["word"]
            p = refitted(retriever, texts, LABELS)
            assert abs(p.mean() - unchanged.mean()) > 1e-5
            check(result["changed"][strategy]["attacked rows"][str(n)], seed, p[at])
            check(result["changed"][strategy]["test rows"][str(n)], seed, p)
    assert {c["aim"] for c in changed if c["strategy"] == "combined"} == {"lower-right", "raise-wrong"}
    page = (tmp_path / "report.html").read_text()
    for c in [c for c in changed if c["strategy"] == "lower-right" and c["query"] == at[0]]:
        assert f"{c['word']} → {c['substitute']}" in page
        assert f"<mark>{c['substitute']}</mark>" in page
    assert "text, before" in page
    assert (tmp_path / "table.csv").read_text().startswith("strategy,rows,accuracy")


def test_fix_adds_changed_rows_for_dev_rows_that_are_wrong(retriever, folder, files, tmp_path):
    asked = ["perturb", "fix", "--index", f"{folder / 'index'}", *files, "--dev", f"{folder / 'dev.jsonl'}"]
    assert run([*asked, "--rows", "2", "--seeds", "1", "--out", f"{tmp_path}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    changed = read_changed(tmp_path)
    wrong = np.flatnonzero(run_forward(retriever.classifier(), [TEXTS[:20]]).predictions == LABELS[:20])
    assert result["queries"] == wrong.tolist()
    assert result["sets"] == {"test rows": 9, "dev rows": 20, "wrong dev rows asked about": len(wrong)}
    assert result["indexed_accuracy"]["wrong dev rows asked about"] == 0
    for strategy in ("raise-right", "random"):
        mine = [c for c in changed if c["strategy"] == strategy]
        assert len(mine) == 2 * len(wrong)
        extra = [LABELS[c["row"]] for c in mine]
        p = refitted(retriever, [*TEXTS, *(c["new"][0] for c in mine)], [*LABELS, *extra])
        measured = result["changed"][strategy]["test rows"]["2"]
        assert measured["accuracy"] == [(p > 0.5).mean()]
        assert measured["probability"] == [pytest.approx(p.mean(), abs=1e-6)]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_gives_the_same(folder, files, tmp_path, monkeypatch):
    from forebear.evaluation.retraining.recipe_head import HeadRecipe

    train, calls = HeadRecipe.train, []

    def dying(self, job):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(job)
        return train(self, job)

    monkeypatch.setattr(HeadRecipe, "train", dying)
    assert run_attack(folder, files, tmp_path / "out") == 130
    assert not (tmp_path / "out" / "report.html").exists()
    counted = []
    monkeypatch.setattr(HeadRecipe, "train", lambda self, job: counted.append(job) or train(self, job))
    assert run_attack(folder, files, tmp_path / "out") == 0
    # Unchanged, lower-right and random at two amounts; random once more for the second seed, all others being alike.
    assert len(calls) + len(counted) == 1 + 2 + 2 + 2
    monkeypatch.undo()
    assert run_attack(folder, files, tmp_path / "whole") == 0
    assert (tmp_path / "out" / "changed.jsonl").read_bytes() == (tmp_path / "whole" / "changed.jsonl").read_bytes()
    assert (tmp_path / "out" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


def test_nothing_is_overwritten_and_mistakes_are_one_line(folder, files, tmp_path, capsys):
    (tmp_path / "changed.jsonl").write_text("mine")
    assert run_attack(folder, files, tmp_path) == 2
    assert "already holds changed.jsonl" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "changed.jsonl").read_text() == "mine"
    assert run_attack(folder, files, tmp_path, "--force") == 0
    assert run_attack(folder, files, tmp_path) == 2
    capsys.readouterr()
    for more, message in (
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--queries", "0"], "--queries 0: expected 1 or more"),
        (["--rows", "one"], "--rows 1,2,one: expected whole numbers"),
        (["--strategy", "raise-right"], "--strategy raise-right: expected one or more of lower-right"),
        (["--wordnet", f"{tmp_path}"], "apt-get install wordnet-base"),
        (["--retrain", "full"], "is no training run"),
    ):
        assert run_attack(folder, files, tmp_path / "other", *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other" / "report.html").exists()


def test_a_dev_set_without_mistakes_has_nothing_to_fix(retriever, folder, files, tmp_path, capsys):
    right = run_forward(retriever.classifier(), [TESTS]).predictions.tolist()
    write_jsonl(tmp_path / "dev.jsonl", text=TESTS, label=right)
    asked = ["perturb", "fix", "--index", f"{folder / 'index'}", *files, "--dev", f"{tmp_path / 'dev.jsonl'}"]
    assert run([*asked, "--out", f"{tmp_path / 'out'}"]) == 2
    assert "gets all 9 rows right. There is nothing to fix." in " ".join(capsys.readouterr().err.split())
