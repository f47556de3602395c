"""Checks that would otherwise fail only after the pass over the rows: sizes of factors, and a token to mask with."""

from __future__ import annotations

from forebear.errors import InputError
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.curvature.head import check_head_size
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.half import has_half_products
from forebear.indexer.model.scopes import Scope, scope_of
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.text import Span

MAX_SIDE = (
    20_000  # width of a layer; a larger Kronecker factor, and its decomposition, would not fit an ordinary machine
)


def check_feasible(classifier: Classifier, options: BuildOptions, n_text_columns: int) -> None:
    """Refuse choices that the model's sizes or its tokenizer rule out, before any row is run.

    Raises:
        InputError: The head's exact curvature or a layer's Kronecker factor is too large, or the device has no products
            of bf16 that are asked for.
        ModelError: A scope does not fit the model, or spans are to be stored and its tokenizer cannot mask any.
    """
    if options.precision == "bf16" and not has_half_products(classifier.device):
        raise InputError(
            f"--precision bf16: {classifier.device} has no products of such numbers, so that a pass would be slower "
            "than in fp32. Give --precision fp32."
        )
    if options.dampings:
        check_head_size(classifier.n_classes, classifier.feature_dim, classifier.loss)
    if classifier.loss.problem_type != SINGLE_LABEL and options.rep_refit:
        raise InputError("--rep-refit refits a softmax head, of one label a row. Leave the option out.", of="index")
    if options.whitened or options.sketch_basis != "random":
        for name in options.sketched_scopes:
            _check_sides(classifier, scope_of(classifier, name, with_bias=options.with_bias))
    if "spans" in options.stores and 0 <= options.span_column < n_text_columns:
        mask_spans(classifier, [["a"]] * n_text_columns, [Span(options.span_column, 0, 1)])


def _check_sides(classifier: Classifier, scope: Scope) -> None:
    for block in scope.blocks:
        side = max(block.n_out, block.n_in)
        if side > MAX_SIDE:
            raise InputError(
                f"{classifier.name}: layer {block.name} of scope {scope.name} is {side:,} wide; its Kronecker factor "
                f"would take {8e-9 * side**2:.1f} GB (limit {8e-9 * MAX_SIDE**2:.1f}). Give a scope without it, or "
                "--curvature none with --sketch-basis random, which take no factors; `if` at this scope is then asked "
                "with --curvature cg."
            )
