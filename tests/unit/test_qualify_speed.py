"""The stages `step` and `scaling` of `qualify`, with clocks and figures that are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bert_pretraining.logs.sinks import Work
from bert_pretraining.qualify import measuring, other_programs, scaling, step
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import kept_figures
from bert_pretraining.qualify.record import FAIL, NOTE, PASS
from bert_pretraining.qualify.stages import STAGES
from bert_pretraining.qualify.workers import NoMemory, TooLate, is_out_of_memory
from bert_pretraining.runtime.process_group import Ranks
from qualify_doubles import ignored
from qualify_faults import FakeClock, FakeWorkload, context_of, fake_clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return fake_clock(monkeypatch)


# ---- step


def measured_ranks(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, waits: list[float], step_seconds: float
) -> None:
    """`run_ranks` of the stage step: ranks whose steps are as long, and which wait so long."""
    monkeypatch.setattr(measuring, "evaluation_rate", lambda *_: 20.0)

    def run_ranks(
        context: Context, program: str, count: int, given: dict, *_: float, shares: int
    ) -> list:
        assert (program, count, shares) == (step.PROGRAM, len(waits), context.ranks)
        found = []
        for rank, waited in enumerate(waits):
            made = FakeWorkload(clock, lambda _: step_seconds, waited)
            monkeypatch.setattr(step, "Workload", lambda *_, made=made, **__: made)
            found.append(step.measure(context, Ranks(rank, 1, CPU), given))
        return json.loads(json.dumps(found))

    monkeypatch.setattr(step, "run_ranks", run_ranks)


def test_a_rank_that_sleeps_15_percent_is_named(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 1's own work takes 1.15 s, that of the others 1 s: they wait for it."""
    measured_ranks(clock, monkeypatch, [0.15, 0.0, 0.15], 1.15)
    context = context_of(tmp_path, ranks=3, batch_sizes=(2,))
    finding = step.run(context, ignored)
    assert finding.verdict == NOTE
    assert "rank 1 is 15% slower than the others" in finding.reason
    assert "(1.15 s of its own work a step, they 1 s)" in finding.reason
    assert finding.figures["by_batch_size"]["2"]["rank_own_seconds"] == pytest.approx([1, 1.15, 1])


def test_two_ranks_are_compared_with_each_other() -> None:
    assert [one.rank for one in measuring.slow_ranks([1.0, 1.15])] == [1]
    assert measuring.slow_ranks([1.0, 1.09]) == []
    assert measuring.slow_ranks([1.0]) == measuring.slow_ranks([0.0, 1.0]) == []


def test_the_figures_of_a_step(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured_ranks(clock, monkeypatch, [0.0, 0.0], 1.0)
    finding = step.run(context_of(tmp_path, batch_sizes=(4,)), ignored)
    assert finding.verdict == PASS
    figures = finding.figures
    assert (figures["best_batch_size"], figures["largest_batch_size"]) == (4, 4)
    assert "too_large_batch_size" not in figures
    assert finding.notes == ["Notice: not compiled"]
    found = figures["by_batch_size"]["4"]
    assert found["sequences/s"] == pytest.approx(8.0)  # 2 ranks with 4 each
    assert found["tokens/s"] == pytest.approx(500.0)
    assert found["tflop/s"] == pytest.approx(1.0)
    assert found["matrix_share"] == pytest.approx(0.25)
    assert found["peak_memory_mib"] == 3072
    assert found["seconds_other"] == pytest.approx(0.1)
    assert found["updates"] == 5
    assert found["step_spread_share"] == 0.0
    assert found["p_train"] == pytest.approx(8.0)
    assert found["p_core"] == pytest.approx(8.0 / 0.9)  # a tenth of a step waits for its batch
    # 150,000 trained in 18,750 s, then 10,000 evaluated in 500 s.
    assert found["p_whole"] == pytest.approx(150_000 / 19_250)
    assert found["evaluation_sequences/s"] == 20.0


def test_steps_that_differ_are_noted(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = measuring.Steps([1.0, 1.0, 1.3, 1.0, 0.9], None, Work(5, 1, 1.0, None))
    assert steps.spread == pytest.approx(0.24)
    found = steps.figures(2, None)
    assert "rank_own_seconds" not in found
    monkeypatch.setattr(
        step,
        "measured",
        lambda *_: {**found, "precision": "fp32", "other_programs_cpus": 1.5},
    )
    finding = step.run(context_of(tmp_path, batch_sizes=(2,)), ignored)
    assert finding.verdict == NOTE
    assert "step times spread by 24% at 2 a rank" in finding.reason
    assert finding.notes[0].startswith("other programs used 1.5 of the CPUs")


def fake_sizes(monkeypatch: pytest.MonkeyPatch, fits: int, precisions: tuple[str, ...]) -> list:
    """`step.measured` where up to `fits` sequences fit; returns the calls that it gets."""
    calls = []

    def measured(context: Context, size: int, precision: str = "") -> dict[str, object]:
        calls.append((size, precision))
        if size > fits:
            raise NoMemory("rank 1: no memory: CUDA out of memory")
        own = precision or "fp16"
        own = own if own in precisions else "fp32"
        steps = measuring.Steps([1.0] * 5, [1.0, 1.0], Work(5, 1, 1.0, None))
        notices = ["Notice: use_cuda_graph has no effect"]
        return {
            "precision": own,
            "notices": notices,
            **steps.figures(2 * size, None),
            "other_programs_cpus": None,
        }

    monkeypatch.setattr(step, "measured", measured)
    return calls


def test_the_first_size_that_does_not_fit_is_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake_sizes(monkeypatch, 32, ("fp16",))
    context = context_of(tmp_path, device="cuda", batch_sizes=(16, 32, 48, 64))
    finding = step.run(context, ignored)
    assert [size for size, _ in calls] == [16, 32, 48]
    assert finding.verdict == PASS
    assert finding.figures["largest_batch_size"] == finding.figures["best_batch_size"] == 32
    assert finding.figures["too_large_batch_size"] == 48
    assert "notices" not in finding.figures["by_batch_size"]["16"]
    assert finding.notes == [
        "Notice: use_cuda_graph has no effect",
        "48 sequences a rank do not fit into the memory (rank 1: no memory: CUDA out of memory)",
    ]


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sizes(monkeypatch, 8, ())
    finding = step.run(context_of(tmp_path, batch_sizes=(16, 32)), ignored)
    assert finding.verdict == FAIL
    assert finding.reason.startswith("16 sequences a rank do not fit into the memory")


def test_a_full_run_tries_the_other_precisions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake_sizes(monkeypatch, 32, ("fp16",))
    context = context_of(tmp_path, quick=False, batch_sizes=(16, 32))
    finding = step.run(context, ignored)
    kept = kept_figures(context, "step")  # should the stage be ended at its limit
    assert kept == {"figures": finding.figures, "notes": finding.notes, "fault": ""}
    assert calls[2:] == [(32, "bf16"), (32, "fp32")]
    assert finding.figures["precision"] == "fp16"
    assert list(finding.figures["by_precision"]) == ["fp32"]
    assert finding.notes[1:] == ["bf16: this device does not compute in it"]
    assert "notices" not in finding.figures["by_precision"]["fp32"]


def test_sizes_are_left_out_where_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured is kept, and the stage does not run into its limit."""
    calls = fake_sizes(monkeypatch, 64, ("fp16",))
    clock = iter((0.0, 1150.0, 1200.0, 1200.0))  # the start, two sizes, the other precisions
    monkeypatch.setattr(step.time, "monotonic", lambda: next(clock))
    finding = step.run(context_of(tmp_path, quick=False, batch_sizes=(8, 16, 32)), ignored)
    assert [size for size, _ in calls] == [8, 16]
    assert finding.figures["best_batch_size"] == 16
    assert finding.notes[1].startswith("32 sequences a rank and more were not tried")
    assert finding.notes[2].startswith("other precisions were not tried")


def test_a_device_has_time_to_compile_with_quick_too(tmp_path: Path) -> None:
    for stage in STAGES:
        cpu, gpu = (stage.limit(context_of(tmp_path, device=one)) for one in ("cpu", "cuda"))
        assert cpu == stage.quick_seconds
        assert gpu >= stage.seconds


def test_the_best_size_comes_from_the_stage_step(tmp_path: Path) -> None:
    context = context_of(tmp_path, batch_sizes=(1, 2, 4))
    assert step.best_batch_size(context) == 1
    (tmp_path / "stages").mkdir()
    file = tmp_path / "stages" / "step.json"
    figures = {"layers": 1, "ranks": 2, "best_batch_size": 4}
    file.write_text(json.dumps({"figures": figures}))
    assert step.best_batch_size(context) == 4
    file.write_text(json.dumps({"figures": {**figures, "layers": 24}}))  # left from another run
    assert step.best_batch_size(context) == 1


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_is_short(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


def test_what_other_programs_use() -> None:
    """Ten seconds; CPU 0 was busy for 9 and CPU 1 for 8, of which the ranks used 6 and 7."""
    ranks = [
        {"cpus": {"0": 9.0}, "own": 6.0, "seconds": 10.0},
        {"cpus": {"1": 8.0}, "own": 7.0, "seconds": 9.0},
    ]
    assert other_programs.others_used(ranks) == pytest.approx(0.4)
    assert other_programs.others_used([{"cpus": {}, "own": 1.0, "seconds": 1.0}]) is None
    assert other_programs.busy_words(0.4, 2).startswith("other programs used 0.4 of the CPUs")
    assert other_programs.busy_words(0.1, 2) == other_programs.busy_words(None, 2) == ""


def test_which_late_stage_was_only_slow() -> None:
    """It took 100 s; the least that other programs must have used are a quarter of the CPUs."""
    assert other_programs.slowed(100.0, 25.0, 0.5, 2)
    assert not other_programs.slowed(100.0, 26.0, 2.0, 2)
    assert not other_programs.slowed(100.0, 1.0, 0.49, 2)
    assert not other_programs.slowed(100.0, 1.0, None, 2)
    assert not other_programs.slowed(100.0, -3600.0, 2.0, 2)  # by a server's wrong clock


@pytest.mark.parametrize("lives", [True, False])
def test_what_a_stage_used_is_not_of_other_programs(
    monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """Its child works, and lives or has ended; all programs used 10 s of one CPU in 20 s."""
    child = (
        "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\n"
        "sys.stdin.read()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    busy, now = iter([{0: 5.0}, {0: 15.0}]), iter([100.0, 120.0])
    monkeypatch.setattr(other_programs, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with monkeypatch.context() as patch:
        patch.setattr(other_programs, "time", SimpleNamespace(monotonic=lambda: next(now)))
        usage = other_programs.StageTime()
        process = subprocess.Popen(
            [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"\n"
        if not lives:
            process.communicate()
        used = usage.others_used(process.pid)
    process.communicate()
    assert 0.0 < used <= (10.0 - 0.25) / 20.0


def test_the_cpu_time_of_this_process() -> None:
    cpu_time = other_programs.CpuTime()
    ended = time.process_time() + 0.05
    while time.process_time() < ended:
        pass
    passed = cpu_time.passed()
    assert passed["own"] >= 0.02
    assert {int(cpu) for cpu in passed["cpus"]} <= os.sched_getaffinity(0)


# ---- scaling


def by_ranks(**rates: float) -> dict[str, object]:
    found = {
        count.removeprefix("n"): {
            "sequences/s": rate,
            "step_seconds_median": 1.0,
            "seconds_reduction": 0.2,
            "rank_own_seconds": [1.0] * int(count.removeprefix("n")),
            "other_programs_cpus": 0.0,
        }
        for count, rate in rates.items()
    }
    return {"batch_size": 2, "by_ranks": found}


def test_which_numbers_of_ranks_are_measured() -> None:
    assert [scaling.counts(ranks) for ranks in (2, 3, 6, 8)] == [
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


@pytest.mark.parametrize(
    ("device", "rate", "verdict"),
    [("cuda", 33.0, PASS), ("cuda", 31.0, NOTE), ("cpu", 31.0, PASS), ("cpu", 23.0, NOTE)],
)
def test_the_efficiency_of_more_ranks(
    device: str, rate: float, verdict: str, tmp_path: Path
) -> None:
    context = context_of(tmp_path, device=device, ranks=4)
    finding = scaling.judged(context, by_ranks(n1=10.0, n2=19.0, n4=rate))
    assert finding.verdict == verdict
    assert finding.figures["efficiency"] == pytest.approx(rate / 40)
    assert finding.figures["by_ranks"]["2"]["efficiency"] == pytest.approx(0.95)
    assert f"1: 100%, 2: 95%, 4: {rate / 40:.0%}" in finding.reason
    assert "20% of a step waits" in finding.reason
    if verdict == NOTE:
        assert f"4 ranks give {rate / 40:.0%} of 4 times one rank" in finding.reason


def test_more_than_the_whole_is_doubted(tmp_path: Path) -> None:
    figures = by_ranks(n1=10.0, n2=36.0)
    finding = scaling.judged(context_of(tmp_path, device="cuda"), figures)
    assert finding.verdict == NOTE
    assert finding.reason.endswith(
        "an efficiency of 180%: the one rank alone was disturbed; try again"
    )


def test_a_straggler_shows_in_scaling_too(tmp_path: Path) -> None:
    figures = by_ranks(n1=10.0, n4=40.0)
    figures["by_ranks"]["4"]["rank_own_seconds"] = [1.0, 1.0, 1.0, 1.15]
    finding = scaling.judged(context_of(tmp_path, device="cuda", ranks=4), figures)
    assert finding.verdict == NOTE
    assert "rank 3 is 15% slower than the others" in finding.reason


def test_numbers_of_ranks_that_were_measured_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four ranks fail."""
    known = by_ranks(n1=10.0, n2=19.0)["by_ranks"]

    def measured(*_: object, ranks: int, **__: object) -> dict[str, object]:
        if ranks == 4:
            raise TooLate("rank 3 did not end within 120 s")
        return dict(known[str(ranks)])

    monkeypatch.setattr(step, "measured", measured)
    context = context_of(tmp_path, ranks=4)
    finding = scaling.run(context, ignored)
    assert finding.verdict == FAIL
    assert finding.reason == "with 4 of 4 ranks: rank 3 did not end within 120 s"
    assert finding.is_late
    assert finding.figures["by_ranks"]["2"]["efficiency"] == pytest.approx(0.95)
    assert kept_figures(context, "scaling")["figures"] == finding.figures


@pytest.mark.parametrize(("quick", "counts"), [(True, [1, 2]), (False, [1, 2, 4])])
def test_a_quick_look_takes_the_figures_of_all_ranks_from_the_stage_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, counts: list[int]
) -> None:
    made, measured = by_ranks(n1=10.0, n2=19.0, n4=36.0)["by_ranks"], []

    def measure(*_: object, ranks: int, **__: object) -> dict[str, object]:
        measured.append(ranks)
        return {**made[str(ranks)], "precision": "fp32"}

    monkeypatch.setattr(step, "measured", measure)
    context = context_of(tmp_path, ranks=4, quick=quick, batch_sizes=(2,))
    known = {name: value for name, value in made["4"].items() if name != "other_programs_cpus"}
    known |= {"p_whole": 30.0, "p_train": 31.0, "p_core": 32.0, "evaluation_sequences/s": 99.0}
    figures = {
        "layers": context.layers, "ranks": 4, "best_batch_size": 2, "precision": "fp32",
        "other_programs_cpus": 0.125, "by_batch_size": {"2": known},
    }  # fmt: skip
    (context.folder / "stages").mkdir(exist_ok=True)
    (context.folder / "stages" / "step.json").write_text(json.dumps({"figures": figures}))
    found = scaling.run(context, ignored).figures
    assert measured == counts
    assert found["efficiency"] == pytest.approx(0.9)
    assert found["by_ranks"]["4"].keys() == found["by_ranks"]["1"].keys()
    assert found["other_programs_cpus"] == (0.125 if quick else 0.0)


def test_one_device_scales_to_nothing(tmp_path: Path) -> None:
    finding = scaling.run(context_of(tmp_path, ranks=1), ignored)
    assert (finding.verdict, finding.reason) == (PASS, "one device: nothing to scale")
