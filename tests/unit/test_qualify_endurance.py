"""The stage `endurance` of `qualify`, on a clock that is made up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify import endurance, measuring
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.sensors import Sensors
from bert_pretraining.qualify.workers import TooLate
from bert_pretraining.runtime import power, power_nvml
from bert_pretraining.runtime.power import MemoryErrors
from bert_pretraining.runtime.process_group import Ranks
from energy_counters import Gpu, nvml_module
from qualify_doubles import ignored
from qualify_faults import FakeClock, FakeWorkload, context_of, fake_clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return fake_clock(monkeypatch)


def endured(
    monkeypatch: pytest.MonkeyPatch, context: Context, made: FakeWorkload, ranks: int = 1
) -> Finding:
    """The finding of `endurance` whose ranks all are this one."""
    monkeypatch.setattr(endurance, "Workload", lambda *_: made)

    def run_ranks(context: Context, program: str, count: int, given: dict, *_: float) -> list:
        assert (program, count) == (endurance.PROGRAM, context.ranks)
        return [endurance.measure(context, Ranks(0, 1, CPU), given)]

    monkeypatch.setattr(endurance, "run_ranks", run_ranks)
    return endurance.run(context, ignored)


@pytest.mark.parametrize(
    ("drift", "verdict"), [(0.0, PASS), (0.04, PASS), (0.08, NOTE), (0.30, FAIL), (-0.2, NOTE)]
)
def test_a_step_time_that_drifts_is_found(
    drift: float,
    verdict: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """100 steps a second apart; from the 50th on they take longer."""
    context = context_of(tmp_path, ranks=1, minutes=100 / 60)
    work = FakeWorkload(clock, lambda made: 1.0 if made < 52 else 1.0 + drift)
    finding = endured(monkeypatch, context, work)
    assert finding.verdict == verdict
    assert finding.figures["drift_share"] == pytest.approx(drift)
    assert finding.figures["step_seconds_first_third"] == pytest.approx(1.0)
    assert finding.figures["slowest_step_seconds"] == pytest.approx(max(1.0, 1.0 + drift))
    assert finding.figures["seconds"] == pytest.approx(100.0, abs=1.5)
    if verdict != PASS:
        assert ("slower" if drift > 0 else "faster") in finding.reason
    json.dumps(finding.figures)


@pytest.mark.parametrize(("device", "verdict"), [("cpu", NOTE), ("cuda", FAIL)])
def test_other_programs_are_blamed_for_a_drift_on_a_cpu(
    device: str, verdict: str, tmp_path: Path
) -> None:
    """Whose CPUs are busy with something else, that machine is not found bad for it."""
    busy = {"cpus": {"0": 9.0}, "own": 4.0, "seconds": 10.0}
    points = [[float(at), 1.0 if at < 6 else 1.3] for at in range(1, 13)]
    rank = {"points": points, "updates": 12, "cpu_times": [busy], "sensors": [], "unread": ""}
    context = context_of(tmp_path, device=device, ranks=1)
    finding = endurance.judged(context, 2, [rank])
    assert finding.verdict == verdict
    assert finding.figures["other_programs_cpus"] == [0.5]
    assert "other programs used 0.5 of the CPUs" in " ".join([finding.reason, *finding.notes])


def test_the_slowest_second_is_named_and_is_no_drift(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = context_of(tmp_path, ranks=1, minutes=0.5)
    work = FakeWorkload(clock, lambda made: 7.0 if made == 12 else 1.0)  # two warm-up updates
    finding = endured(monkeypatch, context, work)
    assert finding.verdict == PASS
    assert finding.figures["slowest_step_seconds"] == pytest.approx(7.0)
    assert finding.figures["slowest_at_seconds"] == pytest.approx(17.0)
    assert "the slowest 7 s after 17 s" in finding.reason


def test_short_steps_share_a_point(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = context_of(tmp_path, ranks=1, minutes=0.5)
    finding = endured(monkeypatch, context, FakeWorkload(clock, lambda _: 0.125))
    assert len(finding.figures["points"]) == 30
    assert finding.figures["updates"] == 240
    assert finding.figures["sequences/s"] == pytest.approx(8.0)


def test_few_steps_tell_no_drift(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = context_of(tmp_path, ranks=1, minutes=0.05)  # 3 s, and up to 12
    finding = endured(monkeypatch, context, FakeWorkload(clock, lambda made: 4.0 + made))
    assert finding.figures["drift_share"] is None
    assert finding.verdict == PASS
    assert "too few to tell of a drift" in finding.reason


def test_points_are_thinned() -> None:
    points = [[float(second), second % 2] for second in range(1, 1201)]
    kept = endurance.thinned(points, 600)
    assert len(kept) == 600
    assert kept[0] == [2.0, 0.5]
    assert endurance.thinned(points[:600], 600) == points[:600]


def test_a_loss_that_is_not_finite_ends_the_updates(clock: FakeClock) -> None:
    losses = itertools.chain([10.5, 10.4], itertools.repeat(float("nan")))
    work = FakeWorkload(clock, lambda _: 1.0, losses=losses)
    with pytest.raises(TrainingError, match="the loss is not finite"):
        measuring.steady_blocks(work, Ranks(0, 1, CPU), 5.0, 5)


def test_steps_that_fail_fail_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_ranks(*_: object) -> None:
        raise TrainingError("the loss is not finite: (nan,)", "the traceback")

    monkeypatch.setattr(endurance, "run_ranks", run_ranks)
    finding = endurance.run(context_of(tmp_path), ignored)
    assert finding.verdict == FAIL
    assert finding.reason == "the steps fail: the loss is not finite: (nan,)"


def test_ranks_that_hang_at_last_keep_their_points(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After 25 steps of a second. What was found is kept every 10 s."""

    def seconds(made: int) -> float:
        if made == 27:  # two are for warming up
            raise TooLate("rank 0 did not end within 280 s")
        return 1.0

    context = context_of(tmp_path, ranks=1, minutes=1.0)
    finding = endured(monkeypatch, context, FakeWorkload(clock, seconds))
    assert finding.verdict == FAIL
    assert finding.reason.startswith(
        "the steps fail: rank 0 did not end within 280 s; until then 21 steps in 21 s; a step "
    )
    assert len(finding.figures["points"]) == finding.figures["updates"] == 21
    assert finding.figures["drift_share"] == pytest.approx(0.0)


class FakeCounter:
    """A GPU that is hot in half of the readings, and takes 300 W.

    errors: of its memory, at the start and later.
    """

    source, kind, device = "NVML", "GPU", "GPU 3"

    def __init__(self, *errors: MemoryErrors) -> None:
        self._read, self._errors = 0, list(errors) or [MemoryErrors()]

    def memory_errors(self) -> MemoryErrors:
        return self._errors.pop(0) if len(self._errors) > 1 else self._errors[0]

    def joules(self, now: float) -> float:
        return 300.0 * now

    def state(self) -> power.State:
        self._read += 1
        hot = self._read % 2 == 0
        return power.State(
            91 if hot else 60, 900 if hot else 1800, 99, ("hardware_heat",) if hot else ()
        )


def test_a_device_that_is_slowed_down_by_heat_is_named(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = power.Found([FakeCounter()])
    monkeypatch.setattr(power_nvml, "find_nvml", lambda _: found)
    monkeypatch.setattr(power, "find_rapl", lambda _: power.Found(reason="no RAPL here"))
    context = context_of(tmp_path, ranks=1, minutes=0.5)
    finding = endured(monkeypatch, context, FakeWorkload(clock, lambda _: 1.0))
    assert finding.verdict == NOTE
    assert "at most 91 degrees Celsius" in finding.reason
    assert "NVML GPU 3 was slowed down by hardware_heat in 48% of the readings" in finding.reason
    assert "not read: no RAPL here" in finding.notes
    (sensor,) = finding.figures["sensors"]
    assert sensor["watts_mean"] == pytest.approx(300.0)
    assert (sensor["clock_mhz_min"], sensor["temperature_celsius_max"]) == (900, 91)
    assert len(sensor["points"]) == 30
    assert sensor["points"][0][1] == pytest.approx(300.0)
    assert "memory_errors" not in sensor  # it does not tell


@pytest.mark.parametrize(
    ("before", "after", "verdict", "told"),
    [
        (
            (0, 0),
            (0, 2),
            FAIL,
            "NVML GPU 3 had 2 uncorrected memory errors (ECC) meanwhile: ",
        ),
        ((5, 0, False, False), (5, 0, False, True), FAIL, "NVML GPU 3 has no spare rows left"),
        ((5, 0), (9, 0), NOTE, "NVML GPU 3 had 4 corrected memory errors (ECC) meanwhile"),
        ((5, 1), (5, 1), NOTE, "NVML GPU 3 had 1 uncorrected memory error (ECC) before, since"),
        ((0, 0, False), (0, 0, True), NOTE, "NVML GPU 3 has bad memory that a reset takes out of"),
        ((5, 0, False, False), (5, 0, False, False), PASS, ""),
        ((9, 0), (0, 0), PASS, ""),  # the driver was loaded again
        ((None, None), (None, None), PASS, ""),  # a device without ECC
    ],
)
def test_errors_of_a_devices_memory(
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    before: tuple,
    after: tuple,
    verdict: str,
    told: str,
) -> None:
    counter = FakeCounter(MemoryErrors(*before), MemoryErrors(*after))
    monkeypatch.setattr(counter, "state", power.State)  # it is not hot
    monkeypatch.setattr(power_nvml, "find_nvml", lambda _: power.Found([counter]))
    monkeypatch.setattr(power, "find_rapl", lambda _: power.Found())
    context = context_of(tmp_path, ranks=1, minutes=0.5)
    finding = endured(monkeypatch, context, FakeWorkload(clock, lambda _: 1.0))
    assert finding.verdict == verdict
    assert ("memory" in finding.reason or "rows" in finding.reason) == bool(told)
    assert told in finding.reason
    assert finding.notes == []


def test_what_nvml_tells_of_a_memory() -> None:
    gpu = Gpu("GPU-1", "0", lacks="")
    gpu.ecc, gpu.remapped = [7, 2], (1, 1, 1, 0)
    counter = power_nvml.NvmlCounter(nvml_module([gpu]), gpu, "GPU 0")
    assert counter.memory_errors() == (7, 2, True, False)
    gpu.lacks, gpu.pages_pending = ["nvmlDeviceGetRemappedRows"], 1  # before Ampere
    assert counter.memory_errors() == (7, 2, True, None)
    gpu.lacks += ["nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetRetiredPagesPendingStatus"]
    assert counter.memory_errors() == MemoryErrors()


def test_a_counter_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(FakeCounter):
        def joules(self, now: float) -> float:
            raise power.CounterError("NVML cannot read GPU 3 (gone)")

    monkeypatch.setattr(power_nvml, "find_nvml", lambda _: power.Found([Failing()]))
    sensors = Sensors(CPU, reads_cpus=False)
    sensors.read(0.0)
    sensors.read(1.0)
    assert sensors.figures() == []
    assert sensors.reason == "NVML cannot read GPU 3 (gone)"
