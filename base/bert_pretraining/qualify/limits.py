"""What can the device, its memory and its links do? Measured here, not looked up.

Figures; the rates of a probe are {"alone": [...], "at_once": [...]}, a number for each rank: while
the other ranks wait, and on all ranks at the same time:
    device                      name of each rank's device
    memory_copy_gb/s            a copy within the memory; what it reads and writes is counted
    host_to_device_gb/s, device_to_host_gb/s    from page-locked memory; missing on a CPU
    matrix_tflop/s              kind of product (fp32, tf32, bf16, fp16, fp8) -> shape "MxKxN" ->
                                rates at once; see `probes.shapes`
    all_reduce                  MB -> {"seconds", "bus_gb/s"}: the bus bandwidth is
                                bytes * 2 (N - 1) / N / seconds, with N ranks; missing with one
    all_reduce_latency_seconds  of one number
    other_programs_cpus         of the ranks' CPUs, used by others meanwhile
GB and TFLOP are powers of ten, MB is 2^20 bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify import measuring, other_programs, probes
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_of_rank, kept_of_ranks
from bert_pretraining.qualify.measuring import DIFFERENCE
from bert_pretraining.qualify.other_programs import CpuTime
from bert_pretraining.qualify.probes import MEGABYTE, Probe
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.roofline import short
from bert_pretraining.qualify.stages import Tell, ranks_limit
from bert_pretraining.qualify.workers import TooLate, run_ranks
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks

PROGRAM = "limits:measure"
MEGABYTES, QUICK_MEGABYTES = (1, 4, 16, 64, 256, 672), (1, 16)
COPIED, QUICK_COPIED = 256, 64  # MB; more than caches hold
ROUNDS = 3  # at most, while a rank seems slow
RATES = ("memory_copy", "host_to_device", "device_to_host")


def run(context: Context, tell: Tell) -> Finding:
    """Measure all limits, on all ranks."""
    tell("limits: memory, matrix products, links")
    limit = ranks_limit("limits", context)
    try:
        found = run_ranks(context, PROGRAM, context.ranks, {}, limit)
    except TrainingError as error:
        print(error.detail)
        so_far = kept_of_ranks(context)
        figures, faults, notes = compared(context, so_far) if so_far else ({}, [], [])
        is_late = isinstance(error, TooLate)
        return Finding(FAIL, str(error), figures, [*faults, *notes], is_late)
    return judged(context, found)


def measure(context: Context, ranks: Ranks, given: Mapping[str, object]) -> dict[str, object]:
    """One rank's part. What concerns all ranks is the same on each."""
    device, cpu_time = ranks.device, CpuTime()
    copied = QUICK_COPIED if context.quick else COPIED
    found: dict[str, object] = {"device": devices.name(device)}

    def keep() -> None:
        keep_of_rank(context, ranks.rank, {**found, "cpu_time": cpu_time.passed()})

    for probe in [probes.copy_probe(device, copied), *probes.host_probes(device, copied)]:
        alone = _in_rounds(lambda probe=probe: _each_alone(probe, ranks))
        found[probe.name] = {"alone": alone, "at_once": _at_once(probe, ranks)}
        keep()
    matrix = found["matrix"] = {}
    for kind, by_shape in probes.matrix_probes(BERT_LARGE, device).items():
        matrix[kind] = {}
        for shape, probe in by_shape.items():
            matrix[kind][shape] = _in_rounds(lambda probe=probe: _at_once(probe, ranks))
            keep()
    if ranks.world_size > 1:
        all_reduce = found["all_reduce"] = {}
        for size in QUICK_MEGABYTES if context.quick else MEGABYTES:
            seconds = probes.all_reduce_seconds(ranks, size)
            all_reduce[str(size)] = _slowest(seconds, ranks)
            keep()
        found["latency"] = _slowest(probes.latency(ranks), ranks)
    found["cpu_time"] = cpu_time.passed()
    return found


def _each_alone(probe: Probe, ranks: Ranks) -> list[float]:
    """Of each rank in turn, while the others wait."""
    own = 0.0
    for rank in range(ranks.world_size):
        process_group.barrier(ranks.device)
        if rank == ranks.rank:
            own = probe.measure()
    return _gathered(own, ranks)


def _at_once(probe: Probe, ranks: Ranks) -> list[float]:
    process_group.barrier(ranks.device)
    return _gathered(probe.measure(), ranks)


def _in_rounds(measure: Callable[[], list[float]]) -> list[float]:
    """The best of each rank; measured again while a rank seems slow, which may be chance."""
    best = measure()
    for _ in range(ROUNDS - 1):
        if not slow(best):
            break
        best = [max(pair) for pair in zip(best, measure(), strict=True)]
    return best


def _slowest(seconds: float, ranks: Ranks) -> float:
    return max(_gathered(seconds, ranks))


def _gathered(value: float, ranks: Ranks) -> list[float]:
    return [row[0] for row in process_group.gather_rows([value], ranks.device)]


def slow(rates: Sequence[float]) -> list[measuring.Straggler]:
    """The ranks whose rate is more than DIFFERENCE below the median of the others."""
    found = []
    for rank, rate in enumerate(rates):
        others = [*rates[:rank], *rates[rank + 1 :]]
        if others and rate < (1.0 - DIFFERENCE) * statistics.median(others):
            median = statistics.median(others)
            found.append(measuring.Straggler(rank, 1.0 - rate / median, rate, median))
    return found


def judged(context: Context, ranks: Sequence[Mapping]) -> Finding:
    """The verdict on what `measure` returned on each rank."""
    figures, faults, notes = compared(context, ranks)
    reason = _reason(figures, len(ranks))
    if not faults:
        return Finding(PASS, reason, figures, notes)
    return Finding(NOTE, f"{reason}; {faults[0]}", figures, [*faults[1:], *notes])


def compared(
    context: Context, ranks: Sequence[Mapping]
) -> tuple[dict[str, object], list[str], list[str]]:
    """The figures of what `measure` returned or has kept on each rank, what is slow, and notes."""
    first, count = ranks[0], len(ranks)
    names = [one["device"] for one in ranks]
    figures: dict[str, object] = {"device": names}
    faults: list[str] = []

    def compare(rates: Sequence[float], what: str, unit: str) -> None:
        if len(set(names)) > 1:  # other devices may be as fast as they are
            return
        faults.extend(
            f"{what}: rank {one.rank} is {one.share:.0%} slower than the others "
            f"({short(one.own)} {unit}, they {short(one.others)})"
            for one in slow(rates)
        )

    for name in RATES:
        if name in first:
            rates = {way: [rate / 1e9 for rate in of] for way, of in first[name].items()}
            figures[f"{name}_gb/s"] = rates
            compare(rates["alone"], f"{name.replace('_', ' ')} of a rank alone", "GB/s")
    matrix = {
        kind: {shape: [rate / 1e12 for rate in rates] for shape, rates in by_shape.items()}
        for kind, by_shape in first.get("matrix", {}).items()
    }
    figures["matrix_tflop/s"] = matrix
    for kind, by_shape in matrix.items():
        for shape, rates in by_shape.items():
            compare(rates, f"products {shape} in {kind}, all ranks at once", "TFLOP/s")
    notes = []
    if count == 1:
        notes.append("one device: no all-reduce to measure")
    if "all_reduce" in first:
        figures["all_reduce"] = {
            size: {"seconds": seconds, "bus_gb/s": bus_rate(int(size), count, seconds) / 1e9}
            for size, seconds in first["all_reduce"].items()
        }
    if "latency" in first:
        figures["all_reduce_latency_seconds"] = first["latency"]
    if context.device == "cpu":
        notes.append("a CPU: main memory is the device's, so there is no copy to it")
    used = other_programs.others_used([one["cpu_time"] for one in ranks])
    figures["other_programs_cpus"] = used
    busy = other_programs.busy_words(used, count)
    if busy and (faults or context.device == "cpu"):
        faults.append(busy)
    return figures, faults, notes


def bus_rate(megabytes: int, ranks: int, seconds: float) -> float:
    """Bytes a second on each rank's link that an all-reduce needs, however it is made."""
    return megabytes * MEGABYTE * 2.0 * (ranks - 1) / ranks / seconds


def _reason(figures: Mapping, count: int) -> str:
    copy = statistics.median(figures["memory_copy_gb/s"]["at_once"])
    start = "each device, all ranks at once: " if count > 1 else ""
    words = [f"{start}memory copy {short(copy)} GB/s"]
    if "host_to_device_gb/s" in figures:
        to = statistics.median(figures["host_to_device_gb/s"]["at_once"])
        back = statistics.median(figures["device_to_host_gb/s"]["at_once"])
        words.append(f"host to device {short(to)} and back {short(back)} GB/s")
    best = {
        kind: max(statistics.median(rates) for rates in by_shape.values())
        for kind, by_shape in figures["matrix_tflop/s"].items()
    }
    words.append("products " + ", ".join(f"{kind} {short(rate)}" for kind, rate in best.items()))
    words[-1] += " TFLOP/s"
    if count > 1:
        size = list(figures["all_reduce"])[-1]
        rate = figures["all_reduce"][size]["bus_gb/s"]
        latency = figures["all_reduce_latency_seconds"]
        words.append(
            f"all-reduce of {size} MB {rate:.3g} GB/s (bus), of one number {1e6 * latency:.0f} us"
        )
    return "; ".join(words)
