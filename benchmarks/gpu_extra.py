"""Measure on a GPU, besides `bench`, how the time of the step could become shorter.

    PYTHONPATH=base python benchmarks/gpu_extra.py --output FILE [--device cpu --num_layers 1]

This times attention with and without dropout, the compiled fused operators of PyTorch and those in
Triton, one layer and all layers, eager and compiled, and fp8 matrix products. It counts the kernel
launches and the host time of a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bert_pretraining.bench import record
from bert_pretraining.bench import step as bench
from bert_pretraining.bench.kernels import differentiate, inputs_of
from bert_pretraining.bench.workload import alternate, batch_of, synchronize, timed
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import Target, select, unavailable


def spreads(
    candidates: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict:
    """Time the candidates in turn. Print milliseconds; return the spread of seconds by name."""
    times = alternate(candidates, device, repeats, warm_up=3)
    found = {name: record.spread(seconds) for name, seconds in times.items()}
    for name, spread in found.items():
        print(f"  {name:<52} {1e3 * spread['median']:.3f} ms (n {spread['n']})", flush=True)
    return found


def fp8_product(rows: int, inner: int, columns: int, device: torch.device) -> Callable[[], Tensor]:
    """x W' in fp8 (e4m3) with one scale for each tensor; the result is bf16."""
    x = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)


def launches(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """The kernel launches of a step, and the seconds until the host has queued all of them."""
    step()
    synchronize(device)
    started = time.perf_counter()
    step()
    queued = time.perf_counter() - started
    synchronize(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        timed(step, device)
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
    count = sum(event.count for event in profiled.key_averages() if event.key in names)
    print(f"  launches {count}, host {1e3 * queued:.2f} ms")
    return {"launches": count, "host_seconds": queued}


def main() -> None:
    parser = bench.step_parser("benchmarks/gpu_extra.py", __doc__)
    flags = parser.parse(sys.argv[1:])
    device, config, lengths = bench.setting_of(flags)
    if flags.precision != parser.get_default("precision"):
        raise UserError("--precision: these measurements are in bf16 only", "leave it out")
    dtype = torch.bfloat16
    batch = batch_of(lengths, config).to(device)
    target = Target(device, dtype, config.head_size)
    providers = [name for name in ("torch", "triton") if not unavailable(name, "attention", target)]
    results: dict[str, object] = {}

    print("attention, forward and backward")
    candidates: dict[str, Callable[[], object]] = {}
    for dropout in (0.0, 0.1):
        sizes = replace(config, attention_probs_dropout_prob=dropout)
        given, call = inputs_of(sizes, batch, device, dtype)["attention"]
        for provider in providers:
            function = select(provider, device, dtype, config.head_size).attention
            name = f"{provider}, dropout {dropout}"
            candidates[name] = partial(differentiate, function, given, call)
    results["attention"] = spreads(candidates, device, flags.repeats)

    print("fused operators, forward and backward")
    for operator, (given, call) in inputs_of(config, batch, device, dtype).items():
        if operator == "attention":
            continue
        plain = getattr(select("reference", device, dtype, config.head_size), operator)
        compiled = torch.compile(plain, dynamic=False)
        candidates = {"compiled": partial(differentiate, compiled, given, call)}
        for provider in providers:
            function = getattr(select(provider, device, dtype, config.head_size), operator)
            candidates[provider] = partial(differentiate, function, given, call)
        named = {f"{operator}, {name}": run for name, run in candidates.items()}
        results[operator] = spreads(named, device, flags.repeats)

    print("steps")
    steps = {}
    for layers in sorted({1, config.num_hidden_layers}):
        sizes = replace(config, num_hidden_layers=layers)
        for compiled_step in (False, True):
            name = f"{layers} layers, {'compiled' if compiled_step else 'eager'}"
            steps[name] = bench.our_step(sizes, batch, device, dtype, compiled=compiled_step)
    results["steps"] = spreads(steps, device, flags.repeats)
    results["launches"] = {name: launches(step, device) for name, step in steps.items()}

    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        print("fp8 matrix products, forward")
        hidden, inner = config.hidden_size, config.intermediate_size
        rows = batch.num_tokens // 16 * 16
        shapes = {"qkv": (hidden, 3 * hidden), "intermediate": (hidden, inner),
                  "output": (inner, hidden)}  # fmt: skip
        products = {
            name: fp8_product(rows, inputs, outputs, device)
            for name, (inputs, outputs) in shapes.items()
        }
        found = spreads(products, device, flags.repeats)
        for name, (inputs, outputs) in shapes.items():
            rate = 2.0 * rows * inputs * outputs / found[name]["median"]
            found[name]["flop_per_second"] = rate
            print(f"  {name}: {rate / 1e12:.0f} TFLOP/s")
        results["fp8"] = found
    if flags.output:
        record.write(
            flags.output, {"device": str(device), "lengths": lengths.tolist(), "results": results}
        )


if __name__ == "__main__":
    main()
