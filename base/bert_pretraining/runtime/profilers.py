"""What profilers need of a type of device: its events, its memory's history, outside profilers.

All of it is looked up in the device's module of PyTorch; what a type of device lacks is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from bert_pretraining.runtime.device_types import module_of
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.runtime.ranges import Maker

NSIGHT_SYSTEMS = "NSYS_PROFILING_SESSION_ID"  # Nsight Systems sets it in the program that it runs
# An outside profiler sets one of these. The last one names a library that takes NVTX ranges, the
# one before it is Nsight Compute's.
OUTSIDE = (NSIGHT_SYSTEMS, "NV_NSIGHT_INJECTION_TRANSPORT_TYPE", "NVTX_INJECTION64_PATH")

MOST_ENTRIES = 100_000  # allocations and releases in a memory snapshot: the latest are kept


def device_activity(device: torch.device) -> ProfilerActivity | None:
    """What torch.profiler records of the device's own work; None for a CPU, and where it cannot."""
    if device.type == "cpu":
        return None
    known = ProfilerActivity.__members__
    activity = known.get(device.type.upper(), known.get("PrivateUse1"))
    return activity if activity in torch.profiler.supported_activities() else None


# ---- outside profilers


def is_watched(environment: Mapping[str, str]) -> bool:
    """Whether an outside profiler runs this program."""
    return any(environment.get(name) for name in OUTSIDE)


def outside_ranges(device: torch.device) -> Maker | None:
    """Ranges for outside profilers (NVTX; rocTX on AMD); None for a device that has none."""
    return getattr(_part(device, "nvtx"), "range", None)


class OutsideWindow(NamedTuple):
    """Tells an outside profiler where to begin and to end, if it was started to wait for that."""

    start: Callable[[], None]
    stop: Callable[[], None]


def outside_window(device: torch.device, environment: Mapping[str, str]) -> OutsideWindow | None:
    """The window of Nsight Systems, if it runs this program and watches the device."""
    part = _part(device, "profiler")
    if not environment.get(NSIGHT_SYSTEMS) or not hasattr(part, "start"):
        return None
    return OutsideWindow(part.start, part.stop)


# ---- memory


class MemoryHistory:
    """The latest allocations and releases of a device's memory, with where in Python they are.

    Args:
        part: the module `memory` of the device's module; PyTorch has only private functions.
    """

    def __init__(self, part: ModuleType | Any) -> None:
        self._record, self._dump = part._record_memory_history, part._dump_snapshot

    def start(self) -> None:
        """Record from now on. Python's stacks alone: those of C++ take much longer."""
        self._record(max_entries=MOST_ENTRIES, stacks="python")

    def write(self, path: Path) -> None:
        """Write what was recorded, for https://pytorch.org/memory_viz. Raises OSError."""
        write_whole(path, lambda temporary: self._dump(str(temporary)))

    def stop(self) -> None:
        """Record no more, and forget."""
        self._record(enabled=None)


def memory_history(device: torch.device) -> MemoryHistory | None:
    """The history of a device's memory; None where PyTorch records none, as on a CPU."""
    part = _part(device, "memory")
    needed = ("_record_memory_history", "_dump_snapshot")
    return MemoryHistory(part) if all(hasattr(part, name) for name in needed) else None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that a device has no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _part(device: torch.device, name: str) -> ModuleType | None:
    """`torch.<type>.<name>`; None where the device has none."""
    return getattr(module_of(device.type), name, None)
