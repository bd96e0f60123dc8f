"""Rules of this code that no linter knows: sizes, public names in tests."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "base" / "bert_pretraining"
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines
# What apex calls on the gradient scaler that it is given; PyTorch named them.
PRESCRIBED = {"_check_inf_per_device", "_get_scale_async"}

each_test_file = pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)

each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def is_private(name: str) -> bool:
    """Whether it begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


@functools.cache
def private_names() -> frozenset[str]:
    """Every private name that the package defines: functions, classes, constants, attributes."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return frozenset(filter(is_private, found)) - PRESCRIBED


def used_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file imports from the package, or takes from an object by name.

    What a test's own class keeps for itself (`self._files`) is its own affair.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bert_pretraining"):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            # setattr, getattr, delattr, also monkeypatch's; mock.patch.object
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in ("setattr", "getattr", "hasattr", "delattr", "object"):
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield node.lineno, argument.value.rpartition(".")[2]


@each_test_file
def test_tests_use_public_names(path: Path) -> None:
    private = private_names()
    found = [
        f"{path.name}:{line}: {name}"
        for line, name in used_names(ast.parse(path.read_text()))
        if name in private
    ]
    assert found == []


def test_the_rule_of_public_names_finds_what_breaks_it() -> None:
    text = (
        "from bert_pretraining.launch.plan import _environment\n"
        "self._mine = network._interfaces()\n"
        "monkeypatch.setattr(network, '_interfaces', None)\n"
        "monkeypatch.setattr('bert_pretraining.launch.network._interfaces', None)\n"
    )
    names = [name for _, name in used_names(ast.parse(text)) if is_private(name)]
    assert sorted(names) == ["_environment", *["_interfaces"] * 3]


def test_no_file_is_long() -> None:
    files = [*MODULES, *TESTS, *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    assert len((PACKAGE / "training" / "train.py").read_text().splitlines()) < 300


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_module
def test_no_function_is_long(path: Path) -> None:
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions_of(path)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@each_module
def test_every_user_error_has_a_fix(path: Path) -> None:
    """A message that says what is wrong, and not what to do, helps nobody."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"
    ]
    without = [
        node.lineno
        for node in calls
        if len(node.args) + len(node.keywords) != 2
        or any(isinstance(part, ast.Constant) and not part.value for part in node.args)
    ]
    assert without == []
