"""How true the effects of an index were found to be, kept beside it: what ``forebear evaluate effects --keep`` writes.

A change of the index leaves the file, but makes it stale.
"""

from __future__ import annotations

from dataclasses import dataclass

from forebear.indexer.index import Index
from forebear.indexer.storage.layout import EFFECTS_NAME
from forebear.retriever.effects.kept_results import KeptResults
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import Question
from forebear.retriever.question.targets import settled_target

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
        interval = "" if self.slope_low is None else f" [{self.slope_low:.3g}, {self.slope_high:.3g}]"
        correlation = "" if self.correlation is None else f", r {self.correlation:.3f}"
        sizes = f"{self.sizes[0]:,}" + (f" to {self.sizes[-1]:,}" if len(self.sizes) > 1 else "")
        return f"slope {self.slope:.3g}{interval}{correlation} for {self.recipe} without {sizes} rows"


KEPT_EFFECTS = KeptResults(
    EFFECTS_NAME,
    version=2,
    command="evaluate effects",
    make=lambda one: Measured(**one | {name: tuple(one[name]) for name in ("seeds", "sizes")}),
    gives_way=Measured.gives_way_to,
)


def scope_and_curvature(question: Question, method: Method) -> tuple[str, str, float | None]:
    """Where and how a question asks a method that estimates effects: its scope, its curvature and its damping."""
    if method.through_run:
        return RUN, NO_CURVATURE, None
    scope = question.scope_of(method)
    if method.query != "preconditioned":
        return scope, NO_CURVATURE, None
    facts = question.curvature.facts(question.index, scope)
    return scope, facts["curvature"], facts.get("damping")


def target_of(question: Question) -> str:
    """Whose loss a question asks for, as results name it."""
    return settled_target(question.spec.target, question.index.manifest.spec.label_names)


def measured_line(question: Question, method: Method) -> str:
    """How true a method's effects were found to be for the index as the question asks it; empty where nobody measured.

    Such as ``Effects of if at head: slope 0.97 [0.92, 1.05], r 0.993 for proximal-head without 1 to 50 rows.`` Where
    nobody measured them for the question's target, those for other targets are given, and these named.
    """
    index = question.index
    kept = [one for one in KEPT_EFFECTS.read(index.folder) if one.method == method.name]
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
    return f"Effects of {method.name} {found[0].place}: {'; '.join(texts)}{stale}."


def measured_lines(index: Index) -> list[str]:
    """All that is kept beside an index, a line for each result."""
    digest = index.manifest.digest()
    lines = []
    for one in KEPT_EFFECTS.read(index.folder):
        how = one.curvature if one.damping is None else f"{one.curvature}, damping {one.damping:.3g}"
        by = "" if one.curvature == NO_CURVATURE else f" ({how})"
        stale = "" if one.index_digest == digest else ", measured before the index changed"
        lines.append(f"{one.method} {one.place}{by}, target {one.target}: {one}{stale}")
    return lines
