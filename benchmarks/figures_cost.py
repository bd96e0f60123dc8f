"""What the figures of a log line cost: updates with and without them, in turns.

    python benchmarks/figures_cost.py [--layers 2] [--hidden 64] [--sequences 32] [--log_every 1]
        [--output FILE]

The figures are the parts' seconds, the counts, the peak memory and the comparison of the ranks, as
`train` takes them. The updates are whole ones: forward, backward, LAMB, on one rank and on the
device that --device names. Without the figures, nothing is measured and nothing is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bert_pretraining.bench import record
from bert_pretraining.bench.workload import batch_of, wikipedia_lengths
from bert_pretraining.kernels import select
from bert_pretraining.logs.sinks import Speed
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import LossScale, OptimizerSettings, Schedule, create_optimizer
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.gradient_reduction import NoReduction
from bert_pretraining.training.micro_step import MicroStep
from bert_pretraining.training.step_clock import StepClock, over_ranks
from bert_pretraining.training.update import Update


class NoClock(StepClock):
    """Measures nothing."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield

    def count(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Nothing is counted."""


def main() -> None:
    """Print and keep the seconds of an update with and without the figures, and their ratio."""
    flags = _flags()
    device = torch.device(flags.device)
    torch.set_num_threads(flags.threads)
    config = BertConfig(
        flags.vocabulary, flags.hidden, flags.layers, max(1, flags.hidden // 64), 4 * flags.hidden,
        512,
    )  # fmt: skip
    ranks = Ranks(0, 1, device)
    model = BertForPreTraining(config, select("auto", device, torch.float32), seed=1).to(device)
    optimizer = create_optimizer("auto", model.parameters_in_memory_order(), OptimizerSettings())
    clocks = {"with": StepClock(device), "without": NoClock(device)}
    updates = {
        name: Update(
            module=model,
            micro_step=MicroStep(model, device, None, graph=False),
            reduction=NoReduction(model),
            optimizer=optimizer,
            schedule=Schedule(1e-4, 10**6, 0),
            loss_scale=LossScale.for_precision("fp32", 0.0, device),
            normalization="rank",
            ranks=ranks,
            clock=clock,
        )
        for name, clock in clocks.items()
    }
    lengths = wikipedia_lengths(flags.sequences).clip(max=flags.longest)
    batch = batch_of(lengths, config).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(flags.repeats + 1):  # the first is a warm-up
        for name in sorted(updates, reverse=bool(number % 2)):
            started = time.perf_counter()
            for step in range(1, flags.block + 1):
                with clocks[name].part("data"):
                    taken = [batch]
                totals = updates[name](taken)
                updates[name].outcomes.read(0, totals)
                if name == "with" and step % flags.log_every == 0:
                    work = over_ranks(clocks[name].take(), True, config, ranks)
                    Speed.of(work, flags.sequences, 1.0, 1e12).named()
            devices.synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - started) / flags.block)
    ratios = [one / two for one, two in zip(seconds["with"], seconds["without"], strict=True)]
    alone = _alone(clocks["with"], batch, config, ranks)
    result = {
        "settings": {key: str(value) for key, value in vars(flags).items()},
        "device": devices.name(device),
        **{name: record.spread(times) for name, times in seconds.items()},
        "alone": alone,
        "median_of_ratios": statistics.median(ratios),
        "ratio_of_minima": min(seconds["with"]) / min(seconds["without"]),
    }
    for name in seconds:
        print(f"{name:>8} figures: {1e3 * result[name]['median']:.3f} ms an update")
    median, least = result["median_of_ratios"], result["ratio_of_minima"]
    print(f"ratio: {median:.4f} (median), {least:.4f} (of the shortest)")
    print("the calls alone: " + ", ".join(f"{k} {1e6 * v:.1f} us" for k, v in alone.items()))
    if flags.output:
        record.write(flags.output, result)


def _alone(
    clock: StepClock, batch: PackedBatch, config: BertConfig, ranks: Ranks
) -> dict[str, float]:
    """Seconds of what the figures add: to each update, and to a log line."""
    started = time.perf_counter()
    for _ in range(1000):
        for name in ("data", "forward_backward", "reduction", "optimizer"):
            with clock.part(name):
                pass
        clock.count([batch])
    update = (time.perf_counter() - started) / 1000
    started = time.perf_counter()
    for _ in range(100):
        clock.count([batch])
        Speed.of(over_ranks(clock.take(), True, config, ranks), 1, 1.0, 1e12).named()
    return {"update": update, "log line": (time.perf_counter() - started) / 100}


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    for name, default in {
        "layers": 2, "hidden": 64, "vocabulary": 1000, "sequences": 32, "longest": 64,
        "log_every": 1, "block": 20, "repeats": 40, "threads": 1,
    }.items():  # fmt: skip
        add(f"--{name}", type=int, default=default)
    add("--device", default="cpu")
    add("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
