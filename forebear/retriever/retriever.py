"""The retriever: ask which training rows made the model predict what it predicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from forebear.errors import DataError, InputError, MismatchError
from forebear.indexer.data import RowSource, rows_from_texts
from forebear.indexer.derived import ScanBlock, ScanTable, norms_of
from forebear.indexer.forward import Forward
from forebear.indexer.index import Index
from forebear.indexer.labels import LabelMap, label_map
from forebear.indexer.manifest import canonical_json
from forebear.indexer.model import Classifier
from forebear.retriever.certify import certify, check_certifiable
from forebear.retriever.curvature import CurvatureSpec
from forebear.retriever.gradients import Asked as DeepAsked
from forebear.retriever.gradients import GradientSearch
from forebear.retriever.methods import METHODS, Method, pick_methods
from forebear.retriever.queries import Asked, Models, ask, make_query, method_facts
from forebear.retriever.results import Answers, answer_table
from forebear.retriever.scoring import Query
from forebear.retriever.search import Ranking, RowFactors, search_ann, search_full, search_scan

Exactness = Literal["none", "rerank", "full"]
DEFAULT_METHODS = ("gc",)
QUERY_BLOCK_ROWS = 512
DEFAULT_CANDIDATES = 100  # where no calibration says how many a recall takes
RECALL = 0.98


@dataclass(frozen=True, kw_only=True)
class QuerySpec:
    """Every choice of a question that changes its answer.

    Attributes:
        methods: Names from the method table.
        top: Rows at each end of the ranking.
        target: Whose loss is explained: ``predicted``, ``gold``, or a label's name.
        exact: ``none`` (scores of the search itself), ``rerank`` (candidates scored exactly, the default) or
            ``full`` (every row scored exactly).
        scope: Parameters whose gradients are compared: ``head``, or a sketched scope of the index. Methods that do not
            compare gradients are the same at every scope.
        recall: Share of the exact top 10 that the candidates of a deeper scope should hold; their number follows from
            the index's calibration.
        candidates: That number itself: rows at each end that the sketches propose and the model scores exactly.
        certify: Prove each top k at a deeper scope, scoring as many rows as it takes.
        curvature: For ``if`` and ``rif``; see :class:`CurvatureSpec` for this and the next four.
        damping: See there.
        curvature_rows: See there.
        lissa: See there.
        tolerance: See there.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    top: int = 10
    target: str = "predicted"
    exact: Exactness = "rerank"
    scope: str = "head"
    recall: float = RECALL
    candidates: int | None = None
    certify: bool = False
    curvature: str | None = None
    damping: str | None = None
    curvature_rows: int = CurvatureSpec.rows
    lissa: str = CurvatureSpec.lissa
    tolerance: float = CurvatureSpec.tolerance

    @property
    def solver(self) -> CurvatureSpec:
        """The curvature that it asks for."""
        return CurvatureSpec(
            solver=self.curvature, damping=self.damping, rows=self.curvature_rows, lissa=self.lissa,
            tolerance=self.tolerance,
        )  # fmt: skip

    def scope_of(self, method: Method) -> str:
        """Where a method's gradients are compared."""
        return method.scope or self.scope

    def digest(self) -> str:
        """Name this question in results."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()

    def check(self) -> tuple[Method, ...]:
        """The methods, after refusing values that mean nothing."""
        if self.top < 1:
            raise InputError(f"--top {self.top}: expected at least 1.")
        if self.exact not in ("none", "rerank", "full"):
            raise InputError(f"--exact {self.exact!r}: expected none or rerank or full.")
        if self.candidates is not None and self.candidates < self.top:
            raise InputError(f"--candidates {self.candidates}: expected at least --top, {self.top}.")
        if not 0 < self.recall <= 1:
            raise InputError(f"--recall {self.recall}: expected a share above 0, at most 1.")
        if self.certify and self.exact != "rerank":
            raise InputError(f"--certify proves what --exact rerank finds; it has no meaning with {self.exact}.")
        self.solver.check()
        methods = pick_methods(self.methods)
        for method in methods:
            if method.query == "preconditioned":
                self.solver.at(self.scope_of(method))
        return methods


class Retriever:
    """Answers questions from one index.

    Example:
        >>> from forebear import Index, Retriever
        >>> retriever = Retriever(Index.open("runs/demo/index"))
        >>> table = retriever.retrieve([("The cat sat .", "A cat sat .")], methods=["gc", "if"], top=5)
        >>> table.to_pandas()
    """

    def __init__(
        self,
        index: Index | str | Path,
        *,
        model: str | Classifier | None = None,
        device: str = "auto",
    ) -> None:
        """Open a retriever; models are loaded at the first question.

        Args:
            index: An open index, or its folder.
            model: Where the model is now, if it has moved; it must match the index's fingerprint.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        """
        self.index = index if isinstance(index, Index) else Index.open(index)
        self._models = Models(self.index, model=model, device=device)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, by id."""
        return self.index.manifest.spec.label_names

    def classifier(self) -> Classifier:
        """The model that is explained."""
        return self._models.classifier()

    def retrieve(
        self,
        queries: Sequence[str] | Sequence[tuple[str, str]] | RowSource,
        *,
        methods: Sequence[str] = DEFAULT_METHODS,
        top: int = 10,
        target: str = "predicted",
        exact: Exactness = "rerank",
        scope: str = "head",
        **choices: Any,
    ) -> pa.Table:
        """The training rows at both ends of each query's ranking.

        Args:
            queries: Texts, pairs of texts, or rows opened by ``open_rows``.
            methods: Names from the method table.
            top: Rows at each end.
            target: ``predicted``, ``gold`` (queries need labels) or a label's name.
            exact: See :class:`QuerySpec`.
            scope: See :class:`QuerySpec`.
            **choices: ``recall``, ``candidates``, ``certify``, ``curvature``, ``damping``, ``curvature_rows``,
                ``lissa``, ``tolerance``; see :class:`QuerySpec`.

        Returns:
            One row a result; columns as DESIGN.md's section 5 lists them, provenance in the schema's metadata.

        Raises:
            InputError: A choice that means nothing, or texts that do not fit the index.
            CorruptIndexError: A stored file was altered.
        """
        spec = QuerySpec(methods=tuple(methods), top=top, target=target, exact=exact, scope=scope, **choices)
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        tables = [answer_table(self.index, answers) for answers in self.answers(source, spec)]
        return pa.concat_tables(tables).replace_schema_metadata(self.metadata(spec))

    def answers(self, source: RowSource, spec: QuerySpec, *, block_rows: int = QUERY_BLOCK_ROWS) -> Iterator[Answers]:
        """Stream answers, ``block_rows`` queries at a time, in bounded memory."""
        methods = spec.check()
        self.check_stores(methods, spec)
        self.check_texts(source)
        labels = self.query_labels(source, required=spec.target == "gold")
        for block in source.blocks(block_rows):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            yield self.answer_block(block.start, block.texts, gold, spec)

    def answer_block(
        self,
        start: int,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray | None,
        spec: QuerySpec,
        *,
        forward: Forward | None = None,
    ) -> Answers:
        """Answer one block of test rows; ``labels`` are class ids of the model, ``forward`` its pass if already run."""
        methods = spec.check()
        n_checkpoints = len(self.index.manifest.checkpoints)
        asked = ask(self._models, methods, texts, labels, spec.target, n_checkpoints, first_row=start, forward=forward)
        top = min(spec.top, self.index.manifest.n_live)
        found: dict[str, tuple[Ranking, Ranking]] = {}
        for scope, some in self._by_scope(methods, spec).items():
            if scope is None:
                found |= {m.name: self._search(m, asked, spec, top) for m in some}
            else:
                found |= self._deep(scope, some, DeepAsked([list(t) for t in texts], asked.targets), spec, top)
        found = {method.name: found[method.name] for method in methods}
        return Answers(start, labels, asked.forward.predictions, asked.targets, found)

    def _by_scope(self, methods: Sequence[Method], spec: QuerySpec) -> dict[str | None, list[Method]]:
        """Methods by the scope beyond the head at which they compare gradients; None: the others."""
        out: dict[str | None, list[Method]] = {}
        for method in methods:
            deep = method.representation == "head" and spec.scope_of(method) != "head"
            out.setdefault(spec.scope_of(method) if deep else None, []).append(method)
        return out

    def _gradient_search(self, scope: str, spec: QuerySpec) -> GradientSearch:
        return GradientSearch(self.index, self._models, scope, spec.solver)

    def _deep(
        self, scope: str, methods: Sequence[Method], asked: DeepAsked, spec: QuerySpec, top: int
    ) -> dict[str, tuple[Ranking, Ranking]]:
        search = self._gradient_search(scope, spec)
        if spec.certify:
            check_certifiable(search, methods)
        n_candidates = {m.name: self.n_candidates(scope, m, spec) for m in methods}
        found = search.search(methods, asked, top, exact=spec.exact, n_candidates=n_candidates)
        if spec.certify:
            n_live = self.index.manifest.n_live
            found = {m.name: certify(search, m, asked, found[m.name], max_rows=n_live) for m in methods}
        return found

    def n_candidates(self, scope: str, method: Method, spec: QuerySpec) -> int:
        """Rows at each end that are scored exactly for a method at a scope beyond the head."""
        if spec.candidates is not None:
            return spec.candidates
        found = self.index.calibrated(scope, method.name)
        if found is None:
            return max(spec.top, DEFAULT_CANDIDATES)
        return max(spec.top, candidates_for(found["candidates"], spec.recall, self.index.manifest.n_live))

    def scores(
        self,
        queries: Sequence[str] | Sequence[tuple[str, str]] | RowSource,
        method: str,
        *,
        target: str = "predicted",
        scope: str = "head",
        **choices: Any,
    ) -> np.ndarray:
        """Exact scores of every live training row, ``(q, n)`` float64, columns in the order of ``index.live``.

        For small sets, and as the yardstick: memory is q x n x 8 bytes.
        """
        spec = QuerySpec(methods=(method,), target=target, exact="full", scope=scope, **choices)
        (chosen,) = spec.check()
        self.check_stores((chosen,), spec)
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        self.check_texts(source)
        labels = self.query_labels(source, required=target == "gold")
        n_checkpoints = len(self.index.manifest.checkpoints)
        parts = []
        for block in source.blocks(QUERY_BLOCK_ROWS):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            asked = ask(self._models, (chosen,), block.texts, gold, target, n_checkpoints, first_row=block.start)
            (where,) = self._by_scope((chosen,), spec)
            if where is not None:
                search = self._gradient_search(where, spec)
                deep = DeepAsked([list(t) for t in block.texts], asked.targets)
                parts.append(search.score((chosen,), deep, {chosen.name: self.index.live})[0][chosen.name])
                continue
            query = make_query(chosen, asked, self.index, spec.solver)
            parts.append(self._factors(chosen).all_products(query))
        return np.concatenate(parts)

    def check_stores(self, methods: Sequence[Method], spec: QuerySpec) -> None:
        """Refuse methods whose representation the index does not hold, naming the option that builds it."""
        if any(method.store == "sbert" for method in methods):
            self.index.sentence()
        self.index.check_scope(spec.scope)
        for method in methods:
            scope = spec.scope_of(method)
            if method.representation == "head":
                self.index.check_scope(scope)
            if method.query == "preconditioned":
                solver = spec.solver.at(scope)
                if solver == "exact":
                    self.index.head_damping(spec.damping)
                elif scope != "head" and solver == "ekfac":
                    self.index.ekfac_damping(scope, spec.damping)
                elif scope != "head" and solver.startswith("cg"):
                    spec.solver.absolute(self.index, scope)

    def available_methods(self) -> tuple[str, ...]:
        """Names of the methods that this index can answer."""
        manifest = self.index.manifest
        has_curvature = "exact" in manifest.curvature.get("head", {})
        return tuple(
            method.name
            for method in METHODS.values()
            if method.store in manifest.spec.stores and (has_curvature or method.query != "preconditioned")
        )

    def check_texts(self, source: RowSource) -> None:
        """Refuse single texts for an index of pairs, and the other way round."""
        wanted = self.index.manifest.spec.text_columns
        if len(source.text_columns) != len(wanted):
            raise MismatchError(
                f"{source.name} gives {len(source.text_columns)} text(s) a row ({', '.join(source.text_columns)}); the "
                f"index was built from {len(wanted)} ({', '.join(wanted)}). Choose them by --text-columns or --pair."
            )

    def query_labels(self, source: RowSource, *, required: bool) -> LabelMap | None:
        """How the test rows' labels map onto the model's; None when there are none or, unless required, none fit."""
        if source.label_column is None and not required:
            return None
        try:
            return label_map(source, self.label_names, self.index.manifest.spec.label_mode)
        except DataError:
            if required:
                raise
            return None

    def metadata(self, spec: QuerySpec) -> dict[str, str]:
        """Provenance of an answer, for the Parquet schema's metadata, under the key ``forebear``."""
        methods = spec.check()
        facts: dict[str, Any] = {
            "index": str(self.index.folder),
            "index_digest": self.index.manifest.digest(),
            "spec_digest": self.index.manifest.spec.digest(),
            "query_digest": spec.digest(),
            "exact": spec.exact,
            "target": spec.target,
            "top": spec.top,
            "sign": "larger = proponent: training on the row supports the target label",
            "methods": {
                m.name: method_facts(m, self.index, spec.solver, spec.scope_of(m)) | self._search_facts(m, spec)
                for m in methods
            },
        }
        return {"forebear": json.dumps(facts, sort_keys=True)}

    def _search_facts(self, method: Method, spec: QuerySpec) -> dict[str, Any]:
        """Scope and recall of a method: proven, calibrated, or not known (None)."""
        scope = spec.scope_of(method)
        if scope == "head" or method.representation != "head":
            return {"recall": self._recall(method, spec)}
        if spec.exact != "rerank":
            return {"recall": 1.0 if spec.exact == "full" else None, "candidates": None}
        calibrated = self.index.calibrated(scope, method.name)
        n = self.n_candidates(scope, method, spec)
        n_live = self.index.manifest.n_live
        recall = None if calibrated is None else recall_of(calibrated["candidates"], n, n_live)
        return {"recall": recall, "candidates": n, "certify": spec.certify}

    def _recall(self, method: Method, spec: QuerySpec) -> float | None:
        """Recall of the exact top 10: calibrated, or 1 where the search proves its answer; None without re-ranking."""
        if spec.exact == "none":
            return None
        name = _ann_name(method)
        if spec.exact == "full" or name is None:
            return 1.0
        return float(self.index.manifest.derived[name]["recall"])

    def _search(self, method: Method, asked: Asked, spec: QuerySpec, top: int) -> tuple[Ranking, Ranking]:
        query = make_query(method, asked, self.index, spec.solver)
        factors = self._factors(method)
        if spec.exact == "full":
            return search_full(query, factors, top)
        rerank = spec.exact == "rerank"
        table = self._scan_table(method, query)
        name = _ann_name(method)
        if name is not None:
            return search_ann(query, self.index.ann(name), table, factors, top, rerank=rerank)
        return search_scan(query, table, factors, top, rerank=rerank)

    def _factors(self, method: Method) -> RowFactors:
        index = self.index
        if method.representation == "sentence":
            return RowFactors((index.sentence(),), (), index.live)
        if method.representation == "feature":
            return RowFactors((index.features(),), (), index.live)
        if method.all_checkpoints:
            numbers = range(len(index.manifest.checkpoints))
            features = tuple(index.features(c) for c in numbers)
            return RowFactors(features, tuple(index.residuals(c) for c in numbers), index.live)
        residuals = index.residuals()
        if method.query == "representer" and index.manifest.curvature["head"]["representer"]["refit"]:
            residuals = index.representer_residuals()
        return RowFactors((index.features(),), (residuals,), index.live)

    def _scan_table(self, method: Method, query: Query) -> ScanTable:
        index = self.index
        if method.representation == "sentence":
            return index.scan_table("sentence")
        if method.all_checkpoints and len(index.manifest.checkpoints) > 1:
            return index.scan_table("head-tracin")
        table = index.scan_table("head")
        if method.representation == "feature":
            return ScanTable(tuple(ScanBlock(b.rows, b.features, (), b.feature_norms, ()) for b in table.blocks))
        if method.query == "representer" and query.terms[0].offset:
            refitted = index.representer_residuals()

            def swap(block: ScanBlock) -> ScanBlock:
                r = refitted.take(block.rows).astype(np.float32)
                return ScanBlock(
                    block.rows, block.features, (r,), block.feature_norms, (norms_of(r).astype(np.float32),)
                )

            return ScanTable(tuple(swap(b) for b in table.blocks))
        return table


def candidates_for(shares: dict[str, float], recall: float, n_live: int) -> int:
    """Candidates at each end that a recall takes, from the shares of all rows that calibration found for some recalls.

    Between two of those the larger one counts; beyond the last, all rows.
    """
    enough = [share for name, share in shares.items() if float(name) >= recall]
    return n_live if not enough else min(n_live, int(np.ceil(min(enough) * n_live)))


def recall_of(shares: dict[str, float], n_candidates: int, n_live: int) -> float | None:
    """The largest calibrated recall that a number of candidates suffices for; None if for none."""
    if n_candidates >= n_live:
        return 1.0
    reached = [float(name) for name, share in shares.items() if np.ceil(share * n_live) <= n_candidates]
    return max(reached, default=None)


def _ann_name(method: Method) -> str | None:
    """The FAISS index that serves a method, if one does."""
    if method.representation == "head" or method.metric == "dot":
        return None
    return f"{method.representation}-{method.metric}"
