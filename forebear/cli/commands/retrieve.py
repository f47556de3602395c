"""``forebear retrieve``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Options, Shown, flag_of, grouped, values_of
from forebear.cli.options.model import IndexesOptions
from forebear.cli.options.queries import QueryOptions
from forebear.cli.options.question import Candidates, Methods, SearchOptions, SolverOptions, SpanOptions, Top, Word
from forebear.cli.options.ray import RayOptions
from forebear.cli.options.report import Hubs, OutputOptions
from forebear.cli.ray_tasks import arguments_without, in_shards
from forebear.cli.screen.answers import SHOWN_QUERIES, say_recall, say_signs, show_answers
from forebear.cli.screen.console import ARGUMENTS, Command, listed, progress_bar, say, warn
from forebear.cli.screen.groups import show_groups
from forebear.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from forebear.indexer.rows.row_source import RowSource
    from forebear.progress import Progress
    from forebear.retriever.answers.parts import Parts
    from forebear.retriever.answers.results import Answers
    from forebear.retriever.question.methods import Method
    from forebear.retriever.question.spec import QuerySpec, Question
    from forebear.retriever.retriever import Retriever

HELP = """Rank the training rows behind each prediction: proponents and opponents, by one or more methods.

Examples:

    forebear retrieve --index I --text "a gripping film" --method gc,if --top 5

    forebear retrieve --index I --text "A man sleeps." --pair "A person is awake."

    forebear retrieve --index I --test dev.csv --method gc,rif --top 10 --out answers.parquet

    forebear retrieve --index I --text "a gripping film" --method tracin-we-topk,tracin-tfidf

    forebear retrieve --index I --text "dull plot, great cast" --method tracin++,if++ --spans clauses

    forebear retrieve --index I --test dev.csv --method gd,if --scope all --recall 0.95 --out answers.parquet

    forebear retrieve --index I --test many.csv --method gd,if --scope all --out answers.parquet --resume

    forebear retrieve --index I --test mistakes.csv --method if --aggregate

    forebear retrieve --index I --text "a gripping film" --method if --group-by source

    forebear retrieve --index I --index J --text "a gripping film" --method gc,gd
"""


@dataclass(frozen=True, kw_only=True)
class RankingOptions(Options, panel="Question"):
    """Which methods rank the rows, and how many rows are listed."""

    methods: Methods = None
    top: Top = 10
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Divide scores of methods by words by sqrt(self x self).")
    ] = False
    word: Word = None
    aggregate: Annotated[
        bool,
        typer.Option("--aggregate", help="One answer to all test rows together: their query vectors are summed."),
    ] = False
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            help="Sum the scores of all rows by a column that the index keeps, or by label: --top groups at each end.",
            show_default=False,
        ),
    ] = None
    candidates: Candidates = None
    certify: Annotated[
        bool,
        typer.Option(
            "--certify",
            help="Prove each top k of a scope beyond the head, however many rows it takes.",
            rich_help_panel="Search",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(OutputOptions):
    """Where answers go, and what is added to them."""

    out: Annotated[
        str | None,
        typer.Option("--out", help="File to write: NAME.parquet, NAME.jsonl or NAME.csv.", show_default=False),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an --out that was interrupted, behind the last finished test rows."),
    ] = False
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="I/N: answer part I of N of the test rows, 1/N to N/N, anywhere that sees --out, in any order. "
            "--resume in its place then writes the file.",
            show_default=False,
        ),
    ] = None
    hubs: Hubs = None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("retrieve", help=HELP, cls=Command)(retrieve)


@grouped(methods=Shown("gc"))
def retrieve(
    ctx: typer.Context,
    index_options: IndexesOptions,
    query_options: QueryOptions,
    ranking: RankingOptions,
    question_options: SearchOptions,
    spans: SpanOptions,
    solver: SolverOptions,
    output: AnswerOptions,
    ray: RayOptions,
) -> None:
    """Rank the training rows behind predictions, on the screen or to a file."""
    from forebear.evaluation.audits.rows.hub_shares import read_hub_shares, with_hub_share
    from forebear.indexer.storage.manifest import digest_of
    from forebear.retriever.answers.coverage import tell_fit_age
    from forebear.retriever.answers.groups import check_additive, grouping_of
    from forebear.retriever.answers.merged import INDEX
    from forebear.retriever.answers.parts import check_parts
    from forebear.retriever.answers.result_file import check_output
    from forebear.retriever.answers.results import text_columns, user_columns
    from forebear.retriever.effects.kinds import effect_meanings
    from forebear.retriever.question.query_rows import tell_label_remark
    from forebear.retriever.question.spec import QuerySpec
    from forebear.retriever.retriever import JointRetriever

    ray.check()
    if ray.ray is not None:
        _answer_shards(ctx.meta[ARGUMENTS], ranking, output, ray)
        output = replace(output, resume=True)
    gold = question_options.target == "gold"
    query_options.check(question_options.target)
    choices = values_of(question_options, ranking, spans, solver)
    group_by = choices.pop("group_by")
    choices |= {"methods": tuple(listed(ranking.methods)) or ("gc",), "span_column": None}
    spec = QuerySpec(**choices)
    methods = spec.check()
    _refuse_what_no_method_takes(spec, methods, spans)
    if group_by is not None:
        _refuse_what_groups_do_not_take(ranking, output)
    if len(index_options.indexes) > 1:
        _refuse_what_several_indexes_do_not_take(ranking, output)
    if output.resume or output.shard is not None:
        _refuse_what_cannot_go_on(ranking, output)
    if output.out is not None and output.shard is None:
        check_parts(Path(output.out), resume=output.resume, force=output.force)
    if output.out is not None:
        check_output(Path(output.out), force=output.force)
    retriever = index_options.open()
    index = retriever.index
    if spans.span_column is not None:
        spec = replace(spec, span_column=index.text_column(spans.span_column))
    source = query_options.open_rows(retriever, need_labels=gold)
    tell_label_remark(index, source, required=gold)

    question = retriever.resolve(spec if group_by is None else replace(spec, exact="full"))
    if group_by is not None:
        check_additive(question)
        grouping_of(index, group_by)
    tell_fit_age(question)
    retriever.check_texts(source)
    _warn_of_reading(retriever, source)
    if group_by is not None:
        _give_groups(retriever, source, question, group_by, output)
        return
    shares = None if output.hubs is None else read_hub_shares(Path(output.hubs), retriever, question)

    def tables_of(answers: Answers) -> Iterator[pa.Table]:
        for table in retriever.tables(answers):
            yield table if shares is None else with_hub_share(table, shares)

    if output.out is None:
        answers = retriever.answers(source, question, block_rows=SHOWN_QUERIES)
        names = [*([INDEX] if isinstance(retriever, JointRetriever) else []), *user_columns(index).values()]
        meanings = effect_meanings(question)
        show_answers(
            answers, tables_of, source, methods, meanings, text_columns(index), names, aggregate=spec.aggregate
        )
    else:
        _write_answers(retriever, source, question, tables_of, None if shares is None else digest_of(shares), output)
    say_recall(retriever, question)
    for other in retriever.others if isinstance(retriever, JointRetriever) else ():
        say_recall(other, other.resolve(question.spec))


def _answer_shards(arguments: Sequence[str], ranking: RankingOptions, output: AnswerOptions, ray: RayOptions) -> None:
    """Answer all shards of the test rows on a Ray cluster, each by this command with ``--shard``."""
    from forebear.retriever.answers.parts import check_parts
    from forebear.retriever.answers.result_file import check_output

    _refuse_what_cannot_go_on(ranking, replace(output, shard="1/1", resume=False))
    assert output.out is not None
    check_parts(Path(output.out), resume=output.resume, force=False)
    check_output(Path(output.out), force=False)
    of_ray = [flag_of(RayOptions, field.name) for field in fields(ray)]
    own = arguments_without(arguments, ("--resume", "--quiet", "-q"), of_ray)
    with progress_bar() as progress:
        in_shards(ray, lambda shard: ["retrieve", *own, "--quiet", "--shard", shard], progress)


def _refuse_what_no_method_takes(spec: QuerySpec, methods: Sequence[Method], spans: SpanOptions) -> None:
    """Refuse options that only methods outside the question have."""
    if not any(m.ranks_spans for m in methods):
        for name, value in values_of(spans).items():
            if value is not None:
                raise InputError(
                    f"{flag_of(SpanOptions, name)} is for if+, if++, tracin+ and tracin++; "
                    f"{', '.join(spec.methods)} compare rows."
                )
    if spec.word is not None and not any(m.saliency for m in methods):
        raise InputError(f"--word is for saliency-if and saliency-if-token, not {', '.join(spec.methods)}.")


def _refuse_what_groups_do_not_take(ranking: RankingOptions, output: AnswerOptions) -> None:
    """Refuse options of single rows beside ``--group-by``, which scores all of them."""
    given = {"--hubs": output.hubs, "--certify": ranking.certify, "--candidates": ranking.candidates}
    for option, value in given.items():
        if value:
            raise InputError(
                f"{option} is about single rows; --group-by sums the scores of all. Leave one of them out."
            )


def _refuse_what_several_indexes_do_not_take(ranking: RankingOptions, output: AnswerOptions) -> None:
    """Refuse options that are about the rows of one index beside several."""
    for option, value in {"--hubs": output.hubs, "--group-by": ranking.group_by}.items():
        if value:
            raise InputError(f"{option} is about the rows of one index. Give one --index.")


def _refuse_what_cannot_go_on(ranking: RankingOptions, output: AnswerOptions) -> None:
    """Refuse ``--resume`` and ``--shard`` where no answers of finished blocks of test rows are kept."""
    from forebear.indexer.building.sharing.parts import part_of

    asked = "--resume" if output.resume else "--shard (and --ray)"
    if output.shard is not None:
        part_of(output.shard)
    if output.out is None:
        raise InputError(f"{asked} is about the parts of a file of answers. Name it by --out.")
    if output.shard is not None and (output.resume or output.force):
        raise InputError(
            "--shard adds to the parts that are there and goes on with its own; --resume then writes the file. "
            "Leave --resume and --force out beside it."
        )
    for option, given in {"--group-by": ranking.group_by, "--aggregate": ranking.aggregate}.items():
        if given:
            raise InputError(
                f"{asked} is about test rows that are answered one by one; {option} keeps none. Leave {asked} out."
            )


def _give_groups(
    retriever: Retriever, source: RowSource, question: Question, column: str, output: AnswerOptions
) -> None:
    """Sum scores by group, on the screen for the first few queries, or to a file for all."""
    from forebear.retriever.answers.parts import remove_parts
    from forebear.retriever.answers.result_file import result_writer
    from forebear.retriever.effects.kinds import effect_meanings

    if output.out is None:
        groups, meanings = retriever.groups(source, question, column), effect_meanings(question)
        show_groups(groups, source, column, meanings, aggregate=question.spec.aggregate)
        return
    metadata = retriever.metadata(question, group_by=column)
    with progress_bar() as progress, result_writer(Path(output.out), metadata, force=output.force) as write:
        remove_parts(Path(output.out))  # of other answers, which --force replaces
        progress("queries", 0, source.n_rows)
        n_lines = 0
        for table in retriever.groups(source, question, column):
            write(table)
            n_lines += table.num_rows
            done = source.n_rows if question.spec.aggregate else table.column("query")[-1].as_py() + 1
            progress("queries", done, source.n_rows)
    say(f"{output.out}: {source.n_rows:,} queries, {n_lines:,} lines of groups by {column}")


def _write_answers(
    retriever: Retriever,
    source: RowSource,
    question: Question,
    tables_of: Callable[[Answers], Iterator[pa.Table]],
    hubs: str | None,
    output: AnswerOptions,
) -> None:
    """Write the answers to all test rows: parts, block by block, which then become the file.

    Args:
        retriever: Over the index.
        source: The test rows.
        question: The question.
        tables_of: Turns answers into tables.
        hubs: Digest of what ``--hubs`` adds to the tables; None without it.
        output: Where they go, and whether parts that are there are gone on with.
    """
    from forebear.indexer.building.sharing.parts import part_of
    from forebear.retriever.answers.parts import kept_parts, kept_shard, run_facts
    from forebear.retriever.answers.result_file import table_writer
    from forebear.retriever.answers.signs import SignCounts

    assert output.out is not None
    path, signs, n_results = Path(output.out), SignCounts(question.methods), 0
    metadata, size = retriever.metadata(question), retriever.asked_together(source, question)
    run = run_facts(question, source, json.loads(metadata["forebear"]), size, hubs=hubs)
    blocks = [(start, min(start + size, source.n_rows)) for start in range(0, source.n_rows, size)]
    if output.shard is not None:
        number, n_shards = part_of(output.shard)
        blocks = blocks[number - 1 :: n_shards]
        with progress_bar() as progress, kept_shard(path, run, blocks, output.shard) as parts:
            _answer_blocks(retriever, source, question, tables_of, parts, progress)
            n_rows = parts.n_rows_done
        say(f"{path}: shard {output.shard} is answered, {n_rows:,} queries; --resume writes the file when all are")
        return
    how = {"resume": output.resume, "force": output.force}
    with progress_bar() as progress, kept_parts(path, run, blocks, **how) as parts:
        _answer_blocks(retriever, source, question, tables_of, parts, progress)
        with table_writer(path, metadata) as write:
            for table in parts.tables():
                write(table)
                signs.add_table(table)
                n_results += table.num_rows
    together = " asked together" if question.spec.aggregate else ""
    say(f"{output.out}: {source.n_rows:,} queries{together}, {n_results:,} results")
    say_signs(signs)


def _answer_blocks(
    retriever: Retriever,
    source: RowSource,
    question: Question,
    tables_of: Callable[[Answers], Iterator[pa.Table]],
    parts: Parts,
    progress: Progress,
) -> None:
    """Answer the blocks of test rows that are missing."""
    progress("queries", parts.n_rows_done, parts.n_rows)
    for answers in retriever.answers(source, question, starts=parts.missing):
        parts.write(answers.start, tables_of(answers))
        progress("queries", parts.n_rows_done, parts.n_rows)


def _warn_of_reading(retriever: Retriever, source: RowSource) -> None:
    """Warn, before the work, if the model reads little of the test rows; of many rows, the first are checked."""
    from forebear.indexer.building.row_facts import reading_of_first_rows

    classifier = retriever.classifier()
    reading = reading_of_first_rows(classifier, source)
    rows = "the test rows" if reading.n_rows == source.n_rows else f"the first {reading.n_rows:,} test rows"
    for warning in reading.warnings(classifier.max_length, rows):
        warn(warning)
