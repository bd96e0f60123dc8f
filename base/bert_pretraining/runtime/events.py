"""Events with times on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from bert_pretraining.runtime import device as devices


class TimedEvent(Protocol):
    """A point in a device's work."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, later: TimedEvent) -> float: ...


def event_maker(device: torch.device) -> Callable[[], TimedEvent] | None:
    """Makes events with times; None where the device has none."""
    module = devices.streams(device)
    if module is None:
        return None

    def make() -> TimedEvent:
        return module.Event(enable_timing=True)

    def works() -> None:
        first, last = make(), make()
        first.record()
        last.record()
        devices.synchronize(device)
        first.elapsed_time(last)
        last.query()

    return make if devices.runs(works) else None
