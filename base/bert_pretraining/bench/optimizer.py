"""`bench optimizer`: the time of one LAMB update of all parameters, implementations in turn."""

from __future__ import annotations

import torch
from torch import nn

from bert_pretraining.bench import record
from bert_pretraining.bench.flags import BENCH, add_model_flags, bench_parser, device_and_model
from bert_pretraining.bench.workload import announce, peak_memory, timed
from bert_pretraining.kernels import DTYPES, select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import OPTIMIZERS, OptimizerSettings, choose, create_optimizer


def bytes_moved(dtype: torch.dtype) -> int:
    """Bytes that an update must move for each parameter if no cache keeps anything of a pass.

    The gradient is read twice (for its norm, for the update). Both passes read the master
    weights and both moments. The first pass writes the moments, the second the master weights
    and the 16-bit parameter.
    """
    rounding = dtype.itemsize if dtype.itemsize < 4 else 0
    return 2 * dtype.itemsize + 12 + 8 + 12 + 4 + rounding


def copy_rate(device: torch.device) -> float:
    """Bytes that copying reads and writes in a second on this device; the best of 7."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2.0 * source.numel() * 4 / seconds


def shapes_of(config: BertConfig) -> dict[str, torch.Size]:
    """The names and shapes of a model's parameters; no memory is allocated for them."""
    kernels = select("reference", torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        model = BertForPreTraining(config, kernels, seed=1)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def seconds_of_updates(
    name: str, shapes: dict[str, torch.Size], device: torch.device, dtype: torch.dtype, count: int
) -> list[float]:
    """Seconds of each of `count` updates after a first one, with new parameters and state."""
    named = [
        # The values do not change the work.
        (key, nn.Parameter(torch.full(shape, 0.02, device=device, dtype=dtype)))
        for key, shape in shapes.items()
    ]
    optimizer = create_optimizer(name, named, OptimizerSettings())
    seconds = []
    for _ in range(1 + count):
        optimizer.zero_grad()
        for _, parameter in named:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.fill_(1e-3)
        seconds.append(timed(lambda: optimizer.step(1e-4), device))
    assert optimizer.updates == 1 + count
    return seconds[1:]


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
    memory, times = {}, {name: [] for name in names}
    for name in names:
        announce(f"{name}: measuring memory")
        memory[name] = peak_memory(
            lambda name=name: seconds_of_updates(name, shapes, device, dtype, 1), device
        )
    for repeat in range(flags.repeats):  # in turn, so that a noisy machine disturbs all alike
        for name in names:
            announce(f"{name}: repeat {repeat + 1} of {flags.repeats}")
            times[name] += seconds_of_updates(name, shapes, device, dtype, 1)
    spreads = {name: record.spread(seconds) for name, seconds in times.items()}
    print(
        f"{count / 1e6:.1f} M parameters, {flags.precision}; copying {rate / 1e9:.1f} GB/s, so at "
        f"{bytes_moved(dtype)} bytes each {floor:.4f} s"
    )
    for name, spread in spreads.items():
        print(
            f"{name:<10} {spread['median']:>8.4f} s ({spread['min']:.4f} to {spread['max']:.4f}, "
            f"n {spread['n']}); {spreads[names[0]]['median'] / spread['median']:.2f} times as fast "
            f"as {names[0]}; {spread['median'] / floor:.2f} times the copy; "
            f"{memory[name]:.0f} MiB with weights and gradients"
        )
    if flags.output:
        described = {
            "device": str(device),
            "precision": flags.precision,
            "threads": torch.get_num_threads(),
            "parameters": count,
            "bytes_a_parameter": bytes_moved(dtype),
            "copy_bytes_per_second": rate,
            "copy_seconds": floor,
            "seconds": spreads,
            "peak_memory_mib": memory,
        }
        record.write(flags.output, described)
    return 0
