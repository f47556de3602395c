"""The line of the training file at which a row begins, where the file lies where the index was built from it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebear.errors import DataError
from forebear.evaluation.worklists.items import text_digest
from forebear.evaluation.worklists.training_files import ending_of, raw_records
from forebear.indexer.rows.files.reader import READ_ERRORS
from forebear.indexer.rows.files.text_file import open_text


def lines_of(
    file: Path, digests: Mapping[int, str], text_columns: tuple[str, ...], row_format: Mapping[str, Any]
) -> dict[int, int]:
    """Lines of some rows of a CSV, TSV or JSON Lines file, from 1, which their texts prove.

    Args:
        file: The file; read up to the last of the rows.
        digests: Of the rows' texts, by their number in the file, from 0.
        text_columns: Names of the text columns.
        row_format: How the file was read: ``delimiter`` and ``encoding``, where they were given.

    Returns:
        The line of each row; without rows whose texts are others now. Empty where the file has no lines, is gone, or
        cannot be read.
    """
    ending = ending_of(file)
    if not digests or not file.is_file() or not any(part in ending for part in (".csv", ".tsv", ".jsonl", ".ndjson")):
        return {}
    is_json, is_tab = "json" in ending, ".tsv" in ending
    sign = None if is_json else str(row_format.get("delimiter") or ("\t" if is_tab else ","))
    found: dict[int, int] = {}
    names: list[str] = []
    last = max(digests)
    try:
        with open_text(str(file), row_format.get("encoding")) as stream:
            for record in raw_records(io.TextIOWrapper(stream, "utf-8", newline=""), sign, quoted=not is_tab):
                if record.number is None and record.text.strip():
                    names = _cells(record.text, sign or ",", quoted=not is_tab)
                if record.number is None or record.number not in digests:
                    continue
                values: Any
                if sign is None:
                    values = json.loads(record.text)
                    if not isinstance(values, dict):
                        return {}  # an array on a line: its rows have no lines
                else:
                    values = dict(zip(names, _cells(record.text, sign, quoted=not is_tab), strict=False))
                if text_digest([values.get(name) for name in text_columns]) == digests[record.number]:
                    found[record.number] = record.line
                if record.number >= last:
                    break
    except (DataError, csv.Error, *READ_ERRORS):
        return {}
    return found


def _cells(record: str, sign: str, *, quoted: bool) -> list[str]:
    lines = io.StringIO(record, newline="")
    return next(csv.reader(lines, delimiter=sign, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
