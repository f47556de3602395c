"""The searchers, by the name that a method's row of the table gives, and the scores that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.encoding import Encoded, Texts, n_rows_of
from forebear.indexer.rows.labels import LabelMap
from forebear.indexer.rows.opening import rows_given
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.retriever.deep.searcher import GradientSearcher
from forebear.retriever.deep.through_run import RunSearcher
from forebear.retriever.head.stored import StoredSearcher
from forebear.retriever.question.batch import Batch, make_batch
from forebear.retriever.question.methods import Searched
from forebear.retriever.question.models import Models
from forebear.retriever.question.query_rows import check_texts, query_labels
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.scores import Scores
from forebear.retriever.spans.search import SpanSearcher
from forebear.retriever.words.search import WordSearcher
from forebear.retriever.words.tfidf import TfidfSearcher

if TYPE_CHECKING:
    from typing_extensions import Unpack

QUERY_BLOCK_ROWS = 512

SEARCHERS: dict[Searched, type[Searcher]] = {
    "stored": StoredSearcher,
    "gradients": GradientSearcher,
    "words": WordSearcher,
    "tfidf": TfidfSearcher,
    "spans": SpanSearcher,
    "run": RunSearcher,
}


class Scorer:
    """Scores the training rows of one index, by any method, for test rows.

    Attributes:
        index: The index, with its checkpoints where they are now.
        models: Its models, loaded at the first question.
    """

    def __init__(
        self,
        index: Index | str | Path,
        *,
        model: str | Classifier | None = None,
        device: str = "auto",
        devices: Sequence[str | int] = (),
        device_bytes: int | None = None,
    ) -> None:
        """Open the index; models are loaded at the first question.

        Args:
            index: An open index, or its folder.
            model: Where the model is now, if it has moved; it must match the index's fingerprint.
            device: As :func:`~forebear.indexer.model.device.picking.pick_device` takes it.
            devices: In place of ``device`` several of one kind, among which exact scores beyond the head are divided:
                names, or numbers of CUDA devices.
            device_bytes: Most bytes of stored vectors that are kept on a GPU; the others are sent to it block by block.
                None: half of what is free at the first search.
        """
        opened = index if isinstance(index, Index) else Index.open(index)
        self.models = Models(opened, model=model, device=device, devices=devices, device_bytes=device_bytes)
        self.index = self.models.index

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, by id."""
        return self.index.manifest.spec.label_names

    def classifier(self, checkpoint: int = -1) -> Classifier:
        """The model that is explained, or another checkpoint of the index by its number."""
        return self.models.classifier(checkpoint)

    def resolve(self, spec: QuerySpec | Question, **changes: Unpack[QueryChoices]) -> Question:
        """The question that a spec is for this index, with some choices changed.

        A question that is resolved already, and in which nothing is changed, stays as it is.

        Raises:
            InputError: A choice that means nothing.
            MissingStoreError: The index does not hold what a method compares.
        """
        if isinstance(spec, Question):
            changed = QuerySpec.of(spec.spec, **changes)
            return spec if spec.index is self.index and changed == spec.spec else changed.resolve(self.index)
        return QuerySpec.of(spec, **changes).resolve(self.index)

    def _opened(self, queries: Any) -> RowSource:
        """The test rows, read as the index read its own."""
        return rows_given(queries, classes=self.label_names, like=self.index.manifest.row_format)

    def check_texts(self, source: RowSource) -> None:
        """Refuse single texts for an index of pairs, the other way round, and the same columns in another order."""
        check_texts(self.index, source)

    def query_labels(self, source: RowSource, *, required: bool) -> LabelMap | TargetMap | None:
        """How the test rows' labels map onto the model's; None when there are none or, unless required, none fit.

        Unless required, a row without a label, or with one that the model does not know, gets ``labels.UNKNOWN``.
        """
        return query_labels(self.index, source, required=required)

    def searcher(self, name: Searched) -> Searcher:
        """One of :data:`~forebear.retriever.searchers.SEARCHERS`, made once."""
        return self.models.keep(SEARCHERS[name], lambda: SEARCHERS[name](self.models))

    def _by_searcher(self, question: Question) -> dict[Searched, Question]:
        """The question's methods by the searcher that answers for them."""
        names = dict.fromkeys(question.searched_by(m) for m in question.methods)
        return {name: question.of(m for m in question.methods if question.searched_by(m) == name) for name in names}

    def scores(
        self,
        queries: Any,
        method: str | None = None,
        *,
        spec: QuerySpec | None = None,
        **choices: Unpack[QueryChoices],
    ) -> np.ndarray:
        """Exact scores of every live training row, ``(q, n)`` float64, columns in the order of ``index.live``.

        Of an aggregate ``(1, n)``, summed over the test rows.

        For small sets, and as the yardstick: memory is q x n x 8 bytes.

        Args:
            queries: As of :meth:`retrieve`.
            method: One name from the method table; None: the one of ``spec`` or of ``methods``.
            spec: The question; None: the default one. Every row is scored, whatever it says of ``exact``.
            **choices: Fields of :class:`QuerySpec` that are otherwise than in ``spec``.

        Raises:
            InputError: A choice that means nothing, or not one method.
        """
        if method is not None:
            choices["methods"] = (method,)
        question = self.resolve(replace(QuerySpec.of(spec, **choices), exact="full"))
        if len(question.methods) != 1:
            raise InputError(f"scores are of one method, not of {len(question.methods)}: ask for them one by one.")
        source = self._opened(queries)
        self.check_texts(source)
        labels = self.query_labels(source, required=question.spec.target == "gold")
        parts = []
        for block in source.blocks(QUERY_BLOCK_ROWS):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            parts.append(self.score_block(block.texts, gold, question, first_row=block.start)[question.methods[0].name])
        scores = np.concatenate(parts)
        return scores.sum(axis=0, keepdims=True) if question.spec.aggregate else scores

    def score_block(
        self,
        texts: Texts,
        labels: np.ndarray | None,
        spec: QuerySpec | Question,
        *,
        rows: np.ndarray | None = None,
        first_row: int = 0,
    ) -> Scores:
        """Exact scores of training rows for one block of test rows, by all methods of a question together.

        Args:
            texts: Test rows, one list a text column; or encoded, for methods that read word pieces alone.
            labels: Class ids of the model, ``(q,)``, or None.
            spec: The question; how candidates are found does not matter.
            rows: Live training rows, ascending; None: all of them.
            first_row: Number of the first test row, for messages.

        Returns:
            By method name ``(q, n)`` float64, columns in the order of ``rows``; with the residuals of H^-1.

        Raises:
            InputError: A method scores no rows, or reads the texts of test rows that are encoded.
        """
        question = self.resolve(spec)
        for method in question.methods:
            if not method.scores_rows:
                raise InputError(f"{method.name} scores spans or asks of a word, not a row: ask for it by retrieve.")
            if isinstance(texts, Encoded) and method.reads_texts:
                raise InputError(f"{method.name} compares texts; it cannot be asked of rows with word pieces masked.")
        batch = self._batch(question, texts, labels, first_row)
        return self._scores(question, batch, self.index.live if rows is None else rows)

    def _batch(self, question: Question, texts: Texts, labels: np.ndarray | None, first_row: int) -> Batch:
        numbers = range(first_row, first_row + n_rows_of(texts))
        return make_batch(question, self.models, texts, labels, numbers=numbers)

    def _scores(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        found = Scores()
        with repeatable(self.models.device):
            for name, part in self._by_searcher(question).items():
                scores = self.searcher(name).score(part, batch, rows)
                found.update(scores)
                found.note_residuals([scores])
        return found.of(method.name for method in question.methods)
