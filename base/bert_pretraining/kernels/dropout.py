"""Dropout on a CPU, where drawing the random numbers is most of the work.

PyTorch's own dropout draws a 64-bit random number per element. Here one such number serves four
elements, 16 bits each (measured: docs/LOG.md, 2026-11-23). The numbers come from PyTorch's
generator, so that `torch.manual_seed` or a restored generator state reproduces them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

GRAIN = 65536  # 16 bits per element: probabilities are rounded to multiples of 1 / GRAIN


def keep_mask(shape: tuple[int, ...], probability: float) -> Tensor:
    """A random mask of 1 and, with `probability`, 0. The probability must be below 1.

    uint8: PyTorch multiplies by it faster than by booleans (docs/LOG.md, 2026-11-26).
    """
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    return (bits >= round(probability * GRAIN) - GRAIN // 2).view(torch.uint8)


def keep_scale(probability: float) -> float:
    """1 / (the probability that `keep_mask` keeps an element)."""
    return GRAIN / (GRAIN - round(probability * GRAIN))


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability`, and scale the others to preserve the mean."""
    if probability == 0.0:
        return x
    if x.device.type != "cpu":
        # No `training=probability > 0`: under torch.compile with dynamic shapes that is a symbol,
        # which F.dropout refuses.
        return F.dropout(x, probability)
    return _Dropout.apply(x, keep_mask(tuple(x.shape), probability), keep_scale(probability))


def dropout_add(x: Tensor, bias: Tensor, residual: Tensor, probability: float) -> Tensor:
    """residual + dropout(x + bias). x, residual: (T, C); bias: (C,)."""
    if probability == 0.0:
        return residual + (x + bias)
    if x.device.type != "cpu":
        return residual + F.dropout(x + bias, probability)
    mask = keep_mask(tuple(x.shape), probability)
    return _DropoutAdd.apply(x, bias, residual, mask, keep_scale(probability))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None, None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, bias: Tensor, residual: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x + bias).mul_(mask).mul_(scale).add_(residual)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        x_gradient = (gradient * mask).mul_(ctx.scale)
        return x_gradient, x_gradient.sum(0), gradient, None, None
