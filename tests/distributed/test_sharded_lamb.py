"""LAMB that reduces gradients itself, on real gloo processes: the same updates, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT


def run(ranks: int, name: str, **environment: str) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("base", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(ranks), str(ROOT / "tests" / "sharded_lamb_program.py"), name],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} is right" for rank in range(ranks)]


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))]
)
def test_reducing_and_sharded_lamb_are_the_plain_one(ranks: int) -> None:
    run(ranks, "flat")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_so_they_are_with_the_kernels_of_triton(ranks: int) -> None:
    """In Triton's interpreter: the sums of blocks are gathered, and added in the same order."""
    pytest.importorskip("triton")
    run(ranks, "triton", TRITON_INTERPRET="1")
