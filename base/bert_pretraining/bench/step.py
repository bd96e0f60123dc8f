"""`bench step`: the time of forward and backward of one batch, for several candidates in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bert_pretraining.bench import record
from bert_pretraining.bench.flags import (
    BENCH,
    add_model_flags,
    bench_parser,
    device_and_model,
    require_at_least_one,
)
from bert_pretraining.bench.workload import (
    alternate,
    announce,
    batch_of,
    matrix_rate,
    peak_memory,
    step_flops,
    wikipedia_lengths,
)
from bert_pretraining.config import FlagParser
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import DTYPES, PROVIDERS, select
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime import device as devices
from bert_pretraining.training.micro_step import MicroStep
from bert_pretraining.training.static_batch import budgets


def step_parser(prog: str, description: str) -> FlagParser:
    """The flags of measurements that work on one batch."""
    parser = bench_parser(prog, description)
    add_model_flags(parser, "steps of each candidate that are timed")
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N",
        help="sequences, at least 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"],
        help="one or more (default: fp32 bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="threads of the CPU, at least 1 (default: PyTorch's choice)",
    )  # fmt: skip
    return parser


def setting_of(flags: argparse.Namespace) -> tuple[torch.device, BertConfig, np.ndarray]:
    """Device, model sizes and sequence lengths that the flags stand for."""
    require_at_least_one(flags, "batch_size", "threads")
    device, config = device_and_model(flags)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    lengths = np.minimum(wikipedia_lengths(flags.batch_size), config.max_position_embeddings)
    return device, config, lengths


def our_step(
    config: BertConfig,
    batch: PackedBatch,
    device: torch.device,
    dtype: torch.dtype,
    provider: str = "auto",
    compiled: bool = False,
    graph: bool = False,
) -> Callable[[], None]:
    """This package's forward and backward, dropout included, as `train` runs them."""
    kernels = select(provider, device, dtype, config.head_size)
    module = BertForPreTraining(config, kernels, seed=1).to(device, dtype)
    sizes = ()
    if compiled or graph:
        longest = config.max_position_embeddings
        sizes = budgets(batch.num_sequences, longest)[:1]
        if not sizes[0].fits(batch):
            sizes = budgets(batch.num_sequences, longest, batch.num_tokens)[:1]
    model = torch.compile(module, dynamic=False) if compiled else module
    step = MicroStep(model, device, sizes, graph)
    if sizes:
        announce("compiling the model" + (" and capturing a CUDA graph" if graph else ""))
    step.prepare(lambda: module.zero_grad(set_to_none=False))
    weights = {
        name: torch.tensor(1.0 / batch.num_predictions(name), device=device)
        for name in module.losses
    }
    batch = batch.to(device)

    def run() -> None:
        module.zero_grad(set_to_none=not graph)
        step(batch, weights)

    return run


def figures_of(
    candidates: dict[str, Callable[[], None]],
    device: torch.device,
    config: BertConfig,
    lengths: np.ndarray,
    num_masked: int,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, dict]:
    """Name -> seconds, sequences/s, real tokens/s, FLOP/s and its share, memory."""
    announce("measuring a large matrix product, for comparison")
    rate = matrix_rate(device, dtype)
    flops = step_flops(lengths, num_masked, config)
    figures = {}
    for name, times in alternate(candidates, device, repeats).items():
        spread = record.spread(times)
        announce(f"{name}: measuring memory")
        figures[name] = {
            "seconds": spread,
            "sequences_per_second": len(lengths) / spread["median"],
            "tokens_per_second": int(lengths.sum()) / spread["median"],
            "flop_per_second": flops / spread["median"],
            "share_of_matrix_rate": flops / spread["median"] / rate,
            "peak_memory_mib": peak_memory(candidates[name], device),
        }
    return figures


def table(figures: dict[str, dict], baseline: str) -> str:
    """A line for each candidate; ratios are of the medians of this run, to `baseline`."""
    lines = [
        f"{'':<34} {'seq/s':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'of GEMM':>7} "
        f"{'MiB':>7} {'ratio':>6}  seconds (n, min to max)"
    ]
    base = figures[baseline]["seconds"]["median"]
    for name, values in figures.items():
        spread = values["seconds"]
        lines.append(
            f"{name:<34} {values['sequences_per_second']:>9.2f} "
            f"{values['tokens_per_second']:>9.0f} {values['flop_per_second'] / 1e12:>8.3f} "
            f"{values['share_of_matrix_rate']:>7.0%} {values['peak_memory_mib']:>7.0f} "
            f"{base / spread['median']:>6.2f}  {spread['median']:.3f} "
            f"({spread['n']}, {spread['min']:.3f} to {spread['max']:.3f})"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Compare providers, and compiled or captured steps, on one machine."""
    parser = step_parser(
        f"{BENCH} step",
        "Time forward and backward of one batch, dropout included. The candidates take turns, so "
        "that a noisy machine disturbs all alike.",
    )
    parser.add_argument(
        "--kernels", nargs="+", choices=("auto", *PROVIDERS), default=["reference", "auto"],
        help="one or more (default: reference auto)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="also with auto kernels, compiled (default: no)"
    )
    parser.add_argument(
        "--graph", action="store_true",
        help="also compiled and captured as a CUDA graph, on a GPU (default: no)",
    )  # fmt: skip
    flags = parser.parse(arguments)
    device, config, lengths = setting_of(flags)
    if flags.graph and devices.graphs(device) is None:
        raise UserError(
            f"--graph: a device of type {device.type} cannot capture graphs", "leave it out"
        )
    batch = batch_of(lengths, config)
    results: dict[str, object] = {}
    for precision in flags.precision:
        dtype = DTYPES[precision]
        makers = {f"{name} {precision}": partial(our_step, provider=name) for name in flags.kernels}
        if flags.compile:
            makers[f"compiled {precision}"] = partial(our_step, compiled=True)
        if flags.graph:
            makers[f"compiled, graph {precision}"] = partial(our_step, compiled=True, graph=True)
        candidates = {}
        for name, make in makers.items():
            announce(f"{name}: making a model of {config.num_hidden_layers} layers")
            candidates[name] = make(config, batch, device, dtype)
        figures = figures_of(
            candidates, device, config, lengths, batch.num_masked, dtype, flags.repeats
        )
        print(table(figures, next(iter(figures))), flush=True)
        results[precision] = figures
        candidates.clear()
    describe = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "lengths": lengths.tolist(),
        "masked": batch.num_masked,
    }
    if flags.output:
        record.write(flags.output, {**describe, "results": results})
    return 0
