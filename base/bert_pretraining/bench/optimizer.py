"""`bench optimizer`: the time of one LAMB update of all parameters, implementations in turn."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bert_pretraining.bench import record
from bert_pretraining.bench.flags import BENCH, add_model_flags, bench_parser, device_and_model
from bert_pretraining.bench.timing import Stopwatch, Times, announce, peak_memory
from bert_pretraining.bench.workload import best_of_7
from bert_pretraining.kernels import DTYPES, select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import OPTIMIZERS, OptimizerSettings, choose, create_optimizer
from bert_pretraining.runtime import device as devices


def bytes_moved(dtype: torch.dtype) -> int:
    """Bytes that an update must move for each parameter if no cache keeps anything of a pass.

    The gradient is read twice (for its norm, for the update). Both passes read the master
    weights and both moments. The first pass writes the moments, the second the master weights
    and the 16-bit parameter.
    """
    rounding = dtype.itemsize if dtype.itemsize < 4 else 0
    return 2 * dtype.itemsize + 12 + 8 + 12 + 4 + rounding


def copy_rate(device: torch.device, megabytes: int = 256) -> float:
    """Bytes that copying reads and writes in a second on this device; the best of 7.

    megabytes: of 2^20 bytes, that are copied.
    """
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / best_of_7(lambda: target.copy_(source), device)


def shapes_of(config: BertConfig) -> dict[str, torch.Size]:
    """The names and shapes of a model's parameters; no memory is allocated for them."""
    kernels = select("reference", torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        model = BertForPreTraining(config, kernels, seed=1)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def times_of_updates(
    name: str, shapes: dict[str, torch.Size], device: torch.device, dtype: torch.dtype, count: int
) -> Times:
    """The times of updates after a first one, with new parameters and state; `count` repeats."""
    named = [
        # The values do not change the work.
        (key, nn.Parameter(torch.full(shape, 0.02, device=device, dtype=dtype)))
        for key, shape in shapes.items()
    ]
    optimizer = create_optimizer(name, named, OptimizerSettings())
    optimizer.zero_grad()
    for _, parameter in named:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.fill_(1e-3)
    rate = torch.tensor(1e-4, device=device, dtype=devices.wide(device))
    optimizer.step(rate)
    watch = Stopwatch(lambda: optimizer.step(rate), device, capture=True)
    for _ in range(count):
        watch.repeat()
    # An update that is skipped, since its gradient is not finite, would be timed as a fast one.
    assert record.is_pretended() or optimizer.updates >= 1 + count
    return watch.times


def main(arguments: list[str]) -> int:
    """Seconds and memory of an update, and their relation to copying as many bytes."""
    parser = bench_parser(
        f"{BENCH} optimizer",
        "Time one LAMB update of all parameters, implementations in turn, and compare it with "
        "copying as many bytes.",
    )
    add_model_flags(parser, "updates of each implementation that are timed")
    parser.add_argument(
        "--precision", choices=tuple(DTYPES), default="fp32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS,
        help="one or more; the others are compared with the first (default: reference, foreach "
        "and the one that auto takes)",
    )  # fmt: skip
    flags = parser.parse(arguments)
    device, config = device_and_model(flags)
    shapes, dtype = shapes_of(config), DTYPES[flags.precision]
    names = flags.optimizers or ["reference", "foreach", choose("auto", device).name]
    for name in names:
        choose(name, device)  # an implementation that cannot run fails here, before any is timed

    announce("measuring how fast this device copies")
    rate = copy_rate(device)
    count = sum(shape.numel() for shape in shapes.values())
    floor = bytes_moved(dtype) * count / rate
    memory: dict[str, float] = {}
    times: dict[str, Times] = {}
    described = {
        "device": devices.name(device),
        "precision": flags.precision,
        "threads": torch.get_num_threads(),
        "parameters": count,
        "bytes_a_parameter": bytes_moved(dtype),
        "copy_bytes_per_second": rate,
        "copy_seconds": floor,
        "peak_memory_mib": memory,
    }

    def keep() -> None:
        if flags.output:
            seconds = {name: one.figures() for name, one in times.items()}
            record.write(flags.output, {**described, "seconds": seconds})

    for name in names:
        announce(f"{name}: measuring memory")
        memory[name] = peak_memory(
            partial(times_of_updates, name, shapes, device, dtype, 1), device
        )
    # On a CPU in turn, so that a noisy machine disturbs all alike.
    rounds = flags.repeats if device.type == "cpu" else 1
    for number in range(rounds):
        for name in names:
            announce(f"{name}: repeat {number + 1} of {rounds}")
            found = times_of_updates(name, shapes, device, dtype, flags.repeats // rounds)
            if name in times:
                found.seconds = times[name].seconds + found.seconds
                found.host_seconds = times[name].host_seconds + found.host_seconds
            times[name] = found
            keep()
    print(
        f"{count / 1e6:.1f} M parameters, {flags.precision}; copying {rate / 1e9:.1f} GB/s, so at "
        f"{bytes_moved(dtype)} bytes each {floor:.4f} s"
    )
    spreads = {name: one.figures() for name, one in times.items()}
    for name, spread in spreads.items():
        host = (
            f"; host {spread['host']['median']:.4f} s ({spread['method']})"
            if "host" in spread
            else ""
        )
        print(
            f"{name:<10} {spread['median']:>8.4f} s ({spread['min']:.4f} to {spread['max']:.4f}, "
            f"n {spread['n']}); {spreads[names[0]]['median'] / spread['median']:.2f} times as fast "
            f"as {names[0]}; {spread['median'] / floor:.2f} times the copy; "
            f"{memory[name]:.0f} MiB with weights and gradients{host}"
        )
    return 0
