"""What a kernel provider declares: its operators, and whether they run on a device.

A provider is one module that ends with `PROVIDER = Provider(...)`; `table.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

OPERATORS = (
    "attention",
    "bias_gelu",
    "bias_dropout_residual_layer_norm",
    "embedding_layer_norm_dropout",
    "masked_cross_entropy",
)


@dataclass(frozen=True)
class Target:
    """What the operators run on: a device, the dtype of activations, the attention's head size."""

    device: torch.device
    dtype: torch.dtype
    head_size: int


class Implementation(NamedTuple):
    """An operator that runs on a target. description: the provider's name, and a reason if any."""

    function: Callable
    description: str


@dataclass(frozen=True)
class Unavailable:
    """The provider cannot run on a target. reason: why. fix: what the user can do, if anything."""

    reason: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}" if self.fix else self.reason


@dataclass(frozen=True)
class NotInstalled(Unavailable):
    """The package that the provider is made of is not there."""


@dataclass(frozen=True)
class Provider:
    """One implementation of some or all operators.

    name: what `--kernels` calls it.
    operators: those of OPERATORS that it has kernels for, on any device.
    find: operator, target -> its implementation, or why it cannot run there. Called with
        declared operators only. The function has the signature of its namesake in
        `reference.py`.
    unavailable: target -> why none of its operators can run there, or None. Imports nothing
        that may be missing.
    """

    name: str
    operators: tuple[str, ...]
    find: Callable[[str, Target], Implementation | Unavailable]
    unavailable: Callable[[Target], Unavailable | None] = lambda _: None


def find_in(name: str, functions: dict[str, Callable]) -> Callable[[str, Target], Implementation]:
    """A `Provider.find` for functions that run on every target; functions: a module's globals."""
    return lambda operator, _: Implementation(functions[operator], name)
