"""The shape of the project: dependencies run one way, public names are pinned, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import forebear

LAYERS = ("indexer", "retriever", "evaluation", "cli")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_run_one_way(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in (ROOT / "forebear" / layer).rglob("*.py"):
        for name in imports_of(path):
            assert not any(name == f"forebear.{a}" or name.startswith(f"forebear.{a}.") for a in above), (path, name)
            assert name.split(".")[0] not in LAYERS, f"{path} imports {name} through the top-level link"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_top_level_links_point_into_the_package(layer):
    link = ROOT / layer
    assert link.is_symlink()
    assert link.readlink() == Path("forebear") / layer


def test_public_names_are_pinned_and_load():
    assert sorted(forebear.__all__) == sorted({name for names in forebear._HOMES.values() for name in names})
    for name in forebear.__all__:
        assert getattr(forebear, name) is not None
        assert getattr(forebear, name).__doc__ or name == "METHODS"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = forebear.nothing


def test_help_does_not_import_torch():
    code = "import sys; from forebear.cli.main import run; run(['index', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_importing_the_package_is_cheap():
    code = "import sys, forebear; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
