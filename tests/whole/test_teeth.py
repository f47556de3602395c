"""Tests that could not fail: without a check, or with a patch of a name that nothing reads any more."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
CHECKS = ("raises", "warns", "fail")  # and what begins with assert_ or check_


def called(node: ast.AST) -> str:
    """Last name of what is called."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def checks(function: ast.FunctionDef, others: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function asserts something, by itself or by a function of the same file."""
    for node in ast.walk(function):
        name = called(node)
        if isinstance(node, ast.Assert) or name in CHECKS or name.startswith(("assert_", "check_")):
            return True
        if name in others and name not in seen and checks(others[name], others, seen | {name}):
            return True
    return False


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_every_test_checks_something_that_is_not_a_constant(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    fixtures = {name for name, f in functions.items() if any("fixture" in ast.unparse(d) for d in f.decorator_list)}
    for name in functions:
        if name.startswith("test") and name not in fixtures:
            assert checks(functions[name], functions), f"{path.name}: {name} checks nothing"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            parts = {type(part) for part in ast.walk(node.test)}
            assert parts & {ast.Name, ast.Call}, f"{path.name}, line {node.lineno}: asserts a constant"
            assert not isinstance(node.test, ast.Tuple), f"{path.name}, line {node.lineno}: asserts a tuple"


def patches(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of each ``monkeypatch.setattr`` of a module that the file imports or spells out."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if called(node) == "setattr" and isinstance(node, ast.Call):
            match node.args:
                case [ast.Name(id=alias), ast.Constant(value=str(name)), *_] if alias in modules:
                    yield modules[alias], name
                case [ast.Constant(value=str(dotted)), *_]:
                    yield tuple(dotted.rsplit(".", 1))


def reads(path: Path, name: str) -> bool:
    functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if called_later(node)]
    return any(isinstance(n, ast.Name) and n.id == name for function in functions for n in ast.walk(function))


def called_later(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.Lambda)


def test_a_patched_name_is_read_by_a_function_of_the_module_where_it_is_patched() -> None:
    """A function that moved reads the name elsewhere, and the test would go on to pass without its patch."""
    n_checked = 0
    for path in TESTS:
        for module, name in patches(ast.parse(path.read_text(encoding="utf-8"))):
            source = ROOT / (module.replace(".", "/") + ".py")
            if source.is_file():
                n_checked += 1
                assert reads(source, name), f"{path.name} patches {module}.{name}, which no function there reads"
    assert n_checked > 50
