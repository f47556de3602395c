"""The shape of the project: dependencies run one way, public names are pinned, importing is cheap."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import forebear

LAYERS = ("indexer", "hub", "retriever", "evaluation", "server", "cli")
ROOMS = {  # of a layer, in their order: a room imports from those before it, never from those after it
    "indexer": (
        "rows", "losses", "model", "storage", "training", "gradients", "curvature", "words", "sketches", "spans",
        "index", "building",
    ),
    "hub": ("card", "published", "attached", "remote", "building", "transfer"),
    "retriever": (
        "ranking", "scores", "question", "head", "effects", "deep", "words", "saliency", "spans", "searchers",
        "answers", "retriever",
    ),
    "evaluation": (
        "reports", "common", "explain", "measures", "retraining", "worklists", "flips", "audits", "perturb", "demo",
        "python", "explorer",
    ),
    "server": (
        "limits", "measures", "served_indexes", "listed_rows", "worklists", "explored", "micro_batches", "tasks",
        "http", "running",
    ),
    "cli": ("screen", "options", "workers", "ray_tasks", "commands", "main"),
}  # fmt: skip
MOST_ENTRIES = 12
PUBLIC_NAMES = """
    BuildOptions CorruptIndexError DataError ForebearCallback ForebearError InUseError Index InputError JointRetriever
    METHODS Method MismatchError MissingStoreError ModelError NonFiniteError NotEnoughMemoryError OutputExistsError
    QuerySpec Retriever RowSource StorageError TrainOptions append_rows audits build_index build_part choose_model
    commit_parts evaluations explain fit_index flip open_rows rebuild_ann retire_rows rows_from_texts saliency
    show train verify_index worklists
"""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "forebear").rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """Modules and names that a file imports, dotted; also those imported within functions or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


IMPORTS = {name: {other for other in imports_of(path) if other in MODULES} for name, path in MODULES.items()}


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_run_one_way(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in (ROOT / "forebear" / layer).rglob("*.py"):
        for name in imports_of(path):
            assert not any(name == f"forebear.{a}" or name.startswith(f"forebear.{a}.") for a in above), (path, name)
            assert name.split(".")[0] not in LAYERS, f"{path} imports {name} through the top-level link"


def test_what_lies_beside_the_layers_imports_none_of_them():
    for name, others in IMPORTS.items():
        if name.count(".") == 1 and name.split(".")[1] not in (*LAYERS, "__main__"):
            assert not any(other.split(".")[1] in LAYERS for other in others if "." in other), name


@pytest.mark.parametrize("layer", LAYERS)
def test_rooms_import_from_those_before_them(layer):
    rooms, inside = ROOMS[layer], f"forebear.{layer}."
    assert {name[len(inside) :].split(".")[0] for name in MODULES if name.startswith(inside)} == set(rooms)
    for name in MODULES:
        if name.startswith(inside):
            place = rooms.index(name[len(inside) :].split(".")[0])
            for other in IMPORTS[name]:
                if other.startswith(inside):
                    assert rooms.index(other[len(inside) :].split(".")[0]) <= place, f"{name} imports {other}"


def test_no_modules_import_each_other():
    within = {name: IMPORTS[name] - {name, "forebear"} for name in MODULES if name != "forebear"}
    assert len(list(graphlib.TopologicalSorter(within).static_order())) == len(within)  # a CycleError names a circle


@pytest.mark.parametrize("top", ["forebear", "tests"])
def test_a_folder_has_at_most_twelve_entries(top):
    for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
        if folder.name != "__pycache__" and not folder.is_relative_to(ROOT / "tests" / "golden"):
            doors = ("__init__.py", "__main__.py", "__pycache__", "py.typed")
            entries = [path.name for path in folder.iterdir() if path.name not in doors]
            assert len(entries) <= MOST_ENTRIES, f"{folder}: {sorted(entries)}"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_top_level_links_point_into_the_package(layer):
    link = ROOT / layer
    assert link.is_symlink()
    assert link.readlink() == Path("forebear") / layer


def test_public_names_are_those_promised():
    """A name that goes breaks users' code; one that is added is listed here and imported at both places of __init__."""
    assert sorted(forebear.__all__) == sorted(PUBLIC_NAMES.split())
    assert dir(forebear) == sorted(forebear.__all__)
    for name in forebear.__all__:
        found = getattr(forebear, name)
        assert found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = forebear.nothing


def test_type_checkers_see_each_public_name_where_it_is_defined():
    tree = ast.parse((ROOT / "forebear" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert seen == forebear._HOME_OF
    assert sum(len(node.names) for node in block.body) == len(seen) == len(forebear.__all__)
    for name, home in seen.items():
        assert getattr(getattr(forebear, name), "__module__", home) == home, f"{name} is defined elsewhere"


@pytest.mark.parametrize(("asked", "installed"), [([], "cpu"), (["FAISS=gpu"], "gpu")])
def test_make_installs_the_gpu_build_of_faiss_only_where_it_is_asked_for(asked, installed, tmp_path, monkeypatch):
    """Also on a machine with a GPU: nothing that is searched by FAISS is searched on it."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = ["make", "--dry-run", "install", f"VENV={tmp_path / 'venv'}", *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"'.[{installed},dev,docs]'" in done.stdout


def test_help_does_not_import_torch():
    code = "import sys; from forebear.cli.main import run; run(['index', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "forebear", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"forebear {forebear.__version__}\n"


def test_importing_the_package_is_cheap():
    code = "import sys, forebear; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_nothing_but_the_server_needs_its_extra():
    """Neither what the package offers nor a command, its help or an error of it imports what only a server needs."""
    code = """
import sys
sys.modules |= dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"))  # importing them fails
import forebear
from forebear.cli.main import run
[getattr(forebear, name) for name in forebear.__all__]
assert run(["serve", "--help"]) == 0
assert run(["retrieve", "--index", "none", "--text", "a"]) == 2
sys.exit(run(["serve", "none"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: forebear serve needs uvicorn, which is not installed. Install it: pip install 'forebear[serve]'."
    )
