"""Time the step on a CPU: `torch` and `reference` operators, padded and looped attention.

    PYTHONPATH=base OMP_NUM_THREADS=2 python benchmarks/step_speed.py --output results/DATE_mini

The candidates take turns, so that a noisy machine disturbs all alike. Compare their ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bert_pretraining.bench import record
from bert_pretraining.bench.timing import alternate
from bert_pretraining.bench.workload import batch_of
from bert_pretraining.kernels import cpu_attention, select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.optim import OptimizerSettings, create_optimizer

REPEATS = 9
CPU = torch.device("cpu")
MODELS = {
    # name: (model sizes, sequence lengths of a batch)
    "mini, 64 sequences of 32 to 64": (
        BertConfig(238, 64, 2, 2, 256, 64, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
        np.random.RandomState(0).randint(32, 65, 64),
    ),
    "2 layers of BERT-large, 8 sequences of 30 to 512": (
        BertConfig(30522, 1024, 2, 16, 4096, 512),
        np.random.RandomState(0).randint(30, 513, 8),
    ),
}


def step_of(provider: str, config: BertConfig, lengths: np.ndarray) -> Callable[[], None]:
    """A whole training step: forward, backward and LAMB."""
    kernels = select(provider, CPU, torch.float32)
    model = BertForPreTraining(config, kernels, seed=1)
    optimizer = create_optimizer("auto", model.named_parameters(), OptimizerSettings())
    batch = batch_of(lengths, config)

    def step() -> None:
        optimizer.zero_grad()
        mean_loss(model(batch), batch).backward()
        optimizer.step(1e-4)

    return step


def attention_of(attention: Callable, length: int, heads: int, size: int) -> Callable[[], None]:
    """Forward and backward of 2,048 tokens in sequences of half to full length."""
    lengths = np.random.RandomState(0).randint(length // 2, length + 1, 3 * 2048 // length + 1)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), 2048) + 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, heads, size, requires_grad=True)

    def call() -> None:
        attention(qkv, cu_seqlens, int(lengths.max()), 0.0).sum().backward()
        qkv.grad = None

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    figures: dict[str, object] = {"threads": torch.get_num_threads(), "repeats": REPEATS}
    steps = {}
    for name, (config, lengths) in MODELS.items():
        providers = {key: step_of(key, config, lengths) for key in ("reference", "torch")}
        spreads = {
            key: times.figures() for key, times in alternate(providers, CPU, REPEATS).items()
        }
        ratio = spreads["reference"]["median"] / spreads["torch"]["median"]
        speed = len(lengths) / spreads["torch"]["median"]
        tokens = int(lengths.sum()) / spreads["torch"]["median"]
        steps[name] = {"seconds": spreads, "reference over torch": ratio, "sequences/s": speed}
        print(f"{name}: {speed:.1f} sequences/s, {tokens:.0f} tokens/s; {ratio:.2f}x reference")
    crossover = {}
    for length in (16, 32, 64, 128, 256, 512):
        for heads, size in ((2, 32), (16, 64)):
            calls = {
                name: attention_of(getattr(cpu_attention, name), length, heads, size)
                for name in ("looped_attention", "padded_attention")
            }
            spreads = {
                key: times.figures() for key, times in alternate(calls, CPU, REPEATS).items()
            }
            ratio = spreads["looped_attention"]["median"] / spreads["padded_attention"]["median"]
            crossover[f"length {length}, {heads} heads of {size}"] = {
                "seconds": spreads,
                "looped over padded": ratio,
            }
            print(f"attention, up to {length} tokens, {heads} heads of {size}: looped takes "
                  f"{ratio:.2f}x padded")  # fmt: skip
    record.write(
        arguments.output / "step_speed.json", {**figures, "step": steps, "attention": crossover}
    )


if __name__ == "__main__":
    main()
