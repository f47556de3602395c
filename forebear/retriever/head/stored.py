"""Search over what is stored exactly: features, sentence embeddings and head gradients as their two factors."""

from __future__ import annotations

from forebear.indexer.index import Index
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable, norms_of
from forebear.retriever.head.queries import make_query
from forebear.retriever.head.scoring import Query
from forebear.retriever.head.search import RowFactors, search_ann, search_full, search_scan
from forebear.retriever.question.asked import Asked
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import Method, ann_name
from forebear.retriever.ranking import Ranking


def search_stored(
    index: Index, method: Method, asked: Asked, curvature: CurvatureSpec, top: int, *, exact: str
) -> tuple[Ranking, Ranking]:
    """Both ends of a method's ranking, (proponents, opponents); see :class:`QuerySpec` for ``exact``."""
    return search_query(index, method, make_query(method, asked, index, curvature), top, exact=exact)


def search_query(index: Index, method: Method, query: Query, top: int, *, exact: str) -> tuple[Ranking, Ranking]:
    """The same for query vectors that are made already."""
    factors = row_factors(index, method)
    if exact == "full":
        return search_full(query, factors, top)
    rerank = exact == "rerank"
    table = _scan_table(index, method, query)
    name = ann_name(method)
    if name is not None:
        return search_ann(query, index.ann(name), table, factors, top, rerank=rerank)
    return search_scan(query, table, factors, top, rerank=rerank)


def row_factors(index: Index, method: Method) -> RowFactors:
    """What a method compares, for every training row."""
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


def _scan_table(index: Index, method: Method, query: Query) -> ScanTable:
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
            r = refitted.take(block.rows).astype("float32")
            return ScanBlock(block.rows, block.features, (r,), block.feature_norms, (norms_of(r).astype("float32"),))

        return ScanTable(tuple(swap(b) for b in table.blocks))
    return table
