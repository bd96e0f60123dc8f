"""What a kernel provider declares: its operators, and whether they run on a device.

A provider is one module that ends with `PROVIDER = Provider(...)`; `table.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bert_pretraining.errors import Unavailable
from bert_pretraining.kernels.pairs import Pair

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
    """An operator's function for a target. description: the provider's name, and why if known.

    pair: the same operator without autograd, if the provider has it; see `pairs.py`.
    """

    function: Callable
    description: str
    pair: Pair | None = None


@dataclass(frozen=True)
class Provider:
    """One implementation of some or all operators.

    name: its value for `--kernels`.
    operators: those of OPERATORS for which it has kernels, on any device.
    find: (operator, target) -> the implementation, or why it cannot run there. It is called with
        declared operators only, and only where `unavailable` has returned None. The function has
        the signature of the function of the same name in `reference.py`.
    unavailable: target -> why none of its operators can run there, or None. It must not import
        packages that may be missing.
    """

    name: str
    operators: tuple[str, ...]
    find: Callable[[str, Target], Implementation | Unavailable]
    unavailable: Callable[[Target], Unavailable | None] = lambda _: None


def find_in(name: str, functions: dict[str, Callable]) -> Callable[[str, Target], Implementation]:
    """A `Provider.find` for functions that run on every target. functions: a module's globals."""
    return lambda operator, _: Implementation(functions[operator], name)
