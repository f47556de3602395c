"""A training row as a passage of a report."""

from __future__ import annotations

import numpy as np

from forebear.evaluation.reports.report import Cell, Passage
from forebear.retriever.retriever import Retriever

NO_LABEL = -1


def row_passage(retriever: Retriever, row: int, what: str, note: str = "") -> Passage:
    """A training row with its label, prediction and loss."""
    index, names = retriever.index, retriever.label_names
    texts = {name: column[0].as_py() for name, column in index.texts(np.array([row])).items()}
    facts: dict[str, Cell] = {
        "label": names[index.labels[row]],
        "prediction": names[index.predictions[row]],
        "loss": float(index.losses[row]),
    }
    return Passage(f"{what} · row {row}", texts, facts=facts, note=note)
