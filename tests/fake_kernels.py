"""Kernel providers that are wrong in a known way, for this process or for those that it starts.

The faults: "element", "leak", "nan", "raises", "hangs", "dies", "mask", "data", "constant", "rate",
"large" (wrong for more than 100 rows only), "memory" (too little for as many), "unsteady" (refuses
where operators must be deterministic), "noise" (other bits each time), "loose" (so, where
operators need not be deterministic), "wild" (as "loose", by far more than rounding).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.kernels import OPERATORS, PROVIDERS, Target, torch_provider
from bert_pretraining.kernels.provider import Implementation, Provider

VARIABLE = "TEST_FAKE_KERNELS"  # NAME=OPERATOR:FAULT,OPERATOR:FAULT
FIRST_GRADIENT = {"embedding_layer_norm_dropout": 3}  # the arguments before it are ids


class Spoil(torch.autograd.Function):
    """The identity; its gradient is wrong in one element."""

    @staticmethod
    def forward(ctx, x: Tensor, fault: str) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        wrong = gradient.clone()
        flat = wrong.view(-1)
        if ctx.fault == "leak":
            flat[flat.abs().argmin()] += 1e-3
        elif ctx.fault == "nan":
            flat[3] = float("nan")
        else:  # an element of usual size has the wrong sign
            largest_first = flat.abs().argsort(descending=True)
            flat[largest_first[int((flat != 0).sum()) // 3]] *= -1.0
        return wrong, None


def spoiled(operator: str, fault: str) -> Callable:
    """PyTorch's operator with a fault."""
    right = (
        getattr(torch_provider, operator, None)
        or torch_provider.attention_for(torch.device("cpu"), torch.float32, 16)[0]
    )
    place = FIRST_GRADIENT.get(operator, 0)

    def wrong(*arguments: object) -> object:
        rows = arguments[0].shape[0]
        if fault == "raises":
            raise RuntimeError("no kernel image for this device\nand more lines")
        deterministic = torch.are_deterministic_algorithms_enabled()
        if fault == "unsteady" and deterministic:
            raise RuntimeError("no deterministic implementation")
        if fault == "memory" and rows > 100:
            raise torch.cuda.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
        if fault == "noise" or (fault in ("loose", "wild") and not deterministic):
            # It changes neither the inputs of other operators nor the generators.
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
            output = right(*arguments)
            size = 0.1 if fault == "wild" else 1e-5
            return output * (1.0 + size * torch.rand(output.shape, generator=generator))
        if fault == "hangs":
            time.sleep(3600)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "mask":  # the value of one call, the gradient of another
            seen, used = right(*arguments), right(*arguments)
            return used + (seen - used).detach()
        if fault == "data":
            torch.manual_seed(int(1000 * sum(part.abs().sum() for part in floats(arguments))))
        if fault == "constant":
            torch.manual_seed(1)
        if fault == "rate":
            return right(*arguments[:-1], arguments[-1] and 0.5)
        arguments = list(arguments)
        if fault in ("element", "leak", "nan") or (fault == "large" and rows > 100):
            arguments[place] = Spoil.apply(arguments[place], fault)
        return right(*arguments)

    return wrong


def floats(arguments: tuple) -> list[Tensor]:
    return [part for part in arguments if isinstance(part, Tensor) and part.is_floating_point()]


def provider(name: str, faults: dict[str, str]) -> Provider:
    """A provider of all operators. faults: operator -> fault; the others are right."""

    def find(operator: str, target: Target) -> Implementation:
        if operator in faults:
            return Implementation(spoiled(operator, faults[operator]), name)
        return torch_provider.find(operator, target)._replace(description=name)

    return Provider(name, OPERATORS, find)


def install() -> None:
    """Add the provider that the environment names, in a process that a test has started."""
    name, _, faults = os.environ[VARIABLE].partition("=")
    pairs = (pair.split(":") for pair in faults.split(",") if pair)
    PROVIDERS[name] = provider(name, dict(pairs))


def environment(here: Path, name: str, faults: dict[str, str], base: Path) -> dict[str, str]:
    """Variables with which a Python process has the provider: each reads sitecustomize first."""
    (here / "sitecustomize.py").write_text("import fake_kernels\nfake_kernels.install()\n")
    return {
        VARIABLE: f"{name}={','.join(':'.join(pair) for pair in faults.items())}",
        "PYTHONPATH": os.pathsep.join([str(here), str(Path(__file__).parent), str(base)]),
    }
