"""What ``peers.py`` asks of other libraries: each is imported where it is called, and may be missing."""

from __future__ import annotations

import functools
import importlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, ROOT

from forebear import open_rows
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.scopes import scope_of

BATCH, BATCH_TOKENS = 16, 4096
PROJECTION = 16  # bergson's two-sided projection, 16 x 16 numbers a layer
MODEL = ROOT / "runs" / "bench" / "sst2" / "checkpoints" / "epoch-3"
Way = Callable[..., np.ndarray]  # scores (q, n) of so many first rows; None, the default: of all


class Question:
    """Rows, queries, and what forebear makes of them.

    Attributes:
        labels: Gold labels, ``(n,)``.
        targets: Predicted labels of the queries, ``(q,)``.
        rows: Word pieces of the rows.
        asked: Word pieces of the queries.
        layers: Names of all linear layers.
    """

    def __init__(self, n_rows: int, n_queries: int, n_sample: int, n_fit: int) -> None:
        block = next(open_rows(DATA / "sst2" / "train.parquet", need_labels=True).blocks(n_rows))
        self.texts, self.labels = list(block.texts[0]), np.array(block.labels, np.int64)
        self.queries = list(next(open_rows(DATA / "sst2" / "dev.parquet").blocks(n_queries)).texts[0])
        self.n_sample, self.n_fit = n_sample, n_fit
        self.classifier = load_classifier(str(MODEL))
        self.rows, self.asked = encode(self.classifier, [self.texts]), encode(self.classifier, [self.queries])
        self.targets = run_forward(self.classifier, [self.queries]).predictions
        self.layers = [block.name for block in scope_of(self.classifier, "all").blocks]

    def dots(self, scope: str = "all", n_rows: int | None = None) -> np.ndarray:
        """Dots of the gradients of queries and first rows over a scope, ``(q, n)``."""
        blocks = scope_of(self.classifier, scope)
        vectors = whole_gradients(self.classifier, blocks, [self.queries], self.targets)
        return exact_dots(self.classifier, blocks, vectors, [self.texts[:n_rows]], self.labels[:n_rows])

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """Dots over all linear layers, ``(q, n)``."""
        return self.dots()

    def model(self, **choices: Any) -> Any:
        """The classifier by transformers alone."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float32, **choices).eval()

    def batch(self, of_rows: bool, some: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Padded word pieces, mask, and labels of some rows or queries."""
        encoded, labels = (self.rows, self.labels) if of_rows else (self.asked, self.targets)
        batch = pad_batch(self.classifier.tokenizer, [encoded[i] for i in some], self.classifier.device)
        return batch["input_ids"], batch["attention_mask"], torch.from_numpy(labels[np.asarray(some)])

    def loader(self, n_rows: int | None, size: int = BATCH) -> torch.utils.data.DataLoader:
        """Batches of the first rows in their order; of the queries where ``n_rows`` is 0."""
        items = range(len(self.asked) if n_rows == 0 else n_rows or len(self.rows))
        collate = functools.partial(self.batch, n_rows != 0)
        return torch.utils.data.DataLoader(items, batch_size=size, collate_fn=collate)


def losses(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row."""
    return torch.nn.functional.cross_entropy(model(ids, mask).logits, labels, reduction="none")


def loop(question: Question) -> Way:
    """Row by row in plain torch: backward, then dots with the gradients of the queries."""
    model = question.model().requires_grad_(False)
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in question.layers]

    def gradient(of_rows: bool, i: int) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(losses(model, *question.batch(of_rows, [i])).sum(), weights)

    def way(n_rows: int | None = None) -> np.ndarray:
        asked = [torch.stack(gs) for gs in zip(*(gradient(False, i) for i in range(len(question.asked))), strict=True)]
        columns = []
        for n in range(n_rows or len(question.rows)):
            products = zip(asked, gradient(True, n), strict=True)
            columns.append(sum(q.flatten(1) @ g.flatten() for q, g in products))
        return torch.stack(columns, 1).double().numpy()

    return way


class Logits(torch.nn.Module):
    """captum calls models as ``model(*batch[:-1])``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, mask).logits


def captum(batch_size: int) -> Callable[[Question], Way]:
    """TracInCP at one checkpoint of weight 1; gradients row by row, or of a batch at once (sample-wise)."""

    def make(question: Question) -> Way:
        from captum.influence import TracInCP

        model = question.model()
        for name in question.layers:
            linear = model.get_submodule(name)
            linear.register_buffer("bias", linear._parameters.pop("bias").detach())  # captum takes every parameter
        sample_wise = batch_size > 1
        loss = torch.nn.CrossEntropyLoss(reduction="sum" if sample_wise else "none")

        def way(n_rows: int | None = None) -> np.ndarray:
            tracin = TracInCP(
                Logits(model), question.loader(n_rows, batch_size), [str(MODEL)], lambda _model, _path: 1.0,
                layers=[f"model.{name}" for name in question.layers], batch_size=batch_size,
                loss_fn=loss, sample_wise_grads_per_batch=sample_wise,
            )  # fmt: skip
            return tracin.influence(question.batch(False, range(len(question.asked)))).detach().numpy()

        return way

    return make


def captum_fast(question: Question) -> Way:
    """TracInCPFast: the gradient of the last layer, from its input and the loss; nothing is stored."""
    from captum.influence import TracInCPFast

    model = question.model()
    loss = torch.nn.CrossEntropyLoss(reduction="sum")

    def way(n_rows: int | None = None) -> np.ndarray:
        wrapped = Logits(model)
        tracin = TracInCPFast(
            wrapped, wrapped.model.classifier, question.loader(n_rows), [str(MODEL)], lambda _model, _path: 1.0,
            loss_fn=loss, batch_size=BATCH,
        )  # fmt: skip
        return tracin.influence(question.batch(False, range(len(question.asked)))).detach().numpy()

    return way


class Dattri:
    """dattri on a linear head without bias over features; through a whole model it takes seconds a row.

    Args:
        model: The classifier.
        rows: Features and gold labels of the rows.
        asked: Features and predicted labels of the queries.
    """

    def __init__(self, model: Any, rows: tuple[torch.Tensor, ...], asked: tuple[torch.Tensor, ...]) -> None:
        from dattri.task import AttributionTask

        head = torch.nn.Linear(model.classifier.in_features, model.classifier.out_features, bias=False)
        head.load_state_dict({"weight": model.classifier.weight.detach()})
        bias = model.classifier.bias.detach()
        self._rows, self._asked = rows, asked

        def loss(parameters: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            features, labels = batch
            logits = torch.func.functional_call(head, parameters, (features.reshape(-1, head.in_features),)) + bias
            return torch.nn.functional.cross_entropy(logits, labels.reshape(-1))

        self._task = AttributionTask(loss_func=loss, model=head, checkpoints=head.state_dict())

    @staticmethod
    def _loader(some: tuple[torch.Tensor, ...], size: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*some), batch_size=size)

    def dots(self) -> np.ndarray:
        """TracIn at one checkpoint of weight 1, without its default of a random projection."""
        from dattri.algorithm.tracin import TracInAttributor

        attributor = TracInAttributor(self._task, torch.ones(1), normalized_grad=False)
        attributor.projector_kwargs = None
        found = attributor.attribute(self._loader(self._rows, 256), self._loader(self._asked, 256))
        return found.numpy().T

    def influence(self, damping: float) -> np.ndarray:
        """<H^-1 g_q, g_n> with the Hessian formed and inverted."""
        from dattri.algorithm.influence_function import IFAttributorExplicit

        attributor = IFAttributorExplicit(self._task, regularization=damping)
        attributor.cache(self._loader(self._rows, len(self._rows[0])))
        found = attributor.attribute(self._loader(self._rows, 256), self._loader(self._asked, 256))
        return found.detach().numpy().T


class OneToken(torch.nn.Module):
    """A linear layer on one vector a row, shown to bergson's hooks as one on a sequence of length 1."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:, None])[:, 0]


class Bergson:
    """bergson's batches, hooks, projection and loop over the classifier, with our loss and two layers wrapped."""

    def __init__(self, question: Question, folder: Path) -> None:
        self.bergson = importlib.import_module("bergson")
        self.question, self.folder = question, folder
        self.model = question.model().requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)  # so that hooks fire
        wrapped = [name for name in question.layers if name == "classifier" or "pooler" in name]
        for name in wrapped:
            self.model.set_submodule(name, OneToken(self.model.get_submodule(name)))
        self.targets = {f"{name}.linear" if name in wrapped else name for name in question.layers}
        self.processor = self.bergson.GradientProcessor(projection_dim=PROJECTION)  # keeps the projections

    def gradients(self, of_rows: bool, n: int | None) -> np.ndarray:
        """Projected gradients of the first rows, or of all queries."""
        from bergson.data import allocate_batches
        from datasets import Dataset

        encoded, labels = (
            (self.question.rows, self.question.labels) if of_rows else (self.question.asked, self.question.targets)
        )
        ids = [row["input_ids"] for row in encoded[:n]]
        lengths = [len(i) for i in ids]
        data = Dataset.from_dict({"input_ids": ids, "length": lengths, "label": labels[:n].tolist()})
        cfg = self.bergson.IndexConfig(
            str(self.folder / "bergson"), projection_dim=PROJECTION, token_batch_size=BATCH_TOKENS
        )
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        choices = {"data": data, "cfg": cfg, "processor": self.processor, "target_modules": self.targets}
        collector = self.bergson.InMemoryCollector(model=self.model, **choices)
        batches = allocate_batches(lengths, BATCH_TOKENS)
        computer = self.bergson.CollectorComputer(self.model, data, collector=collector, batches=batches, cfg=cfg)
        computer.forward_backward = self.loss  # for its next-token loss, which has no attention mask either
        computer.run_with_collector_hooks()
        return np.asarray(collector.builder.grad_buffer)

    @staticmethod
    def loss(model: Any, x: torch.Tensor, _y: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """The classifier's, of each row of a batch."""
        mask = torch.arange(x.shape[1]) < torch.tensor(batch["length"])[:, None]
        found = losses(model, x, mask.long(), torch.tensor(batch["label"]))
        found.sum().backward()
        model.zero_grad()
        return found


class Unbiased(torch.nn.Module):
    """A linear layer whose bias kronfluence does not see: it takes a layer's bias for a column of its weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.linear.weight = linear.weight
        self.register_buffer("added", linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.added


class Kronfluence:
    """kronfluence's EK-FAC; where it asks for labels sampled from the model it gets their expectation, as ours has."""

    def __init__(self, question: Question) -> None:
        arguments, analyzer, task = (
            importlib.import_module(f"kronfluence.{name}") for name in ("arguments", "analyzer", "task")
        )
        self.question, self.arguments = question, arguments
        logging.disable(logging.WARNING)
        names = [f"{name}.linear" for name in question.layers]

        class Classification(task.Task):
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
                ids, mask, labels = batch
                logits = model(ids, mask).logits
                if sample:  # the gradient that has, for two classes, the second moment of all labels weighted by p
                    spread = logits.detach().softmax(1).prod(1).sqrt()
                    return (spread * (logits[:, 1] - logits[:, 0])).sum()
                return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return names

            def get_attention_mask(self, batch: Any) -> torch.Tensor:
                return batch[1]

        model = question.model()
        for name in question.layers:
            model.set_submodule(name, Unbiased(model.get_submodule(name)))
        made = Classification()
        self.folder = tempfile.TemporaryDirectory()
        self.analyzer = analyzer.Analyzer(
            "sst2", analyzer.prepare_model(model, made), made, cpu=True, disable_tqdm=True, output_dir=self.folder.name
        )

    def data(self, of_rows: bool, n: int) -> Any:
        """Word pieces, mask and label of each, padded alike: kronfluence collates by torch's default."""
        return torch.utils.data.TensorDataset(*self.question.batch(of_rows, range(n)))

    def fit(self) -> None:
        """Covariances, eigenvectors, eigenvalues."""
        torch.manual_seed(0)
        self.analyzer.fit_all_factors(
            "factors", self.data(True, self.question.n_fit), per_device_batch_size=BATCH, overwrite_output_dir=True,
            factor_args=self.arguments.FactorArguments(strategy="ekfac"),
        )  # fmt: skip

    def score(self, n_rows: int, damping: float) -> np.ndarray:
        """Scores of the first rows, ``(q, n)``."""
        n_queries = len(self.question.asked)
        found = self.analyzer.compute_pairwise_scores(
            "scores", "factors", self.data(False, n_queries), self.data(True, n_rows),
            per_device_query_batch_size=n_queries, per_device_train_batch_size=BATCH, overwrite_output_dir=True,
            score_args=self.arguments.ScoreArguments(damping_factor=damping),
        )  # fmt: skip
        found = self.analyzer.load_pairwise_scores("scores") if found is None else found
        return found["all_modules"].double().numpy()
