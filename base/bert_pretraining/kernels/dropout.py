"""Dropout on a CPU, where drawing the random numbers is most of the work.

PyTorch's own draws a 64-bit number an element; here one gives four elements' masks of 16
bits each (measured: docs/LOG.md, 2026-11-23). The numbers come from PyTorch's generator,
so that `torch.manual_seed` and a saved generator state decide them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

GRAIN = 65536  # 16 bits an element: probabilities are rounded to 1 / GRAIN


def keep_mask(shape: tuple[int, ...], probability: float) -> Tensor:
    """Booleans that are False with `probability`, which is below 1."""
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    return bits >= round(probability * GRAIN) - GRAIN // 2


def keep_scale(probability: float) -> float:
    """1 / the probability with which `keep_mask` keeps."""
    return GRAIN / (GRAIN - round(probability * GRAIN))


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zeroes an element with `probability`; the others are scaled to keep the mean."""
    if probability == 0.0 or x.device.type != "cpu":
        return F.dropout(x, probability, training=probability > 0)
    return _Dropout.apply(x, keep_mask(tuple(x.shape), probability), keep_scale(probability))


def dropout_add(x: Tensor, bias: Tensor, residual: Tensor, probability: float) -> Tensor:
    """residual + dropout(x + bias). x, residual: (T, C); bias: (C,)."""
    if probability == 0.0 or x.device.type != "cpu":
        return residual + F.dropout(x + bias, probability, training=probability > 0)
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
