"""The retriever: ask which training rows made the model predict what it predicts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from typing_extensions import override

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.memory import return_memory
from forebear.indexer.model.forward import Forward
from forebear.indexer.rows.labels import UNKNOWN
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.text import Span
from forebear.retriever.answers.coverage import available_methods, question_facts
from forebear.retriever.answers.groups import check_additive, group_table, grouping_of
from forebear.retriever.answers.merged import check_one_model, check_question, merge_tables
from forebear.retriever.answers.results import ANSWER_BYTES, Answers, answer_tables, queries_together
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.deep.searcher import GradientSearcher
from forebear.retriever.deep.through_run import RunSearcher
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.listed import GroupEffects, with_effects
from forebear.retriever.head.aggregate import common_class, read_rows, sum_queries
from forebear.retriever.head.stored import search_query
from forebear.retriever.question.batch import make_batch
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.spec import QueryChoices, QuerySpec, Question
from forebear.retriever.ranking import Ends
from forebear.retriever.searchers import QUERY_BLOCK_ROWS, Scorer
from forebear.retriever.spans.search import word_influence

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Retriever(Scorer):
    """Answers questions from one index.

    Attributes:
        index: The index.
        models: Its models, loaded at the first question.

    Example:
        >>> from forebear import Index, Retriever
        >>> retriever = Retriever(Index.open("runs/demo/index"))
        >>> table = retriever.retrieve([("The cat sat .", "A cat sat .")], methods=["gc", "if"], top=5)
        >>> table.to_pandas()
    """

    def retrieve(
        self,
        queries: Any,
        *,
        spec: QuerySpec | Question | None = None,
        group_by: str | None = None,
        **choices: Unpack[QueryChoices],
    ) -> pa.Table:
        """The training rows at both ends of each query's ranking; or groups of rows, by the sums of their scores.

        Args:
            queries: Texts, pairs of texts; a path, table or list of dicts, as ``open_rows`` takes; or its result.
            spec: The question; None: the default one.
            group_by: ``label``, or a column that the index keeps: every training row is scored, and the result has one
                row a group, as docs/answers.md lists it; see :mod:`~forebear.retriever.answers.groups`.
            **choices: Fields of :class:`QuerySpec` that are otherwise than in ``spec``, such as
                ``methods=["gc", "if"]``, ``top=5``, ``target="gold"``, ``scope="all"``.

        Returns:
            One row a result; columns as docs/answers.md lists them, provenance in the schema's metadata. Texts
            are dictionaries, which hold each text once: of type ``category`` in pandas.

        Raises:
            InputError: A choice that means nothing, or texts that do not fit the index.
            CorruptIndexError: A stored file was altered.
        """
        question = self.resolve(QuerySpec() if spec is None else spec, **choices)
        source = self._opened(queries)
        if group_by is not None:
            question = self.resolve(question, exact="full")
            groups = self.groups(source, question, group_by)
            return pa.concat_tables(groups).replace_schema_metadata(self.metadata(question, group_by=group_by))
        tables = [table for answers in self.answers(source, question) for table in self.tables(answers)]
        return pa.concat_tables(tables).replace_schema_metadata(self.metadata(question))

    def asked_together(self, source: RowSource, spec: QuerySpec | Question, block_rows: int = QUERY_BLOCK_ROWS) -> int:
        """Number of test rows of a block of :meth:`answers`: fewer where their rankings are long."""
        question = self.resolve(spec)
        if question.spec.aggregate:
            return source.n_rows
        top = question.spec.top if any(m.spans for m in question.methods) else question.top
        return min(block_rows, queries_together(question.methods, top))

    def answers(
        self,
        source: RowSource,
        spec: QuerySpec | Question,
        *,
        block_rows: int = QUERY_BLOCK_ROWS,
        starts: Collection[int] | None = None,
    ) -> Iterator[Answers]:
        """Stream answers in bounded memory; of an aggregate, the one answer.

        Args:
            source: Test rows.
            spec: The question.
            block_rows: Queries that are asked together, at most: fewer where their rankings are long.
            starts: First test rows of the blocks that are asked; None: all blocks.
        """
        if starts is not None and not starts:
            return
        question = self.resolve(spec)
        self.check_texts(source)
        labels = self.query_labels(source, required=question.spec.target == "gold")
        if question.spec.aggregate:
            texts, gold = read_rows(source, labels)
            yield self.aggregate(texts, gold, np.zeros(source.n_rows, np.int64), question)
            return
        for block in source.blocks(self.asked_together(source, question, block_rows), min(starts or [0])):
            if starts is not None and block.start not in starts:
                continue
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            yield self.answer_block(block.start, block.texts, gold, question, table=block.table, effects=True)
            return_memory()

    def groups(self, source: RowSource, spec: QuerySpec | Question, column: str) -> Iterator[pa.Table]:
        """Sums of the scores of all live rows by group, as tables, a bounded number of queries each.

        Args:
            source: Test rows.
            spec: The question; of an aggregate, the sums over all test rows together. Every row is scored, whatever it
                says of ``exact``.
            column: ``label``, or a column that the index keeps.

        Raises:
            InputError: There is no such column, or scores of a method cannot be summed.
            NonFiniteError: A score is NaN or infinite.
        """
        question = self.resolve(spec, exact="full")
        check_additive(question)
        grouping = grouping_of(self.index, column)
        self.check_texts(source)
        labels = self.query_labels(source, required=question.spec.target == "gold")
        size = max(1, min(QUERY_BLOCK_ROWS, ANSWER_BYTES // (8 * len(grouping.live) * len(question.methods))))
        effects = GroupEffects(question, self.models, grouping.rows)
        predictions: list[Predictions] = []
        summed: dict[str, np.ndarray] = {}
        classes: list[list[np.ndarray]] = [[], [], []]
        for block in source.blocks(size):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            batch = self._batch(question, block.texts, gold, block.start)
            scores = self._scores(question, batch, grouping.live)
            of_block = [
                np.full(len(block), UNKNOWN) if gold is None else gold,
                batch.forward.predictions,
                batch.targets,
            ]
            asked = Predictions.of(batch.forward, batch.targets)
            if not question.spec.aggregate:
                each = [asked.take(np.array([i])) for i in range(len(block))]
                top = question.spec.top
                yield group_table(grouping, scores, top, block.start, of_block, self.index, effects, each)
                continue
            predictions.append(asked)
            for name, values in scores.items():
                summed[name] = summed.get(name, 0.0) + values.sum(axis=0, keepdims=True)
            for kind, ids in zip(classes, of_block, strict=True):
                kind.append(ids)
        if question.spec.aggregate:
            together = np.zeros(source.n_rows, np.int64)
            shared = [common_class(np.concatenate(kind), together) for kind in classes]
            all_rows = [Predictions.join(predictions)]
            yield group_table(grouping, summed, question.spec.top, 0, shared, self.index, effects, all_rows)

    def tables(self, answers: Answers) -> Iterator[pa.Table]:
        """Answers as tables, one row a result, a bounded number of results each."""
        return answer_tables(self.index, answers, self.classifier().tokenizer)

    def answer_block(
        self,
        start: int,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray | None,
        spec: QuerySpec | Question,
        *,
        forward: Forward | None = None,
        table: pa.Table | None = None,
        numbers: Sequence[int] | None = None,
        effects: bool = False,
    ) -> Answers:
        """Answer one block of test rows.

        Args:
            start: Number of the first of them.
            texts: One list a text column.
            labels: Class ids of the model, or None.
            spec: The question.
            forward: The last checkpoint's pass over them, if already run.
            table: The rows with all their columns, where spans are given by columns.
            numbers: Of the test rows, for messages; None: from ``start`` on.
            effects: Whether the effects of the rows that are found are estimated, too.
        """
        question = self.resolve(spec)
        numbers = range(start, start + len(texts[0])) if numbers is None else numbers
        found: dict[str, Ends] = {}
        with repeatable(self.models.device):
            batch = make_batch(question, self.models, texts, labels, numbers=numbers, forward=forward, table=table)
            for name, part in self._by_searcher(question).items():
                found |= self.searcher(name).search(part, batch)
        found = {method.name: found[method.name] for method in question.methods}
        if effects:
            found = with_effects(question, self.models, Predictions.of(batch.forward, batch.targets), found)
        return Answers(start, labels, batch.forward.predictions, batch.targets, found)

    def aggregate(
        self,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray | None,
        groups: np.ndarray,
        spec: QuerySpec | Question,
    ) -> Answers:
        """One answer for each group of test rows: their query vectors are summed, and searched once.

        Scores and effects are the sums of those that the rows would get one by one.

        Args:
            texts: Test rows, one list a text column.
            labels: Class ids of the model, ``(q,)``, or None.
            groups: Number of each row's group, ``(q,)``; every number from 0 on has rows.
            spec: The question, with ``aggregate``.
        """
        question = self.resolve(spec, aggregate=True)
        seen = sum_queries(question, self.models, texts, labels, groups)
        exact, top = question.spec.exact, question.top
        methods = {method.name: method for method in question.methods}
        found = {n: search_query(self.models, methods[n], q, top, exact=exact) for n, q in seen.queries.items()}
        through_run = question.of(m for m in question.methods if m.through_run)
        if through_run.methods:
            found |= RunSearcher(self.models).search_sums(through_run, texts, seen.targets, groups)
        beyond = question.of(m for m in question.methods if m.name not in found)
        if beyond.methods:
            queries = Queries([list(column) for column in texts], seen.targets, groups=groups)
            with repeatable(self.models.device):
                found |= GradientSearcher(self.models).search(beyond, queries)
        predictions = replace(Predictions.of(seen.forward, seen.targets), groups=groups)
        found = with_effects(question, self.models, predictions, {name: found[name] for name in methods})
        gold = None if labels is None else common_class(labels, groups)
        predicted, targets = (common_class(one, groups) for one in (seen.forward.predictions, seen.targets))
        return Answers(0, gold, predicted, targets, found)

    def word_influence(
        self, query: Sequence[str], target: int | np.ndarray, rows: np.ndarray, spec: QuerySpec | Question
    ) -> tuple[Span, list[tuple[int, Span, float]]]:
        """How much each word of some training rows made the model look at a word of a test row (Joint eq. 8).

        Args:
            query: Texts of the test row.
            target: Class whose probability the saliency is of; else the numbers of all outputs, ``(c,)``.
            rows: Training rows.
            spec: Scope, curvature and ``word``.

        Returns:
            The test row's word; and (row, word, ``saliency-if-token``) of each word that the model reads.
        """
        question = self.resolve(spec)
        search = GradientSearch.kept(self.models, question.spec.scope, question.curvature)
        columns = [[text] for text in query]
        with repeatable(self.models.device):
            salient, words, scores = word_influence(search, columns, target, question.spec.word, np.unique(rows))
        return salient, list(zip(words.rows.tolist(), words.spans, scores.tolist(), strict=True))

    def available_methods(self) -> tuple[str, ...]:
        """Names of the methods that this index can answer."""
        return available_methods(self.index)

    def row_methods(self) -> tuple[str, ...]:
        """Names of those that score every training row from what is stored, without passes of the model over rows."""
        return tuple(name for name in self.available_methods() if not METHODS[name].by_model)

    def facts(self, spec: QuerySpec | Question) -> dict[str, Any]:
        """Everything that decides an answer, and what is known of its recall; see ``docs/``."""
        facts = question_facts(self.resolve(spec), by_scan=not self.models.memory.on_host)
        return facts | {"computed_on": self.models.computed_on()}

    def metadata(self, spec: QuerySpec | Question, **more: str | None) -> dict[str, str]:
        """The same, and more facts by name, for the Parquet schema's metadata: as JSON under the key ``forebear``."""
        facts = self.facts(spec) | {name: value for name, value in more.items() if value is not None}
        return {"forebear": json.dumps(facts, sort_keys=True, allow_nan=False)}


@dataclass(frozen=True)
class JointAnswers(Answers):
    """Answers of several indexes to a block of test rows: what holds of all of them, and the answers of each.

    Attributes:
        each: The answers of each index, in the order of the indexes.
        top: Rows at each end of the merged rankings, at most.
    """

    each: tuple[Answers, ...]
    top: int


class JointRetriever(Retriever):
    """Answers questions from several indexes of one model, as from one index of all their rows.

    Answers have a column ``index`` beside ``row``. Methods whose scores depend on the other rows of an index (``if``,
    ``rif``, ``rep``, ``tracin-tfidf`` and others) are refused. Beyond the head each index proposes its own candidates.

    Attributes:
        index: The first index.
        others: A retriever of each of the others.
    """

    def __init__(self, indexes: Sequence[Index | str | Path], **places: Any) -> None:
        """Open the indexes.

        Args:
            indexes: Two or more, open or by their folders.
            **places: ``model``, ``device`` and more, as of :class:`Retriever`.

        Raises:
            InputError: An index is given twice.
            MismatchError: They are not of one model.
        """
        first, *others = indexes
        super().__init__(first, **places)
        self.others = tuple(Retriever(other, **places) for other in others)
        check_one_model(self._indexes)

    @property
    def _indexes(self) -> list[Index]:
        return [self.index, *(other.index for other in self.others)]

    @override
    def resolve(self, spec: QuerySpec | Question, **changes: Unpack[QueryChoices]) -> Question:
        question = super().resolve(spec, **changes)
        for other in self.others:
            other.resolve(question.spec)
        check_question(question, self._indexes[1:])
        return question

    @override
    def asked_together(self, source: RowSource, spec: QuerySpec | Question, block_rows: int = QUERY_BLOCK_ROWS) -> int:
        question = self.resolve(spec)
        sizes = [other.asked_together(source, question.spec, block_rows) for other in self.others]
        return min(super().asked_together(source, question, block_rows), *sizes)

    @override
    def answers(
        self,
        source: RowSource,
        spec: QuerySpec | Question,
        *,
        block_rows: int = QUERY_BLOCK_ROWS,
        starts: Collection[int] | None = None,
    ) -> Iterator[Answers]:
        question = self.resolve(spec)
        how: Any = {"block_rows": self.asked_together(source, question, block_rows), "starts": starts}
        streams = [super().answers(source, question, **how)]
        streams += [other.answers(source, question.spec, **how) for other in self.others]
        for each in zip(*streams, strict=True):
            first = each[0]
            yield JointAnswers(
                first.start, first.labels, first.predictions, first.targets, first.rankings, each, question.spec.top
            )

    @override
    def tables(self, answers: Answers) -> Iterator[pa.Table]:
        assert isinstance(answers, JointAnswers)
        own, *others = answers.each
        tables = [pa.concat_tables(super().tables(own))]
        tables += [pa.concat_tables(r.tables(a)) for r, a in zip(self.others, others, strict=True)]
        yield merge_tables(self._indexes, tables, answers.top)

    @override
    def groups(self, source: RowSource, spec: QuerySpec | Question, column: str) -> Iterator[pa.Table]:
        raise InputError("--group-by sums the scores of one index's rows. Ask one index.")

    @override
    def facts(self, spec: QuerySpec | Question) -> dict[str, Any]:
        question = self.resolve(spec)
        return super().facts(question) | {"indexes": [other.facts(question.spec) for other in self.others]}
