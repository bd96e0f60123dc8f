"""Builds the device type `testdev` of tests/accelerator, for the PyTorch that runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from bert_pretraining.runtime.compat import TORCH
from helpers import ROOT

SOURCES = ROOT / "tests" / "accelerator"
PYTORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")


def obstacle() -> str | None:
    """Why it cannot be built here, or None if it can."""
    if shutil.which(COMPILER) is None:
        return f"the device for tests is compiled, and there is no C++ compiler ({COMPILER})"
    if not (PYTORCH / "include" / "ATen" / "ATen.h").is_file():
        return "the device for tests is compiled, and this PyTorch came without C++ headers"
    return None


def build(folder: Path) -> None:
    """Make `folder`: for PYTHONPATH, it has the module torch_testdev. Takes about 15 s."""
    folder.mkdir()
    shutil.copy(SOURCES / "torch_testdev.py", folder)
    include = PYTORCH / "include"
    words = [
        COMPILER, "-shared", "-fPIC", "-O1", "-w",
        f"-std=c++{20 if TORCH >= (2, 10) else 17}",  # as the headers of that version need
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
        str(SOURCES / "torch_testdev.cpp"), f"-L{PYTORCH / 'lib'}", "-lc10", "-ltorch_cpu",
        "-o", str(folder / "libtestdev.so"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
