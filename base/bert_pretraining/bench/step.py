"""`bench step`: forward and backward of one batch, candidates in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bert_pretraining.bench import record
from bert_pretraining.bench.workload import (
    BERT_LARGE,
    alternate,
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
from bert_pretraining.training.micro_step import MicroStep
from bert_pretraining.training.static_batch import budgets


def parser(prog: str) -> FlagParser:
    """The flags that every comparison of steps has."""
    flags = FlagParser(prog=prog, allow_abbrev=False, description=__doc__)
    flags.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    flags.add_argument("--bert_config_path", type=Path, help="sizes; by default BERT-large")
    flags.add_argument("--num_layers", type=int, help="encoder layers, if not all")
    flags.add_argument("--batch_size", type=int, default=8, help="sequences (8)")
    flags.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    flags.add_argument("--repeats", type=int, default=5, help="steps of each candidate (5)")
    flags.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's choice")
    flags.add_argument("--output", type=Path, help="a JSON file for the figures")
    return flags


def setting_of(flags: argparse.Namespace) -> tuple[torch.device, BertConfig, np.ndarray]:
    """Device, model sizes and sequence lengths that the flags stand for."""
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    if min(flags.batch_size, flags.repeats, flags.num_layers or 1) < 1:
        raise UserError("--batch_size, --repeats and --num_layers must be at least 1")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    config = BERT_LARGE
    if flags.bert_config_path:
        config = BertConfig.load(flags.bert_config_path)
    if flags.num_layers:
        config = replace(config, num_hidden_layers=flags.num_layers)
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
    rate = matrix_rate(device, dtype)
    flops = step_flops(lengths, num_masked, config)
    figures = {}
    for name, times in alternate(candidates, device, repeats).items():
        spread = record.spread(times)
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
    """A line a candidate; ratios are to `baseline`, by medians of the same run."""
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
    flags_parser = parser("python -m bert_pretraining bench step")
    flags_parser.add_argument(
        "--kernels", nargs="+", choices=("auto", *PROVIDERS), default=["reference", "auto"]
    )
    flags_parser.add_argument("--compile", action="store_true", help="also compiled, auto kernels")
    flags_parser.add_argument("--graph", action="store_true", help="also as a CUDA graph (GPU)")
    flags = flags_parser.parse(arguments)
    device, config, lengths = setting_of(flags)
    if flags.graph and device.type != "cuda":
        raise UserError("--graph needs a GPU")
    batch = batch_of(lengths, config)
    results: dict[str, object] = {}
    for precision in flags.precision:
        dtype = DTYPES[precision]
        candidates = {
            f"{name} {precision}": our_step(config, batch, device, dtype, name)
            for name in flags.kernels
        }
        if flags.compile:
            candidates[f"compiled {precision}"] = our_step(
                config, batch, device, dtype, compiled=True
            )
        if flags.graph:
            candidates[f"compiled, graph {precision}"] = our_step(
                config, batch, device, dtype, compiled=True, graph=True
            )
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
