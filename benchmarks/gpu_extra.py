"""Measure on a GPU, besides `bench`, how the time of the step could become shorter.

    PYTHONPATH=base python benchmarks/gpu_extra.py --output FILE [--device cpu --num_layers 1]

The parts, all in bf16 unless stated:

    proof      every provider's operators at the run's sizes against float64; fails if one is wrong
    attention  with and without dropout: PyTorch's flash and memory-efficient attention, the Triton
               kernels with several block sizes
    operators  the other fused operators: compiled by PyTorch, and those of the providers
    tf32       the step in fp32, its products in fp32 and in TF32
    fp8        matrix products in fp8 beside bf16, forward and both gradients
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.bench import record
from bert_pretraining.bench import step as bench
from bert_pretraining.bench.kernels import differentiate, inputs_of
from bert_pretraining.bench.timing import Stopwatch, Times, announce
from bert_pretraining.bench.workload import batch_of
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import (
    DTYPES,
    Target,
    select,
    triton_attention,
    triton_attention_tilings,
    unavailable,
)
from bert_pretraining.kernels.cuda_attention import efficient_attention, flash_attention
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.kernels.triton_attention_tilings import Tiling, Tilings
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime import device as devices
from bert_pretraining.training.kernel_choice import choose_kernels

PARTS = ("proof", "attention", "operators", "tf32", "fp8")
WARM_UP = 3
TILINGS = [  # block of queries, block of keys, warps, stages
    Tiling(*sizes)
    for sizes in ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2),
                  (128, 128, 8, 2))
]  # fmt: skip
Found = dict[str, dict]


class Case:
    """What every part works on. keep: called with the figures of the part so far."""

    def __init__(
        self,
        flags: argparse.Namespace,
        device: torch.device,
        config: BertConfig,
        batch: PackedBatch,
        keep: Callable[[Found], None],
    ) -> None:
        self.device, self.config, self.batch = device, config, batch
        self.dtype = torch.bfloat16
        self.repeats = flags.repeats
        self.keep = keep

    def measure(
        self,
        candidates: dict[str, Callable[[], object]],
        found: Found | None = None,
        operations: float = 0.0,
    ) -> Found:
        """The spread of seconds by name; prints milliseconds. A candidate may fail.

        found: what other candidates of the part have given. operations: of a call, in floating
        point, to tell a rate.
        """
        found = {} if found is None else found
        for name, call in candidates.items():
            announce(name)
            try:
                found[name] = self._time(call).figures()
                line = f"{1e3 * found[name]['median']:.3f} ms (n {found[name]['n']})"
                if "host" in found[name]:
                    line += f" ({found[name]['method']})"
                if operations:
                    found[name]["flop_per_second"] = operations / found[name]["median"]
                    line += f", {found[name]['flop_per_second'] / 1e12:.0f} TFLOP/s"
            except Exception as error:  # compilers and drivers raise errors of many kinds
                reason = str(error).strip().splitlines() or [""]
                found[name] = {"failed": f"{type(error).__name__}: {reason[0]}"}
                line = found[name]["failed"]
            print(f"  {name:<52} {line}", flush=True)
            self.keep(found)
        return found

    def _time(self, call: Callable[[], object]) -> Times:
        for _ in range(WARM_UP):
            call()
        watch = Stopwatch(call, self.device, capture=True)
        for _ in range(self.repeats):
            watch.repeat()
        return watch.times


def proof(case: Case) -> Found:
    """Which kernels prove right, and which was taken why; "failed" names those that are wrong."""
    found: Found = {}
    for precision in ("bf16", "fp16", "fp32"):
        said: list[str] = []
        config = Config(
            precision=precision, train_batch_size=case.batch.num_sequences, prove_kernels="on"
        )
        choose_kernels(config, case.config, DTYPES[precision], case.device, said.append)
        print(*(f"  {precision}: {line}" for line in said), sep="\n", flush=True)
        found[precision] = {"said": said}
        faults = [line for line in said if line.startswith("Notice: ")]
        if faults:
            found[precision]["failed"] = "; ".join(faults)
        case.keep(found)
    return found


def attention(case: Case) -> Found:
    found: Found = {}
    for dropout in (0.1, 0.0):
        sizes = replace(case.config, attention_probs_dropout_prob=dropout)
        given, call = inputs_of(sizes, case.batch, case.device, case.dtype)["attention"]
        functions: dict[str, Callable] = {}
        if devices.is_cuda(case.device):
            functions = {"flash": flash_attention, "memory-efficient": efficient_attention}
        else:
            functions = {
                "torch": select("torch", case.device, case.dtype, sizes.head_size).attention
            }
        target = Target(case.device, case.dtype, sizes.head_size)
        if not unavailable("triton", "attention", target):
            triton = select("triton", case.device, case.dtype, sizes.head_size).attention
            for one in TILINGS if dropout else TILINGS[:1]:
                functions[f"triton {'x'.join(map(str, one))}"] = partial(_tiled, one, triton)
        candidates = {
            f"{name}, dropout {dropout}": partial(differentiate, function, given, call)
            for name, function in functions.items()
        }
        case.measure(candidates, found)
    return found


def _tiled(tiling: Tiling, function: Callable, *arguments: object) -> Tensor:
    """The Triton kernels with these block sizes. Backward must follow before another tiling."""
    problem = triton_attention.problem_of(arguments[0], arguments[2])
    triton_attention_tilings.use(problem, Tilings(tiling, tiling, tiling))
    return function(*arguments)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`masked_cross_entropy` without boolean indices, at which a compiled program would end."""
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return loss, ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()


def operators(case: Case) -> Found:
    found: Found = {}
    target = Target(case.device, case.dtype, case.config.head_size)
    for operator, (given, call) in inputs_of(
        case.config, case.batch, case.device, case.dtype
    ).items():
        if operator == "attention":
            continue
        functions = {
            name: getattr(select(name, case.device, case.dtype, case.config.head_size), operator)
            for name in ("torch", "triton")
            if not unavailable(name, operator, target)
        }
        plain = getattr(select("reference", case.device, case.dtype), operator)
        if operator == "masked_cross_entropy":
            plain = cross_entropy
        functions["compiled"] = torch.compile(plain, dynamic=False)
        candidates = {
            f"{operator}, {name}": partial(differentiate, function, given, call)
            for name, function in functions.items()
        }
        case.measure(candidates, found)
    return found


def tf32(case: Case) -> Found:
    step = bench.OurStep(case.config, case.batch, case.device, torch.float32)

    def run(precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        step()

    names = {"highest": "products in fp32", "high": "products in TF32"}
    found = case.measure(
        {f"step in fp32, {what}": partial(run, name) for name, what in names.items()}
    )
    torch.set_float32_matmul_precision("highest")
    return found


def fp8_product(
    rows: int, inner: int, columns: int, device: torch.device, gradient: bool
) -> Callable[[], Tensor]:
    """A (rows, inner) times B (columns, inner)' in fp8, one scale for each; the result is bf16.

    gradient: A is in e5m2, as gradients are, not in e4m3.
    """
    kind = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    a = torch.randn(rows, inner, device=device).to(kind)
    b = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def fp8(case: Case) -> Found:
    hidden, inner = case.config.hidden_size, case.config.intermediate_size
    rows = case.batch.num_tokens // 16 * 16
    linear = {"qkv": (hidden, 3 * hidden), "attention output": (hidden, hidden),
              "intermediate": (hidden, inner), "output": (inner, hidden)}  # fmt: skip
    found: Found = {}
    for name, (inputs, outputs) in linear.items():
        products = {
            "forward": (rows, inputs, outputs),
            "gradient of x": (rows, outputs, inputs),
            "gradient of W": (outputs, rows, inputs),
        }
        for what, (m, k, n) in products.items():
            a = torch.randn(m, k, device=case.device).to(case.dtype)
            b = torch.randn(n, k, device=case.device).to(case.dtype)
            candidates = {
                f"{name}, {what}, bf16": lambda a=a, b=b: a @ b.t(),
                f"{name}, {what}, fp8": fp8_product(m, k, n, case.device, what != "forward"),
            }
            case.measure(candidates, found, operations=2.0 * m * k * n)
    return found


def main() -> int:
    parser = bench.step_parser("benchmarks/gpu_extra.py", __doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)"
    )
    flags = parser.parse(sys.argv[1:])
    if flags.precision != parser.get_default("precision"):
        raise UserError("--precision: these measurements are in bf16", "leave it out")
    device, config, lengths = bench.setting_of(flags)
    batch = batch_of(lengths, config).to(device)
    results: dict[str, Found] = {}
    described = {
        "device": devices.name(device),
        "layers": config.num_hidden_layers,
        "lengths": lengths.tolist(),
        "results": results,
    }

    def keep(part: str, found: Found) -> None:
        results[part] = found
        if flags.output:
            record.write(flags.output, described)

    for part in flags.parts:
        if part == "fp8" and (devices.capability(device) or (0, 0)) < (8, 9):
            print("fp8: this device has no such products")
            continue
        print(part, flush=True)
        case = Case(flags, device, config, batch, partial(keep, part))
        keep(part, globals()[part](case))
    wrong = any("failed" in one for found in results.values() for one in found.values())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
