"""Proposes the training rows that may score highest and lowest beyond the head; the model then scores these exactly.

Sketches of the gradients themselves propose candidates for ``gd``, ``gc`` and ``tracin``; sketches of the gradients
whitened by the index's curvature propose them for ``if`` and ``rif``. Under another H^-1 than the whitened sketches'
own, candidates for ``if`` come from a sketch of the solution H^-1 g beside the rows' plain sketches. ``rif`` divides by
the rows' lengths under H^-1 too, so it takes the candidates of the solution's sketch and those of the whitened ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.sketches.candidates import propose
from forebear.indexer.sketches.estimates import Part, Proposal
from forebear.indexer.sketches.fitting import gradient_files, open_sketcher
from forebear.indexer.sketches.sketch import Sketcher, SketchRows, sketch_rows
from forebear.retriever.deep.query_gradients import Queries, QueryGradients
from forebear.retriever.question.kept import size_of
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import N_VARIANTS
from forebear.retriever.question.recall import UNWHITENED, same_as


@dataclass(frozen=True)
class Listed:
    """Candidates at one end of the ranking of each test row.

    Attributes:
        rows: Row numbers, ``(q, m)``.
        reach: The most that each score can be, if its error is an allowed one; at the opponents' end of scores times
            -1. By falling reach, ``(q, m)``; None: all are to be scored.
    """

    rows: np.ndarray
    reach: np.ndarray | None = None

    @classmethod
    def by_reach(cls, rows: np.ndarray, reach: np.ndarray) -> Listed:
        """Rows ``(q, m)`` in the order of their reach."""
        order = np.argsort(-reach, axis=1, kind="stable")
        return cls(np.take_along_axis(rows, order, axis=1), np.take_along_axis(reach, order, axis=1))

    def take(self, queries: np.ndarray) -> Listed:
        """Those of some test rows."""
        return Listed(self.rows[queries], None if self.reach is None else self.reach[queries])

    @classmethod
    def join(cls, parts: Sequence[Listed]) -> Listed:
        """Those of some test rows after those of others, which list as many."""
        reaches = [part.reach for part in parts if part.reach is not None]
        return cls(np.concatenate([part.rows for part in parts]), np.concatenate(reaches) if reaches else None)


class Candidates:
    """Proposes rows, or stored spans, of one index at one scope."""

    def __init__(self, gradients: QueryGradients) -> None:
        """Set up without opening a sketcher; each is opened when a question first needs it.

        Args:
            gradients: Gradients of test rows over the scope, with the curvature that the question asks for.
        """
        self._gradients, self._index, self._scope = gradients, gradients.index, gradients.scope

    @property
    def _solver(self) -> str:
        return self._gradients.curvature.at(self._scope)

    def sketched(self, method: Method) -> list[tuple[int, float]]:
        """Numbers and weights of the checkpoints whose sketches propose candidates.

        A method over variants of the last checkpoint takes that checkpoint's sketches: variants have none stored.
        """
        return [(self._gradients.last, float(N_VARIANTS))] if method.variants else self._gradients.checkpoints(method)

    def white_number(self) -> int | None:
        """Number of the damping whose whitened sketches propose candidates for ``if`` and ``rif``.

        None where no whitened sketches do: the index has none, or H is the identity.

        Raises:
            InputError: EK-FAC is asked for at a damping that the index has no whitened sketches of.
        """
        if not self._index.manifest.spec.whitened or self._solver == "identity":
            return None
        if self._solver != "ekfac":
            return 0
        return self._index.ekfac_damping(self._scope, self._gradients.curvature.damping)[0]

    def by_pass(self, methods: Sequence[Method], queries: Queries) -> bool:
        """Whether a pass over the texts of test rows gives their sketches, so that no whole gradient is held.

        It does not where sketches are those of sums over groups of test rows, of vectors that were given, or of
        solutions H^-1 g.
        """
        is_summed = queries.vectors is not None or queries.groups is not None
        return not is_summed and not any(self._from_solutions(method) for method in methods)

    def parts(
        self, methods: Sequence[Method], queries: Queries, *, spans: bool = False, by_pass: bool = False
    ) -> dict[str, list[Part]]:
        """Sketches of the test rows beside those of the training rows, for each method.

        Args:
            methods: Methods that compare gradients.
            queries: Test rows; those whose whole gradients do not fit in memory together only :meth:`by_pass`.
            by_pass: Whether a pass over the texts makes their sketches, instead of their whole gradients.
            spans: Whether the other side is the sketches of all stored spans, at the last checkpoint, instead of
                those of the training rows.
        """
        sketches: dict[tuple[int, int | None], SketchRows] = {}
        for number in sorted({number for method in methods for number, _ in self.sketched(method)}):
            wanted = sorted({kind for m in methods for kind in self._kinds(m) if kind[0] == number}, key=str)
            sketchers = [self._sketcher(*kind) for kind in wanted]
            if not sketchers:
                continue
            classifier = self._gradients.models.classifier(number)
            if by_pass:
                tokens = classifier.batch_tokens()
                rows, _ = sketch_rows(classifier, sketchers, queries.texts, queries.targets, batch_tokens=tokens)
            else:
                vectors = self._gradients.at_checkpoint(number, queries)
                rows = [sketcher.of_matrix(vectors, classifier.device) for sketcher in sketchers]
            sketches |= dict(zip(wanted, rows, strict=True))
        out = {}
        for method in methods:
            kinds = self._kinds(method)
            if not kinds:
                out[method.name] = [self._solution_part(queries, spans=spans)]
                continue
            weights = dict(self.sketched(method))
            out[method.name] = [
                Part(
                    weights[number],
                    sketches[number, white],
                    self._index.gradients(self._scope, number, white, spans=spans),
                )
                for number, white in kinds
            ]
        return out

    def _solution_part(self, queries: Queries, *, spans: bool) -> Part:
        """Sketches of the solution H^-1 g of each test row, beside the plain sketches of the training rows."""
        solved = {name: v.float() for name, v in self._gradients.solutions(queries)[0].items()}
        sketched = self._sketcher(self._gradients.last, None).of_matrix(
            solved, self._gradients.models.classifier().device
        )
        return Part(1.0, sketched, self._index.gradients(self._scope, spans=spans))

    def propose(
        self,
        methods: Sequence[Method],
        queries: Queries,
        widths: dict[str, int],
        *,
        spans: bool = False,
        by_pass: bool = False,
        errors: Mapping[str, float] | None = None,
    ) -> dict[str, tuple[Listed, Listed]]:
        """Candidates at the proponents' end and at the opponents', by method name.

        Args:
            methods: Methods that compare gradients.
            queries: As of :meth:`parts`.
            widths: Number of candidates at each end from each sketch, by method name; more than there are live rows
                (or spans) means all of them.
            spans: Whether to propose entries of the index's store of spans instead of rows.
            by_pass: As of :meth:`parts`.
            errors: By method name, how far a score may be beyond its estimate, in units of :meth:`Proposal.units`.
                Candidates of other methods have no reach.
        """
        live = self._index.live_spans if spans else self._index.live
        memory = self._gradients.models.memory
        out = {}
        parts = self.parts(methods, queries, spans=spans, by_pass=by_pass)
        for method in methods:
            name, width = method.name, min(len(live), widths[method.name])
            proposal = self.proposal(method)
            ends = [propose(parts[name], live, width, proposal, memory)]
            if errors is not None and name in errors:
                units = (proposal.units(parts[name], rows) for rows, _ in ends[0])
                first, last = (
                    Listed.by_reach(rows, sign * estimates + errors[name] * of_rows)
                    for (rows, estimates), of_rows, sign in zip(ends[0], units, (1.0, -1.0), strict=True)
                )
                out[name] = first, last
                continue
            if self._from_solutions(method) and self._kinds(method):
                proposal = self._index.proposal(self._scope, UNWHITENED[name], cosine=method.metric == "cos")
                ends.append(propose([self._solution_part(queries, spans=spans)], live, width, proposal, memory))
            high, low = (Listed(np.concatenate([both[end][0] for both in ends], axis=1)) for end in (0, 1))
            out[name] = high, low
        return out

    def proposal(self, method: Method) -> Proposal:
        """The calibrated rule by which a method's candidates are chosen from its :meth:`parts`."""
        name = same_as(self._index, self._scope, method, self._gradients.curvature)
        if method.query == "preconditioned" and not self._kinds(method):
            name = UNWHITENED[method.name]
        return self._index.proposal(self._scope, name, cosine=method.metric == "cos")

    def _sketcher(self, number: int, white: int | None) -> Sketcher:
        """The sketcher of a checkpoint's gradients, plain (None) or whitened with the damping of number ``white``."""
        models = self._gradients.models

        def make() -> Sketcher:
            name, spec = self._index.manifest.checkpoints[number].name, self._index.manifest.spec
            files = gradient_files(spec, self._scope, name, last=number == self._gradients.last)
            self._index.checked(*map(self._index.manifest.fitted_name, files))
            classifier = models.classifier(number)
            return open_sketcher(self._index.fit_folder, classifier, spec, self._scope, name, white)

        def size(sketcher: Sketcher) -> int:
            return size_of(vars(sketcher.projector)) + size_of(sketcher.reduction.on(models.classifier(number).device))

        return models.kept.get(("sketcher", self._scope, number, white), make, size=size)

    def _from_solutions(self, method: Method) -> bool:
        """Whether sketches of H^-1 g propose candidates, because the whitened sketches are of another H^-1."""
        if method.query != "preconditioned" or self._solver == "identity":
            return False
        return self._solver != "ekfac" or self.white_number() is None

    def _kinds(self, method: Method) -> list[tuple[int, int | None]]:
        """Numbers of the checkpoint and of the damping (None: plain) of each kind of sketches that a method compares.

        Empty where the sketches of H^-1 g alone propose the method's candidates.
        """
        white = self.white_number() if method.query == "preconditioned" else None
        if self._from_solutions(method) and (method.metric == "dot" or white is None):
            return []
        return [(number, white) for number, _ in self.sketched(method)]
