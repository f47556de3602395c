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
from forebear.retriever.gradients import GradientSearch
from forebear.retriever.methods import METHODS, Method, pick_methods
from forebear.retriever.queries import Asked, Models, ask, make_query, method_facts
from forebear.retriever.results import Answers, answer_table
from forebear.retriever.scoring import Query
from forebear.retriever.search import Ranking, RowFactors, search_ann, search_full, search_scan

Exactness = Literal["none", "rerank", "full"]
DEFAULT_METHODS = ("gc",)
QUERY_BLOCK_ROWS = 512
DEEP_METHODS = ("gd", "gc", "tracin")  # gradient methods of the sketched scopes


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
        candidates: Rows at each end that the sketches of a deeper scope propose and the model scores exactly.
        curvature: ``exact`` or ``identity``, for ``if`` and ``rif``.
        damping: One of the index's; None for its first.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    top: int = 10
    target: str = "predicted"
    exact: Exactness = "rerank"
    scope: str = "head"
    candidates: int = 100
    curvature: str = "exact"
    damping: str | None = None

    def digest(self) -> str:
        """Name this question in results."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()

    def check(self) -> tuple[Method, ...]:
        """The methods, after refusing values that mean nothing."""
        if self.top < 1:
            raise InputError(f"--top {self.top}: expected at least 1.")
        for name, value, known in (
            ("--exact", self.exact, ("none", "rerank", "full")),
            ("--curvature", self.curvature, ("exact", "identity")),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r}: expected {' or '.join(known)}.")
        if self.candidates < self.top:
            raise InputError(f"--candidates {self.candidates}: expected at least --top, {self.top}.")
        methods = pick_methods(self.methods)
        if self.scope != "head":
            fixed = [m.name for m in methods if m.representation == "head" and m.name not in DEEP_METHODS]
            if fixed:
                raise InputError(
                    f"method {fixed[0]} is not available at scope {self.scope}: there are {', '.join(DEEP_METHODS)}. "
                    "Use --scope head for it."
                )
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
        candidates: int = 100,
        curvature: str = "exact",
        damping: str | None = None,
    ) -> pa.Table:
        """The training rows at both ends of each query's ranking.

        Args:
            queries: Texts, pairs of texts, or rows opened by ``open_rows``.
            methods: Names from the method table.
            top: Rows at each end.
            target: ``predicted``, ``gold`` (queries need labels) or a label's name.
            exact: See :class:`QuerySpec`.
            scope: See :class:`QuerySpec`.
            candidates: See :class:`QuerySpec`.
            curvature: See :class:`QuerySpec`.
            damping: See :class:`QuerySpec`.

        Returns:
            One row a result; columns as DESIGN.md's section 5 lists them, provenance in the schema's metadata.

        Raises:
            InputError: A choice that means nothing, or texts that do not fit the index.
            CorruptIndexError: A stored file was altered.
        """
        spec = QuerySpec(
            methods=tuple(methods),
            top=top,
            target=target,
            exact=exact,
            scope=scope,
            candidates=candidates,
            curvature=curvature,
            damping=damping,
        )
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        tables = [answer_table(self.index, answers) for answers in self.answers(source, spec)]
        return pa.concat_tables(tables).replace_schema_metadata(self.metadata(spec))

    def answers(self, source: RowSource, spec: QuerySpec, *, block_rows: int = QUERY_BLOCK_ROWS) -> Iterator[Answers]:
        """Stream answers, ``block_rows`` queries at a time, in bounded memory."""
        methods = spec.check()
        self.check_stores(methods, spec.curvature, spec.scope)
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
        deep = [m for m in methods if spec.scope != "head" and m.representation == "head"]
        found = {m.name: self._search(m, asked, spec, top) for m in methods if m not in deep}
        for together in (True, False):
            some = [m for m in deep if m.all_checkpoints == together]
            if some:
                search = GradientSearch(
                    self.index, self._models, spec.scope, texts, asked.targets, all_checkpoints=together
                )
                found |= {m.name: search.search(m, top, exact=spec.exact, n_candidates=spec.candidates) for m in some}
        found = {method.name: found[method.name] for method in methods}
        return Answers(start, labels, asked.forward.predictions, asked.targets, found)

    def scores(
        self,
        queries: Sequence[str] | Sequence[tuple[str, str]] | RowSource,
        method: str,
        *,
        target: str = "predicted",
        scope: str = "head",
        curvature: str = "exact",
        damping: str | None = None,
    ) -> np.ndarray:
        """Exact scores of every live training row, ``(q, n)`` float64, columns in the order of ``index.live``.

        For small sets, and as the yardstick: memory is q x n x 8 bytes.
        """
        spec = QuerySpec(
            methods=(method,), target=target, exact="full", scope=scope, curvature=curvature, damping=damping
        )
        (chosen,) = spec.check()
        self.check_stores((chosen,), curvature, scope)
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        self.check_texts(source)
        labels = self.query_labels(source, required=target == "gold")
        n_checkpoints = len(self.index.manifest.checkpoints)
        parts = []
        for block in source.blocks(QUERY_BLOCK_ROWS):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            asked = ask(self._models, (chosen,), block.texts, gold, target, n_checkpoints, first_row=block.start)
            if scope != "head" and chosen.representation == "head":
                search = GradientSearch(
                    self.index,
                    self._models,
                    scope,
                    block.texts,
                    asked.targets,
                    all_checkpoints=chosen.all_checkpoints,
                )
                parts.append(search.scores(chosen, self.index.live))
                continue
            query = make_query(chosen, asked, self.index, damping=damping, curvature=curvature)
            parts.append(self._factors(chosen).all_products(query))
        return np.concatenate(parts)

    def check_stores(self, methods: Sequence[Method], curvature: str = "exact", scope: str = "head") -> None:
        """Refuse methods whose representation the index does not hold, naming the option that builds it."""
        if any(method.store == "sbert" for method in methods):
            self.index.sentence()
        if scope != "head":
            self.index.gradients(scope)
        if curvature == "exact" and any(method.query == "preconditioned" for method in methods):
            self.index.head_damping(None)

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
                m.name: method_facts(m, self.index, damping=spec.damping, curvature=spec.curvature)
                | self._search_facts(m, spec)
                for m in methods
            },
        }
        return {"forebear": json.dumps(facts, sort_keys=True)}

    def _search_facts(self, method: Method, spec: QuerySpec) -> dict[str, Any]:
        """Scope and recall of a method; candidates proposed by sketches have no proven or calibrated recall."""
        if spec.scope == "head" or method.representation != "head":
            return {"recall": self._recall(method, spec)}
        recall = 1.0 if spec.exact == "full" else None
        candidates = spec.candidates if spec.exact == "rerank" else None
        return {"scope": spec.scope, "recall": recall, "candidates": candidates}

    def _recall(self, method: Method, spec: QuerySpec) -> float | None:
        """Recall of the exact top 10: calibrated, or 1 where the search proves its answer; None without re-ranking."""
        if spec.exact == "none":
            return None
        name = _ann_name(method)
        if spec.exact == "full" or name is None:
            return 1.0
        return float(self.index.manifest.derived[name]["recall"])

    def _search(self, method: Method, asked: Asked, spec: QuerySpec, top: int) -> tuple[Ranking, Ranking]:
        query = make_query(method, asked, self.index, damping=spec.damping, curvature=spec.curvature)
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


def _ann_name(method: Method) -> str | None:
    """The FAISS index that serves a method, if one does."""
    if method.representation == "head" or method.metric == "dot":
        return None
    return f"{method.representation}-{method.metric}"
