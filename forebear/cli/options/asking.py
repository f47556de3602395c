"""The options that most audits and evaluations of test rows have, as one group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forebear.cli.options.groups import Options
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, SampleOptions, SpanOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TestOptions


@dataclass(frozen=True, kw_only=True)
class AskOptions(Options):
    """The index, a sample of test rows, the report and the methods."""

    index: IndexOptions
    test: TestOptions
    sample: SampleOptions
    report: ReportOptions
    methods: Methods = None

    def call(
        self, function: Callable[..., Any], *groups: Options, spans: SpanOptions | None = None, **given: Any
    ) -> None:
        """Call a function of ``forebear.audits`` or ``forebear.evaluations`` by these and further options.

        Args:
            function: The function.
            *groups: Further groups of options that are keywords of the function; see :meth:`ReportOptions.call`.
            spans: Which spans are compared.
            **given: Further keywords of the function.
        """
        retriever = self.index.open()
        given |= {"rows": self.test.rows, "methods": self.methods} | ({} if spans is None else spans.given(retriever))
        self.report.call(function, retriever, self.sample, *groups, **given)
