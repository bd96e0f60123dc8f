"""The time of a call on a device whose clock and the host's are simulated."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bert_pretraining.bench import timing

CPU = torch.device("cpu")  # no call of the tests touches a device
MICROSECOND = 1e-6


class Machine:
    """A host that queues calls for a device. All times are in seconds.

    host_cost: of queueing one call. device_cost: of its work.
    """

    def __init__(self, host_cost: float, device_cost: float) -> None:
        self.host_cost, self.device_cost = host_cost, device_cost
        self.host = self.device = 0.0
        self.captures = 0

    def call(self) -> None:
        self.host += self.host_cost
        self.device = max(self.device, self.host) + self.device_cost

    def synchronize(self, _: torch.device) -> None:
        self.host = max(self.host, self.device)

    def event(self) -> Event:
        return Event(self)

    def captured(self, call: Callable, device: torch.device, calls: int) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.host += 10 * MICROSECOND
            self.device = max(self.device, self.host) + calls * self.device_cost

        return replay


class Event:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def record(self) -> None:
        self.time = max(self._machine.host, self._machine.device)

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds, as PyTorch's events tell them."""
        return 1e3 * (later.time - self.time)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Machine]:
    def make(host_cost: float, device_cost: float) -> Machine:
        made = Machine(host_cost, device_cost)
        clock = SimpleNamespace(perf_counter=lambda: made.host)
        monkeypatch.setattr(timing, "time", clock)
        monkeypatch.setattr(timing.devices, "synchronize", made.synchronize)
        monkeypatch.setattr(timing, "event_maker", lambda _: made.event)
        monkeypatch.setattr(timing, "captured", made.captured)
        return made

    return make


def measured(machine: Machine, capture: bool) -> timing.Times:
    watch = timing.Stopwatch(machine.call, CPU, capture)
    for _ in range(3):
        watch.repeat()
    return watch.times


def test_a_short_kernel_is_not_measured_as_the_hosts_time(machine: Callable) -> None:
    """A kernel of 20 us that the host queues in 5 us: the time of its work, not of a round trip."""
    times = measured(machine(5 * MICROSECOND, 20 * MICROSECOND), capture=True)
    assert times.method == "events"
    assert times.seconds == pytest.approx([20 * MICROSECOND] * 3, rel=0.02)
    assert times.host_seconds == pytest.approx([5 * MICROSECOND] * 3)
    assert times.calls * 20 * MICROSECOND >= timing.ENOUGH


def test_where_the_host_is_the_limit_a_graph_is_replayed(machine: Callable) -> None:
    """An operator of 3 us with a host time of 500 us."""
    simulated = machine(500 * MICROSECOND, 3 * MICROSECOND)
    times = measured(simulated, capture=True)
    assert (times.method, simulated.captures) == ("graph", 1)
    assert times.seconds == pytest.approx([3 * MICROSECOND] * 3, rel=0.05)
    assert times.host_seconds == pytest.approx([500 * MICROSECOND] * 3)


def test_a_step_that_waits_for_the_host_is_called_host_bound(machine: Callable) -> None:
    simulated = machine(60_000 * MICROSECOND, 20_000 * MICROSECOND)
    times = measured(simulated, capture=False)
    assert (times.method, simulated.captures) == ("host-bound", 0)
    assert min(times.seconds) >= 20_000 * MICROSECOND
    assert times.figures()["host"]["median"] == pytest.approx(0.06)


def test_what_cannot_be_captured_is_called_host_bound(
    machine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = machine(500 * MICROSECOND, 3 * MICROSECOND)
    monkeypatch.setattr(timing, "captured", lambda *_: None)
    assert measured(simulated, capture=True).method == "host-bound"


def test_a_device_whose_events_tell_nothing_ends_the_search(machine: Callable) -> None:
    """The pretended GPU tells the same time for any work; the number of calls is bounded."""
    simulated = machine(100 * MICROSECOND, 0.0)
    times = measured(simulated, capture=True)
    assert 1 <= times.calls <= timing.MOST_CALLS


def test_a_cpu_is_timed_by_the_clock() -> None:
    watch = timing.Stopwatch(lambda: None, CPU, capture=True)
    watch.repeat()
    assert (watch.times.method, watch.times.calls) == ("clock", 1)
    assert set(watch.times.figures()) == {"n", "min", "median", "max"}


def test_times_are_told_after_each_measurement() -> None:
    told = []
    turns = timing.Turns(
        CPU, 2, measured=lambda times: told.append({k: len(t.seconds) for k, t in times.items()})
    )
    turns.add("a", lambda: None)
    turns.add("b", lambda: None)
    turns.finish()
    assert told == [{"a": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
