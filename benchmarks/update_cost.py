"""Count what one update of BERT-large costs on a GPU: launches, host time, waits, memory.

    PYTHONPATH=base python benchmarks/update_cost.py --output FILE [--ways eager graph] [--ranks 2]

The update is built as `train` builds it: forward, backward, reduction, LAMB. Each way is one of
eager, compiled, graph (a captured CUDA graph) and compiled_graph. An evaluation batch, LAMB alone
and an interval of 50 updates between two lines of the log are counted too.

On a GPU, the profiler counts, and CUDA events give the time of the device. On the pretended GPU
(see benchmarks/pretended.py) the stub libraries count. There the host's time is real, the record
says "pretended", and it has no time of the device.
"""

from __future__ import annotations

import argparse
import copy
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pretended
import torch
import torch.distributed as dist
from counting import (
    count,
    device_seconds,
    free_memory,
    host_seconds,
    host_waits,
    trace,
)

from bert_pretraining.bench import record
from bert_pretraining.bench.timing import announce
from bert_pretraining.bench.workload import BERT_LARGE, batch_of, wikipedia_lengths
from bert_pretraining.config import Config, FlagParser, Resolved
from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.data.packing import on_device
from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.kernels import DTYPES, PROVIDERS
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import Schedule
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.build import Setup, Training, build
from bert_pretraining.training.step_clock import over_ranks

WAYS = {  # name -> the settings that stand for it
    "eager": {"compile": "off", "use_cuda_graph": False},
    "compiled": {"compile": "on", "use_cuda_graph": False},
    "graph": {"compile": "off", "use_cuda_graph": True},
    "compiled_graph": {"compile": "on", "use_cuda_graph": True},
}
EVALUATED = 8  # batches, besides the first one
INTERVAL = 50  # updates between two lines of the log, as in configs/nvidia
SCHEDULE = Schedule(4e-4, 6700, 0, 0)
GIB = 2**30


# ---- what is counted


class Said(RunLog):
    """A log without outputs, which keeps what it is told in words."""

    def __init__(self, config: Config, world_size: int) -> None:
        super().__init__(Resolved(config, "", {}), 1, "GPU", world_size)  # rank 0 would write files
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def batches(flags: argparse.Namespace, device: torch.device) -> Iterator[PackedBatch]:
    """The same few batches without end, in page-locked memory, copied as the loader does."""
    lengths = wikipedia_lengths(flags.batch_size)
    random = np.random.RandomState(1)
    made = [batch_of(random.permutation(lengths), BERT_LARGE) for _ in range(4)]
    pinned = [
        replace(one, **{name: devices.pinned(t, device) for name, t in one.tensors().items()})
        for one in made
    ]

    def endless() -> Iterator[PackedBatch]:
        while True:
            yield from pinned

    return on_device(endless(), device)


def config_of(way: str, flags: argparse.Namespace, ranks: Ranks) -> Config:
    """The settings of a run of configs/nvidia, as far as an update depends on them."""
    return Config(
        precision=flags.precision,
        batching="balanced",
        train_batch_size=flags.batch_size,
        gradient_accumulation_steps=flags.accumulation,
        nproc_per_node=ranks.world_size,
        distributed_lamb=flags.distributed_lamb,
        kernels=flags.kernels,
        prove_kernels="off",
        dist_backend="gloo",
        **WAYS[way],
    )


class Run:
    """What `train` does with the parts of a run, as far as it costs the GPU or the host anything.

    training: the parts. accumulation: micro-batches an update, taken from `given`.
    """

    def __init__(
        self,
        training: Training,
        given: Iterator[PackedBatch],
        accumulation: int,
        ranks: Ranks,
        model: BertConfig,
    ) -> None:
        self.training, self._given, self._accumulation = training, given, accumulation
        self._ranks, self._model = ranks, model

    def update(self) -> None:
        """One update."""
        with self.training.clock.part("data"):
            taken = [next(self._given) for _ in range(self._accumulation)]
        self._totals = self.training.update(taken)

    def update_and_look(self) -> None:
        """One update, and what is known of earlier ones."""
        self.update()
        self._learn(self.training.update.outcomes.look)

    def read(self) -> None:
        """What became of all updates, and the log line's figures of speed; the host waits."""
        if self.training.update.outcomes.num_unread:
            self._learn(self.training.update.outcomes.read)
            clock = self.training.clock
            over_ranks(clock.take(), clock.measures, self._model, self._ranks)

    def _learn(self, learn: Callable) -> None:
        try:
            learn(0, self._totals, False)
        except (TrainingError, pretended.NoNumbers):  # the flags of the pretended GPU are not set
            if not record.is_pretended():
                raise

    def interval(self) -> None:
        """The updates between two lines of the log, and the figures of the line."""
        for _ in range(INTERVAL - 1):
            self.update_and_look()
        self.update()
        self.read()

    def optimizer_step(self) -> None:
        """LAMB alone, on the gradients that are there."""
        self.training.optimizer.scheduled_step(SCHEDULE, self.training.loss_scale)

    def evaluation(self, num_batches: int, batch_size: int) -> Callable[[], object]:
        """Evaluates so many batches, which stay on the device, as later evaluations of a run do."""
        given = [batch_of(wikipedia_lengths(batch_size), BERT_LARGE) for _ in range(num_batches)]
        ranks, total = self._ranks, num_batches * self._ranks.world_size
        numbers = range(ranks.rank, total, ranks.world_size)
        found = EvaluationSet(total, list(zip(numbers, given, strict=True))).near(ranks.device)
        # Each copy captures for the first set that it is given.
        evaluate = partial(copy.copy(self.training.evaluate), found)
        evaluate()
        return evaluate


def cost_of(way: str, flags: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    """All figures of one way, in seconds, GiB and counts an update."""
    device, config = ranks.device, config_of(way, flags, ranks)
    model = replace(BERT_LARGE, num_hidden_layers=flags.num_layers)
    log = Said(config, ranks.world_size)
    free_memory(device)
    if record.is_pretended():
        pretended.counters().reset()
    started = time.perf_counter()
    training = build(Setup(config, model, None, 1, SCHEDULE, ranks, log))
    devices.synchronize(device)
    figures: dict[str, object] = {
        "said": log.lines,
        "build_seconds": time.perf_counter() - started,
        "build_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }
    if record.is_pretended():
        counts = pretended.counters().counts().items()
        inside = sum(n for key, n in counts if key.startswith("CAPTURE:K:"))
        figures["launches_captured"] = inside  # by all graphs of the run together
    lost = [line for line in log.lines if "goes on without" in line or "graph has no" in line]
    if lost:
        raise RuntimeError("; ".join(lost))
    training.module.train()
    run = Run(training, batches(flags, device), flags.accumulation, ranks, model)
    announce(f"{way}: counting updates")
    for _ in range(3):
        run.update_and_look()
    run.read()
    torch.cuda.reset_peak_memory_stats(device)
    counted = count(run.update, device, 3)
    figures["update"] = counted.figures()
    figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    figures["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    figures["held_gib"] = torch.cuda.memory_allocated(device) / GIB
    run.read()
    figures |= host_seconds(run.update, device, flags.repeats)
    run.read()
    times = device_seconds(run.update_and_look, flags.repeats)
    if times is not None:
        figures["device_seconds"] = record.spread(times)
        rate = flags.batch_size * flags.accumulation / figures["device_seconds"]["median"]
        figures["sequences_per_second_a_gpu"] = rate
    if flags.trace and ranks.is_main:
        trace(run.update_and_look, device, flags.trace / f"{way}_{flags.batch_size}")
    figures["kernels"] = counted.kernels
    figures["evaluation"] = _evaluation_figures(run, flags.batch_size, device)
    if ranks.world_size == 1:
        figures |= _other_figures(run, flags, ranks)
    return figures


def _other_figures(run: Run, flags: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    """LAMB alone, an interval of the log."""
    device = ranks.device
    announce("counting LAMB and an interval of the log")
    figures: dict[str, object] = {}
    run.update()
    counted = count(run.optimizer_step, device, 1)
    figures["optimizer"] = counted.figures() | host_seconds(run.optimizer_step, device, 5)
    run.read()
    waits = host_waits(run.interval, device)
    figures["log_interval"] = {
        "updates": INTERVAL, "host_waits": sum(waits.values()), "waits": waits
    }  # fmt: skip
    return figures


def _evaluation_figures(
    run: Run, batch_size: int, device: torch.device
) -> dict[str, dict[str, object]]:
    """Of one batch more, and of what an evaluation costs besides its batches."""
    torch.cuda.reset_peak_memory_stats(device)
    one, many = (run.evaluation(n, batch_size) for n in (1, 1 + EVALUATED))
    prepared_peak = torch.cuda.max_memory_allocated(device) / GIB
    few, more = (count(call, device, 1).figures() for call in (one, many))
    torch.cuda.reset_peak_memory_stats(device)
    seconds = host_seconds(many, device, 5)
    keys = ("launches", "graph_launches", "host_waits")
    batch = {key: (more[key] - few[key]) / EVALUATED for key in keys}
    return {
        "batch": batch,
        "besides": {key: few[key] - batch[key] for key in keys},
        f"of_{1 + EVALUATED}_batches_with_the_last_wait": seconds,
        "first_peak_gib": prepared_peak,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.memory_reserved(device) / GIB,
    }


# ---- the program


def parser() -> FlagParser:
    made = FlagParser(prog="benchmarks/update_cost.py", allow_abbrev=False, description=__doc__)
    made.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the figures")
    made.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=["eager", "graph"])
    made.add_argument(
        "--precision", choices=(*DTYPES, "fp8"), default="bf16", help="(default: %(default)s)"
    )
    made.add_argument("--batch_size", type=int, nargs="+", default=[48], help="sequences")
    made.add_argument("--accumulation", type=int, default=1, help="micro-batches an update")
    made.add_argument("--kernels", choices=("auto", *PROVIDERS), default="auto")
    made.add_argument("--num_layers", type=int, default=24)
    made.add_argument("--repeats", type=int, default=10)
    made.add_argument("--ranks", type=int, default=1, help="more than 1: each rank has a GPU")
    made.add_argument("--distributed_lamb", action="store_true", help="LAMB's state is shared out")
    made.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="a trace of two updates, and its table"
    )
    made.add_argument("--list", action="store_true", help="print the kernels of an update")
    return made


def line(name: str, found: dict) -> str:
    """One line for people."""
    update, host, cpu = found["update"], found["host_seconds"], found["host_cpu_seconds"]
    device = found.get("device_seconds")
    return (
        f"{name:<22} {update['launches']:>6.0f} launches {update['graph_launches']:>2.0f} graphs "
        f"{update['host_waits']:>4.1f} waits  host {1e3 * host['median']:>6.2f} ms "
        f"(n {host['n']}, {1e3 * host['min']:.2f} to {1e3 * host['max']:.2f}; "
        f"computing {1e3 * cpu['median']:.2f})  "
        f"device {f'''{1e3 * device['median']:.2f} ms''' if device else 'not known'}  "
        f"peak {found['peak_gib']:.2f} GiB, reserved {found['reserved_gib']:.2f}  "
        f"built in {found['build_seconds']:.1f} s"
    )


def evaluation_line(found: dict) -> str:
    """The same of an evaluation."""
    batch, besides = found["batch"], found["besides"]
    cpu = next(one for key, one in found.items() if key.startswith("of_"))["host_cpu_seconds"]
    return (
        f"  an evaluation batch: {batch['launches']:.1f} launches {batch['graph_launches']:.1f} "
        f"graphs {batch['host_waits']:.1f} waits; besides: {besides['launches']:.0f} launches "
        f"{besides['host_waits']:.0f} waits; {1 + EVALUATED} batches: "
        f"{1e3 * cpu['median']:.2f} ms computing (n {cpu['n']}, {1e3 * cpu['min']:.2f} to "
        f"{1e3 * cpu['max']:.2f})  peak {found['peak_gib']:.2f} GiB (first "
        f"{found['first_peak_gib']:.2f}), reserved {found['reserved_gib']:.2f}"
    )


def connect(flags: argparse.Namespace) -> Ranks:
    """This process's rank; gloo, since two ranks may share one GPU."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if record.is_pretended():
        pretended.pass_checks_of_numbers()
    if world_size > 1:
        dist.init_process_group("gloo")
    index = rank if torch.cuda.device_count() >= world_size else 0
    torch.cuda.set_device(index)
    return Ranks(rank, world_size, torch.device("cuda", index))


def start_ranks(count: int) -> int:
    """Run this program once for each rank; the exit code is the first one that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "FAKE_GPUS": str(count)}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**environment, "RANK": str(n), "LOCAL_RANK": str(n)}
        )
        for n in range(count)
    ]
    return next((code for code in [one.wait() for one in started] if code), 0)


def main() -> int:
    flags = parser().parse(sys.argv[1:])
    if flags.ranks > 1 and "WORLD_SIZE" not in os.environ:
        return start_ranks(flags.ranks)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU", "run it where PyTorch sees one")
    ranks = connect(flags)
    results: dict[str, object] = {}
    failed = 0
    described = {
        "pretended": record.is_pretended(),
        "device": devices.name(ranks.device),
        "precision": flags.precision,
        "layers": flags.num_layers,
        "accumulation": flags.accumulation,
        "ranks": ranks.world_size,
        "distributed_lamb": flags.distributed_lamb,
        "results": results,
    }
    sizes = flags.batch_size
    for size in sizes:
        for way in flags.ways:
            name = f"{way}, {size} sequences"
            announce(name)
            flags.batch_size = size
            try:
                found = cost_of(way, flags, ranks)
                text = line(name, found)
                text += "\n" + evaluation_line(found["evaluation"])
            except (RuntimeError, UserError) as error:
                failed += 1
                found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                text = f"{name}: {found['failed']}"
            results[name] = found
            if ranks.is_main:
                print(text, flush=True)
                named = found.get("kernels", {}) if flags.list else {}
                for kernel, n in sorted(named.items(), key=lambda one: -one[1]):
                    print(f"  {n:>7.1f} {kernel[:150]}")
                if flags.output:
                    record.write(flags.output, described)
    process_group.stop()
    return failed


if __name__ == "__main__":
    sys.exit(main())
