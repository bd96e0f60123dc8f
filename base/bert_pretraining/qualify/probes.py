"""What a rank measures of its device, its memory and its links, for the stage `limits`.

Each probe returns one rate; the best of several repeats counts, because what disturbs only slows.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bert_pretraining.bench.optimizer import copy_rate
from bert_pretraining.bench.workload import MASKED_SHARE, best_of_7
from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.kernels import DTYPES, fp8_engine
from bert_pretraining.kernels.fp8_casts import FORMATS
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime import arithmetic, process_group
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.matrix_rate import matrix_rate
from bert_pretraining.runtime.process_group import Ranks

MEGABYTE = 2**20
REDUCTIONS, LATENCIES = 5, 100  # repeats
FP8, TF32 = "fp8", "tf32"
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Probe:
    """measure: returns a rate; it is called on one rank alone, and on all at once."""

    name: str
    measure: Callable[[], float]


def shapes(model: BertConfig, device: torch.device) -> list[Shape]:
    """(m, k, n) of the model's large products: intermediate, QKV, and vocabulary.

    The tokens are those of 2 sequences on a CPU, and of 48 on a device; the vocabulary's product
    has the masked ones alone.
    """
    hidden, tokens = model.hidden_size, 512 if device.type == "cpu" else 12288
    masked = int(MASKED_SHARE * tokens)
    return [
        (tokens, hidden, model.intermediate_size),
        (tokens, hidden, 3 * hidden),
        (masked, hidden, model.padded_vocab_size),
    ]


def copy_probe(device: torch.device, megabytes: int) -> Probe:
    """Bytes a second that a copy within the memory reads and writes."""
    return Probe("memory_copy", lambda: copy_rate(device, megabytes))


def host_probes(device: torch.device, megabytes: int) -> list[Probe]:
    """Bytes a second from main memory to the device and back; none for a CPU."""
    if device.type == "cpu":
        return []
    host = devices.pinned(torch.ones(megabytes * MEGABYTE // 4), device)
    own = torch.empty_like(host, device=device)
    size, asynchronous = 4.0 * host.numel(), devices.can_pin(device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        return size / best_of_7(lambda: target.copy_(source, non_blocking=asynchronous), device)

    return [
        Probe("host_to_device", lambda: rate(own, host)),
        Probe("device_to_host", lambda: rate(host, own)),
    ]


def matrix_probes(model: BertConfig, device: torch.device) -> dict[str, dict[str, Probe]]:
    """Kind of product -> shape -> floating-point operations a second.

    fp32 is without TF32. A CPU has no fp16 here, since no run uses it there, and emulates fp8.
    """
    found: dict[str, dict[str, Probe]] = {}
    for kind in kinds(device):
        found[kind] = {}
        for shape in shapes(model, device):
            if kind == FP8 and any(size % 16 for size in shape):
                shape = tuple(-(-size // 16) * 16 for size in shape)
            name = "x".join(map(str, shape))
            found[kind][name] = Probe(name, lambda k=kind, s=shape: _product(device, k, s))
    return found


def kinds(device: torch.device) -> list[str]:
    """The kinds of products that the device has: names of DTYPES, TF32, FP8."""
    found = ["fp32"]
    with tf32(device, True):
        if arithmetic.multiplies_in_tf32(device):
            found.append(TF32)
    if devices.supports(device, DTYPES["bf16"]) and not devices.emulates_bf16(device):
        found.append("bf16")
    if device.type != "cpu":
        if devices.supports(device, DTYPES["fp16"]):
            found.append("fp16")
        try:
            fp8_engine.engine_for(device)
            found.append(FP8)
        except UserError:  # the device has none
            pass
    return found


@contextlib.contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """In this context float32 products may use TF32, or may not."""
    before = torch.get_float32_matmul_precision()
    arithmetic.set_tf32(device, allowed)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(device: torch.device, kind: str, shape: Shape) -> float:
    if kind == FP8:
        return fp8_rate(device, shape)
    with tf32(device, kind == TF32):
        return matrix_rate(device, DTYPES["fp32" if kind == TF32 else kind], shape)[0]


def fp8_rate(device: torch.device, shape: Shape) -> float:
    """Floating-point operations a second of a product as fp8 layers make it, without casts."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(FORMATS[0])
    right = torch.randn(columns, inner, device=device).to(FORMATS[1])
    one = torch.ones((), device=device)
    bf16 = devices.supports(device, torch.bfloat16)
    dtype = torch.bfloat16 if bf16 else torch.float16
    product = fp8_engine.engine_for(device).product

    def run() -> None:
        product(left, right, one, one, dtype, None)

    return 2.0 * rows * inner * columns / best_of_7(run, device)


def all_reduce_seconds(ranks: Ranks, megabytes: int) -> float:
    """Seconds of an all-reduce of so many MB of float32; the best of several, on the slowest rank.

    Every rank calls it. Raises TrainingError on every rank where a sum is wrong.
    """
    device, world = ranks.device, ranks.world_size
    values = torch.full((megabytes * MEGABYTE // 4,), float(ranks.rank + 1), device=device)
    process_group.sum_over_ranks(values)
    low, high, right = values.min().item(), values.max().item(), world * (world + 1) / 2
    rows = process_group.gather_rows([low, high], device)
    for rank, (least, most) in enumerate(rows):
        if (least, most) != (right, right):
            raise TrainingError(
                f"an all-reduce of {megabytes} MB gave {least:g} to {most:g} on rank {rank}, but "
                f"the sum is {right:g}: look at that device's memory and links"
            )
    values.zero_()  # sums stay finite
    return min(_timed_reduction(ranks, values) for _ in range(REDUCTIONS))


def latency(ranks: Ranks) -> float:
    """Seconds of an all-reduce of one number, the median; every rank calls it."""
    values = torch.zeros(1, device=ranks.device)
    return statistics.median(_timed_reduction(ranks, values) for _ in range(LATENCIES))


def _timed_reduction(ranks: Ranks, values: torch.Tensor) -> float:
    process_group.barrier(ranks.device)
    started = time.perf_counter()
    process_group.sum_over_ranks(values)
    devices.synchronize(ranks.device)
    return time.perf_counter() - started
