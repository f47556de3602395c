"""How true the effects of an index were found to be, kept beside it: what ``forebear evaluate effects --keep`` writes.

The file is no part of the index: its digest does not cover it, and a change of the index leaves it, but makes it stale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forebear.errors import StorageError
from forebear.indexer.index import Index
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.layout import EFFECTS_NAME, LOCK_NAME
from forebear.indexer.storage.locks import exclusive
from forebear.progress import tell_warning
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import Question
from forebear.retriever.question.targets import settled_target

VERSION = 2
RUN, NO_CURVATURE = "run", "none"  # scope and curvature of a method that differentiates the training run


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How the predicted effects of a method at one scope fit those of models trained again.

    Attributes:
        index_digest: The index that was asked.
        method: Name of the method.
        scope: Scope of its gradients; ``run`` of a method that differentiates the training run.
        curvature: How H^-1 was had; ``none`` of a method without it.
        damping: What was added to the diagonal; None where nothing says it.
        target: Whose loss was predicted: ``predicted``, ``gold`` or ``label:NAME``.
        recipe: What was trained again, as ``--retrain`` names it; and by which damping the head was held, where that is
            not the effects' own.
        seeds: Seeds of the retrainings.
        test_rows: Name of the test rows, and how many there were.
        sizes: Numbers of rows that were left out.
        n_pairs: Pairs of a predicted and a retrained change.
        slope: Slope of the retrained change of the loss on the predicted one, through the origin; its 95% interval
            over test rows, None where one test row has none.
        slope_low: See there.
        slope_high: See there.
        correlation: Pearson's correlation of the two; None where it is undefined.
    """

    index_digest: str
    method: str
    scope: str
    curvature: str
    damping: float | None
    target: str
    recipe: str
    seeds: tuple[int, ...]
    test_rows: str
    sizes: tuple[int, ...]
    n_pairs: int
    slope: float
    slope_low: float | None
    slope_high: float | None
    correlation: float | None

    def gives_way_to(self, newer: Measured) -> bool:
        """Whether a newer result takes this one's place: of the same kind, or of this kind before a change."""
        names = ["method", "scope", "curvature", "target", "recipe"]
        if self.index_digest == newer.index_digest:
            names.append("damping")
        return all(getattr(self, name) == getattr(newer, name) for name in names)

    @property
    def place(self) -> str:
        """Where its gradients are, in words."""
        return "through the run" if self.scope == RUN else f"at {self.scope}"

    def __str__(self) -> str:
        interval = "" if self.slope_low is None else f" [{self.slope_low:.2f}, {self.slope_high:.2f}]"
        correlation = "" if self.correlation is None else f", r {self.correlation:.3f}"
        sizes = f"{self.sizes[0]:,}" + (f" to {self.sizes[-1]:,}" if len(self.sizes) > 1 else "")
        return f"slope {self.slope:.2f}{interval}{correlation} for {self.recipe} without {sizes} rows"


def read_measured(folder: Path) -> list[Measured]:
    """What is kept beside an index; nothing, with a warning, where the file is damaged."""
    path = folder / EFFECTS_NAME
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            tell_warning(f"{path} was written by another version of forebear: what it says of effects is not shown.")
            return []
        return [Measured(**_with_tuples(one)) for one in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        tell_warning(f"{path} is damaged ({error}): it is not shown. Write it again by evaluate effects with --keep.")
        return []


def check_keeping(folder: Path) -> None:
    """Refuse to keep a result in a folder that cannot be written; before the work.

    Raises:
        StorageError: As said.
    """
    if not os.access(folder, os.W_OK):
        raise StorageError(f"--keep: {folder} cannot be written. Make it writable, or leave the option out.")


def keep_measured(folder: Path, results: Sequence[Measured]) -> None:
    """Keep results beside an index, in place of earlier ones of the same method, scope, curvature, target and recipe.

    Raises:
        InUseError: Another process changes the index.
        StorageError: The file cannot be written.
    """
    with exclusive(folder / LOCK_NAME, str(folder)):
        earlier = [one for one in read_measured(folder) if not any(one.gives_way_to(new) for new in results)]
        content = {"version": VERSION, "results": [asdict(one) for one in [*earlier, *results]]}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / EFFECTS_NAME, text.encode() + b"\n")


def scope_and_curvature(question: Question, method: Method) -> tuple[str, str, float | None]:
    """Where and how a question asks a method that estimates effects: its scope, its curvature and its damping."""
    if method.through_run:
        return RUN, NO_CURVATURE, None
    scope = question.scope_of(method)
    facts = question.curvature.facts(question.index, scope)
    return scope, facts["curvature"], facts.get("damping")


def target_of(question: Question) -> str:
    """Whose loss a question asks for, as results name it."""
    return settled_target(question.spec.target, question.index.manifest.spec.label_names)


def measured_line(question: Question, method: Method) -> str:
    """How true a method's effects were found to be for the index as the question asks it; empty where nobody measured.

    Such as ``effects of if at head: slope 0.97 [0.92, 1.05], r 0.993 for proximal-head without 1 to 50 rows``. Where
    nobody measured them for the question's target, those for other targets are given, and these named.
    """
    index = question.index
    kept = [one for one in read_measured(index.folder) if one.method == method.name]
    if not kept:
        return ""
    asked = scope_and_curvature(question, method)
    found = [one for one in kept if (one.scope, one.curvature, one.damping) == asked]
    if not found:
        return ""
    digest, target = index.manifest.digest(), target_of(question)
    shown = [one for one in found if one.target == target] or found
    of_another = "" if shown[0].target == target else f" (here {target})"
    texts = [f"{one}, of the target {one.target}{of_another}" if of_another else str(one) for one in shown]
    stale = "" if all(one.index_digest == digest for one in shown) else ", measured before the index changed"
    return f"effects of {method.name} {found[0].place}: {'; '.join(texts)}{stale}"


def measured_lines(index: Index) -> list[str]:
    """All that is kept beside an index, a line for each result."""
    digest = index.manifest.digest()
    lines = []
    for one in read_measured(index.folder):
        how = one.curvature if one.damping is None else f"{one.curvature}, damping {one.damping:.3g}"
        by = "" if one.curvature == NO_CURVATURE else f" ({how})"
        stale = "" if one.index_digest == digest else ", measured before the index changed"
        lines.append(f"{one.method} {one.place}{by}, target {one.target}: {one}{stale}")
    return lines


def _with_tuples(one: dict[str, Any]) -> dict[str, Any]:
    return one | {name: tuple(one[name]) for name in ("seeds", "sizes")}
