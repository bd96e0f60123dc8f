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
LEAVES = set(
    "agreement config distributed errors files kernels lock outcome seeds settings signals "
    "topology".split()
)
# part -> the parts beside the leaves that it may import
ALLOWED = {
    "errors": set(),
    "seeds": set(),
    "state": set(),
    "data": set(),
    "optim": set(),
    "checkpoint": {"model"},
    "model": {"data"},
    "evaluate": {"data"},
    "logs": {"state"},
    "launch": set(),
    "doctor": {"launch", "inputs"},
    "inputs": {"model"},
    "start_checkpoint": {"checkpoint", "model"},
    "step": {"data"},
    "reduction": {"data", "optim"},
    "update": {"data", "model", "optim", "reduction", "step"},
    "bench": {"data", "model", "optim", "logs", "step"},
    "training_state": {"checkpoint", "optim", "state"},
    "building": set("checkpoint logs model optim reduction step training_state update".split()),
    "train": set(
        "building checkpoint data evaluate inputs logs model optim report state "
        "training_state".split()
    ),
    "__init__": set(),
    "checkpoint_commands": {"checkpoint", "inputs", "model"},
    "data_commands": {"data", "start_checkpoint", "train"},
    "submission": {"logs", "state"},
    "submission_commands": {"submission", "launch"},
    "report": {"logs", "submission"},
    "__main__": {
        *{"inputs", "launch", "train", "bench", "doctor", "report"},
        *{"checkpoint_commands", "data_commands", "submission_commands"},
    },
}
LEAF_ALLOWED = {"agreement", "errors", "seeds", "settings", "files"}
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


def test_no_file_is_long() -> None:
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 300
