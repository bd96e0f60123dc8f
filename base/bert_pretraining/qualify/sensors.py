"""Power, heat, clock, throttling and memory errors of a stage's devices, where they can be read."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter as Count
from collections.abc import Sequence

import torch

from bert_pretraining.runtime import power, power_nvml
from bert_pretraining.runtime.power import Counter, CounterError

MOST_POINTS = 300
PERIOD = 0.9  # seconds between two readings, at least


class Sensors:
    """Those of one rank's device; the first rank of the machine reads the CPUs' too.

    Attributes:
        reason: why nothing, or not all, can be read; "" where all can, or there is nothing to read.
    """

    def __init__(self, device: torch.device, reads_cpus: bool) -> None:
        identity = power_nvml.identify(device)
        found = [power_nvml.find_nvml([] if identity is None else [identity])]
        if reads_cpus:
            found.append(power.find_rapl(power.powercap()))
        self._counters: list[Counter] = [counter for one in found for counter in one.counters]
        self.reason = "; ".join(one.reason for one in found if one.reason)
        self._next = 0.0
        self._read: dict[str, list[tuple[float, float, power.State]]] = {}
        self._errors = {_name(one): one.memory_errors() for one in self._counters}

    def read(self, at: float) -> None:
        """Read all, unless that was done a moment ago. at: seconds since the start."""
        if at < self._next:
            return
        self._next = at + PERIOD
        for counter in list(self._counters):
            try:
                joules, state = counter.joules(at), counter.state()
            except CounterError as error:
                self._counters.remove(counter)
                self.reason = "; ".join(one for one in (self.reason, str(error)) if one)
                continue
            self._read.setdefault(_name(counter), []).append((at, joules, state))

    def figures(self) -> list[dict[str, object]]:
        """Of each device that was read twice, as JSON; what it does not tell is missing.

        device, watts_mean, temperature_celsius_max, clock_mhz_min, clock_mhz_median, throttled
        (reason -> share of the readings), points ([seconds, watts, degrees Celsius, MHz], each
        since the one before), memory_errors (see `new_errors`, since this object was made).
        """
        now = {_name(one): one.memory_errors() for one in self._counters}
        found = []
        for device, readings in self._read.items():
            if len(readings) > 1:
                figures = _figures(device, readings)
                errors = new_errors(self._errors[device], now.get(device, power.MemoryErrors()))
                found.append({**figures, "memory_errors": errors} if errors else figures)
        return found


def new_errors(before: power.MemoryErrors, after: power.MemoryErrors) -> dict[str, object]:
    """Errors of a device's memory, as JSON; what it does not tell is missing.

    corrected, uncorrected: new ones. uncorrected_before: since the driver was loaded. rows_pending,
    remap_failed: as they are now.
    """
    found: dict[str, object] = {}
    for name in ("corrected", "uncorrected"):
        first, last = getattr(before, name), getattr(after, name)
        if first is not None and last is not None:
            found[name] = max(last - first, 0)  # a driver that is loaded again counts from 0
    if "uncorrected" in found:
        found["uncorrected_before"] = before.uncorrected
    for name in ("rows_pending", "remap_failed"):
        if getattr(after, name) is not None:
            found[name] = getattr(after, name)
    return found


def _name(counter: Counter) -> str:
    return f"{counter.source} {counter.device}"


def _figures(
    device: str, readings: Sequence[tuple[float, float, power.State]]
) -> dict[str, object]:
    first, last = readings[0], readings[-1]
    states = [state for _, _, state in readings]
    found: dict[str, object] = {"device": device}
    found["watts_mean"] = (last[1] - first[1]) / max(last[0] - first[0], 1e-9)
    temperatures = [state.temperature for state in states if state.temperature is not None]
    clocks = [state.clock for state in states if state.clock is not None]
    if temperatures:
        found["temperature_celsius_max"] = max(temperatures)
    if clocks:
        found |= {"clock_mhz_min": min(clocks), "clock_mhz_median": statistics.median(clocks)}
    reasons = Count(reason for state in states for reason in state.reasons)
    found["throttled"] = {
        reason: count / len(states)
        for reason, count in reasons.items()
        if reason in power_nvml.SLOWDOWNS
    }
    step = -(-len(readings) // MOST_POINTS)
    kept = readings[::step]
    found["points"] = [
        [now, (joules - before) / max(now - then, 1e-9), state.temperature, state.clock]
        for (then, before, _), (now, joules, state) in itertools.pairwise(kept)
    ]
    return found
