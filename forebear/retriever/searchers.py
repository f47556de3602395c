"""The searchers, by the name that a method's row of the table gives (:meth:`Method.searched_by`)."""

from __future__ import annotations

from forebear.retriever.deep.searcher import GradientSearcher
from forebear.retriever.deep.through_run import RunSearcher
from forebear.retriever.head.stored import StoredSearcher
from forebear.retriever.question.methods import Searched
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.spans.search import SpanSearcher
from forebear.retriever.words.search import WordSearcher
from forebear.retriever.words.tfidf import TfidfSearcher

SEARCHERS: dict[Searched, type[Searcher]] = {
    "stored": StoredSearcher,
    "gradients": GradientSearcher,
    "words": WordSearcher,
    "tfidf": TfidfSearcher,
    "spans": SpanSearcher,
    "run": RunSearcher,
}
