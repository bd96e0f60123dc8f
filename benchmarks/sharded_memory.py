"""Compare `distributed_lamb` with LAMB on every rank: memory of a rank, seconds of an update.

    PYTHONPATH=base python benchmarks/sharded_memory.py --ranks 1 2 4 --num_layers 12 \\
        --output results/DATE_optimizer/sharded_memory.json

This starts gloo ranks on this machine with the parameter shapes of BERT-large, and gives each
parameter a gradient in place of a backward pass. A rank allocates nothing else, so that its memory
grows only by weights, gradients, optimizer state and what an update needs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bert_pretraining.bench import record
from bert_pretraining.bench.optimizer import shapes_of
from bert_pretraining.bench.timing import timed
from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.kernels import DTYPES
from bert_pretraining.optim import OptimizerSettings, create_optimizer
from bert_pretraining.runtime import process_group

UPDATES = 4


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def run_rank(sharing: str, num_layers: int, precision: str) -> None:
    """Measure on one rank; rank 0 prints the figures of all."""
    ranks = process_group.start("cpu", "gloo")
    shapes = shapes_of(replace(BERT_LARGE, num_hidden_layers=num_layers))
    dtype = DTYPES[precision]
    before = status_mib("VmRSS")
    named = [
        (name, nn.Parameter(torch.full(shape, 0.02, dtype=dtype))) for name, shape in shapes.items()
    ]
    alone = "alone" if ranks.world_size == 1 else sharing
    optimizer = create_optimizer("auto", named, OptimizerSettings(), sharing=alone)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak in /proc/self/status

    def update() -> None:
        optimizer.zero_grad()
        for _, parameter in named:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.fill_(1e-3)
        if optimizer.reduces_gradients:
            optimizer.finish_reduction(None)
        elif ranks.world_size > 1:
            for _, parameter in named:
                dist.all_reduce(parameter.grad.mul_(1.0 / ranks.world_size))
        assert optimizer.step(1e-6)

    seconds = [timed(update, ranks.device) for _ in range(1 + UPDATES)][1:]
    ctypes.CDLL(None).malloc_trim(0)
    held, peak = status_mib("VmRSS") - before, status_mib("VmHWM") - before
    found = process_group.gather((held, peak))
    if ranks.is_main:
        figures = {
            "parameters": sum(shape.numel() for shape in shapes.values()),
            "held_mib": [round(held) for held, _ in found],
            "peak_mib": [round(peak) for _, peak in found],
            "seconds": record.spread(seconds),
        }
        print(json.dumps(figures), flush=True)
    process_group.stop()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run_rank", choices=("replicated", "sharded"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run_rank:
        run_rank(flags.run_rank, flags.num_layers, flags.precision)
        return
    found = {}
    for ranks in flags.ranks:
        for sharing in ("replicated", "sharded") if ranks > 1 else ("replicated",):
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", str(ranks), __file__, "--run_rank", sharing,
                 "--num_layers", str(flags.num_layers), "--precision", flags.precision],
                stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            figures = json.loads(done.stdout)
            found[f"{ranks} ranks, {sharing}"] = figures
            print(
                f"{ranks} ranks, {sharing}: holds {max(figures['held_mib'])} MiB a rank, at most "
                f"{max(figures['peak_mib'])}; {figures['seconds']['median']:.2f} s an update"
            )
    if flags.output:
        record.write(flags.output, {"precision": flags.precision, "runs": found})


if __name__ == "__main__":
    main()
