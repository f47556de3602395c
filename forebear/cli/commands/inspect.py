"""``forebear methods``, ``info`` and ``verify``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import grouped
from forebear.cli.options.model import Device, MovedModel
from forebear.cli.options.report import JsonOut
from forebear.cli.screen.console import OUT, Command, size
from forebear.errors import CorruptIndexError

if TYPE_CHECKING:
    from forebear.indexer.index import Index
    from forebear.indexer.storage.manifest import Manifest

Folder = Annotated[str, typer.Argument(metavar="INDEX", help="The index folder, or hf://user/name.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("methods", cls=Command)(methods)
    app.command("info", cls=Command)(info)
    app.command("verify", cls=Command)(verify)


@grouped()
def methods(as_json: JsonOut = False) -> None:
    """List the methods: what is stored, the score, the paper.

    Example: forebear methods
    """
    from forebear.retriever.question.methods import METHODS, STORED

    if as_json:
        found = [asdict(method) | {"sign": method.sign} for method in METHODS.values()]
        OUT.print_json(json.dumps(found, allow_nan=False))
        return
    from rich.table import Table

    grid = Table()
    for name in ("method", "score(query q, row n)", "stored for each row", "needs", "source"):
        grid.add_column(name, no_wrap=name == "method", overflow="fold")  # what is cut cannot be typed
    for method in METHODS.values():
        stored = STORED[method.representation].words + (", all checkpoints" if method.all_checkpoints else "")
        grid.add_row(
            method.name,
            method.formula,
            stored,
            f"--store {method.store}{' --words-top 0' if method.needs_all_words else ''}",
            method.source,
        )
    unsigned = ", ".join(method.name for method in METHODS.values() if not method.signed)
    grid.caption, grid.caption_justify = f"Scores of {unsigned} are similarities: their sign says nothing.", "left"
    OUT.print(grid)


@grouped()
def info(index: Folder, as_json: JsonOut = False) -> None:
    """Say what an index holds, and where its numbers were computed; of a build in parts what is there and missing.

    Example: forebear info runs/mine-index
    """
    from forebear.indexer.building.sharing.under_way import find_build
    from forebear.indexer.index import Index

    build = find_build(index)
    facts = index_facts(Index.open(index, check=False)) if build is None else asdict(build)
    if as_json:
        OUT.print_json(json.dumps(facts, allow_nan=False))
        return
    from rich.table import Table

    grid = Table(show_header=False, box=None)
    for name, value in _lines(facts) if build is None else _lines_of_build(facts):
        grid.add_row(name, value)
    OUT.print(grid)


def index_facts(index: Any) -> dict[str, Any]:
    """Facts of an index, as ``forebear info --json`` prints them."""
    from forebear.indexer.building.row_facts import row_facts
    from forebear.indexer.model.device.arithmetic import device_kind
    from forebear.indexer.model.device.picking import pick_device
    from forebear.indexer.rows.row_format import SINGLE_LABEL
    from forebear.indexer.storage.ann import backend
    from forebear.retriever.effects.measured import measured_lines

    manifest = index.manifest
    spec = manifest.spec
    rows = row_facts(index)
    by_kind: dict[str, int] = {}
    fitted = manifest.fitted_name("")
    for name, facts in manifest.files.items():
        kind = name.removeprefix(fitted).split("/")[0]
        by_kind[kind] = by_kind.get(kind, 0) + facts["bytes"]
    total = sum(by_kind.values())
    return {
        "folder": str(index.folder),
        "digest": manifest.digest(),
        "spec_digest": spec.digest(),
        "rows": {"live": manifest.n_live, "retired": manifest.n_retired, "given_out": manifest.n_rows},
        "self_check": manifest.self_check or None,
        "row_facts": asdict(rows) | {"lines": rows.describe(), "warnings": rows.warnings()},
        "segments": [asdict(segment) for segment in manifest.segments],
        "text_columns": list(spec.text_columns),
        "without_texts": manifest.without_texts,
        "columns": dict(manifest.columns),
        "parts": _parts_computed_elsewhere(manifest),
        "label_names": list(spec.label_names),
        "label_mode": spec.label_mode,
        "max_length": spec.max_length,
        "precision": spec.precision,
        "computed_on": manifest.computed_on or None,
        "refitted_on": manifest.fit.get("computed_on"),
        "loss": {
            "name": "cross-entropy" if spec.problem_type == SINGLE_LABEL else index.loss.describe(),
            "problem_type": spec.problem_type,
            "class_weights": dict(zip(spec.label_names, spec.class_weights, strict=True))
            if spec.class_weights
            else None,
            "label_smoothing": spec.label_smoothing,
        },
        "checkpoints": [asdict(checkpoint) for checkpoint in manifest.checkpoints],
        "tokenizer_sha256": spec.tokenizer_sha256,
        "scopes": {"head": {"classes": len(spec.label_names), "feature_dim": manifest.feature_dim}}
        | {
            scope: {"sketch_dim": spec.sketch_dim, "with_bias": spec.with_bias, "whitened": spec.whitened}
            for scope in spec.sketched_scopes
        },
        "representations": [
            "feature",
            "head",
            *(["sentence"] if "sbert" in spec.stores else []),
            *(["words", "tfidf"] if "words" in spec.stores else []),
            *(["spans"] if "spans" in spec.stores else []),
        ],
        "words": {"tops": list(spec.words_tops), "precision": spec.words_precision} if spec.words_tops else None,
        "spans": {
            "how": spec.spans,
            "column": spec.text_columns[spec.span_column],
            "n": len(index.spans().rows),
            "cut_by_truncation": index.spans().n_cut,
        }
        if spec.spans is not None
        else None,
        "sentence_model": manifest.sentence_model,
        "curvature": manifest.curvature,
        "sketch": {
            "width": spec.sketch_dim or None,
            "bits": spec.sketch_bits,
            "white_bits": spec.white_bits,
            "whitening": _whitening(index),
            "basis": spec.sketch_basis,
            "seed": spec.seed,
        },
        "fitted_beyond_the_head": asdict(manifest.fit_age) if spec.sketched_scopes else None,
        "calibration": manifest.calibration,
        "search": {name: found for name, found in manifest.derived.items() if spec.ann or found["kind"] == "scan"},
        "effects": measured_lines(index),
        "bytes": {"total": total, "a_row": total / manifest.n_rows, **by_kind},
        "device": device_kind(pick_device()),
        "faiss": backend(),
        "libraries": manifest.libraries,
    }


def _whitening(index: Index) -> dict[str, dict[str, str]]:
    """How gradients were whitened, by scope and damping: by leading directions, or whole."""
    spec = index.manifest.spec
    dampings = list(enumerate(spec.dampings)) if spec.whitened else []
    return {
        scope: {
            given: "leading" if index.gradients(scope, damping=number).reduction.from_plain else "whole"
            for number, given in dampings
        }
        for scope in spec.sketched_scopes
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from forebear.indexer.gradients.self_check import CheckedGradients
    from forebear.indexer.rows.row_format import SINGLE_LABEL
    from forebear.indexer.storage.manifest import FitAge

    rows, stored = facts["rows"], facts["bytes"]
    lines = [
        ("index", f"{facts['folder']}  (digest {facts['digest'][:16]})"),
        (
            "rows",
            f"{rows['live']:,} live, {rows['retired']:,} retired; text columns {', '.join(facts['text_columns'])}"
            + (", published without the texts" if facts["without_texts"] else ""),
        ),
        *(
            ("rows", f"{part['n_left_out']:,} more rows of {part['source']} have no label and were left out")
            for part in facts["segments"]
            if part["n_left_out"]
        ),
        *(("rows", line) for line in facts["row_facts"]["lines"]),
        *(("warning", line) for line in facts["row_facts"]["warnings"]),
        ("labels", ", ".join(facts["label_names"]) + (f" ({facts['label_mode']})" if facts["label_mode"] else "")),
        ("model", f"max length {facts['max_length']}, {facts['precision']}"),
    ]
    lines += _device_lines(facts)
    lines += [
        ("part", f"{part['what']}: computed otherwise than the fit: {_maker(part['by'])}") for part in facts["parts"]
    ]
    if facts["columns"]:
        lines.append(("columns", ", ".join(f"{name} ({kind})" for name, kind in facts["columns"].items())))
    if facts["self_check"]:
        lines.append(("model", CheckedGradients(**facts["self_check"]).describe()))
    if facts["loss"]["problem_type"] != SINGLE_LABEL:
        lines.append(("loss", f"{facts['loss']['name']} ({facts['loss']['problem_type']})"))
    if weights := facts["loss"]["class_weights"]:
        lines.append(("loss", "class weights " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())))
    if smoothing := facts["loss"]["label_smoothing"]:
        lines.append(("loss", f"label smoothing {smoothing:g}"))
    lines += [("checkpoint", f"{c['name']}  eta {c['eta']:.3g}  {c['path']}") for c in facts["checkpoints"]]
    for scope, shape in facts["scopes"].items():
        head = scope == "head"
        what = (
            f"exact, {shape['classes']} x {shape['feature_dim']}"
            if head
            else f"sketch of {shape['sketch_dim']} coordinates and {facts['sketch']['bits']} bits"
            + (", with biases and LayerNorm" if shape["with_bias"] else "")
        )
        lines.append(("scope", f"{scope}: {what}"))
    lines.append(("representations", ", ".join(facts["representations"])))
    if facts["words"]:
        kept = " and ".join(f"{top} longest gradients a row" if top else "all" for top in facts["words"]["tops"])
        lines.append(("words", f"{kept}, {facts['words']['precision']}"))
    if facts["spans"]:
        of = facts["spans"]
        lines.append(
            ("spans", f"{of['n']:,} ({of['how']} of {of['column']}); {of['cut_by_truncation']:,} cut by truncation")
        )
    for scope, solvers in facts["curvature"].items():
        for name in ("exact", "cg", "ekfac"):
            if name in solvers:
                found = solvers[name]
                given = ", ".join(f"{d['given']} = {d['damping']:.4g}" for d in found["dampings"])
                lines.append(("curvature", f"{scope}: {name}, damping {given}, {found['n_rows']:,} rows"))
    if facts["fitted_beyond_the_head"]:
        lines.append(("fitted", str(FitAge(**facts["fitted_beyond_the_head"]))))
    for scope, found in facts["calibration"].items():
        for method, known in found["methods"].items():
            some = ", ".join(f"{float(r):.4g}: {100 * share:.2g}%" for r, share in known["candidates"].items())
            by = "an earlier forebear: no recall is stated by it"
            if "margin_unit" in known:
                by = f"{known['n_stating']} queries, which support at most {known['supported']:.4g}"
                by += f" of the top {known['top']}"
            if "errors" in known:
                allowed = ", ".join(f"{float(r):.4g}: {error:.2g}" for r, error in known["errors"].items())
                listed = f"{100 * known['list_share']:.2g}%"
                some += f", or of {listed} until none can be better but by an error of {allowed}"
            lines.append(("candidates", f"{scope} {method}, share of rows by recall {some}; by {by}"))
    lines += [("effects", line) for line in facts["effects"]]
    for name, search in facts["search"].items():
        lines.append(("search", f"{name}: {_search_line(search)}"))
    parts = ", ".join(f"{kind} {size(n)}" for kind, n in stored.items() if kind not in ("total", "a_row"))
    lines.append(("size", f"{size(stored['total'])}, {stored['a_row']:,.0f} bytes a row ({parts})"))
    lines.append(("built with", ", ".join(f"{k} {v}" for k, v in facts["libraries"].items())))
    lines.append(("here", f"models run on {facts['device']} unless --device names another; {facts['faiss']}"))
    return lines


def _device_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers of the index were computed, as far as it says so."""
    from forebear.indexer.model.device.arithmetic import computed_line

    records = [("", facts["computed_on"]), ("fits beyond the head: ", facts["refitted_on"])]
    for part in facts["segments"]:
        rows = f"rows {part['start']} to {part['start'] + part['n_rows'] - 1}: "
        records.append((rows, part["computed_on"]))
    return [("computed on", f"{subject}{computed_line(record)}") for subject, record in records if record]


def _parts_computed_elsewhere(manifest: Manifest) -> list[dict[str, Any]]:
    """Of an index that was built in parts: which were not computed by what computed the fit, and by what they were."""
    found: list[dict[str, Any]] = []
    for part in manifest.parts:
        by = {name: value for name, value in part.items() if name not in ("part", "shards")}
        if "libraries" in by:
            by["libraries"] = dict(by["libraries"].items() - manifest.libraries.items())
        if "shards" in part:
            first, stop = part["shards"]
            rows = [manifest.shards[first][0], manifest.shards[stop - 1][1]]
            found.append({"what": f"{part['part']} (rows {rows[0]} to {rows[1] - 1})", "rows": rows, "by": by})
        else:
            found.append({"what": "what follows from all rows", "rows": None, "by": by})
    return found


def _maker(by: dict[str, Any]) -> str:
    """What computed a part, as far as it is recorded, in words."""
    from forebear.indexer.model.device.arithmetic import computed_line

    said = {"processor": by.get("processor"), "device": None, "libraries": None, "source of forebear": by.get("code")}
    if "computed_on" in by:
        said["device"] = computed_line(by["computed_on"])
    if "libraries" in by:
        said["libraries"] = ", ".join(f"{name} {version}" for name, version in sorted(by["libraries"].items()))
    return "; ".join(f"{name} {value}" for name, value in said.items() if value)


def _lines_of_build(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """A build in parts that goes on, see :class:`~forebear.indexer.building.sharing.under_way.BuildUnderWay`."""
    columns, n_missing = ", ".join(facts["text_columns"]), facts["n_missing"]
    lines = [
        ("build in parts", f"{facts['folder']}: fitted (digest {facts['fit'][:16]}), no index yet"),
        ("rows", f"{facts['n_rows']:,} in {facts['n_shards']:,} files (--shard-rows); text columns {columns}"),
        ("labels", ", ".join(facts["label_names"])),
        ("scopes", ", ".join(facts["scopes"])),
        ("stores", ", ".join(facts["stores"])),
        ("fitted by", _maker(facts["fitted_by"])),
    ]
    for part in facts["parts"]:
        state = "finished" if part["is_finished"] else "begun, not finished"
        state += "" if part["of_this_fit"] else "; of another fit, which --commit refuses"
        by = " and ".join(map(_maker, part["differing"]))
        state += f"; computed otherwise than the fit: {by}" if by else ""
        rows = "" if part["rows"] is None else f" (rows {part['rows'][0]} to {part['rows'][1] - 1})"
        lines.append(("part", f"{part['part']}{rows}: {state}"))
    lines.append(("missing", f"{n_missing:,} rows are in no finished part of this folder" if n_missing else "nothing"))
    return [*lines, ("next", facts["next"])]


def _search_line(search: dict[str, Any]) -> str:
    """How one kind of vector is searched, and the recall that answers state."""
    from forebear.indexer.storage.ann import expected_recall

    if search["kind"] == "scan":
        return "norm-sorted scan"
    if search["factory"] == "Flat":
        return "FAISS Flat, exact"
    recall = expected_recall(search)
    stated = "recall not measured" if recall is None else f"recall {recall:.3g} by {search['n_stating']} training rows"
    return f"FAISS {search['factory']}, {stated}"


@grouped()
def verify(
    index: Folder,
    model: MovedModel = None,
    rows: Annotated[int, typer.Option("--rows", help="Training rows to recompute; 0: bytes only.")] = 16,
    device: Device = "auto",
    as_json: JsonOut = False,
) -> None:
    """Re-hash every file of an index and recompute a sample of its rows from the model.

    Example: forebear verify runs/mine-index
    """
    from forebear.indexer.building.verify import verify_index

    found = verify_index(index, model=model, n_rows=rows, device=device)
    if as_json:
        OUT.print_json(json.dumps({"ok": not found.problems, **asdict(found)}, allow_nan=False))
        if found.problems:
            raise typer.Exit(1)
        return
    if found.problems:
        more = f" (and {len(found.problems) - 1} more; --json lists them)" if len(found.problems) > 1 else ""
        raise CorruptIndexError(f"{index}: {found.problems[0]}{more}.")
    recomputed = (
        "no rows recomputed"
        if found.max_error is None
        else f"{found.n_rows_recomputed} rows recomputed, largest relative difference {found.max_error:.1e}"
    )
    OUT.print(f"{index}: whole. {found.n_files} files, {size(found.size_bytes)} re-hashed; {recomputed}.")
