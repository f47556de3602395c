"""Choice of the words of training rows to replace, and of their substitutes (Joint, sections 4.2 and 4.3).

Rows are taken by their influence on the saliency s of a test row's salient word (``saliency-if``, eq. 5). In each row
the word that matters most for that influence (``saliency-if-token``, eq. 8) and a few random words are tried, with all
their WordNet synonyms (for a fix, antonyms too); the substitution that moves s furthest the wanted way is chosen.

Sign. A training step on a row of gradient g moves theta by -H^-1 g, so s by v . g with v = -H^-1 ds/dtheta. Replacing
the row moves s by v . (g_new - g_old), over the number of rows: positive raises s. (The sign of the
paper's eqs. 9 and 10 contradicts that of its eq. 7; here the effect on s decides.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.perturb.spec import (
    RANDOM,
    SALIENCY_IF,
    STRATEGIES,
    Aim,
    Change,
    PerturbationQueries,
    PerturbSpec,
)
from forebear.evaluation.perturb.wordnet import WordNet
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.model.encoding import Encoded, Texts, encode, encode_with_places
from forebear.indexer.spans.masking import mask_spans, pieces_of
from forebear.indexer.spans.text import Span, split_text
from forebear.retriever.deep.query_gradients import Queries as GradientQueries
from forebear.retriever.deep.search import VECTOR_BYTES, GradientSearch
from forebear.retriever.question.methods import METHODS
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.gradients import salient_gradients

CHUNK_QUERIES = 16
FIRST_WIDTH = 100  # rows of the rankings at first; more where many test rows share rows
GD = METHODS["gd"]  # with the query vector v it scores v . g
Progress = Callable[[str, int, int], None]
EncodedRow = dict[str, list[int]]


@dataclass(frozen=True)
class Place:
    """A word of a training row that can be replaced: the span in its text, and the words that may replace it."""

    span: Span
    word: str
    substitutes: tuple[str, ...]


class _Versions:
    """Versions of training rows in the form that :class:`GradientSearch` scores: texts and labels by position."""

    def __init__(self, rows: Sequence[EncodedRow], labels: np.ndarray) -> None:
        self._encoded, self._labels = Encoded(rows), labels

    def texts(self, positions: np.ndarray) -> Texts:
        return self._encoded.take(positions)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self._labels[positions])


class Chooser:
    """Chooses the words to replace in the rows of an index, for the test rows of a perturbation.

    Attributes:
        residual: Largest relative residual of H^-1 so far, where the solver iterates; else None.
    """

    def __init__(
        self,
        retriever: Retriever,
        spec: PerturbSpec,
        queries: PerturbationQueries,
        wordnet: WordNet,
        progress: Progress = lambda _stage, _done, _total: None,
    ) -> None:
        """Check the choices and open the search over the index's gradients.

        Args:
            retriever: Over the index.
            spec: Strategies, numbers of rows and words, scope and curvature.
            queries: The test rows.
            wordnet: The source of substitutes.
            progress: Called with the stage, queries done and queries in all.

        Raises:
            InputError: A choice is out of range, the index cannot answer it, or a test row has no text.
        """
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        spec.check()
        for number, texts in zip(queries.numbers, zip(*queries.texts, strict=True), strict=True):
            if not "".join(texts).strip():
                raise InputError(f"test row {number} is empty: it has no word to be salient. Leave it out.")
        question = retriever.resolve(spec.question)
        self._retriever, self._spec, self._queries, self._wordnet = retriever, spec, queries, wordnet
        self._index, self._classifier = retriever.index, retriever.classifier()
        self._search = GradientSearch.kept(retriever.models, spec.scope, question.curvature)
        self._progress, self._stop_words = progress, ENGLISH_STOP_WORDS
        self._places: dict[int, tuple[Place, ...]] = {}
        self._ranked: dict[tuple[Aim, int], np.ndarray] = {}
        self.residual: float | None = None

    def texts(self, row: int) -> tuple[str, ...]:
        """Texts of a training row."""
        return tuple(column[0] for column in self._index.text_lists(np.array([row])))

    def places(self, row: int) -> tuple[Place, ...]:
        """Words of a training row that can be replaced, in order: words that the model reads and that have substitutes.

        Stop words are not replaced: WordNet has only unrelated senses of them ("a": ampere, "in": indium).
        """
        if row not in self._places:
            texts = self.texts(row)
            _, encoded = encode_with_places(self._classifier, [[text] for text in texts])
            replaceable = []
            for column, text in enumerate(texts):
                for start, end in split_text(text, "words"):
                    word, span = text[start:end], Span(column, start, end)
                    if word.lower() in self._stop_words or not any(pieces_of(encoded, 0, span)):
                        continue
                    if substitutes := self._wordnet.substitutes(word, antonyms=self._spec.what == "fix"):
                        replaceable.append(Place(span, word, substitutes))
            self._places[row] = tuple(replaceable)
        return self._places[row]

    def choose(self, strategy: str) -> list[list[Change]]:
        """The changes of a strategy.

        In a first turn each test row, one after the other, takes the first training row of its ranking that no test row
        has taken and in which a word can be replaced; in a second turn each takes another, and so on. So no row is
        changed twice, and the changes for 2 rows a query are the first ones of the changes for 6.

        Returns:
            One list of q changes for each of the ``spec.most`` turns.

        Raises:
            InputError: There are too few rows in which a word can be replaced.
        """
        aims = STRATEGIES[self._spec.what][strategy]
        q, most = len(self._queries.numbers), self._spec.most
        width = max(FIRST_WIDTH, 4 * most)
        while (turns := self._allocate(aims, width)) is None:
            if width >= self._index.manifest.n_live:
                raise InputError(
                    f"{q} test rows with {most} rows each take {q * most} training rows; the index has fewer in which "
                    "a word can be replaced. Give smaller --rows, or fewer --queries.",
                    of="perturb attack",
                )
            width *= 2
        out: list[list[Change]] = [[] for _ in turns]
        for number, aim in enumerate(aims[:most]):
            out[number :: len(aims)] = self._change(aim, turns[number :: len(aims)])
        return out

    def choose_random(self, seed: int) -> list[list[Change]]:
        """Changes of random words of random rows to random substitutes, equally many and in equally many turns.

        Raises:
            InputError: There are too few rows in which a word can be replaced.
        """
        rng = np.random.default_rng([seed, 17])
        n_queries, most = len(self._queries.numbers), self._spec.most
        changes: list[Change] = []
        for row in rng.permutation(self._index.live).tolist():
            if len(changes) == n_queries * most:
                break
            if places := self.places(row):
                place = places[rng.integers(len(places))]
                substitute = place.substitutes[rng.integers(len(place.substitutes))]
                changes.append(self._changed(row, place, substitute))
        if len(changes) < n_queries * most:
            raise InputError(
                f"{n_queries * most} random changes: only {len(changes)} training rows have a word that can be "
                "replaced. Give smaller --rows, or fewer --queries.",
                of="perturb attack",
            )
        return [changes[j * n_queries : (j + 1) * n_queries] for j in range(most)]

    def _allocate(self, aims: Sequence[Aim], width: int) -> list[list[int]] | None:
        """A row for each query and turn; None if the first ``width`` rows of the rankings are not enough."""
        rankings = [self._rankings(aim, width) for aim in aims[: self._spec.most]]
        taken: set[int] = set()
        turns: list[list[int]] = []
        for turn in range(self._spec.most):
            turns.append([])
            for ranked in rankings[turn % len(aims)]:
                row = next((row for row in ranked.tolist() if row not in taken and self.places(row)), None)
                if row is None:
                    return None
                taken.add(row)
                turns[-1].append(row)
        return turns

    def _rankings(self, aim: Aim, width: int) -> np.ndarray:
        """Training rows by influence on the saliency of each query's salient word, ``(q, width)``; kept for reuse."""
        if (aim, width) not in self._ranked:
            targets = self._queries.targets(aim)
            # The target stands in as the gold label.
            question = self._retriever.resolve(self._spec.question, top=width, target="gold")
            out = np.empty((len(targets), min(width, self._index.manifest.n_live)), np.int64)
            for positions in self._chunks(np.arange(len(targets))):
                block = self._queries.take(positions)
                answers = self._retriever.answer_block(
                    0, block.texts, targets[positions], question, numbers=block.numbers.tolist()
                )
                out[positions] = answers.rankings[SALIENCY_IF][0 if aim.proponents else 1].rows
                self._progress(f"{aim.name}: rows", int(positions[-1]) + 1, len(targets))
            self._ranked[aim, width] = out
        return self._ranked[aim, width]

    def _chunks(self, positions: np.ndarray) -> list[np.ndarray]:
        """Positions of test rows in chunks whose vectors, before and after H^-1, fit in memory together."""
        search = self._search
        in_memory = VECTOR_BYTES // (4 * search.curvature.n_vectors(search.scope) * search.gradients.parameters.size)
        size = max(1, min(CHUNK_QUERIES, in_memory))
        return [positions[i : i + size] for i in range(0, len(positions), size)]

    def _change(self, aim: Aim, turns: list[list[int]]) -> list[list[Change]]:
        """A change of each row in ``turns`` (one row a query in each), in the same order."""
        q = len(self._queries.numbers)
        out: list[list[Change]] = [[] for _ in turns]
        for positions in self._chunks(np.arange(q)):
            changes = self._change_some(
                self._queries.take(positions), aim, [turn[i] for turn in turns for i in positions]
            )
            for j, turn_changes in enumerate(out):
                turn_changes += changes[j * len(positions) : (j + 1) * len(positions)]
            self._progress(f"{aim.name}: words", int(positions[-1]) + 1, q)
        return out

    def _change_some(self, queries: PerturbationQueries, aim: Aim, rows: list[int]) -> list[Change]:
        """The best change of each of the rows; row i belongs to query i modulo the number of queries."""
        n, targets = len(rows), queries.targets(aim)
        owners = np.arange(n) % len(targets)
        numbers = queries.numbers.tolist()
        parameters = self._search.gradients.parameters
        salient, vectors = salient_gradients(self._classifier, parameters, queries.texts, targets, None, numbers)
        solved = self._solved(queries, targets, vectors)
        texts = [self.texts(row) for row in rows]
        labels = self._index.targets(np.asarray(rows))

        words = [(i, place) for i, row in enumerate(rows) for place in self.places(row)]
        line_of_word = np.array([i for i, _ in words])
        masked, _ = mask_spans(
            self._classifier,
            _columns([texts[i] for i in line_of_word]),
            [place.span for _, place in words],
            unknown=True,
        )
        assert masked.minus is not None and len(masked) == len(words)  # every place is read by the model
        whole = encode(self._classifier, _columns(texts))
        everything = np.concatenate([np.arange(n), line_of_word])
        scores = self._score(solved, [*whole, *masked.minus], labels[everything], owners[everything])
        before, importance = scores[:n], scores[line_of_word] - scores[n:]  # saliency-if, saliency-if-token

        tried: list[tuple[int, Place, str]] = []
        for i, row in enumerate(rows):
            candidates = np.flatnonzero(line_of_word == i)
            first = candidates[np.argmax(importance[candidates] if aim.proponents else -importance[candidates])]
            rng = np.random.default_rng([self._spec.seed, 19, int(queries.numbers[owners[i]]), row])
            random_words = rng.permutation(np.setdiff1d(candidates, first))[: self._spec.random_words]
            tried += [
                (i, words[j][1], substitute) for j in (first, *random_words) for substitute in words[j][1].substitutes
            ]
        line_of_word = np.array([i for i, _, _ in tried])
        changed = [_replaced(texts[i], place.span, substitute) for i, place, substitute in tried]
        after = self._score(
            solved, encode(self._classifier, _columns(changed)), labels[line_of_word], owners[line_of_word]
        )
        effects = after - before[line_of_word]
        out = []
        for i, row in enumerate(rows):
            candidates = np.flatnonzero(line_of_word == i)
            best = candidates[np.argmax(aim.sign * effects[candidates])]
            query = owners[i]
            change = self._changed(row, *tried[best][1:])
            out.append(
                replace(
                    change, query=int(queries.numbers[query]), aim=aim.name, salient=salient[query],
                    score=float(before[i]), effect=float(effects[best]),
                )
            )  # fmt: skip
        return out

    def _solved(self, queries: PerturbationQueries, targets: np.ndarray, vectors: Vectors) -> GradientQueries:
        """The queries with v = H^-1 of their vectors as query vectors."""
        solved, convergence = self._search.gradients.solve(vectors)
        if convergence is not None:
            self.residual = max(self.residual or 0.0, convergence.worst)
        return GradientQueries(queries.texts, targets, solved)

    def _score(
        self, queries: GradientQueries, rows: Sequence[EncodedRow], labels: np.ndarray, owners: np.ndarray
    ) -> np.ndarray:
        """v . g of versions of training rows, each with the vector v of the query that owns it, ``(m,)`` float64."""
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(queries.targets))
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        versions = np.zeros((len(counts), counts.max()), np.int64)  # short lists are filled up with version 0
        versions[owners[order], columns] = order
        search = self._search.over(_Versions(rows, labels))
        scores = search.score([GD], queries, {GD.name: versions})[0][GD.name]
        out = np.empty(len(rows))
        out[order] = scores[owners[order], columns]
        return out

    def _changed(self, row: int, place: Place, substitute: str) -> Change:
        """A random change: of a row, for no test row."""
        old = self.texts(row)
        return Change(
            query=None, aim=RANDOM, salient=None, row=row, label=int(self._index.labels[row]), span=place.span,
            word=place.word, substitute=substitute, old=old, new=_replaced(old, place.span, substitute),
            score=None, effect=None,
        )  # fmt: skip


def _replaced(texts: tuple[str, ...], span: Span, substitute: str) -> tuple[str, ...]:
    """Texts of a row with the characters of a span replaced."""
    text = texts[span.column]
    changed = text[: span.start] + substitute + text[span.end :]
    return (*texts[: span.column], changed, *texts[span.column + 1 :])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Texts by row as one list a text column."""
    return [list(column) for column in zip(*rows, strict=True)]
