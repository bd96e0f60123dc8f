"""What a call costs on a GPU: launches, waits of the host, copies, seconds of host and device.

On a GPU the profiler counts, on the pretended GPU (see `pretended.py`) the stub libraries do.
"""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pretended
import torch
from torch.profiler import ProfilerActivity, profile

from bert_pretraining.bench import record
from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def free_memory(device: torch.device) -> None:
    """Free what earlier candidates have left, and begin to look for the peak anew.

    Without it the working memory of matrix products on their streams, 32 MiB each on Hopper, counts
    for the next candidate too.
    """
    gc.collect()
    compat.free_product_workspaces()
    devices.free_unused_memory(device)
    torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class Counts:
    """What happened, by name. kernels: those of graphs too, except on the pretended GPU."""

    launches: float
    graph_launches: float
    waits: dict[str, float]
    copies: dict[str, float]
    kernels: dict[str, float]

    def figures(self) -> dict[str, object]:
        return {
            "launches": self.launches,
            "graph_launches": self.graph_launches,
            "kernels_run": sum(self.kernels.values()),
            "host_waits": sum(self.waits.values()),
            "waits": self.waits,
            "copies": self.copies,
        }


def count(call: Callable[[], object], device: torch.device, calls: int) -> Counts:
    """What one of `calls` calls does, on average."""
    if record.is_pretended():
        counters = pretended.counters()
        devices.synchronize(device)
        counters.reset()
        for _ in range(calls):
            call()
        return _of_stubs(counters.counts(), calls)
    # The profiler waits by itself, once: what one call counts is taken away from what more do.
    once, more = _profiled(call, device, 1), _profiled(call, device, 1 + calls)
    more.subtract(once)
    return _of_profiler({key: value / calls for key, value in more.items() if value > 0})


def _of_stubs(found: dict[str, int], calls: int) -> Counts:
    each = {key: value / calls for key, value in found.items()}

    def those(start: str) -> dict[str, float]:
        return {key.removeprefix(start): n for key, n in each.items() if key.startswith(start)}

    waits = those("SYNC:")
    copies = those("memcpyAsync ")
    return Counts(sum(those("K:").values()), each.get("graphlaunch", 0), waits, copies, those("K:"))


def _profiled(call: Callable[[], object], device: torch.device, calls: int) -> Counter[str]:
    devices.synchronize(device)
    with profile(activities=ACTIVITIES) as profiled:
        for _ in range(calls):
            call()
        devices.synchronize(device)
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        is_kernel = str(event.device_type).endswith("CUDA")
        found[f"K:{event.key}" if is_kernel else event.key] += event.count
    return found


def _of_profiler(each: dict[str, float]) -> Counts:
    kernels = {key[2:]: n for key, n in each.items() if key.startswith("K:")}
    copies = {name: n for name, n in kernels.items() if name.startswith(("Memcpy", "Memset"))}
    waits = {key: n for key, n in each.items() if key.startswith("cuda") and "Synchronize" in key}
    return Counts(
        sum(each.get(name, 0.0) for name in LAUNCHES),
        each.get("cudaGraphLaunch", 0.0),
        waits,
        copies,
        {name: n for name, n in kernels.items() if name not in copies},
    )


def host_waits(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """How often the host waits for the device in one call, by the name of what waits.

    On a GPU, PyTorch tells of its own operations that wait; the profiler could not hold long calls.
    """
    if record.is_pretended():
        return count(call, device, 1).waits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"operations that wait": float(told)}


def host_seconds(
    call: Callable[[], object], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Spread of the host's seconds in each of `repeats` calls, each on an idle device.

    "host_seconds" are by the clock, until all work is queued. Where more than about 1,000 launches
    are queued, the host waits for the device, and its time includes that. "host_cpu_seconds" are
    those in which the process computed: on a machine that others use too they tell more.
    """
    by_clock, by_cpu = [], []
    for _ in range(repeats):
        devices.synchronize(device)
        started, cpu = time.perf_counter(), time.process_time()
        call()
        by_clock.append(time.perf_counter() - started)
        by_cpu.append(time.process_time() - cpu)
    return {"host_seconds": record.spread(by_clock), "host_cpu_seconds": record.spread(by_cpu)}


def device_seconds(call: Callable[[], object], repeats: int) -> list[float] | None:
    """Seconds from the end of one call to the end of the next on the device; None if pretended."""
    if record.is_pretended():
        return None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + repeats)]
    call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def trace(update: Callable[[], object], device: torch.device, name: Path) -> None:
    """Write NAME.trace.json.gz, for Chrome or Perfetto, and NAME.profile.txt."""
    with profile(activities=ACTIVITIES) as profiled:
        for _ in range(2):
            update()
        devices.synchronize(device)
    profiled.export_chrome_trace(f"{name}.trace.json.gz")
    rows = profiled.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=80
    )
    Path(f"{name}.profile.txt").write_text(rows)
