"""Runs whose kernels are proven: a wrong one is passed over on all ranks, or an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import fake_kernels
from helpers import ROOT, command, error_lines, perf_events

RUN = ("launch", "--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--max_steps", 2,
       "--seed", 3)  # fmt: skip


@pytest.fixture
def workplace(mini_data: Path, tmp_path: Path) -> Path:
    (tmp_path / "data/datasets").mkdir(parents=True)
    (tmp_path / "data/datasets/bert_mini").symlink_to(mini_data)
    return tmp_path


def run(here: Path, *flags: object, **faults: str) -> subprocess.CompletedProcess[str]:
    """A run of two ranks, with a provider of that name if there are faults."""
    environment = {"XDG_CACHE_HOME": str(here / "cache")}
    if faults:
        environment |= fake_kernels.environment(here, "torch", faults, ROOT / "base")
    return command(*RUN, *flags, cwd=here, **environment)


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    return [value["eval_loss"] for value in perf_events(done.stdout, "EVALUATION")]


@pytest.mark.slow
def test_a_proof_changes_no_number(workplace: Path) -> None:
    plain = run(workplace)
    proven = run(workplace, "--prove_kernels", "on")
    assert "Kernels proven in " not in plain.stdout
    assert proven.stdout.count("Kernels proven in ") == 1
    assert losses(proven) == losses(plain) != []
    assert len(list((workplace / "cache").rglob("*.json"))) == 5


def test_two_ranks_pass_over_a_wrong_kernel(workplace: Path) -> None:
    done = run(workplace, "--prove_kernels", "on", bias_gelu="element")
    assert done.returncode == 3, done.stderr  # the target is not reached in two steps
    notices = [line for line in done.stdout.splitlines() if "passed over" in line]
    assert len(notices) == 1
    assert notices[0].startswith("Notice: torch bias_gelu: gradient of x differs by ")
    assert notices[0].endswith(" fp32: passed over, reference runs it")
    assert "bias_gelu=reference, bias_dropout_residual_layer_norm=torch" in done.stdout


@pytest.mark.slow
def test_a_wrong_kernel_that_was_asked_for_ends_the_run(workplace: Path) -> None:
    flags = ("--prove_kernels", "on", "--kernels.bias_gelu", "torch")
    done = run(workplace, *flags, bias_gelu="nan")
    assert done.returncode == 2
    lines = error_lines(done.stderr)
    assert len(lines) == 1
    assert "--kernels.bias_gelu torch: gradient of x is nan at [0, 3]" in lines[0]
    assert run(workplace, *flags[2:], bias_gelu="large").returncode == 3  # without a proof
