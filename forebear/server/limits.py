"""What one request may ask for, and what all of them together may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from forebear.errors import InputError
from forebear.retriever.question.methods import Method
from forebear.retriever.question.spec import QuerySpec, Question

Rows = Sequence[tuple[str, ...]]  # test rows: the texts of each, one a text column


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every bound of the server; what is beyond one is refused before any work.

    Attributes:
        texts: Test rows of a request.
        text_characters: Characters of one text.
        body_bytes: Bytes of a request's body, whether or not its length is announced.
        methods: Methods of a request.
        results: Results of a request: test rows x methods x both ends x ``top``.
        scores: Numbers of an answer of scores: test rows x methods x training rows.
        model_texts: Test rows of a request whose methods run the model over training rows; 0 refuses such methods.
        candidates: Training rows at each end that the model scores, where a request names their number.
        flip_texts: Test rows of a request for flip sets.
        flip_rows: Training rows of a flip set.
        queue: Requests that wait for one index.
        batch_texts: Test rows that are computed together, of one request or several.
        request_seconds: From the first byte of a request's body to the last of its answer.
        body_seconds: For the head of a request to arrive, and again for its body.
        connections: Open connections.
        shutdown_seconds: What running requests have to end in, once the server is told to stop.
    """

    texts: int = 256
    text_characters: int = 20_000
    body_bytes: int = 1 << 20
    methods: int = 8
    results: int = 100_000
    scores: int = 1_000_000
    model_texts: int = 8
    candidates: int = 2000
    flip_texts: int = 8
    flip_rows: int = 1000
    queue: int = 256
    batch_texts: int = 64
    request_seconds: float = 60.0
    body_seconds: float = 10.0
    connections: int = 512
    shutdown_seconds: float = 30.0

    def check(self) -> None:
        """Refuse bounds that would let nothing through.

        Raises:
            InputError: A bound is below 1 (``model_texts``: below 0).
        """
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "model_texts" else 1
            if value < least:
                raise InputError(f"{field.name.replace('_', ' ')} {value}: expected at least {least}.")

    def together(self, spec: QuerySpec) -> int:
        """Test rows that are computed together, of one request or several.

        Where the model runs over training rows, whole gradients of the test rows are held, and each takes long: so many
        as one request may ask about.
        """
        try:
            by_model = methods_by_model(spec, spec.check())
        except InputError:  # which is told when the question is checked
            return 1
        return max(1, min(self.batch_texts, self.model_texts)) if by_model else self.batch_texts

    def check_rows(self, rows: Rows) -> None:
        """Refuse too many test rows, or too long ones.

        Raises:
            InputError: As said.
        """
        _refuse_more("texts", len(rows), self.texts)
        for number, row in enumerate(rows):
            _refuse_more(f"characters in text {number} (from 0)", max(map(len, row)), self.text_characters)

    def check_question(self, question: Question, n_rows: int) -> None:
        """Refuse what would hold the server for longer than other clients can wait.

        Args:
            question: The question, resolved against its index.
            n_rows: Its test rows.

        Raises:
            InputError: It lists too much, or runs the model over training rows for too many test rows, or over all.
        """
        spec = question.spec
        _refuse_more("methods", len(question.methods), self.methods)
        _refuse_more("results (texts x methods x 2 x top)", n_rows * len(question.methods) * 2 * spec.top, self.results)
        if spec.candidates is not None:
            _refuse_more("candidates", spec.candidates, self.candidates)
        by_model = methods_by_model(spec, question.methods)
        if not by_model:
            return
        over_all = [m.name for m in question.methods if m.through_run]
        if spec.exact == "full" or spec.certify or spec.recall >= 1:
            over_all = by_model
        if over_all:
            raise InputError(
                f"{', '.join(over_all)}: as asked, the model runs over all training rows, which is not done for a "
                "client. Ask it by `forebear retrieve`."
            )
        if self.model_texts == 0:
            raise InputError(
                f"{', '.join(by_model)}: as asked, the model runs over training rows, which this server was started "
                "without (`forebear serve --model-texts 8`). Ask a method of the head."
            )
        _refuse_more(f"texts for {', '.join(by_model)}, which run the model over training rows", n_rows,
                     self.model_texts)  # fmt: skip


def methods_by_model(spec: QuerySpec, methods: Sequence[Method]) -> list[str]:
    """Names of the methods that, as asked, run the model over training rows."""
    return [m.name for m in methods if m.by_model or (m.representation == "head" and spec.scope_of(m) != "head")]


def _refuse_more(what: str, n: int, most: int) -> None:
    if n > most:
        raise InputError(f"{n:,} {what}: this server takes at most {most:,}. Ask in several requests.")
