"""Names of options in messages: ``--top 5`` on the command line, ``top=5`` in Python.

Messages of the library name options as the command line does. Where no command is running, :func:`worded` turns them
into the keywords of the functions that take them; every :class:`ForebearError` does so with its own message.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

_at_command_line: ContextVar[bool] = ContextVar("at_command_line", default=False)
Kind = Literal["text", "texts", "number", "numbers", "switch", "phrase"]


@dataclass(frozen=True)
class Keyword:
    """The Python counterpart of an option of the command line.

    Attributes:
        name: Name of the parameter or field; for a ``phrase``, the words that stand for the option.
        of: The function or class that takes the parameter; for a ``phrase``, the function that does the same.
        kind: Kind of the values: one text or number, a tuple of them, or True.
    """

    name: str
    of: str
    kind: Kind = "text"


# By flag. Where commands give one flag different meanings, the rarer ones stand with their command: "index --scope".
KEYWORDS = {
    "--accept": Keyword("accept", "apply", "number"),
    "--aggregate": Keyword("aggregate", "QuerySpec", "switch"),
    "--ann": Keyword("ann", "BuildOptions"),
    "--astra": Keyword("astra", "QuerySpec"),
    "--at": Keyword("at", "measure_agreement", "numbers"),
    "--attach": Keyword("Index.with_texts()", "with_texts", "phrase"),
    "--batch-size": Keyword("batch_size", "TrainOptions", "number"),
    "--batch-tokens": Keyword("batch_tokens", "BuildOptions", "number"),
    "--before": Keyword("before", "regressions"),
    "--budget": Keyword("budget", "measure_lds", "number"),
    "--calibrate": Keyword("calibration_queries", "BuildOptions", "number"),
    "--candidates": Keyword("candidates", "QuerySpec", "number"),
    "--certify": Keyword("certify", "QuerySpec", "switch"),
    "--checkpoints": Keyword("checkpoints", "choose_model", "texts"),
    "--class-weights": Keyword("class_weights", "BuildOptions", "texts"),
    "--commit": Keyword("commit_parts()", "commit_parts", "phrase"),
    "--clusters": Keyword("n_clusters", "group_mistakes", "number"),
    "--column": Keyword("column", "negation_feature"),
    "--cosine": Keyword("cosine", "Thresholds", "number"),
    "--cosine-jaccard": Keyword("cosine_jaccard", "Thresholds", "number"),
    "--curvature": Keyword("curvature", "QuerySpec"),
    "--curvature-rows": Keyword("curvature_rows", "QuerySpec", "number"),
    "--damping": Keyword("damping", "QuerySpec"),
    "index --damping": Keyword("dampings", "BuildOptions", "texts"),
    "--delimiter": Keyword("delimiter", "open_rows"),
    "--dev": Keyword("dev", "hans"),
    "--device": Keyword("device", "Retriever"),
    "--devices": Keyword("devices", "BuildOptions", "texts"),
    "--draw": Keyword("draw", "lds"),
    "--directions": Keyword("n_directions", "metasmoothness", "number"),
    "--edits": Keyword("edits", "near_duplicates", "texts"),
    "--encoding": Keyword("encoding", "open_rows"),
    "--epochs": Keyword("epochs", "TrainOptions", "number"),
    "--eta": Keyword("etas", "choose_model", "numbers"),
    "--exact": Keyword("exact", "QuerySpec"),
    "--feature": Keyword("feature", "user_feature"),
    "--fit": Keyword("fit_index()", "fit_index", "phrase"),
    "--force": Keyword("force", "Work", "switch"),
    "--freeze-below": Keyword("freeze_below", "TrainOptions", "number"),
    "--from": Keyword("parts", "commit_parts", "texts"),
    "--group-by": Keyword("group_by", "retrieve"),
    "--host": Keyword("host", "serve"),
    "--html": Keyword("path", "write_page"),
    "--jaccard": Keyword("jaccard", "Thresholds", "number"),
    "--keep": Keyword("keep", "effects", "switch"),
    "--keep-columns": Keyword("keep_columns", "BuildOptions", "texts"),
    "--l2": Keyword("l2", "open_retrainer", "number"),
    "--label-column": Keyword("label_column", "open_rows"),
    "--label-names": Keyword("label_names", "open_rows", "texts"),
    "--problem-type": Keyword("problem_type", "open_rows"),
    "--label-smoothing": Keyword("label_smoothing", "BuildOptions", "number"),
    "--labels": Keyword("label_mode", "BuildOptions"),
    "--left-out": Keyword("n_left_out", "sources", "number"),
    "--learning-rate": Keyword("learning_rate", "TrainOptions", "number"),
    "--limit": Keyword("limit", "flip", "number"),
    "--lissa": Keyword("lissa", "QuerySpec"),
    "--listed": Keyword("n_listed", "hubs_report", "number"),
    "--max-length": Keyword("max_length", "BuildOptions", "number"),
    "--measured": Keyword("n_measured", "poison", "number"),
    "--method": Keyword("methods", "QuerySpec", "texts"),
    "--model": Keyword("model", "Retriever"),
    "--neighbours": Keyword("n_neighbours", "suspects", "number"),
    "audit duplicates --neighbours": Keyword("neighbours", "Thresholds", "number"),
    "--no-overlap": Keyword("n_candidates", "least_overlap", "number"),
    "--normalise": Keyword("normalise", "QuerySpec", "switch"),
    "--out": Keyword("out", "build_index"),
    "retrieve --out": Keyword("path", "result_writer"),
    "--pair": Keyword("pairs of texts", "rows_from_texts", "phrase"),
    "--paired": Keyword("paired", "lds", "switch"),
    "--planted": Keyword("planted", "suspects"),
    "--port": Keyword("port", "serve", "number"),
    "--precision": Keyword("precision", "BuildOptions"),
    "--queries": Keyword("n_queries", "sample_queries", "number"),
    "perturb attack --queries": Keyword("test rows", "make_queries", "phrase"),
    "--query-spans": Keyword("query_spans", "QuerySpec"),
    "--random-words": Keyword("random_words", "PerturbSpec", "number"),
    "--rebuild-ann": Keyword("rebuild_ann()", "rebuild_ann", "phrase"),
    "--recall": Keyword("recall", "QuerySpec", "number"),
    "--refit": Keyword("refit_index()", "refit_index", "phrase"),
    "--remove": Keyword("remove", "amounts_of", "numbers"),
    "--rep-refit": Keyword("rep_refit", "BuildOptions", "switch"),
    "--resume": Keyword("resume", "Work", "switch"),
    "--retrain": Keyword("name", "open_retrainer"),
    "--rows": Keyword("n_rows", "correlations", "number"),
    "audit deletion --rows": Keyword("without", "deletion"),
    "perturb attack --rows": Keyword("rows", "PerturbSpec", "numbers"),
    "--rows-share": Keyword("rows_share", "lds", "number"),
    "--run": Keyword("run", "open_retrainer"),
    "--repeats": Keyword("n_repeats", "measure_faithfulness", "number"),
    "--saliency": Keyword("form", "explain"),
    "--scope": Keyword("scope", "QuerySpec"),
    "index --scope": Keyword("scopes", "BuildOptions", "texts"),
    "--seed": Keyword("seed", "PerturbSpec", "number"),
    "--seeds": Keyword("n_seeds", "seeds_of", "number"),
    "--sets": Keyword("n_sets", "measure_effects", "number"),
    "--shard": Keyword("build_part()", "build_part", "phrase"),
    "--shard-rows": Keyword("shard_rows", "BuildOptions", "number"),
    "--share": Keyword("shares", "amounts_of", "texts"),
    "evaluate metasmoothness --keep": Keyword("keep", "metasmoothness", "switch"),
    "evaluate metasmoothness --share": Keyword("share", "metasmoothness", "number"),
    "--shortcut": Keyword("shortcut", "hans"),
    "--sides": Keyword("names", "sides_of", "texts"),
    "--site": Keyword("site", "serve"),
    "--sketch-basis": Keyword("sketch_basis", "BuildOptions"),
    "--sketch-bits": Keyword("sketch_bits", "BuildOptions", "number"),
    "--sketch-dim": Keyword("sketch_dim", "BuildOptions", "number"),
    "--spans": Keyword("spans", "QuerySpec"),
    "--store": Keyword("stores", "BuildOptions", "texts"),
    "--strategy": Keyword("strategies", "PerturbSpec", "texts"),
    "--subsets": Keyword("n_subsets", "measure_lds", "number"),
    "--target": Keyword("target", "QuerySpec"),
    "--test": Keyword("the test rows", "serve", "phrase"),
    "--text-columns": Keyword("text_columns", "open_rows", "texts"),
    "--tolerance": Keyword("tolerance", "QuerySpec", "number"),
    "--to": Keyword("to", "flip"),
    "--top": Keyword("top", "QuerySpec", "number"),
    "evaluate overlap --top": Keyword("tops", "depths_of", "numbers"),
    "evaluate mislabelled --top": Keyword("tops", "mislabelled_report", "numbers"),
    "--token-file": Keyword("path", "token_of"),
    "--train": Keyword("the training rows", "build_index", "phrase"),
    "--unlabelled": Keyword("unlabelled", "open_rows"),
    "--warmup-ratio": Keyword("warmup_ratio", "TrainOptions", "number"),
    "--weight": Keyword("weight", "hans", "number"),
    "--weight-decay": Keyword("weight_decay", "TrainOptions", "number"),
    "--white-bits": Keyword("white_bits", "BuildOptions", "number"),
    "--whitening": Keyword("whitening", "BuildOptions"),
    "--wordnet": Keyword("folder", "WordNet"),
    "--with-texts": Keyword("with_texts", "PushKeywords", "switch"),
    "--words-precision": Keyword("words_precision", "BuildOptions"),
    "--words-top": Keyword("words_tops", "BuildOptions", "numbers"),
    "--worklists": Keyword("worklists", "serve"),
}
COMMANDS = {  # phrases of messages that name a command, and the Python functions that do the same
    "`forebear index`": "build_index()",
    "forebear index --refit": "refit_index()",
    "`forebear index --fit`": "fit_index()",
    "forebear index": "build_index()",
    "forebear verify": "verify_index()",
    "`forebear train`": "train()",
    "forebear audit hans": "audit_hans()",
    "the same command": "the same call",
    "this command": "this call",
}
# A word after a flag is its value, unless it is one of these, which continue the sentence:
GOING_ON = frozenset({
    "a", "and", "asks", "bounds", "fits", "goes", "has", "how", "if", "in", "is", "measures", "must", "names", "naming",
    "needs", "or", "out", "proves", "sums", "takes", "that", "to", "with", "without",
})  # fmt: skip
_COMMAND = re.compile("|".join(re.escape(words) for words in COMMANDS))
_LEFT_ALONE = r"`forebear [^`]*`"  # a whole command line in code marks stays: it can be run as it is
_NUMBERS = r"\d[\d.e+-]*(?: \d[\d.e+-]*)+"  # several values of one flag, as in --eta 0.1 0.2
_OPTION = re.compile(rf"{_LEFT_ALONE}|(?<![\w-])(--[a-z][a-z0-9-]*)(?: ('[^']*'|\"[^\"]*\"|{_NUMBERS}|[^\s(]\S*))?")


@contextmanager
def at_command_line() -> Iterator[None]:
    """Within this context, messages name options as the command line does."""
    token = _at_command_line.set(True)
    try:
        yield
    finally:
        _at_command_line.reset(token)


def is_at_command_line() -> bool:
    """Whether messages name options as the command line does."""
    return _at_command_line.get()


def caller(call: str) -> str:
    """What repeats a report: the command line of this process where a command is running, or else the Python call."""
    return shlex.join(["forebear", *sys.argv[1:]]) if _at_command_line.get() else call


def caller_of(command: str, call: str) -> str:
    """A command by its words at the command line, or else the Python function that does the same."""
    return command if _at_command_line.get() else call


def worded(message: str, *, of: str | None = None) -> str:
    """A message with its options named as the reader writes them: by flag, or as Python keywords.

    Args:
        message: Options in it are named by their flags, with or without a value: ``Give --top 5``, ``by --model``.
        of: The command whose options the flags are, such as ``index``, where commands share a flag.
    """
    if _at_command_line.get():
        return message
    return _OPTION.sub(lambda found: _in_python(found, of), _COMMAND.sub(lambda found: COMMANDS[found[0]], message))


def _in_python(found: re.Match[str], of: str | None) -> str:
    """An option, and its value if it has one, as a keyword argument."""
    flag, after = found[1], found[2] or ""
    if flag is None:
        return found[0]
    keyword = KEYWORDS.get(f"{of} {flag}") or KEYWORDS.get(flag)
    if keyword is None:
        return found[0]
    parts = re.fullmatch(r"('[^']*'|\"[^\"]*\"|.*?)([.,:;)?]*)", after)
    assert parts is not None  # the pattern takes any text
    value, end = parts.groups()
    rest = f" {after}" if after else ""
    if keyword.kind == "phrase":
        return f"{keyword.name}{rest}"
    if keyword.kind == "switch":
        return f"{keyword.name}=True{rest}"
    if found[2] and not value:  # an empty one: --rows : expected numbers
        return f"{keyword.name}={'()' if keyword.kind in ('texts', 'numbers') else repr('')}{end}"
    if not value or value in GOING_ON:
        colon = found.string[found.end(1) : found.end(1) + 1] == ":"
        return f"{keyword.name}{'' if colon else '='}{rest}"
    comma = "," if not end and found.string.startswith(" --", found.end()) else ""  # between two options
    return f"{keyword.name}={_literal(value, keyword.kind)}{end}{comma}"


def _literal(value: str, kind: Kind) -> str:
    """A value as Python writes it."""
    if kind in ("number", "text"):
        return value if kind == "number" or value[0] in "'\"" else f'"{value}"'
    if value == "none":
        return "()"
    parts = [_literal(part, "number" if kind == "numbers" else "text") for part in re.split("[, ]", value)]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
