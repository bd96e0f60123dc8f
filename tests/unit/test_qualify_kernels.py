"""`qualify`: kernels that are wrong, hang or end their process are named; right ones pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bert_pretraining.kernels import OPERATORS
from bert_pretraining.kernels.proof_process import Limits
from bert_pretraining.qualify import kernels
from bert_pretraining.qualify.kept import kept_figures
from bert_pretraining.qualify.kernels import Kernel, conclude
from bert_pretraining.qualify.record import FAIL, NOTE, PASS
from bert_pretraining.runtime import device as devices
from qualify_doubles import SMALL, context_of, ignored

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "BERT_LARGE", replace(SMALL, max_position_embeddings=128))
    return tmp_path / "cache"


def test_right_kernels_pass(tmp_path: Path, cache: Path) -> None:
    context = context_of(tmp_path)
    finding = kernels.run(context, ignored)
    assert finding.verdict == PASS
    count = 2 * len(OPERATORS) * 2 + 1  # providers, operators, dtypes; and the layers in fp8
    assert finding.reason.startswith(f"{count} of {count} right; worst error 0.")
    figures = finding.figures
    assert (figures["right"], figures["tried"]) == (count, count)
    assert 0.0 < figures["worst_share"] <= 1.0
    shares = figures["kernels"]["attention torch bf16"]["cases"]
    assert list(shares) == [
        "53 x 3 x 16 bf16, dropout 0",
        "53 x 3 x 16 bf16, dropout 0.1",
        "161 x 4 x 16 bf16, dropout 0",
        "161 x 4 x 16 bf16, dropout 0.1",
    ]
    assert all(0.0 < share <= 1.0 for share in shares.values())
    assert figures["kernels"]["fp8_linear fp8 bf16"]["implementation"] == "emulated"
    assert figures["unavailable"] == {}
    assert not cache.exists()
    kept = kept_figures(context, "kernels")  # should the stage be ended at its limit
    assert kept == {"figures": figures, "notes": finding.notes, "fault": ""}


@pytest.mark.slow
def test_every_kind_of_fault_fails_and_is_named(
    use_fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong element; a hang, which has a time limit; the end of a process; an exception."""
    monkeypatch.setattr(kernels, "QUICK_CPU_LIMITS", Limits(case=30.0))
    monkeypatch.setattr(kernels, "trained_dtypes", lambda _: ["fp32"])
    kinds = ("element", "hangs", "raises", "dies", "nan")
    use_fake("torch", dict(zip(OPERATORS, kinds, strict=True)))
    context = context_of(tmp_path)
    finding = kernels.run(context, ignored)
    assert finding.verdict == FAIL
    wrong = "5 of 10 are wrong: attention torch fp32: gradient of qkv differs by "
    assert finding.reason.startswith(wrong), finding
    for part in (" at [", "(bound ", "at 53 x 3 x 16 fp32, dropout 0 (on cpu); pass "):
        assert part in finding.reason
    assert "pass --kernels.attention reference" in finding.reason
    found = finding.figures["kernels"]
    texts = {
        "bias_gelu torch fp32": "no answer within 30 s at 53 x 192 fp32",
        "bias_dropout_residual_layer_norm torch fp32": "RuntimeError: no kernel image",
        "embedding_layer_norm_dropout torch fp32": "its process ended by signal 11",
        "masked_cross_entropy torch fp32": "gradient of logits is nan at [",
    }
    for name, text in texts.items():
        assert found[name]["verdict"] == FAIL
        assert found[name]["fault"].startswith(text)
    assert found["attention torch fp32"]["worst_share"] > 1.0
    assert all(found[f"{operator} reference fp32"]["verdict"] == PASS for operator in OPERATORS)
    assert len(finding.notes) == 4
    assert kept_figures(context, "kernels")["fault"] == finding.reason


@pytest.mark.slow
def test_a_size_that_does_not_fit_the_memory_is_no_fault(
    use_fake: Callable, tmp_path: Path
) -> None:
    use_fake("torch", {"bias_gelu": "memory"})
    finding = kernels.run(context_of(tmp_path), ignored)
    assert finding.verdict == PASS
    told = [note for note in finding.notes if note.startswith("bias_gelu torch fp32: no larger ")]
    assert "out of memory" in told[0]
    assert list(finding.figures["kernels"]["bias_gelu torch fp32"]["cases"]) == ["53 x 192 fp32"]


@pytest.mark.slow
def test_every_batch_size_is_tried_and_timed_without_quick(tmp_path: Path) -> None:
    context = context_of(tmp_path, quick=False, batch_sizes=(2, 3))
    finding = kernels.run(context, ignored)
    assert finding.verdict == PASS
    found = finding.figures["kernels"]["bias_gelu torch fp32"]
    assert list(found["cases"]) == ["53 x 192 fp32", "129 x 128 fp32", "257 x 128 fp32"]
    assert found["forward_backward_s"] > 0.0


def kernel(operator: str, provider: str, dtype: str, implementation: str = "") -> Kernel:
    return Kernel(operator, provider, dtype, implementation, cases={"53 x 3": 0.25})


def test_what_usually_runs_on_a_gpu_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "capability", lambda _: (8, 0))
    right = [kernel("attention", "torch", "bf16", "torch (flash)")]
    finding = conclude(right, {"apex": "NVIDIA apex is not installed"}, [], CUDA)
    assert finding.verdict == PASS
    assert finding.reason == "1 of 1 right; worst error 0.25 of its bound (attention torch bf16)"
    finding = conclude(right, {"triton": "triton is not installed"}, [], CUDA)
    assert finding.verdict == NOTE
    assert finding.reason.endswith("; triton does not run: triton is not installed")
    slow = kernel("attention", "torch", "bf16", "torch (padded; flash refused: no kernel)")
    finding = conclude([slow], {}, [], CUDA)
    assert finding.verdict == NOTE
    assert "attention torch bf16 runs without flash attention" in finding.reason
    # float32 has no flash attention anywhere, and older devices have none either.
    for device, one in (
        (CUDA, kernel("attention", "torch", "fp32", slow.implementation)),
        (torch.device("cpu"), slow),
    ):
        assert conclude([one], {}, [], device).verdict == PASS
    monkeypatch.setattr(devices, "capability", lambda _: (7, 0))
    assert conclude([slow], {}, [], CUDA).verdict == PASS


def test_what_another_device_found_counts_too() -> None:
    first, other = kernel("attention", "torch", "bf16"), kernel("attention", "torch", "bf16")
    other.cases = {"53 x 3": 0.5, "161 x 4": None}
    other.faults = ["differs by 2 at [1] (on cuda:3)"]
    first.take(other)
    assert first.cases == {"53 x 3": 0.5, "161 x 4": None}
    finding = conclude([first], {}, [], torch.device("cpu"))
    assert finding.verdict == FAIL
    assert "(on cuda:3); do not train on this device" in finding.reason
