"""Training rows as a report shows them."""

from __future__ import annotations

import numpy as np

from forebear.evaluation.common.passages import rank_headings, row_passages


def test_a_passage_holds_what_the_index_says_of_the_row(bert_world) -> None:
    retriever, index = bert_world.retriever, bert_world.index
    rows, scores = np.array([7, 3]), np.array([0.123456, -2.0])
    passages = row_passages(
        retriever, rows, rank_headings(rows, scores), facts=[{"overlap": 0.5}, {}], notes=["planted", ""],
        highlighted=[{"film"}, set()],
    )  # fmt: skip
    assert [p.heading for p in passages] == ["rank 1 · row 7 · score 0.1235", "rank 2 · row 3 · score -2"]
    assert [p.note for p in passages] == ["planted", ""]
    assert [p.highlighted for p in passages] == [{"film"}, set()]
    assert [list(p.facts) for p in passages] == [
        ["label", "prediction", "overlap", "loss"],
        ["label", "prediction", "loss"],
    ]
    for row, passage in zip(rows, passages, strict=True):
        assert list(passage.texts.values()) == [bert_world.texts[row]]
        assert passage.facts["label"] == retriever.label_names[bert_world.labels[row]]
        assert passage.facts["prediction"] == retriever.label_names[index.predictions[row]]
        assert passage.facts["loss"] == float(index.losses[row])


def test_no_rows_are_no_passages(bert_world) -> None:
    assert row_passages(bert_world.retriever, [], []) == []
