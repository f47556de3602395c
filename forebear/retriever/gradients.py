"""Gradients of deeper scopes: candidates from the stored sketches, exact scores from the model.

<V, G_n> over all layers of the scope is computed from the factors of the candidates' gradients, in one forward and one
backward of activations for each candidate; no gradient is stored. Which rows become candidates is decided by
the sketches: their dot times the stored lengths for dot products, their cosine for cosines. Nothing proves
that the sketches miss no row; the number of candidates is a choice (``--candidates``), and is stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forebear.indexer.ann import unit_rows
from forebear.indexer.index import GradientStore, Index
from forebear.indexer.gradient_pass import labels_seed, run_pass
from forebear.indexer.scopes import Block
from forebear.indexer.sketch import GradientRows, Sketcher
from forebear.indexer.store import as_tensor
from forebear.indexer.tape import LayerFactors
from forebear.retriever.methods import Method
from forebear.retriever.queries import Models
from forebear.retriever.scoring import rank
from forebear.retriever.search import Ranking

_QUERY_BYTES = 1 << 29  # query gradients held at once
_BATCH_TOKENS = 2048
_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class _Part:
    """One checkpoint of a method over a scope: the queries' sketches beside the rows'."""

    weight: float
    number: int
    sketcher: Sketcher
    store: GradientStore
    asked: GradientRows


class GradientSearch:
    """Scores training rows by gradients over one sketched scope, for one block of test rows."""

    def __init__(
        self,
        index: Index,
        models: Models,
        scope: str,
        texts: Sequence[Sequence[str]],
        targets: np.ndarray,
        *,
        all_checkpoints: bool,
    ) -> None:
        """Sketch the test rows' gradients.

        Args:
            index: With the scope's sketches.
            models: Its models.
            scope: ``top-K`` or ``all``.
            texts: Test rows, one list a text column.
            targets: Class whose loss is explained, ``(q,)``.
            all_checkpoints: For methods that sum over checkpoints; else the last alone.
        """
        self.index, self.texts, self.targets = index, [list(t) for t in texts], targets
        checkpoints = index.manifest.checkpoints
        self.parts = []
        for number in range(len(checkpoints)) if all_checkpoints else [len(checkpoints) - 1]:
            classifier, store = models.classifier(number), index.gradients(scope, number)
            sketcher = Sketcher(classifier, scope, index.manifest.spec.seed, store.reduction)
            asked = sketcher.sketch(texts, targets, batch_tokens=_BATCH_TOKENS)
            weight = checkpoints[number].eta if all_checkpoints else 1.0
            self.parts.append(_Part(weight, number, sketcher, store, asked))

    def search(self, method: Method, k: int, *, exact: str, n_candidates: int) -> tuple[Ranking, Ranking]:
        """Both ends of the ranking, (proponents, opponents)."""
        live = self.index.live
        if exact == "full":
            scores = self.scores(method, live)
            n_scored = np.full(len(scores), len(live))
            return tuple(  # type: ignore[return-value]
                Ranking(*rank(scores, live, k, largest=largest), True, n_scored) for largest in (True, False)
            )
        approximate = torch.from_numpy(self._approximate(method))
        width = min(len(live), max(k, n_candidates) if exact == "rerank" else k)
        ends = [approximate.topk(width, dim=1, largest=largest) for largest in (True, False)]
        positions = [end.indices.numpy() for end in ends]
        if exact == "none":
            none = np.zeros(len(approximate), np.int64)
            found = [end.values.numpy().astype(np.float64) for end in ends]
            return tuple(  # type: ignore[return-value]
                Ranking(*rank(values, live[at], k, largest=largest), False, none)
                for values, at, largest in zip(found, positions, (True, False), strict=True)
            )
        listed = [live[at] for at in positions]
        exactly = self._rescore(method, np.concatenate(listed, axis=1))
        n_scored = np.full(len(approximate), 2 * width)
        proponents = rank(exactly[:, :width], listed[0], k, largest=True)
        opponents = rank(exactly[:, width:], listed[1], k, largest=False)
        return Ranking(*proponents, True, n_scored), Ranking(*opponents, True, n_scored)

    def _approximate(self, method: Method) -> np.ndarray:
        """Scores by the sketches alone, ``(q, n_live)`` float32."""
        live = self.index.live
        out = np.zeros((len(self.targets), len(live)), np.float32)
        for part in self.parts:
            q = part.asked.sketches.astype(np.float32)
            if method.metric == "cos":
                lengths = np.linalg.norm(q, axis=1, keepdims=True)
                q = np.divide(q, lengths, out=np.zeros_like(q), where=lengths > 0)
            for start in range(0, len(live), _BLOCK_ROWS):
                rows = live[start : start + _BLOCK_ROWS]
                # fp16 rounds the length of a vector with one large component by up to 5e-4: more than what tells
                # the rows of a fine-tuned model apart.
                sketches = unit_rows(part.store.sketches.take(rows))
                scores = (as_tensor(q) @ as_tensor(sketches).T).numpy()
                if method.metric == "dot":
                    scores *= part.weight * part.store.lengths[rows]
                out[:, start : start + len(rows)] += scores
        return out

    def _rescore(self, method: Method, rows: np.ndarray) -> np.ndarray:
        """Exact scores of candidates ``(q, m)``, a few queries at a time over their distinct candidates."""
        out = np.empty(rows.shape)
        for which in self._query_chunks():
            distinct, inverse = np.unique(rows[which], return_inverse=True)
            found = self._scores_of(method, which, distinct)
            out[which] = np.take_along_axis(found, inverse.reshape(len(which), -1), axis=1)
        return out

    def scores(self, method: Method, rows: np.ndarray) -> np.ndarray:
        """Exact scores of the given rows, ``(q, n)`` float64."""
        chunks = [self._scores_of(method, which, rows) for which in self._query_chunks()]
        return np.concatenate(chunks)

    def _query_chunks(self) -> list[np.ndarray]:
        """Queries whose gradients fit in memory together."""
        numbers = max(sum(block.size for block in p.sketcher.blocks) for p in self.parts)
        size = max(1, _QUERY_BYTES // (4 * numbers))
        return [np.arange(i, min(i + size, len(self.targets))) for i in range(0, len(self.targets), size)]

    def _scores_of(self, method: Method, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        total = np.zeros((len(which), len(rows)))
        texts = [[column[i] for i in which] for column in self.texts]
        row_texts = [column.to_pylist() for column in self.index.texts(rows).values()]
        gold = self.index.labels[rows].astype(np.int64)
        for part in self.parts:
            vectors = query_gradients(part.sketcher, texts, self.targets[which])
            dots = exact_dots(part.sketcher, vectors, row_texts, gold)
            if method.metric == "cos":
                below = part.asked.norms[which][:, None] * part.store.norms[rows].astype(np.float64)
                dots = np.divide(dots, below, out=np.zeros_like(dots), where=below > 0)
            total += part.weight * dots
        return total


def query_gradients(sketcher: Sketcher, texts: Sequence[Sequence[str]], targets: np.ndarray) -> dict[str, torch.Tensor]:
    """Full gradients of a few test rows, ``(q, n_out, n_in)`` for each block of the scope."""
    collector = _Gradients(sketcher, len(targets))
    run_pass(sketcher.classifier, texts, labels_seed(targets), [collector], batch_tokens=_BATCH_TOKENS)
    return collector.out


class _Gradients:
    """Gathers whole gradients."""

    def __init__(self, sketcher: Sketcher, n_rows: int) -> None:
        self.scope, self.blocks = sketcher.scope, sketcher.blocks
        weight = sketcher.classifier.head.weight

        def zeros(block: Block) -> torch.Tensor:
            return torch.zeros((n_rows, block.n_out, block.n_in), dtype=weight.dtype, device=weight.device)

        self.out = {block.name: zeros(block) for block in self.blocks}
        self._batch: dict[str, torch.Tensor] = {}

    def begin(self, n_rows: int) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self._batch[name] = factors.gradients()

    def end(self, positions: list[int]) -> None:
        for name, gradients in self._batch.items():
            self.out[name][positions] = gradients


def exact_dots(
    sketcher: Sketcher, vectors: dict[str, torch.Tensor], texts: Sequence[Sequence[str]], labels: np.ndarray
) -> np.ndarray:
    """<V_q, G_n> over the scope, from the factors of the rows' gradients.

    For one query, sum over t of d_t . (V a_t), no gradient being formed; for several, a batch's gradients are formed
    block by block and multiplied.

    Args:
        sketcher: Whose model and blocks.
        vectors: V, ``(q, n_out, n_in)`` for each block.
        texts: Training rows, one list a text column, ``n`` of them.
        labels: Their classes, ``(n,)``.

    Returns:
        ``(q, n)`` float64.
    """
    collector = _Dots(sketcher, vectors, len(labels))
    run_pass(sketcher.classifier, texts, labels_seed(labels), [collector], batch_tokens=_BATCH_TOKENS)
    return collector.out


class _Dots:
    """Gathers dots with query vectors."""

    def __init__(self, sketcher: Sketcher, vectors: dict[str, torch.Tensor], n_rows: int) -> None:
        self.scope, self.blocks = sketcher.scope, sketcher.blocks
        self._vectors = vectors
        self._n_queries = len(next(iter(vectors.values())))
        self._device = sketcher.classifier.device
        self.out = np.zeros((self._n_queries, n_rows))

    def begin(self, n_rows: int) -> None:
        self._total = torch.zeros((self._n_queries, n_rows), dtype=torch.float64, device=self._device)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        v = self._vectors[name]
        if self._n_queries == 1:
            self._total += ((factors.inputs @ v[0].T) * factors.deltas).sum(dim=(1, 2))[None, :]
        else:
            self._total += v.flatten(1) @ factors.gradients().flatten(1).T

    def end(self, positions: list[int]) -> None:
        self.out[:, positions] = self._total.cpu().numpy()
