"""Which part may import which, and that importing needs no GPU, Triton or apex."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "base" / "bert_pretraining"
# Each part with the parts that it may import, one way only. A part is a folder of the package, or
# a module at its root.
LEAVES = {
    "errors": set(),
    "config": {"errors", "runtime"},
    "kernels": {"errors", "runtime"},
    "progress": {"errors"},
    "runtime": {"errors"},
    "topology": {"errors"},
}
ALLOWED = {
    **LEAVES,
    "__init__": set(),
    "model": {"errors", "kernels", "runtime"},
    "data": {"config", "errors", "model", "runtime"},
    "optim": {"errors", "runtime"},
    "checkpoint": {"config", "errors", "model", "optim", "progress", "runtime"},
    "logs": {"config", "errors", "progress", "runtime"},
    "launch": {"config", "errors", "runtime", "topology"},
    "predict": {"checkpoint", "errors", "kernels", "model", "preparation", "runtime"},
    "preparation": {"checkpoint", "data", "errors", "kernels", "model", "runtime"},
    "submission": {"config", "errors", "logs", "progress", "runtime"},
    "report": {"config", "errors", "logs", "runtime", "submission"},
    "training": {
        *LEAVES,
        *{"checkpoint", "data", "logs", "model", "optim", "report"},
    },
    "bench": {*LEAVES, "data", "logs", "model", "optim", "training"},
    "doctor": {*LEAVES, "data", "launch", "model"},
    "qualify": {
        *LEAVES,
        *{"bench", "data", "doctor", "launch", "logs", "model", "optim", "preparation", "report"},
        *{"checkpoint", "training"},
    },
    "scaling": {*LEAVES, "bench", "logs", "model", "optim", "qualify", "report", "submission"},
    "commands": {
        *LEAVES,
        *{"checkpoint", "data", "launch", "model", "predict", "preparation", "submission"},
        "training",
    },
    "__main__": {
        *{"bench", "commands", "config", "doctor", "errors", "qualify", "report", "runtime"},
        "scaling",
    },
}
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
    assert imported_parts(path) <= ALLOWED[part] | {part}


def test_the_root_holds_three_modules() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")}
    assert names == {"__init__", "__main__", "errors", "progress"}


def test_every_module_is_imported_without_gpu_packages() -> None:
    names = [
        ".".join(["bert_pretraining", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in MODULES
        # The kernels themselves are Triton; the table imports them where they are chosen.
        if path.name != "__main__.py" and not path.name.startswith("triton_")
    ]
    program = (
        "import importlib, sys\n"
        "for blocked in ('apex', 'triton', 'cupy'): sys.modules[blocked] = None\n"
        f"for name in {[name.removesuffix('.__init__') for name in names]!r}:\n"
        "    importlib.import_module(name)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "base")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
