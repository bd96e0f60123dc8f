"""`bench optimizer`: one LAMB update of all parameters, implementations in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bert_pretraining.bench import record
from bert_pretraining.bench.workload import BERT_LARGE, alternate, peak_memory, timed
from bert_pretraining.config import FlagParser
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import OPTIMIZERS, LambSettings

# Numbers of 4 bytes that an update must at least move a parameter: gradient, weight and both
# moments read, weight and moments written.
MOVED = 7


def copy_rate(device: torch.device) -> float:
    """Bytes a second that copying moves here, read and written; the best of 7."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2.0 * source.numel() * 4 / seconds


def main(arguments: list[str]) -> int:
    """Seconds of an update in float32, and their relation to copying as many bytes."""
    flags_parser = FlagParser(
        prog="python -m bert_pretraining bench optimizer", allow_abbrev=False, description=__doc__
    )
    flags_parser.add_argument("--device", choices=("cpu", "cuda"))
    flags_parser.add_argument("--bert_config_path", type=Path, help="by default BERT-large")
    flags_parser.add_argument("--num_layers", type=int, help="encoder layers, if not all")
    flags_parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=None)
    flags_parser.add_argument("--repeats", type=int, default=5)
    flags_parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    flags = flags_parser.parse(arguments)
    if min(flags.repeats, flags.num_layers or 1) < 1:
        raise UserError("--repeats and --num_layers must be at least 1")
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    config = BertConfig.load(flags.bert_config_path) if flags.bert_config_path else BERT_LARGE
    if flags.num_layers:
        config = replace(config, num_hidden_layers=flags.num_layers)
    kernels = select("reference", torch.device("cpu"), torch.float32)
    model: nn.Module = BertForPreTraining(config, kernels, seed=1).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    # One set of weights and gradients for all; what they hold does not change the work.
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    candidates, memory = {}, {}
    # The pieces of `chunked` are for a CPU's cache; on a GPU it would only wait.
    default = [name for name in OPTIMIZERS if device.type == "cpu" or name != "chunked"]
    for name in flags.optimizers or default:
        optimizer = OPTIMIZERS[name](model.named_parameters(), LambSettings())

        def update(optimizer: object = optimizer) -> None:
            assert optimizer.step(1e-4)

        memory[name] = peak_memory(update, device)
        candidates[name] = update
    rate = copy_rate(device)
    floor = MOVED * 4 * count / rate
    times = alternate(candidates, device, flags.repeats)
    spreads = {name: record.spread(seconds) for name, seconds in times.items()}
    first = next(iter(spreads))
    print(
        f"{count / 1e6:.1f} M parameters; copying {rate / 1e9:.1f} GB/s, so at least {floor:.3f} s"
    )
    for name, spread in spreads.items():
        print(
            f"{name:<10} {spread['median']:>8.3f} s ({spread['min']:.3f} to {spread['max']:.3f}, "
            f"n {spread['n']}); {spreads[first]['median'] / spread['median']:.2f} times as fast as "
            f"{first}; {spread['median'] / floor:.2f} times the floor; {memory[name]:.0f} MiB more"
        )
    if flags.output:
        described = {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "parameters": count,
            "copy_bytes_per_second": rate,
            "floor_seconds": floor,
            "seconds": spreads,
            "peak_memory_mib": memory,
        }
        record.write(flags.output, described)
    return 0
