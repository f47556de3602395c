"""Peak memory of a build over scope ``all`` with two texts of thousands of word pieces, by architecture and length.

Tiny random models of two layers: what grows is what the length costs, not the weights. Thirty rows, features, words and
sketches with EK-FAC; each build in a process of its own, whose peak before the build is taken off.
``python benchmarks/long_texts.py [--kinds bert,llama,modernbert,deberta-v2] [--lengths 500,2000,6000]``
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

from common import ROOT, write_result

sys.path[:0] = [str(ROOT / "tests" / "support")]


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(kind: str, n_pieces: int) -> float:
    """MiB by which the peak rises during a build."""
    import torch
    import transformers
    from families import make_family
    from tiny import labels, sentences
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from forebear import BuildOptions, build_index, choose_model, rows_from_texts

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_family(Path(scratch) / "model", kind)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.max_position_embeddings = n_pieces + 8
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = n_pieces
        tokenizer.save_pretrained(folder)
        texts, gold = sentences(30), labels(30, 3)
        texts[5], texts[20] = "good film " * n_pieces, "bad story " * n_pieces
        before = peak_mib()
        options = BuildOptions(stores=("features", "words"), scopes=("head", "all"), calibration_queries=0)
        build_index(
            rows_from_texts(texts, gold), Path(scratch) / "index", choose_model(str(folder)).checkpoints, options
        )
        return peak_mib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="bert,llama,modernbert,deberta-v2")
    parser.add_argument("--lengths", default="500,2000,6000")
    given = parser.parse_args()
    found: dict[str, dict[int, float]] = {}
    for kind in given.kinds.split(","):
        for length in map(int, given.lengths.split(",")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.setdefault(kind, {})[length] = round(pool.apply(build, (kind, length)))
    write_result("long_texts", peak_mib=found)


if __name__ == "__main__":
    main()
