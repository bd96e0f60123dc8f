"""The stage `limits` of `qualify`: rates that are made up, and small ones that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bert_pretraining.errors import TrainingError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.qualify import limits, probes
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, NOTE, PASS
from bert_pretraining.qualify.workers import TooLate
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.matrix_rate import matrix_rate
from bert_pretraining.runtime.process_group import Ranks
from qualify_doubles import ignored
from qualify_faults import context_of

CPU = torch.device("cpu")


def found_limits(**changes: object) -> list[dict[str, object]]:
    """What four ranks measured; all are alike, but for the changes."""
    alike = [50e9] * 4
    found = {
        "device": "X100",
        "memory_copy": {"alone": [2e12] * 4, "at_once": [2e12] * 4},
        "host_to_device": {"alone": alike, "at_once": [40e9] * 4},
        "device_to_host": {"alone": alike, "at_once": [30e9] * 4},
        "matrix": {"bf16": {"12288x1024x4096": [700e12] * 4}},
        "all_reduce": {"1": 1e-4, "64": 0.5},
        "latency": 2e-5,
        "cpu_time": {"cpus": {}, "own": 0.0, "seconds": 1.0},
        **changes,
    }
    return [found] * 4


def test_limits_of_like_devices(tmp_path: Path) -> None:
    finding = limits.judged(context_of(tmp_path, device="cuda", ranks=4), found_limits())
    assert finding.verdict == PASS
    assert finding.figures["memory_copy_gb/s"]["alone"] == [2000.0] * 4
    assert finding.figures["matrix_tflop/s"]["bf16"]["12288x1024x4096"] == [700.0] * 4
    assert finding.figures["all_reduce"]["64"]["bus_gb/s"] == pytest.approx(
        64 * 2**20 * 2 * 3 / 4 / 0.5 / 1e9
    )
    assert finding.reason == (
        "each device, all ranks at once: memory copy 2,000 GB/s; host to device 40 and back 30 "
        "GB/s; products bf16 700 TFLOP/s; all-reduce of 64 MB 0.201 GB/s (bus), of one number 20 us"
    )


def test_a_rank_with_slow_memory_is_named(tmp_path: Path) -> None:
    copy = {"alone": [2e12, 2e12, 1.7e12, 2e12], "at_once": [2e12] * 4}
    context = context_of(tmp_path, device="cuda", ranks=4)
    finding = limits.judged(context, found_limits(memory_copy=copy))
    assert finding.verdict == NOTE
    assert (
        "; memory copy of a rank alone: rank 2 is 15% slower than the others (1,700 GB/s, they "
        "2,000)" in finding.reason
    )


def test_other_devices_are_not_compared(tmp_path: Path) -> None:
    ranks = found_limits(memory_copy={"alone": [2e12, 9e11, 2e12, 2e12], "at_once": [2e12] * 4})
    ranks[1] = {**ranks[1], "device": "X50"}
    finding = limits.judged(context_of(tmp_path, device="cuda", ranks=4), ranks)
    assert finding.verdict == PASS
    assert finding.figures["device"] == ["X100", "X50", "X100", "X100"]


def test_limits_of_one_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are really measured, at small sizes."""
    monkeypatch.setattr(limits, "QUICK_COPIED", 1)
    monkeypatch.setattr(limits, "BERT_LARGE", BertConfig(512, 64, 2, 1, 128, 512))

    def run_ranks(context: Context, program: str, ranks: int, given: dict, _: float) -> list:
        assert program == limits.PROGRAM
        found = limits.measure(context, Ranks(0, 1, CPU), given)
        return [json.loads(json.dumps(found))]

    monkeypatch.setattr(limits, "run_ranks", run_ranks)
    finding = limits.run(context_of(tmp_path, ranks=1), ignored)
    assert finding.verdict in (PASS, NOTE)  # a note on a busy machine
    assert "one device: no all-reduce to measure" in finding.notes
    assert "all_reduce" not in finding.figures
    products = finding.figures["matrix_tflop/s"]
    assert list(products["fp32"]) == ["512x64x128", "512x64x192", "76x64x512"]
    assert all(rate > 0 for rates in products["fp32"].values() for rate in rates)
    assert finding.figures["memory_copy_gb/s"]["alone"][0] > 0


def test_limits_that_hang_at_last_keep_their_rates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the second shape of the first kind of products."""
    monkeypatch.setattr(limits, "QUICK_COPIED", 1)
    made: list[int] = []

    def hangs(*_: object) -> float:
        made.append(1)
        if len(made) == 2:
            raise TooLate("rank 0 did not end within 130 s")
        return 2e12

    products = {shape: probes.Probe(shape, hangs) for shape in ("8x8x8", "16x8x8")}
    monkeypatch.setattr(probes, "matrix_probes", lambda *_: {"fp32": products})

    def run_ranks(context: Context, program: str, ranks: int, given: dict, _: float) -> list:
        return [limits.measure(context, Ranks(0, 1, CPU), given)]

    monkeypatch.setattr(limits, "run_ranks", run_ranks)
    finding = limits.run(context_of(tmp_path, ranks=1), ignored)
    assert (finding.verdict, finding.reason) == (FAIL, "rank 0 did not end within 130 s")
    assert finding.is_late
    assert finding.figures["matrix_tflop/s"] == {"fp32": {"8x8x8": [2.0]}}
    assert finding.figures["memory_copy_gb/s"]["alone"][0] > 0


def test_an_all_reduce_with_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(values: torch.Tensor) -> torch.Tensor:
        values.fill_(3.0)  # of ranks 0 and 1: 1 + 2
        if values.numel() > 1:
            values[7] = 2.0
        return values

    monkeypatch.setattr(process_group, "sum_over_ranks", reduced)
    with pytest.raises(TrainingError, match="1 MB gave 2 to 3 on rank 0, but the sum is 3"):
        probes.all_reduce_seconds(Ranks(0, 2, CPU), 1)


def test_the_matrix_rate_of_a_shape() -> None:
    rate, shape = matrix_rate(CPU, torch.float32, (16, 32, 48))
    assert rate > 0
    assert shape == (16, 32, 48)
