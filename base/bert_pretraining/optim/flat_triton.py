"""The passes of flat LAMB in Triton, one program per block; nothing waits for the GPU.

u is not stored between the passes but recomputed from m, v and p, which moves as many bytes as
storing it. If the norm of the gradients is not finite, m, v and p are not written.

Bytes moved per parameter: gradient 2 x 2, first stage 12 read and 8 written, second stage 12 read
and 4 written, rounding 2: 42 with 16-bit gradients, 44 in float32.

Import this module lazily, because it imports Triton if that is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from bert_pretraining.errors import NotInstalled, Unavailable
from bert_pretraining.optim import flat
from bert_pretraining.optim.flat import Shard, Step
from bert_pretraining.runtime import device as devices

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def unavailable(device: torch.device) -> Unavailable | None:
    """Why these kernels cannot run on a device, or None if they can."""
    if triton is None:
        return NotInstalled("the package 'triton' is not installed", "pip install triton")
    if not devices.is_cuda(device) and os.environ.get("TRITON_INTERPRET") != "1":
        return Unavailable(f"Triton's kernels need a GPU, not device {device.type}")
    return None


def _kernel(function: Callable) -> Callable:
    """`triton.jit` if Triton is installed, else the function as it is."""
    return function if triton is None else triton.jit(function)


@_kernel
def square_sums(gradient, sums, BLOCK: tl.constexpr):
    """sums[b] = sum of gradient^2 over block b."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + places).to(tl.float32)
    tl.store(sums + block, tl.sum(g * g, axis=0))


@_kernel
def adam_update(m, v, p, first_factor, second_factor, epsilon, decay):
    """u of the formulas; the factors are 1 / (1 - beta^t)."""
    return m * first_factor / (tl.sqrt(v * second_factor) + epsilon) + decay * p


@_kernel
def first_stage(
    gradient, master, first, second, decay_of_block, scalars, finite, sums, blocks,
    beta_1, gain_1, beta_2, gain_2, epsilon, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update m and v; sums[b] = sum of p^2, sums[blocks + b] = sum of u^2 over block b."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scalars)
    first_factor, second_factor = tl.load(scalars + 1), tl.load(scalars + 2)
    # The mask is a comparison, because Triton 3.9's interpreter accepts no other mask.
    keep = tl.arange(0, BLOCK) < tl.where(tl.load(finite) != 0, BLOCK, 0)
    g = tl.load(gradient + places).to(tl.float32) * factor
    p = tl.load(master + places)
    m = beta_1 * tl.load(first + places) + gain_1 * g
    v = beta_2 * tl.load(second + places) + gain_2 * g * g
    u = adam_update(m, v, p, first_factor, second_factor, epsilon, tl.load(decay_of_block + block))
    tl.store(first + places, m, mask=keep)
    tl.store(second + places, v, mask=keep)
    tl.store(sums + block, tl.sum(p * p, axis=0))
    tl.store(sums + blocks + block, tl.sum(u * u, axis=0))


@_kernel
def second_stage(
    master, rounded, first, second, rates, decay_of_block, scalars, finite, epsilon,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- p - rate * u, also rounded to the parameters' dtype."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first_factor, second_factor = tl.load(scalars + 1), tl.load(scalars + 2)
    # The mask is a comparison, because Triton 3.9's interpreter accepts no other mask.
    keep = tl.arange(0, BLOCK) < tl.where(tl.load(finite) != 0, BLOCK, 0)
    p = tl.load(master + places)
    m, v = tl.load(first + places), tl.load(second + places)
    u = adam_update(m, v, p, first_factor, second_factor, epsilon, tl.load(decay_of_block + block))
    p -= tl.load(rates + block) * u
    tl.store(master + places, p, mask=keep)
    if ROUND:
        tl.store(rounded + places, p.to(rounded.dtype.element_ty), mask=keep)


class TritonKernels:
    """For float32, bfloat16 or float16 parameters, with float32 masters. See `FlatKernels`."""

    def square_sums(self, shard: Shard, out: Tensor) -> None:
        """The sum of squares of the gradient in each block. See `FlatKernels`."""
        square_sums[(len(shard.decay_of_block),)](shard.gradient, out, BLOCK=flat.BLOCK)

    def first_stage(self, shard: Shard, step: Step, out: Tensor) -> None:
        """Update m and v. See `FlatKernels`."""
        blocks, settings = len(shard.decay_of_block), step.settings
        first_stage[(blocks,)](
            shard.gradient, shard.master, shard.first, shard.second, shard.decay_of_block,
            _scalars(step), step.finite.to(torch.int32), out, blocks,
            settings.beta_1, 1.0 - settings.beta_1, settings.beta_2, 1.0 - settings.beta_2,
            settings.epsilon, BLOCK=flat.BLOCK,
        )  # fmt: skip

    def second_stage(self, shard: Shard, step: Step, rates: Tensor) -> None:
        """Update p and round it. See `FlatKernels`."""
        rounded = shard.master if shard.rounded is None else shard.rounded
        second_stage[(len(shard.decay_of_block),)](
            shard.master, rounded, shard.first, shard.second, rates, shard.decay_of_block,
            _scalars(step), step.finite.to(torch.int32), step.settings.epsilon,
            ROUND=shard.rounded is not None, BLOCK=flat.BLOCK,
        )  # fmt: skip


def _scalars(step: Step) -> Tensor:
    """(3,) float32, read by the kernels: gradient factor, both inverse bias corrections."""
    # Computed in float64: in float32, 1 - 0.999 has only five correct digits.
    settings, count = step.settings, step.updates.double()
    first, second = 1.0 - settings.beta_1**count, 1.0 - settings.beta_2**count
    return torch.stack([step.factor.double(), 1.0 / first, 1.0 / second]).float()
