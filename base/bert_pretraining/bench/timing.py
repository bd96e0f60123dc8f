"""Time and memory of a call, on a CPU and on a device.

A device works on its own. The host's clock around one call would show the host's time to queue
the work, which for a small kernel is ten times that of the kernel. So on a device with events the
time between two events is taken, with many calls between them. Where the host queues the calls
more slowly than the device does them, the device is idle in between; then the calls are captured
as a graph and replayed, if that is wanted and works, or the figure is called host-bound.

All calls work on the same tensors, and no cache is emptied between them: tensors that fit into the
device's L2 cache are read from there.
"""

from __future__ import annotations

import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bert_pretraining.bench import record
from bert_pretraining.runtime import capture
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.events import event_maker
from bert_pretraining.runtime.process_memory import status_bytes

ENOUGH = 0.02  # seconds between the two events, to be long beside their own error of microseconds
LEAST_CALLS = 4  # between them: the host and the device overlap only from the second call on
MOST_CALLS = 1000  # between the two events
MOST_HOST_SECONDS = 1.0  # for the host to queue them
IN_A_GRAPH = 20  # calls in one graph, so that its launch counts little
HOST_BOUND = 0.9  # of the time between two events: if the host needs more, the device waited for it


def announce(text: str) -> None:
    """Say on stderr what a measurement does now, because it may take minutes."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call by the host's clock, until the device has done its work."""
    devices.synchronize(device)
    started = time.perf_counter()
    call()
    devices.synchronize(device)
    return time.perf_counter() - started


@dataclass
class Times:
    """The seconds of one call, a number for each repeat.

    seconds: on a device its time, else the host's. host_seconds: until the host had queued one
    call on an idle device. method: "clock", "events", "graph" or "host-bound", as in this module's
    docstring. calls: between the two readings of the clock, or the two events.
    """

    method: str
    calls: int
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        """The spread of the seconds, that of the host's, and how they were measured."""
        found: dict[str, object] = dict(record.spread(self.seconds))
        if self.method != "clock":
            host = record.spread(self.host_seconds)
            found |= {"host": host, "method": self.method, "calls": self.calls}
        return found


class Stopwatch:
    """Times a call that has been warmed up.

    Args:
        call: may be called any number of times.
        capture: whether calls that the host queues too slowly are captured as a graph.

    Attributes:
        times: of the repeats so far.
    """

    def __init__(
        self, call: Callable[[], object], device: torch.device, capture: bool = False
    ) -> None:
        self._call, self._device, self._capture = call, device, capture
        self._replay: Callable[[], object] | None = None
        self._event = event_maker(device)
        self.times = Times("clock" if self._event is None else "", 1)

    def repeat(self) -> None:
        """Measure once more."""
        if self._event is None:
            seconds = timed(self._call, self._device)
            self._keep(seconds, seconds)
            return
        if not self.times.method:
            self._choose()
        self._keep(*self._between_events(self.times.calls))

    def _keep(self, seconds: float, host_seconds: float) -> None:
        self.times.seconds.append(seconds)
        self.times.host_seconds.append(host_seconds)

    def _between_events(self, calls: int) -> tuple[float, float]:
        """Seconds of one of so many calls on the device, and of the host for the first of them."""
        first, last = self._event(), self._event()
        devices.synchronize(self._device)
        if self._replay is not None:
            started = time.perf_counter()
            self._call()
            host = time.perf_counter() - started
            devices.synchronize(self._device)
            first.record()
            for _ in range(calls // IN_A_GRAPH):
                self._replay()
        else:
            first.record()
            started = time.perf_counter()
            self._call()
            host = time.perf_counter() - started
            for _ in range(calls - 1):
                self._call()
        last.record()
        devices.synchronize(self._device)
        return first.elapsed_time(last) / 1e3 / calls, host

    def _choose(self) -> None:
        """Find how to measure, and with how many calls."""
        self.times.method = "events"
        self._find_calls(1, LEAST_CALLS)
        seconds, host = self._between_events(self.times.calls)
        if host < HOST_BOUND * seconds:
            return
        self.times.method = "host-bound"
        if not self._capture:
            return
        self._replay = captured(self._call, self._device, IN_A_GRAPH)
        if self._replay is not None:
            self.times.method = "graph"
            self._find_calls(IN_A_GRAPH, IN_A_GRAPH)

    def _find_calls(self, step: int, least: int) -> None:
        """Let so many calls, a multiple of step, lie between the events that they take ENOUGH."""
        calls, most = least, MOST_CALLS
        for _ in range(3):
            seconds, host = self._between_events(calls)
            if seconds * calls >= ENOUGH:
                break
            if self._replay is None:
                most = min(most, max(least, int(MOST_HOST_SECONDS / host)))
            wanted = min(most, math.ceil(1.2 * ENOUGH / max(seconds, 1e-9)))
            calls = max(calls, math.ceil(wanted / step) * step)
        self.times.calls = calls


def captured(
    call: Callable[[], object], device: torch.device, calls: int
) -> Callable[[], object] | None:
    """Replays a graph of so many calls; None where the device or the call cannot be captured."""
    if devices.graphs(device) is None:
        return None
    with devices.side_stream(device):
        call()
    devices.synchronize(device)

    def work() -> None:
        for _ in range(calls):
            call()

    try:
        graph, _ = capture.captured(device, work)
    except RuntimeError:
        return None
    return graph.replay


class Turns:
    """Candidates are timed in turn, so that a noisy machine disturbs all alike.

    Args:
        repeats: of each candidate.
        capture: see `Stopwatch`.
        measured: called with all times so far after each measurement, so that they can be kept.
    """

    def __init__(
        self,
        device: torch.device,
        repeats: int,
        warm_up: int = 1,
        capture: bool = False,
        measured: Callable[[dict[str, Times]], None] = lambda _: None,
    ) -> None:
        self._device, self._repeats, self._warm_up = device, repeats, warm_up
        self._capture, self._measured = capture, measured
        self._watches: dict[str, Stopwatch] = {}

    @property
    def times(self) -> dict[str, Times]:
        """By the name of the candidate."""
        return {name: watch.times for name, watch in self._watches.items()}

    def add(self, name: str, call: Callable[[], object]) -> None:
        """Warm a candidate up and measure it once; it takes part in the turns from then on."""
        announce(f"{name}: warming up")
        for _ in range(self._warm_up):
            call()
        watch = Stopwatch(call, self._device, self._capture)
        self._repeat(name, watch)
        self._watches[name] = watch
        self._measured(self.times)

    def finish(self) -> dict[str, Times]:
        """Measure all candidates until each has its repeats."""
        for _ in range(self._repeats - 1):
            for name, watch in self._watches.items():
                self._repeat(name, watch)
            self._measured(self.times)
        return self.times

    def _repeat(self, name: str, watch: Stopwatch) -> None:
        announce(f"{name}: repeat {len(watch.times.seconds) + 1} of {self._repeats}")
        watch.repeat()


def alternate(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int = 1,
    capture: bool = False,
) -> dict[str, Times]:
    """The times of candidates that are all there; see `Turns`."""
    turns = Turns(device, repeats, warm_up, capture)
    for name, call in candidates.items():
        turns.add(name, call)
    return turns.finish()


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """The most MiB that a call needs beyond those in use before it; 0 where nothing tells it.

    A replayed graph allocates nothing: its memory was taken when it was captured.
    """
    if device.type != "cpu":
        devices.reset_peak_memory(device)
        before = devices.memory(device).in_use or 0
        timed(call, device)
        return max(0, (devices.memory(device).peak or 0) - before) / 2**20
    try:
        # The C library keeps memory that was freed, which would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak in /proc/self/status
        before = status_bytes("VmRSS")
        call()
        return (status_bytes("VmHWM") - before) / 2**20
    except (OSError, AttributeError):
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
