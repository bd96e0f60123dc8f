"""Made-up qualifications with all figures that the stages have: of eight GPUs, a full one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bert_pretraining.qualify.page import Page
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Qualification, StageResult
from bert_pretraining.report import figures

SIZES, RANKS = (16, 32, 48, 64, 96), (1, 2, 4, 8)
POINT_SECONDS = 2.0


def quick_png(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pictures are not drawn, which takes seconds; the names of those that would be."""
    drawn: list[str] = []

    def png(picture: object, data: object, theme: object) -> bytes:
        drawn.append(f"{picture.name} {theme.name}")
        return b"image"

    monkeypatch.setattr(figures, "png", png)
    monkeypatch.setattr(figures, "require_matplotlib", lambda: None)
    return drawn


def page_of(done: Qualification, folder: Path) -> str:
    """Its page, which is written to page.html."""
    Page(folder / "page.html").write(done)
    return (folder / "page.html").read_text(encoding="utf-8")


def complete(**changed: StageResult | None) -> Qualification:
    """All nine stages. changed: name -> another result, or None for a stage that did not run."""
    found = {stage.name: stage for stage in _stages()} | changed
    return Qualification(
        started="2026-11-26T13:45:00Z",
        machine={
            "device": "NVIDIA H100 80GB HBM3", "device_type": "cuda", "devices": 8,
            "host": "node-17", "cpu": "Xeon", "machine": "x86_64", "cpus_allowed": 224,
            "commit": "d986a0a",
            "versions": {"bert_pretraining": "0.1.0", "python": "3.11.7", "torch": "2.13.0",
                         "driver": "580.65"},
        },
        settings={
            "quick": False, "ranks": 8, "layers": 24, "batch_sizes": list(SIZES), "minutes": 10.0,
            "precision": "bf16", "kernels": "auto", "compile": "auto", "use_cuda_graph": True,
            "deterministic": False, "optimizer": "auto",
        },
        stages=[stage for stage in found.values() if stage is not None],
    )  # fmt: skip


def stage(name: str, verdict: str = PASS, **values: object) -> StageResult:
    """A result; values: reason, figures, notes."""
    return StageResult(name, verdict, seconds=12.5, **{"reason": f"{name} is right", **values})


def _stages() -> list[StageResult]:
    return [
        stage("machine", NOTE, reason="a run can start; 1 note; the first: numactl: not installed",
              figures={"checks": {"device": "OK", "numactl": "note"}, "problems": 0, "notes": 1},
              notes=["numactl: numactl is not installed; install numactl"]),
        stage("software", figures={"versions": {"torch": "2.13.0", "apex": "not installed"},
                                   "variables": {"OMP_NUM_THREADS": "1"}}),
        stage("kernels", figures=kernel_figures()),
        stage("determinism", figures={"rounds": 5, "steps": 4, "ranks": 8,
                                      "fingerprints": {"step 1": "0a1b2c3d4e5f6071"}}),
        stage("limits", figures=_limits()),
        stage("step", figures=_step()),
        stage("scaling", figures=_scaling()),
        stage("endurance", figures=_endurance()),
        stage("learning", figures={"target_accuracy": 0.72, "reached": True, "steps": 600,
                                   "start_accuracy": 0.34, "batch_size": 64,
 "curve": [[100, 0.45], [300, 0.6], [600, 0.724]]}),
    ]  # fmt: skip


def kernel_figures(wrong: str = "") -> dict[str, object]:
    """wrong: the name of a kernel that is wrong in one element."""
    kernels = {}
    for number, operator in enumerate(("attention", "bias_gelu", "masked_cross_entropy")):
        for provider in ("reference", "torch", "triton"):
            for dtype in ("fp32", "bf16"):
                name = f"{operator} {provider} {dtype}"
                kernels[name] = {
                    "verdict": FAIL if name == wrong else PASS,
                    "fault": "the output at [3, 7] is off by 1.0" if name == wrong else "",
                    "worst_share": 41.0 if name == wrong else 0.1 + 0.05 * number,
                    "implementation": provider, "proof_s": 0.4, "forward_backward_s": 0.0012,
                    "cases": {"53 x 3 x 64": 0.1},
                }  # fmt: skip
    return {"kernels": kernels, "unavailable": {"apex": "apex is not installed"}, "right": 18,
            "tried": 18, "worst_share": 0.2}  # fmt: skip


def _limits() -> dict[str, object]:
    def near(value: float) -> list[float]:
        return [value * (1 - 0.004 * rank) for rank in range(8)]

    def ways(value: float) -> dict[str, list[float]]:
        return {"alone": near(value), "at_once": near(0.99 * value)}

    shapes = {"12288x1024x4096": 1.0, "12288x1024x3072": 0.97, "1831x1024x30528": 0.86}
    peaks = {"fp32": 51.0, "tf32": 370.0, "bf16": 690.0, "fp8": 1150.0}
    return {
        "device": ["NVIDIA H100 80GB HBM3"] * 8,
        "memory_copy_gb/s": ways(2900.0), "host_to_device_gb/s": ways(53.0),
        "device_to_host_gb/s": ways(52.0),
        "matrix_tflop/s": {kind: {shape: near(peak * part) for shape, part in shapes.items()}
                           for kind, peak in peaks.items()},
        "all_reduce": {str(size): {"seconds": 2e-5 + size / 4.2e5,
                                   "bus_gb/s": 1.75 * size / 1e3 / (2e-5 + size / 4.2e5)}
                       for size in (1, 4, 16, 64, 256, 672)},
        "all_reduce_latency_seconds": 2.1e-5, "other_programs_cpus": 0.1,
    }  # fmt: skip


def speed(sequences: float, batch: int) -> dict[str, object]:
    """The figures of a step: sequences a second over all ranks, and the sequences of a step."""
    seconds = batch / sequences
    return {
        "sequences/s": sequences, "tokens/s": 256 * sequences, "tflop/s": 0.5 * sequences,
        "matrix_share": 0.5 * sequences / 5520.0, "peak_memory_mib": 9000 + 60 * batch,
        "seconds_data": 0.001 * seconds, "seconds_forward_backward": 0.82 * seconds,
        "seconds_reduction": 0.05 * seconds, "seconds_optimizer": 0.11 * seconds,
        "seconds_other": 0.019 * seconds, "updates": 120, "step_seconds_median": seconds,
        "step_seconds_min": 0.97 * seconds, "step_seconds_max": 1.06 * seconds,
        "step_spread_share": 0.021, "rank_own_seconds": [0.95 * seconds] * 8,
        "p_train": 0.995 * sequences, "p_whole": 0.97 * sequences, "p_core": sequences,
        "evaluation_sequences/s": 4 * sequences, "efficiency": 1.0,
    }  # fmt: skip


def _step() -> dict[str, object]:
    sizes = {str(size): speed(7000 * size / (size + 9), 8 * size) for size in SIZES}
    return {
        "layers": 24, "ranks": 8, "by_batch_size": sizes, "precision": "bf16",
        "best_batch_size": 96, "largest_batch_size": 96, "too_large_batch_size": 128,
        "sequences/s": sizes["96"]["sequences/s"], "other_programs_cpus": 0.1,
        "by_precision": {"fp32": speed(1100.0, 768)},
    }  # fmt: skip


def _scaling() -> dict[str, object]:
    shares = dict(zip(RANKS, (1.0, 0.98, 0.96, 0.93), strict=True))
    found = {str(count): {**speed(830 * count * share, 96 * count), "efficiency": share}
             for count, share in shares.items()}  # fmt: skip
    return {"batch_size": 96, "by_ranks": found, "efficiency": 0.93}


def _endurance() -> dict[str, object]:
    times = [POINT_SECONDS * number for number in range(1, 301)]
    points = [[at, 0.12 * (1 + 0.01 * math.sin(at / 9) + 2e-5 * at)] for at in times]
    sensors = [
        {"device": f"GPU {rank}", "watts_mean": 640.0, "temperature_celsius_max": 71,
         "clock_mhz_min": 1700, "clock_mhz_median": 1755, "throttled": {},
         "points": [[at, 640.0 + rank, 70 - 30 * math.exp(-at / 60) + rank, 1760 - rank]
                    for at in times]}
        for rank in range(8)
    ]  # fmt: skip
    return {
        "batch_size": 96, "updates": 4800, "seconds": times[-1], "sequences/s": 6400.0,
        "points": points, "step_seconds_first_third": 0.1203, "step_seconds_last_third": 0.1211,
        "drift_share": 0.0066, "slowest_step_seconds": 0.1228, "slowest_at_seconds": 130.0,
        "sensors": sensors, "other_programs_cpus": [0.0, 0.1, 0.0],
    }  # fmt: skip
