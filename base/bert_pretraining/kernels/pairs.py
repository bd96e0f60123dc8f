"""Operators of an encoder layer as two plain functions, forward and backward, without autograd.

Autograd's records of small operators cost the host more time than a GPU needs for their work. The
layer of `model/fused_layer.py` is one record, and calls these functions by itself. A backward
function adds the gradients of parameters to tensors that the caller gives, so that they are
written where the optimizer reads them. Shapes and formulas: see `reference.py`.

Dropout masks follow from `seed`, (2,) int32 on the device, or None where nothing is dropped. An
operator that draws its masks by itself ignores it and keeps what it needs in `saved`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Saved = tuple[Tensor, ...]


class AttentionForward(Protocol):
    def __call__(
        self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """The context, (T, heads, D), and what the backward function needs besides it."""


class AttentionBackward(Protocol):
    def __call__(
        self,
        gradient: Tensor,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: float,
        seed: Tensor | None,
        context: Tensor,
        saved: Saved,
    ) -> Tensor:
        """The gradient of qkv, (T, 3, heads, D), contiguous."""


class GeluForward(Protocol):
    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """GELU(x + bias)."""


class GeluBackward(Protocol):
    def __call__(self, gradient: Tensor, x: Tensor, bias: Tensor, bias_gradient: Tensor) -> Tensor:
        """The gradient of x. The bias's is added to bias_gradient, (C,)."""


class NormForward(Protocol):
    def __call__(
        self,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        epsilon: float,
        dropout: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Saved]:
        """LayerNorm(residual + dropout(x + bias)), and what the backward function needs."""


class NormBackward(Protocol):
    def __call__(
        self,
        gradient: Tensor,
        weight: Tensor,
        dropout: float,
        seed: Tensor | None,
        saved: Saved,
        bias_gradient: Tensor,
        weight_gradient: Tensor,
        norm_bias_gradient: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the residual, (T, C) each; they may be the same tensor.

        The gradients of bias, weight and norm_bias are added to the last three, (C,) each.
        """


class ColumnSum(Protocol):
    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Add the sum over the rows of x, (T, C), to out, (C,): the gradient of a plain bias."""


class Pair(NamedTuple):
    """One operator: its forward and its backward function.

    column_sum: of the same provider, where it has one.
    """

    forward: AttentionForward | GeluForward | NormForward
    backward: AttentionBackward | GeluBackward | NormBackward
    column_sum: ColumnSum | None = None


@dataclass(frozen=True)
class LayerPairs:
    """All that an encoder layer needs besides matrix products."""

    attention: Pair
    bias_gelu: Pair
    bias_dropout_residual_layer_norm: Pair
    column_sum: ColumnSum


def layer_pairs(pairs: Mapping[str, Pair | None]) -> LayerPairs | None:
    """The pairs of a layer's operators, from those of all operators; None if one has no pair."""
    names = ("attention", "bias_gelu", "bias_dropout_residual_layer_norm")
    chosen = {name: pairs.get(name) for name in names}
    if None in chosen.values():
        return None
    column_sum = chosen["bias_dropout_residual_layer_norm"].column_sum or plain_column_sum
    return LayerPairs(**chosen, column_sum=column_sum)


def plain_column_sum(x: Tensor, out: Tensor) -> None:
    """See `ColumnSum`."""
    out.add_(x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)))
