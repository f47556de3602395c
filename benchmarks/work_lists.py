"""A work list applied to all of GLUE SST-2 as a CSV file, beside the csv module that writes the same rows.

Every 13th row is on the list: relabelled, removed and kept by turns.
``python benchmarks/work_lists.py [--rounds 5]``
"""

from __future__ import annotations

import argparse
import csv
import resource
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from common import DATA, by_turns, count_processor_seconds, ratio, write_result

from forebear import worklists
from forebear.evaluation.worklists.items import Item, WorkList

NAMES = ("negative", "positive")
EVERY = 13


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    count_processor_seconds()
    table = pq.read_table(DATA / "sst2_glue" / "train.parquet")
    texts = table.column("sentence" if "sentence" in table.column_names else "text").to_pylist()
    labels = [NAMES[label] for label in table.column("label").to_pylist()]
    items = {
        row: Item(
            row=row, texts={"text": texts[row]}, given=labels[row], suggested=NAMES[labels[row] == NAMES[0]],
            decision=("relabel", "remove", "keep")[row % 3],
        )
        for row in range(0, len(texts), EVERY)
    }  # fmt: skip
    todo = WorkList(tuple(items.values()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, ours, plain = folder / "train.csv", folder / "ours.csv", folder / "plain.csv"
        with train.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])

        def by_csv() -> None:
            with (
                train.open(newline="", encoding="utf-8") as source,
                plain.open("w", newline="", encoding="utf-8") as to,
            ):
                writer, reader = csv.writer(to), csv.reader(source)
                writer.writerow(next(reader))
                for number, (text, label) in enumerate(reader):
                    item = items.get(number)
                    if item is None or item.decision == "keep":
                        writer.writerow((text, label))
                    elif item.decision == "relabel":
                        writer.writerow((text, item.suggested))

        ways = {"apply": lambda: worklists.apply(todo, train, ours, force=True), "csv": by_csv}
        taken = by_turns(ways, given.rounds)
        same = ours.read_bytes() == plain.read_bytes()
    write_result(
        "work_lists", smaller=["apply_over_csv"], recalls=["same_bytes"], rows=len(texts), listed=len(items),
        apply_over_csv=ratio(taken["apply"], taken["csv"]), same_bytes=float(same),
        seconds_of_apply=sorted(taken["apply"])[len(taken["apply"]) // 2],
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )  # fmt: skip


if __name__ == "__main__":
    main()
