"""`bench step`: the time of forward and backward of one batch, for several candidates in turn."""

from __future__ import annotations

import argparse
import math
import statistics
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
from bert_pretraining.bench.timing import Times, Turns, announce, peak_memory
from bert_pretraining.bench.workload import batch_of, wikipedia_lengths
from bert_pretraining.config import Config, FlagParser
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import DTYPES, PROVIDERS, select
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.flops import Amount, step_flops
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.matrix_rate import matrix_rate
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.words import counted
from bert_pretraining.training.static_batch import usual_budget
from bert_pretraining.training.step_choice import Trained, prepared_step


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


class OurStep:
    """This package's forward and backward of one batch, dropout included, as `train` runs them.

    Calling it adds the batch's gradients to the zeroed ones. RuntimeError if it is to be compiled
    or captured, and that fails.

    Attributes:
        prepared_mib: the most memory that compiling and capturing took; a replayed graph works in
            that memory. 0 for an eager step.
        said: what `train` would have said of the choice of the step.
    """

    def __init__(
        self,
        config: BertConfig,
        batch: PackedBatch,
        device: torch.device,
        dtype: torch.dtype,
        provider: str = "auto",
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        kernels = select(provider, device, dtype, config.head_size)
        module = BertForPreTraining(config, kernels, seed=1).to(device, dtype)
        # On a device `train` keeps the gradients where they are, and zeroes them.
        self._zero_grad = partial(module.zero_grad, set_to_none=device.type == "cpu")
        longest = config.max_position_embeddings
        usual = usual_budget(batch.num_sequences, longest)
        settings = Config(
            train_batch_size=batch.num_sequences,
            batching="balanced",
            static_tokens=0 if usual.fits(batch) else batch.num_tokens,
            compile="on" if compiled else "off",
            use_cuda_graph=graph,
            prove_kernels="off",
        )
        self.said: list[str] = []

        def say(text: str) -> None:
            self.said.append(text)
            announce(text)

        def prepare() -> None:
            trained = Trained(module, module, partial(module.zero_grad, set_to_none=False))
            try:
                self._step = prepared_step(settings, trained, longest, Ranks(0, 1, device), say)
            except UserError as error:
                raise RuntimeError(error.problem) from error

        is_prepared = compiled or graph
        self.prepared_mib = peak_memory(prepare, device) if is_prepared else prepare() or 0.0
        lost = [line for line in self.said if line.startswith("Notice: use_cuda_graph")]
        if graph and lost:
            raise RuntimeError(lost[0].removeprefix("Notice: "))
        self._weights = {
            name: torch.tensor(1.0 / batch.num_predictions(name), device=device)
            for name in module.losses
        }
        self._batch = batch.to(device)

    def __call__(self) -> None:
        self._zero_grad()
        self._step(self._batch, self._weights)


Makers = dict[str, Callable[[], Callable[[], object]]]


def compare(
    makers: Makers,
    device: torch.device,
    config: BertConfig,
    lengths: np.ndarray,
    num_masked: int,
    dtype: torch.dtype,
    repeats: int,
    keep: Callable[[dict[str, dict]], None],
) -> dict[str, dict]:
    """Name -> seconds, sequences/s, real tokens/s, FLOP/s and its share, memory; or "failed".

    makers: each makes a candidate, which is measured before the next one is made: one that fails
    or hangs takes no other figures with it. keep: called with all figures so far.
    """
    announce("measuring a large matrix product, for comparison")
    rate, _ = matrix_rate(device, dtype)
    pairs = int((lengths.astype(np.int64) ** 2).sum())
    flops = step_flops(Amount(int(lengths.sum()), pairs, num_masked), config)
    memory: dict[str, float] = {}
    said: dict[str, list[str]] = {}
    failed: dict[str, dict] = {}

    def figures_of(name: str, times: Times) -> dict:
        median = statistics.median(times.seconds)
        return {
            "seconds": times.figures(),
            "sequences_per_second": len(lengths) / median,
            "tokens_per_second": int(lengths.sum()) / median,
            "flop_per_second": flops / median,
            "share_of_matrix_rate": flops / median / rate,
            "peak_memory_mib": memory[name],
            "said": said[name],
        }

    def all_figures(times: dict[str, Times]) -> dict[str, dict]:
        return {name: figures_of(name, one) for name, one in times.items()} | failed

    turns = Turns(device, repeats, measured=lambda times: keep(all_figures(times)))
    for name, make in makers.items():
        announce(f"{name}: making a model of {counted(config.num_hidden_layers, 'layer')}")
        try:
            call = make()
            said[name] = getattr(call, "said", [])
            call()
            announce(f"{name}: measuring memory")
            memory[name] = max(peak_memory(call, device), getattr(call, "prepared_mib", 0.0))
            turns.add(name, call)
        except RuntimeError as error:  # out of memory, or what a compiler or a capture raised
            failed[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            keep(all_figures(turns.times))
    return all_figures(turns.finish())


def table(figures: dict[str, dict], baseline: str) -> str:
    """A line for each candidate; ratios are of the medians of this run, to `baseline`."""
    lines = [
        f"{'':<34} {'seq/s':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'of GEMM':>7} "
        f"{'MiB':>7} {'ratio':>6}  seconds (n, min to max)"
    ]
    base = figures[baseline].get("seconds", {}).get("median", math.nan)
    for name, values in figures.items():
        if "failed" in values:
            lines.append(f"{name:<34} failed: {values['failed']}")
            continue
        spread = values["seconds"]
        line = (
            f"{name:<34} {values['sequences_per_second']:>9.2f} "
            f"{values['tokens_per_second']:>9.0f} {values['flop_per_second'] / 1e12:>8.3f} "
            f"{values['share_of_matrix_rate']:>7.0%} {values['peak_memory_mib']:>7.0f} "
            f"{base / spread['median']:>6.2f}  {spread['median']:.4f} "
            f"({spread['n']}, {spread['min']:.4f} to {spread['max']:.4f})"
        )
        if "host" in spread:
            line += f"; host {spread['host']['median']:.4f} s ({spread['method']})"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Compare providers, and compiled or captured steps, on one machine."""
    parser = step_parser(
        f"{BENCH} step",
        "Time forward and backward of one batch, dropout included. The candidates take turns, so "
        "that a noisy machine disturbs all alike. On a GPU the seconds are those between two "
        "events of the device; 'host-bound' says that the GPU waited for the host meanwhile.",
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
        help="also captured as a CUDA graph, on a GPU; with --compile, also compiled and captured "
        "(default: no)",
    )  # fmt: skip
    flags = parser.parse(arguments)
    device, config, lengths = setting_of(flags)
    if flags.graph and devices.graphs(device) is None:
        raise UserError(
            f"--graph: a device of type {device.type} cannot capture graphs", "leave it out"
        )
    batch = batch_of(lengths, config)

    def makers_of(precision: str) -> Makers:
        ours = partial(OurStep, config, batch, device, DTYPES[precision])
        return _makers(flags, precision, ours)

    return compare_each_precision(flags, (device, config, lengths), batch.num_masked, makers_of)


def compare_each_precision(
    flags: argparse.Namespace,
    setting: tuple[torch.device, BertConfig, np.ndarray],
    num_masked: int,
    makers_of: Callable[[str], Makers],
    **described: object,
) -> int:
    """`compare` for each of the flags' precisions; prints tables, and keeps figures in the file.

    setting: what `setting_of` returns. described: further facts for the file. Returns the exit
    code: 1 if a candidate failed.
    """
    device, config, lengths = setting
    results: dict[str, dict] = {}
    described |= {
        "device": devices.name(device),
        "threads": torch.get_num_threads(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "lengths": lengths.tolist(),
        "masked": num_masked,
        "results": results,
    }

    def keep(precision: str, figures: dict[str, dict]) -> None:
        results[precision] = figures
        if flags.output:
            record.write(flags.output, described)

    for precision in flags.precision:
        figures = compare(
            makers_of(precision), device, config, lengths, num_masked, DTYPES[precision],
            flags.repeats, partial(keep, precision),
        )  # fmt: skip
        print(table(figures, next(iter(figures))), flush=True)
        keep(precision, figures)
    return 1 if any("failed" in one for found in results.values() for one in found.values()) else 0


def _makers(flags: argparse.Namespace, precision: str, make: Callable[..., OurStep]) -> Makers:
    makers: Makers = {f"{name} {precision}": partial(make, provider=name) for name in flags.kernels}
    if flags.graph:
        makers[f"graph {precision}"] = partial(make, graph=True)
    if flags.compile:
        makers[f"compiled {precision}"] = partial(make, compiled=True)
    if flags.compile and flags.graph:
        makers[f"compiled, graph {precision}"] = partial(make, compiled=True, graph=True)
    return makers
