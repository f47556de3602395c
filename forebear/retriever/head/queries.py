"""From test rows to query vectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError, MismatchError, MissingStoreError
from forebear.indexer.building.shards import check_same_model
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier, load_classifier, weights_sha256
from forebear.indexer.model.encoding import Encoded, Texts, encode, pad_batch, plan_batches
from forebear.indexer.model.forward import Forward, residual_and_loss, run_forward
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.indexer.training.run import moved_paths
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.question.inverse import CurvatureSpec, HeadSolver
from forebear.retriever.question.methods import Method

N_VARIANTS = 3  # of the Span paper's TracInF
VARIANT_ROWS = 32
VARIANT_LEARNING_RATE = 1e-4


def one_step_away(classifier: Classifier, index: Index, number: int) -> Classifier:
    """A variant of a model: one SGD step on the mean loss of a seeded mini-batch of training rows (Span, TracInF).

    All weights move; dropout is off. The classifier itself stays as it is.
    """
    seed = index.manifest.spec.seed
    rows = np.random.default_rng([seed, 7, number]).permutation(index.live)[:VARIANT_ROWS]
    model = copy.deepcopy(classifier.model).requires_grad_(True)
    encoded = encode(classifier, index.text_lists(rows))
    lengths = [len(row["input_ids"]) for row in encoded]
    labels = torch.from_numpy(index.labels[rows].astype(np.int64)).to(classifier.device)
    losses = []
    for batch in plan_batches(lengths, len(rows) * max(lengths), equal_lengths=classifier.equal_lengths):
        at = sorted(batch)
        with classifier.autocast():
            logits = model(**pad_batch(classifier.tokenizer, [encoded[i] for i in at], classifier.device)).logits
        losses.append(torch.nn.functional.cross_entropy(logits.float(), labels[at]) * (len(at) / len(rows)))
    gradients = torch.autograd.grad(sum(losses[1:], losses[0]), list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(VARIANT_LEARNING_RATE * gradient)
    name = f"{classifier.name} (variant {number})"
    return replace(classifier, name=name, model=model.requires_grad_(False), sha256=weights_sha256(model))


class Models:
    """The models of an index, loaded when first asked for and checked against its fingerprints."""

    def __init__(self, index: Index, *, model: str | Classifier | None, device: str) -> None:
        self._index = index
        self._override = model if isinstance(model, Classifier) else None
        self._paths = moved_paths(model if isinstance(model, str) else None, index.manifest.checkpoints, index.folder)
        self._device = device
        self._loaded: dict[int, Classifier] = {}

    def classifier(self, checkpoint: int = -1) -> Classifier:
        """The classifier at a checkpoint of the index; the last by default. Numbers past it are its variants."""
        checkpoints = self._index.manifest.checkpoints
        number = checkpoint if checkpoint >= 0 else checkpoint % len(checkpoints)
        if number not in self._loaded:
            if number < len(checkpoints):
                self._loaded[number] = self._load(number, last=number == len(checkpoints) - 1)
            else:
                self._loaded[number] = one_step_away(self.classifier(), self._index, number - len(checkpoints))
        return self._loaded[number]

    def _load(self, number: int, *, last: bool) -> Classifier:
        manifest = self._index.manifest
        spec, listed = manifest.spec, manifest.checkpoints[number]
        if last and self._override is not None:
            classifier = self._override
        else:
            classifier = load_classifier(
                self._paths[number], device=self._device, precision=spec.precision, max_length=spec.max_length
            )
        check_same_model(classifier, listed.sha256, spec.tokenizer_sha256)
        return replace(classifier, label_names=spec.label_names)  # the model's own may say nothing: LABEL_0

    @cached_property
    def sentence_encoder(self) -> SentenceEncoder:
        """The un-tuned encoder of the index."""
        manifest = self._index.manifest
        if manifest.sentence_model is None:
            raise MissingStoreError(
                f"{self._index.folder} holds no sentence embeddings. Build it with --store features,sbert."
            )
        encoder = load_sentence_encoder(manifest.sentence_model, device=self._device)
        if encoder.sha256 != manifest.spec.sentence_sha256:
            raise MismatchError(
                f"{encoder.name} is not the sentence model of the index: sha256 {encoder.sha256[:12]}, expected "
                f"{(manifest.spec.sentence_sha256 or '')[:12]}."
            )
        return encoder


@dataclass(frozen=True)
class Asked:
    """A block of test rows after the models have seen them.

    Attributes:
        forwards: Forward pass of each checkpoint asked for, by checkpoint number.
        sentence: Sentence embeddings ``(q, s)``, or None.
        labels: Gold class ids ``(q,)``, or None.
        targets: Class whose loss is explained, ``(q,)``.
    """

    forwards: dict[int, Forward]
    sentence: np.ndarray | None
    labels: np.ndarray | None
    targets: np.ndarray
    last: int

    def take(self, which: np.ndarray) -> Asked:
        """Some of the test rows."""
        forwards = {c: f.take(which) for c, f in self.forwards.items()}
        sentence = None if self.sentence is None else self.sentence[which]
        labels = None if self.labels is None else self.labels[which]
        return Asked(forwards, sentence, labels, self.targets[which], self.last)

    @property
    def forward(self) -> Forward:
        """Of the last checkpoint, the model that is explained."""
        return self.forwards[self.last]


def ask(
    models: Models,
    methods: Sequence[Method],
    texts: Texts,
    labels: np.ndarray | None,
    target: str,
    n_checkpoints: int,
    first_row: int = 0,
    forward: Forward | None = None,
) -> Asked:
    """Run every model that the methods need over a block of test rows, once; ``forward`` of the last is not redone.

    Test rows may be encoded, but for methods that compare sentence embeddings.
    """
    last = n_checkpoints - 1
    wanted = range(n_checkpoints) if any(m.all_checkpoints and m.representation != "words" for m in methods) else [last]
    forwards = {last: forward} if forward is not None else {}
    for c in wanted:
        if c not in forwards:
            forwards[c] = run_forward(models.classifier(c), texts, first_row=first_row)
    sentence = None
    if any(m.representation == "sentence" for m in methods):
        assert not isinstance(texts, Encoded)
        sentence = models.sentence_encoder.embed(texts)
    targets = choose_targets(target, forwards[last].predictions, labels, models.classifier().label_names)
    return Asked(forwards, sentence, labels, targets, last)


def choose_targets(target: str, predictions: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """The class whose loss is explained, for each test row: ``predicted``, ``gold`` or a label's name."""
    if target == "predicted":
        return predictions
    if target == "gold":
        if labels is None:
            raise InputError("--target gold needs labels in the test file. Name their column by --label-column.")
        return labels
    fitting = [i for i, name in enumerate(names) if name == target]
    fitting = fitting or [i for i, name in enumerate(names) if name.casefold() == target.casefold()]
    if len(fitting) != 1:
        raise InputError(f"--target {target!r}: expected predicted, gold, or one of {', '.join(names)}.")
    return np.full(len(predictions), fitting[0])


def make_query(method: Method, asked: Asked, index: Index, curvature: CurvatureSpec) -> Query:
    """Query vectors of one method at the head for a block of test rows, in float64.

    Args:
        method: Which.
        asked: The test rows.
        index: Whose curvature, eta and N are used.
        curvature: For ``if`` and ``rif``.
    """
    if method.representation == "sentence":
        assert asked.sentence is not None
        return _plain(method, asked.sentence)
    if method.representation == "feature":
        return _plain(method, asked.forward.features)
    if method.all_checkpoints:
        parts = [
            _gradient_term(asked.forwards[c], asked.targets, index.manifest.checkpoints[c].eta)
            for c in sorted(asked.forwards)
        ]
        return Query(method, tuple(parts), np.ones(len(asked.targets)))
    if method.query == "representer":
        return _representer(method, asked, index)
    term = _gradient_term(asked.forward, asked.targets)
    assert term.left is not None and term.right is not None
    norms = np.linalg.norm(term.left, axis=1) * np.linalg.norm(term.right, axis=1)
    solver = curvature.at("head")
    if method.query == "same" or solver == "identity":
        return Query(method, (term,), norms)
    if solver == "exact":
        stored = index.head_curvature(curvature.damping)
        norms = np.sqrt(stored.self_influence(term.left, term.right))
        solved = Term(1.0, None, matrix=stored.solve(term.left, term.right))
        return Query(method, (solved,), norms, index.head_self_influence(curvature.damping))
    iterated = HeadSolver(curvature, index)
    matrix, residual = iterated.solve(term.left, term.right)
    self_influence = None
    if method.metric == "cos":
        norms = np.sqrt(iterated.self_influence(term.left, term.right))
        self_influence = iterated.self_influence(
            index.residuals().take(_every(index)), index.features().take(_every(index))
        )
    return Query(method, (Term(1.0, None, matrix=matrix),), norms, self_influence, residual)


def _every(index: Index) -> np.ndarray:
    return np.arange(index.manifest.n_rows)


def _plain(method: Method, vectors: np.ndarray) -> Query:
    wide = vectors.astype(np.float64)
    return Query(method, (Term(1.0, wide),), np.linalg.norm(wide, axis=1))


def _gradient_term(forward: Forward, targets: np.ndarray, eta: float = 1.0) -> Term:
    """The query's head gradient as factors (p - y, f), y being the target."""
    residuals, _ = residual_and_loss(forward.logits, targets)
    return Term(eta, forward.features.astype(np.float64), residuals)


def _representer(method: Method, asked: Asked, index: Index) -> Query:
    """alpha_nc <f_n, f_q> as a dot with (p_n - y_n) outer f_n: the left factor is -e_target / (2 lambda N)."""
    facts = index.manifest.curvature["head"]["representer"]
    left = np.zeros((len(asked.targets), len(index.manifest.spec.label_names)))
    left[np.arange(len(left)), asked.targets] = -1.0 / (2 * facts["lambda"] * index.manifest.n_live)
    features = asked.forward.features.astype(np.float64)
    return Query(method, (Term(1.0, features, left, offset=1.0 if facts["refit"] else 0.0),), np.ones(len(left)))


def method_facts(method: Method, index: Index, curvature: CurvatureSpec, scope: str) -> dict[str, Any]:
    """What a result must say of a method's number: scope, metric, curvature, effective damping."""
    facts: dict[str, Any] = {
        "scope": scope if method.representation == "head" else None,
        "representation": method.representation,
        "metric": method.metric,
        "formula": method.formula,
        "sign": "larger = proponent; " + method.sign,
    }
    if method.representation == "head" and scope != "head":
        facts["with_bias"] = index.manifest.spec.with_bias
    if method.all_checkpoints:
        facts["eta"] = [c.eta for c in index.manifest.checkpoints]
    if method.variants:
        facts |= {"variants": N_VARIANTS, "variant_learning_rate": VARIANT_LEARNING_RATE, "variant_rows": VARIANT_ROWS}
    if method.words is not None:
        facts |= {"words": method.words, "tops": list(index.manifest.spec.words_tops)}
        facts["precision"] = index.manifest.spec.words_precision
    if method.query == "preconditioned":
        facts |= curvature.facts(index, scope)
    if method.query == "representer":
        head = index.manifest.curvature["head"]["representer"]
        facts |= {"lambda": head["lambda"], "refit": head["refit"]}
    return facts
