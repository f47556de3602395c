"""The interface of searchers: search, score and facts, for every representation of the training rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends
from forebear.retriever.scores import Scores


class Searcher(ABC):
    """Answers for the methods that compare one representation of the training rows.

    A method's row of the table says which searcher answers for it; :mod:`forebear.retriever.searchers` lists them.
    """

    def __init__(self, models: Models) -> None:
        """Set up without loading a model; a searcher serves all questions of an index."""
        self.models, self.index = models, models.index

    @abstractmethod
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        """Both ends of the ranking of training rows for each test row, by method name.

        Args:
            question: A question with only methods that this searcher answers for.
            batch: Test rows.
        """

    @abstractmethod
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        """Exact scores of training rows, ``(q, n)`` float64, larger = proponent.

        Args:
            question: A question with only methods that this searcher answers for.
            batch: Test rows.
            rows: Live training rows, ascending, ``(n,)``.
        """

    @staticmethod
    @abstractmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        """Facts of the search for an answer: ``recall`` (None where it was not measured), candidates, choices."""
