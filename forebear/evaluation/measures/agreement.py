"""Do the rows and spans at the top mean what the query means, and bear its label? (Span paper, Table 3)

Sag@K = 100/K sum over the top K of cos(e_n, e_q). For methods that compare spans, e = emb(x) - emb(x(-span)): the row's
retrieved span, and the test row's span, which is given or the one of largest importance. The latter also for `if+` and
`tracin+`, whose scores ignore it: what they find is measured against the same thing. For other methods e = emb(x).
emb is the state of the start token after the last encoder layer, before any pooler. A cosine with a zero vector is 0.

Lag@K = 100/K sum over the top K of [y_n = y_q], y_q the target whose loss is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from forebear.errors import InputError, ModelError, NonFiniteError
from forebear.evaluation.common.queries import QueryRows, refuse_saliency
from forebear.evaluation.common.span_queries import training_spans
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import Fetched, one_late
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.encoding import Encoded, Texts, encoded_rows, plan_batches
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.rows.sampling import live_sample
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.text import Span
from forebear.ratio import ratio
from forebear.retriever.answers.results import Answers
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.spans.rows import query_spans

Measure = Literal["semantic", "label"]
PAPER_METHODS = ("if", "if+", "if++", "tracin-f", "tracin+", "tracin++")
RANDOM_ROWS, RANDOM_SPANS = "(random rows)", "(random spans)"
POOL_ROWS = 1000  # random rows, or spans, that each query draws its own from
SHOWN_QUERIES = 3
BLOCK_ROWS = 128  # test rows that are asked about together
LABELLED_ROWS = 1024  # training rows whose spans are found together, where only their labels are wanted
SHOWN_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A query and what each method finds for it: training rows, their spans and their scores."""

    row: int
    texts: tuple[str, ...]
    span: Span | None
    results: dict[str, list[tuple[int, Span | None, float]]]  # by method


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Sag@K or Lag@K of every query.

    Attributes:
        measure: ``semantic`` (Sag) or ``label`` (Lag).
        methods: Names of the methods, ``m``.
        at: The depths K, ascending.
        values: Sag@K or Lag@K in percent, ``(q, m, len(at))``.
        controls: What random rows (where a method ranks rows) and random spans (where a method ranks spans) reach,
            ``(q, len(at))`` by control. For labels it is the share of the label among all live rows, or their spans.
        rows: Numbers of the test rows, ``(q,)``.
        targets: Class ids y_q of the test rows, ``(q,)``.
        residuals: Largest relative residual of H^-1 by method, where a solver iterated.
        shown: The first queries, with what each method finds for them.
        n_unread: Number of training spans that the model does not read; the largest such number of any query.
    """

    measure: Measure
    methods: tuple[str, ...]
    at: tuple[int, ...]
    values: np.ndarray
    controls: dict[str, np.ndarray]
    rows: np.ndarray
    targets: np.ndarray
    residuals: dict[str, float]
    shown: tuple[Shown, ...]
    n_unread: int

    @property
    def name(self) -> str:
        """Sag or Lag."""
        return "Sag" if self.measure == "semantic" else "Lag"

    def columns(self, k: int) -> dict[str, np.ndarray]:
        """Values at the ``k``-th of ``at`` by method, controls first, ``(q,)`` each."""
        controls = {name: values[:, k] for name, values in self.controls.items()}
        return controls | {name: self.values[:, i, k] for i, name in enumerate(self.methods)}


def depths(at: Sequence[int]) -> tuple[int, ...]:
    """The depths K, each once, ascending.

    Raises:
        InputError: A depth is below 1, or there are more than a chart shows.
    """
    distinct = tuple(sorted(set(at)))
    if not distinct or distinct[0] < 1 or len(distinct) > 6:
        raise InputError(f"--at {','.join(map(str, at))}: expected one to six numbers of at least 1, such as 10,100.")
    return distinct


def measure_agreement(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    at: Sequence[int],
    measure: Measure,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Agreement:
    """Sag@K or Lag@K of the question's methods, for each query.

    Args:
        retriever: Over the index.
        queries: Test rows, from :func:`~forebear.evaluation.common.span_queries.sample_span_queries`.
        spec: The question, with ``top`` the largest K.
        at: The depths K, ascending.
        measure: ``semantic`` or ``label``.
        seed: Random seed of the rows and spans that the methods are compared with.
        progress: Called with the stage, queries done and queries in all.

    Raises:
        InputError: K is larger than the number of live rows or of spans found, or a method explains the saliency of a
            word, which has no meaning of its own.
        ModelError: The model does not give its last states.
    """
    question = retriever.resolve(spec)
    methods = question.methods
    n_live = retriever.index.manifest.n_live
    if at[-1] > n_live:
        raise InputError(f"--at {at[-1]}: {retriever.index.folder} has {n_live:,} live rows. Give a smaller K.")
    if measure == "semantic":
        refuse_saliency(question)
    kinds = sorted({RANDOM_SPANS if m.ranks_spans else RANDOM_ROWS for m in methods})
    pools: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    if measure == "semantic":
        pools = {k: _random_states(retriever, question, at[-1], seed, by_spans=k == RANDOM_SPANS) for k in kinds}
    else:
        labels = {k: _labels_of_all(retriever, question, by_spans=k == RANDOM_SPANS) for k in kinds}
    values: list[np.ndarray] = []
    controls: list[dict[str, np.ndarray]] = []
    targets: list[np.ndarray] = []
    residuals: dict[str, float] = {}
    shown: list[Shown] = []
    n_unread = 0
    progress("queries", 0, len(queries))
    for block in queries.blocks(BLOCK_ROWS):
        forward = run_forward(retriever.classifier(), block.texts)
        answers = retriever.answer_block(
            0, block.texts, block.labels, question, forward=forward, table=block.table,
            numbers=block.rows.tolist(),
        )  # fmt: skip
        targets.append(answers.targets)
        if measure == "label":
            labels_at_top = [retriever.index.labels[answers.rankings[m.name][0].rows] for m in methods]
            agreements = (np.stack(labels_at_top, axis=1) == answers.targets[:, None, None]).astype(np.float64)
            shares = {
                name: (row_labels == answers.targets[:, None]).mean(axis=1) for name, row_labels in labels.items()
            }
            controls.append({name: 100.0 * np.stack([share] * len(at), axis=1) for name, share in shares.items()})
        else:
            query_states = _query_states(retriever, block, answers.targets, forward.logits, question)
            agreements = np.stack(_cosines(retriever, answers, methods, query_states), axis=1)
            controls.append({
                name: _top_means(
                    _random_cosines(pool, query_states[name == RANDOM_SPANS], block.rows, at[-1], seed), at
                )
                for name, pool in pools.items()
            })  # fmt: skip
        values.append(_top_means(agreements, at))
        for name, (top, _) in answers.rankings.items():
            if top.n_cut is not None:
                n_unread = max(n_unread, int(top.n_cut.max()))
            if top.convergence is not None:
                residuals[name] = max(residuals.get(name, 0.0), top.convergence.worst)
        shown += [_shown(block, answers, i) for i in range(min(len(block), SHOWN_QUERIES - len(shown)))]
        progress("queries", sum(map(len, targets)), len(queries))
    return Agreement(
        measure=measure,
        methods=tuple(m.name for m in methods),
        at=tuple(at),
        values=np.concatenate(values),
        controls={name: np.concatenate([part[name] for part in controls]) for name in controls[0]},
        rows=queries.rows,
        targets=np.concatenate(targets),
        residuals=residuals,
        shown=tuple(shown),
        n_unread=n_unread,
    )


def _top_means(values: np.ndarray, tops: Sequence[int]) -> np.ndarray:
    """Mean over the first K of the last axis, in percent, for each K."""
    return np.stack([100.0 * values[..., :k].mean(axis=-1) for k in tops], axis=-1)


def start_states(classifier: Classifier, texts: Texts) -> np.ndarray:
    """emb(x): state of the start token after the last encoder layer, before any pooler, ``(n, h)`` float64.

    Raises:
        ModelError: The model does not give its last states.
        NonFiniteError: One of them is NaN or infinite.
    """
    rows = encoded_rows(classifier, texts)
    encoder = classifier.model.base_model
    assert isinstance(encoder, torch.nn.Module)
    lengths = [len(row["input_ids"]) for row in rows]

    def run(batch: list[int]) -> Fetched:
        with torch.no_grad(), classifier.arithmetic():
            output = encoder(**pad_batch(classifier.tokenizer, [rows[i] for i in batch], classifier.device))
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise ModelError(
                f"{classifier.name}: {type(encoder).__name__} does not give the states of its last layer, so rows have "
                "no embedding. label-agreement needs none."
            )
        return Fetched(states[:, 0].double())

    plan = plan_batches(lengths, classifier.batch_tokens(), equal_lengths=classifier.equal_lengths)
    out = list(one_late(run_batches(plan, run, lengths=lengths, device=classifier.device)))
    states = np.concatenate([batch_states for _, (batch_states,) in out])
    ordered = np.empty_like(states)
    ordered[[i for batch, _ in out for i in batch]] = states
    if not np.isfinite(ordered).all():
        raise NonFiniteError(f"{classifier.name}: the state of a start token is NaN or infinite. Check the model.")
    return ordered


def differences(classifier: Classifier, encoded: Encoded) -> np.ndarray:
    """emb(x) - emb(x(-span)) of rows with masked versions, ``(n, h)``."""
    assert encoded.minus is not None
    whole, masked = (start_states(classifier, Encoded(rows)) for rows in (encoded.rows, encoded.minus))
    return np.asarray(whole - masked)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """cos of vectors along the last axis, broadcast over the others; 0 where one of them is zero."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    dots = (first * second).sum(axis=-1)
    return ratio(dots, lengths)


def _query_states(
    retriever: Retriever, block: QueryRows, targets: np.ndarray, logits: np.ndarray, question: Question
) -> dict[bool, np.ndarray]:
    """e_q of test rows, ``(q, h)``: of the whole row (False), and of its span (True) where a method compares spans."""
    classifier = retriever.classifier()
    states = {False: start_states(classifier, block.texts)}
    if any(m.spans for m in question.methods):
        find = question.query_finder(classifier.device)
        _, encoded = query_spans(classifier, block.texts, block.table, targets, logits, find, block.rows.tolist())
        states[True] = differences(classifier, encoded)
    return states


def _cosines(
    retriever: Retriever, answers: Answers, methods: Sequence[Method], query_states: dict[bool, np.ndarray]
) -> list[np.ndarray]:
    """cos(e_n, e_q) of the proponents of each method, ``(q, k)``; every row and span goes through the model once."""
    classifier, index = retriever.classifier(), retriever.index
    tops = [answers.rankings[m.name][0] for m in methods]
    rows = np.unique(np.concatenate([top.rows.reshape(-1) for top in tops]))
    whole = start_states(classifier, index.text_lists(rows))
    keys = [_keys(top.rows, top.spans) for top in tops]
    entries = sorted({key for method_keys in keys for key in method_keys})
    masked = np.empty((0, whole.shape[1]))
    if entries:
        owners = np.array([row for row, _ in entries])
        encoded, read = mask_spans(classifier, index.text_lists(owners), [span for _, span in entries])
        assert read.all()
        assert encoded.minus is not None
        masked = start_states(classifier, Encoded(encoded.minus))
    place = {key: i for i, key in enumerate(entries)}
    cosines_of_methods = []
    for method, top, method_keys in zip(methods, tops, keys, strict=True):
        e = whole[np.searchsorted(rows, top.rows)]
        if method.spans:
            e = e - masked[[place[key] for key in method_keys]].reshape(e.shape)
        cosines_of_methods.append(cosines(e, query_states[bool(method.spans)][:, None, :]))
    return cosines_of_methods


def _keys(rows: np.ndarray, spans: list[list[Span]] | None) -> list[tuple[int, Span]]:
    """Row and span of each result, query by query; none where rows are ranked."""
    if spans is None:
        return []
    pairs = zip(rows.tolist(), spans, strict=True)
    return [key for numbers, row_spans in pairs for key in zip(numbers, row_spans, strict=True)]


def _random_states(retriever: Retriever, question: Question, k: int, seed: int, *, by_spans: bool) -> np.ndarray:
    """e of random live rows, or of random spans of such rows, ``(pool, h)``; each query draws K of them.

    Raises:
        InputError: There are fewer than ``k`` spans.
    """
    classifier, index = retriever.classifier(), retriever.index
    size = max(k, POOL_ROWS)
    if not by_spans:
        return start_states(classifier, index.text_lists(live_sample(index.live, size, seed)))
    entries = training_spans(retriever, question, live_sample(index.live, size, seed))
    chosen = live_sample(np.arange(len(entries.rows)), size, seed)
    if len(chosen) < k:
        raise InputError(f"--at {k}: {len(chosen)} spans were found in the training rows. Give a smaller K.")
    return differences(classifier, entries.encoded.take(chosen))


def _labels_of_all(retriever: Retriever, question: Question, *, by_spans: bool) -> np.ndarray:
    """Labels of all live rows; or, with ``by_spans``, for each span of a live row the label of its row."""
    index = retriever.index
    if not by_spans:
        return np.asarray(index.labels[index.live])
    if question.spans_are_stored:
        return np.asarray(index.labels[index.spans().rows[index.live_spans]])
    blocks = [index.live[start : start + LABELLED_ROWS] for start in range(0, len(index.live), LABELLED_ROWS)]
    return np.concatenate([index.labels[training_spans(retriever, question, rows).rows] for rows in blocks])


def _random_cosines(pool: np.ndarray, query_states: np.ndarray, rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """cos(e_n, e_q) of ``k`` of the pool for each test row, drawn by its number, ``(q, k)``."""
    drawn = np.stack([np.random.default_rng([seed, row]).permutation(len(pool))[:k] for row in rows.tolist()])
    return cosines(pool[drawn], query_states[:, None, :])


def _shown(block: QueryRows, answers: Answers, i: int) -> Shown:
    results: dict[str, list[tuple[int, Span | None, float]]] = {}
    query_span = None
    for name, (top, _) in answers.rankings.items():
        spans: Sequence[Span | None] = [None] * top.rows.shape[1] if top.spans is None else top.spans[i]
        listed = zip(top.rows[i].tolist(), spans, top.scores[i].tolist(), strict=True)
        results[name] = list(listed)[:SHOWN_ROWS]
        query_span = query_span or (None if top.query_spans is None else top.query_spans[i])
    return Shown(
        row=int(block.rows[i]), texts=tuple(column[i] for column in block.texts), span=query_span, results=results
    )
