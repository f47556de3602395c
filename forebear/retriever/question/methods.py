"""The table of methods: each is a representation, a query vector and a metric, not a program of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from forebear.errors import InputError
from forebear.indexer.model.scope_names import EMBEDDING, scope_named

if TYPE_CHECKING:
    from forebear.indexer.index import Index

Representation = Literal["feature", "sentence", "head", "words", "tfidf", "run"]
Words = Literal["all", "topk", "common", "nocommon"]
QueryVector = Literal["same", "preconditioned", "representer"]
Metric = Literal["dot", "cos", "euc"]
Searched = Literal["stored", "gradients", "words", "tfidf", "spans", "run"]


@dataclass(frozen=True)
class Stored:
    """What an index holds for each training row, in a representation.

    Attributes:
        store: The ``--store`` that stores it.
        words: What is stored, for people.
    """

    store: str
    words: str


STORED: dict[Representation, Stored] = {
    "feature": Stored("features", "feature f"),
    "sentence": Stored("sbert", "sentence embedding s"),
    "head": Stored("features", "head gradient g"),
    "words": Stored("words", "gradient of each word"),
    "tfidf": Stored("words", "word counts, logit gradient"),
    "run": Stored("features", "nothing: the run is repeated"),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        name: The name that ``--method`` takes.
        representation: What is stored for each training row: the head's input f, an un-tuned sentence embedding, or
            the head gradient (p - y) outer f, kept as its two factors; gradients of its words, by token; tf-idf;
            nothing, where the training run is repeated and differentiated.
        query: The query vector: the same representation of the test row, its gradient preconditioned by H^-1, or
            the target's row of the representer kernel.
        metric: ``dot``, ``cos`` or ``euc`` (minus the Euclidean distance). With a preconditioned query, ``cos`` is the
            cosine in H^-1's inner product.
        all_checkpoints: Whether the score is summed over all checkpoints, weighted by eta, instead of taken at the
            last one alone.
        words: Which words take part, in a method that compares words.
        spans: Whether the method compares what a span adds to the gradient: of the training ``row``, or of ``both``
            rows.
        saliency: Whether the query vector is -d s / d theta of the saliency of a word instead of a loss gradient.
        variants: Whether the score is summed over models one training step away from the last checkpoint.
        scope: The scope that the method's name fixes (``rep``: the head); None: the question's.
        formula: The score, in the notation of ``docs/methods.md``.
        source: The paper, by its short name in ``docs/methods.md``.
    """

    name: str
    representation: Representation
    query: QueryVector = "same"
    metric: Metric
    all_checkpoints: bool = False
    words: Words | None = None
    spans: Literal["row", "both"] | None = None
    saliency: bool = False
    variants: bool = False
    scope: str | None = None
    formula: str
    source: str

    @property
    def store(self) -> str:
        """The ``--store`` of the index that the method needs."""
        return STORED[self.representation].store

    @property
    def needs_all_words(self) -> bool:
        """Whether the index must hold the gradients of all words of each row, not of the longest alone."""
        return self.words not in (None, "topk")

    def searched_by(self, scope: str) -> Searched:
        """Name of the searcher (:data:`~forebear.retriever.searchers.SEARCHERS`) that answers for the method.

        ``stored`` answers for features, sentence embeddings and gradients of the head, which are stored exactly;
        ``gradients`` (sketches, then the model) for gradients beyond the head; ``spans`` for spans, saliency and
        variants, which only the model scores; ``run`` for the derivative through the training run.
        """
        if self.through_run:
            return "run"
        if self.by_model:
            return "spans"
        if self.representation in ("words", "tfidf"):
            return self.representation
        return "gradients" if self.representation == "head" and scope != "head" else "stored"

    @property
    def adds_up_steps(self) -> bool:
        """Whether the score adds up what steps of gradient descent on the row did to the query's loss (TracIn)."""
        return self.all_checkpoints and self.representation == "head"

    @property
    def reads_texts(self) -> bool:
        """Whether the method compares texts, so that it cannot be asked about rows with word pieces masked."""
        return self.by_words or self.representation == "sentence"

    @property
    def scores_rows(self) -> bool:
        """Whether each training row has one score for a prediction: not one a span, and not for a word's saliency."""
        return self.spans is None and not self.saliency

    @property
    def calibrated_as(self) -> str:
        """The method whose calibration says how many rows to propose."""
        if not self.by_model:
            return self.name
        return "if" if self.query == "preconditioned" else "gd"

    @property
    def by_model(self) -> bool:
        """Whether the model alone gives the scores, not what is stored.

        Of candidates that other vectors propose (``if``'s or ``gd``'s), or of all rows through the training run.
        """
        return self.saliency or self.variants or self.spans is not None or self.through_run

    @property
    def through_run(self) -> bool:
        """Whether the scores are a derivative through the whole training run."""
        return self.representation == "run"

    @property
    def ranks_spans(self) -> bool:
        """Whether spans of training rows are ranked for a prediction.

        False of ``saliency-if-token``: it ranks words of training rows for the saliency of a word of the query.
        """
        return self.spans is not None and not self.saliency

    @property
    def signed(self) -> bool:
        """Whether a score above 0 supports the target and one below 0 opposes it.

        False of features and sentence embeddings: their score is a similarity (a distance is always below 0).
        """
        return self.representation not in ("feature", "sentence")

    @property
    def sign(self) -> str:
        """The meaning of a score's sign, which is the same at both ends of a ranking."""
        if not self.signed:
            return "a similarity, whose sign says neither support nor opposition"
        if self.saliency:
            return "above 0 raises the word's saliency, below 0 lowers it"
        return "above 0 supports the target, below 0 opposes it"

    @property
    def linear(self) -> bool:
        """Whether scores of a sum of query vectors are the sums of the scores, so that one search serves many rows."""
        return (self.metric == "dot" and not (self.by_model or self.by_words)) or self.through_run

    @property
    def by_words(self) -> bool:
        """Whether the method's scores are sums over shared words."""
        return self.store == "words"


_ROWS = (
    Method(name="nn-euc", representation="feature", metric="euc", formula="-||f_q - f_n||", source="Pez21"),
    Method(name="nn-cos", representation="feature", metric="cos", formula="cos(f_q, f_n)", source="Pez21"),
    Method(name="nn-dot", representation="feature", metric="dot", formula="<f_q, f_n>", source="Pez21"),
    Method(name="sbert-euc", representation="sentence", metric="euc", formula="-||s_q - s_n||", source="Pez21"),
    Method(name="sbert-cos", representation="sentence", metric="cos", formula="cos(s_q, s_n)", source="Pez21"),
    Method(name="sbert-dot", representation="sentence", metric="dot", formula="<s_q, s_n>", source="Pez21"),
    Method(name="gd", representation="head", metric="dot", formula="<g_q, g_n>", source="Pez21"),
    Method(name="gc", representation="head", metric="cos", formula="cos(g_q, g_n)", source="Pez21"),
    Method(
        name="if", representation="head", query="preconditioned", metric="dot",
        formula="<H^-1 g_q, g_n>", source="Koh17, Han20, Pez21",
    ),
    Method(
        name="rif", representation="head", query="preconditioned", metric="cos",
        formula="<H^-1 g_q, g_n> / sqrt(<H^-1 g_q, g_q> <H^-1 g_n, g_n>)", source="Barshan20, Pez21",
    ),
    Method(
        name="rep", representation="head", query="representer", metric="dot", scope="head",
        formula="-(p_n - y_n)_t <f_n, f_q> / (2 lambda N)", source="Yeh18, Pez21",
    ),
    Method(
        name="tracin", representation="head", metric="dot", all_checkpoints=True,
        formula="sum_c eta_c <g_q, g_n>", source="Pruthi20, Yeh22",
    ),
    Method(
        name="tracin-last", representation="head", metric="dot", all_checkpoints=True, scope="head",
        formula="sum_c eta_c <g_q, g_n>, head weight only", source="Yeh22",
    ),
    Method(
        name="tracin-we", representation="words", metric="dot", all_checkpoints=True, words="all",
        formula="sum_c eta_c sum_w <dL_q/dE_w, dL_n/dE_w>, shared words w", source="Yeh22 eq. 4",
    ),
    Method(
        name="tracin-we-topk", representation="words", metric="dot", all_checkpoints=True, words="topk",
        formula="tracin-we over each row's k positions of longest gradient", source="Yeh22 eq. 6",
    ),
    Method(
        name="tracin-we-common", representation="words", metric="dot", all_checkpoints=True, words="common",
        formula="tracin-we over start and end tokens only", source="Yeh22",
    ),
    Method(
        name="tracin-we-nocommon", representation="words", metric="dot", all_checkpoints=True, words="nocommon",
        formula="tracin-we without start, end, stop words, punctuation", source="Yeh22",
    ),
    Method(
        name="tracin-tfidf", representation="tfidf", metric="dot", all_checkpoints=True,
        formula="cos(tfidf_q, tfidf_n) sum_c eta_c <p_q - y_q, p_n - y_n>", source="Yeh22 eq. 7",
    ),
    Method(
        name="magic", representation="run", metric="dot",
        formula="-dL_q/dw_n through the training run, w_n the row's weight", source="Ilyas25",
    ),
    Method(
        name="tracin-f", representation="head", metric="dot", variants=True,
        formula="sum_m <g_q, g_n>, m models one step away", source="Span",
    ),
    Method(
        name="if+", representation="head", query="preconditioned", metric="dot", spans="row",
        formula="<H^-1 g_q, g_n - g_n(-ij)>, row without span ij", source="Span",
    ),
    Method(
        name="if++", representation="head", query="preconditioned", metric="dot", spans="both",
        formula="<H^-1 (g_q - g_q(-kl)), g_n - g_n(-ij)>", source="Span",
    ),
    Method(
        name="tracin+", representation="head", metric="dot", spans="row", variants=True,
        formula="sum_m <g_q, g_n - g_n(-ij)>, m models one step away", source="Span",
    ),
    Method(
        name="tracin++", representation="head", metric="dot", spans="both", variants=True,
        formula="sum_m <g_q - g_q(-kl), g_n - g_n(-ij)>", source="Span",
    ),
    Method(
        name="saliency-if", representation="head", query="preconditioned", metric="dot", saliency=True,
        formula="-<H^-1 ds/dtheta, g_n>, s the saliency of a word", source="Joint eq. 5",
    ),
    Method(
        name="saliency-if-token", representation="head", query="preconditioned", metric="dot", saliency=True,
        spans="row", formula="-<H^-1 ds/dtheta, g_n - g_n(j)>, word j made [UNK]", source="Joint eq. 8",
    ),
)  # fmt: skip

LAYER_PREFIX = "tracin-layer:"
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def pick_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Methods by name, each once, in the order given.

    Raises:
        InputError: A name that is not in the table, or none at all.
    """
    known = f"Choose from: {', '.join(METHODS)}, {LAYER_PREFIX}NAME."
    if not names:
        raise InputError(f"no method given. {known}")
    unknown = [name for name in names if name not in METHODS and not name.startswith(LAYER_PREFIX)]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known. {known}")
    return tuple(METHODS.get(name) or _layer_method(name) for name in dict.fromkeys(names))


def _layer_method(name: str) -> Method:
    """``tracin-layer:NAME``: TracIn over one layer, a whole scope (``head``, ``top-K``, ``all``), or ``embedding``."""
    layer = name.removeprefix(LAYER_PREFIX)
    if layer == EMBEDDING:  # another name of tracin-we
        return replace(METHODS["tracin-we"], name=name)
    if not layer:
        raise InputError(f"{name!r} names no layer. Give one, such as {LAYER_PREFIX}bert.encoder.layer.0.output.dense.")
    return Method(
        name=name, representation="head", metric="dot", all_checkpoints=True,
        scope=scope_named(layer),
        formula=f"sum_c eta_c <g_q, g_n> over {layer}", source="Yeh22",
    )  # fmt: skip


def ann_name(index: Index, method: Method) -> str | None:
    """The FAISS index that serves a method, if one was asked for (``--ann``)."""
    if (
        index.manifest.spec.ann is None
        or method.representation not in ("feature", "sentence")
        or method.metric == "dot"
    ):
        return None
    return f"{method.representation}-{method.metric}"
