"""Where the time of a step goes: right sums, no wait for a device, the ranks compared."""

from __future__ import annotations

import itertools
import time
import weakref

import pytest
import torch

from bert_pretraining.logs.sinks import OWN_PARTS, PARTS, RankSeconds, Speed, Throughputs, Work
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.flops import Amount, step_flops
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.matrix_rate import SHAPES, matrix_rate
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.step_clock import UNREAD, StepClock, Tally, over_ranks
from helpers import packed, padded_arrays
from rank_threads import as_ranks

CPU = torch.device("cpu")
BATCH = packed(padded_arrays([9, 16, 3], 16, 101, seed=1))
CONFIG = BertConfig(101, 32, 2, 4, 64, 16)


class Device:
    """A device whose work takes the time that a test says, and that is `behind` events late."""

    def __init__(self, behind: int) -> None:
        self.behind, self.events, self.now, self.waits = behind, 0, 0.0, 0

    def event(self) -> Event:
        return Event(self)

    def works(self, seconds: float) -> None:
        self.now += seconds


class Event:
    """An event of `Device`. To read the time of one that is not reached yet is to wait."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self._device.events += 1
        self._number, self.at = self._device.events, self._device.now

    def query(self) -> bool:
        return self._number <= self._device.events - self._device.behind

    def synchronize(self) -> None:
        self._device.waits += 1

    def elapsed_time(self, later: Event) -> float:
        self._device.waits += not (self.query() and later.query())
        return 1e3 * (later.at - self.at)


def update(clock: StepClock, device: Device, waited: float = 0.0) -> None:
    """An update on the device; waited: how long it stands still before, for a slow host."""
    with clock.part("data"):
        time.sleep(0.001)
    device.works(waited)
    for part, seconds in (("forward_backward", 0.5), ("reduction", 0.25), ("optimizer", 0.125)):
        with clock.part(part):
            device.works(seconds)
    clock.count([BATCH, BATCH])


def test_a_device_is_never_waited_for_between_two_reads() -> None:
    device = Device(behind=100)
    clock = StepClock(CPU, device.event)
    for _ in range(1000):
        update(clock, device)
    assert device.waits == 0
    device.behind = 0  # as after a read of the latest outcome
    tally = clock.take()
    assert device.waits == 0
    assert tally.updates == 1000
    expected = {"forward_backward": 500.0, "reduction": 250.0, "optimizer": 125.0, "data": 0.0}
    assert tally.seconds == pytest.approx(expected)


def test_events_do_not_pile_up() -> None:
    device = Device(behind=20)
    made: list[weakref.ref] = []

    def make() -> Event:
        event = device.event()
        made.append(weakref.ref(event))
        return event

    clock = StepClock(CPU, make)
    for _ in range(300):
        update(clock, device)
    assert len(made) == 300 * 6
    assert sum(event() is not None for event in made) <= 2 * UNREAD + 1
    device.behind = 0
    assert clock.take().seconds["forward_backward"] == pytest.approx(150.0)


def test_waiting_for_data_is_no_longer_than_the_device_stands_still() -> None:
    device = Device(behind=0)
    clock = StepClock(CPU, device.event)
    update(clock, device)
    update(clock, device, waited=0.0)  # the host waits 1 ms, and the device still works
    assert clock.take().seconds["data"] == 0.0
    update(clock, device, waited=0.0004)
    assert clock.take().seconds["data"] == pytest.approx(0.0004)
    update(clock, device, waited=30.0)  # an evaluation came between; the host waited 1 ms or more
    assert 0.001 <= clock.take().seconds["data"] < 600.0


def test_a_wait_inside_of_backward_counts_as_reduction() -> None:
    device = Device(behind=0)
    clock = StepClock(CPU, device.event)
    with clock.part("forward_backward"):
        device.works(2.0)
        clock.waits_from_here()
        device.works(3.0)
    seconds = clock.take().seconds
    assert (seconds["forward_backward"], seconds["reduction"]) == pytest.approx((2.0, 3.0))


def test_on_a_cpu_the_host_s_clock_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    clock = StepClock(CPU)
    with clock.part("data"):
        pass
    with clock.part("forward_backward"):
        clock.waits_from_here()
    with clock.part("optimizer"):
        time.perf_counter()
    clock.count([BATCH])
    tally = clock.take()
    expected = {"data": 1.0, "forward_backward": 1.0, "reduction": 1.0, "optimizer": 2.0}
    assert tally.seconds == expected
    assert tally.amount == Amount(28, 9**2 + 16**2 + 3**2, BATCH.num_masked)
    assert clock.take() == Tally()
    clock.count([BATCH])
    clock.take()
    assert clock.whole.updates == 2
    assert clock.whole.seconds == expected


def test_a_device_without_events_gives_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_pretraining.training.step_clock.event_maker", lambda _: None)
    clock = StepClock(torch.device("meta"))
    with clock.part("data"), clock.part("optimizer"):
        clock.waits_from_here()
    clock.count([BATCH])
    assert not clock.measures
    work = over_ranks(clock.take(), clock.measures, CONFIG, Ranks(0, 1, CPU))
    assert (work.updates, work.tokens, work.seconds, work.slowest) == (1, 28, None, None)


def test_the_ranks_are_compared_by_their_own_work() -> None:
    def tally(scale: float) -> Tally:
        seconds = {"data": 2.0, "forward_backward": 8.0, "reduction": 30.0, "optimizer": 4.0}
        return Tally(2, Amount(10, 50, 2), {part: scale * one for part, one in seconds.items()})

    scales = (1.0, 3.0, 2.0)
    work, *others = as_ranks(
        3, lambda rank: over_ranks(tally(scales[rank]), True, CONFIG, Ranks(rank, 3, CPU))
    )
    assert others == [work, work]
    assert work.tokens == 30
    assert work.flops == 3 * step_flops(Amount(10, 50, 2), CONFIG)
    assert work.seconds == {
        "data": 2.0, "forward_backward": 8.0, "reduction": 30.0, "optimizer": 4.0
    }  # fmt: skip
    assert (work.fastest, work.slowest) == (RankSeconds(0, 7.0), RankSeconds(1, 21.0))
    assert work.median_seconds == 14.0
    assert work.peak_memory > 2**20  # of this process


def test_speed_is_work_by_time() -> None:
    seconds = {"data": 0.5, "forward_backward": 1.0, "reduction": 0.25, "optimizer": 0.125}
    one = RankSeconds(0, 1.625)
    work = Work(10, 4000, 6e12, 3 * 2**30, seconds, one, one, 1.625)
    speed = Speed.of(work, sequences=100, seconds=20.0, matrix_rate=6e11)
    figures = speed.named()
    assert figures["tokens/s"] == 200.0
    assert figures["tflop/s"] == 0.3
    assert figures["matrix_share"] == 0.5
    assert figures["peak_memory_mib"] == 3072
    assert figures["seconds_other"] == 0.125
    assert sum(figures[f"seconds_{part}"] for part in PARTS) == 20.0 / 10
    assert set(OWN_PARTS) < set(PARTS)
    unknown = Speed.of(Work(10, 4000, 6e12, None), 100, 20.0, None).named()
    assert set(unknown) == {"tokens/s", "tflop/s"}
    assert Throughputs(1.0, 2.0, None).named() == {"p_whole": 1.0, "p_train": 2.0}


def test_packed_batches_know_their_token_pairs() -> None:
    assert BATCH.token_pairs == 9**2 + 16**2 + 3**2
    assert BATCH.to(torch.device("meta")).token_pairs == BATCH.token_pairs
    assert isinstance(BATCH, PackedBatch)


def test_the_matrix_rate_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is not that of training; later random numbers are as without it."""
    told: list[str] = []
    for name in ("free_unused_memory", "reset_peak_memory"):
        monkeypatch.setattr(devices, name, lambda device, name=name: told.append(name))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rate, shape = matrix_rate(CPU, torch.float32)
    assert rate > 0
    assert shape in SHAPES
    assert torch.equal(torch.get_rng_state(), before)
    assert told == ["free_unused_memory", "reset_peak_memory"]
