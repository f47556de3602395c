"""Checks that test rows fit an index: their text columns, and their labels."""

from __future__ import annotations

from forebear.errors import DataError, MismatchError
from forebear.indexer.index import Index
from forebear.indexer.rows.labels import LabelMap, label_map, refuse_other_form
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.progress import tell_warning


def check_texts(index: Index, source: RowSource) -> None:
    """Refuse single texts for an index of pairs, the other way round, and the same columns in another order."""
    expected = index.manifest.spec.text_columns
    if len(source.text_columns) != len(expected):
        raise MismatchError(
            f"{source.name} gives {len(source.text_columns)} text(s) a row ({', '.join(source.text_columns)}); the "
            f"index was built from {len(expected)} ({', '.join(expected)}). Choose them by --text-columns or --pair."
        )
    if source.text_columns != expected and sorted(source.text_columns) == sorted(expected):
        raise MismatchError(
            f"{source.name} is read as {', '.join(source.text_columns)}, the index was built from "
            f"{', '.join(expected)}, in this order. Give --text-columns {','.join(expected)}."
        )


def query_labels(index: Index, source: RowSource, *, required: bool) -> LabelMap | TargetMap | None:
    """How the test rows' labels map onto the model's; None when there are none or, unless required, none fit.

    Unless required, a row without a label, or with one that the model does not know, gets ``labels.UNKNOWN``.
    """
    if source.label_column is None and not required:
        return None
    try:
        spec = index.manifest.spec
        refuse_other_form(source, index.manifest.row_format)
        return label_map(
            source, spec.label_names, spec.label_mode, partial=not required, problem_type=spec.problem_type
        )
    except DataError:
        if required:
            raise
        return None


def tell_label_remark(index: Index, source: RowSource, *, required: bool) -> None:
    """Warn of test rows whose label is not one of the model's."""
    if source.label_column is None:
        return
    labels = query_labels(index, source, required=required)
    unknown = f"{source.name}: its labels are not the model's, so query_label stays empty"
    tell_warning(unknown if labels is None else labels.remark)
