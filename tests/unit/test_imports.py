"""Which part may import which, and that importing needs no GPU, Triton or apex."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "base" / "bert_pretraining"
LEAVES = {"errors", "seeds", "settings", "config", "distributed", "kernels", "topology", "outcome"}
# part -> the parts beside the leaves that it may import
ALLOWED = {
    "errors": set(),
    "seeds": set(),
    "state": set(),
    "data": set(),
    "optim": set(),
    "checkpoint": set(),
    "model": {"data"},
    "evaluate": {"data"},
    "logs": {"state"},
    "launch": set(),
    "start_checkpoint": {"checkpoint", "model"},
    "train": {"state", "data", "optim", "checkpoint", "model", "evaluate", "logs"},
    "__init__": set(),
    "data_commands": {"data", "start_checkpoint", "train"},
    "__main__": {"launch", "train", "data_commands"},
}
LEAF_ALLOWED = {"errors", "seeds", "settings"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "bert_pretraining":
                names = [f"bert_pretraining.{alias.name}" for alias in node.names]
        else:
            continue
        own = [name.split(".") for name in names if name.startswith("bert_pretraining.")]
        parts |= {name[1] for name in own}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    allowed = LEAF_ALLOWED if part in LEAVES else LEAVES | ALLOWED[part]
    assert imported_parts(path) <= allowed | {part}
    if part not in ("train", "__main__", "data_commands"):
        assert "train" not in imported_parts(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_is_imported_without_gpu_packages(path: Path) -> None:
    if path.name == "__main__.py":
        return
    name = ".".join(["bert_pretraining", *path.relative_to(PACKAGE).with_suffix("").parts])
    importlib.import_module(name.removesuffix(".__init__"))
    assert "apex" not in sys.modules


def test_no_file_is_long() -> None:
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 300
