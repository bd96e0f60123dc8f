"""The passes of flat LAMB in Triton; nothing waits for the GPU.

A step is six launches:

    square_sums      a program per block: sum of the squares of the gradient
    parameter_sums   a program per parameter: the sum over its blocks
    begin            one program: norm, clipping, bias corrections, learning rate, loss scale
    first_stage      a program per block: moments, sums of squares of weights and updates
    parameter_rates  a program per parameter: learning rate times trust ratio
    second_stage     a program per block: new weights

u is not stored between the passes but recomputed from m, v and p, which moves as many bytes as
storing it. If the norm of the gradients is not finite, m, v and p are not written.

Bytes moved per parameter: gradient 2 x 2, first stage 12 read and 8 written, second stage 12 read
and 4 written, rounding 2: 42 with 16-bit gradients, 46 with float32 ones, 44 in float32.

Sums over blocks and whatever follows from them are computed in float64: a few numbers for each
parameter. Their order is fixed, so that ranks that gather the same sums find the same numbers.

Import this module lazily, because it imports Triton if that is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.errors import NotInstalled, Unavailable
from bert_pretraining.optim import flat
from bert_pretraining.optim.flat import ParameterTable, Request, Shard
from bert_pretraining.optim.loss_scale import MINIMUM_SCALE, LossScale
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import packages

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# Sums of blocks that are added side by side: it decides the order of addition. The longest
# parameter of BERT-large has 30,528 blocks.
TILE, TILE_WARPS = 4096, 8


def unavailable(device: torch.device) -> Unavailable | None:
    """Why these kernels cannot run on a device, or None if they can."""
    if triton is None:
        return NotInstalled(
            "the package 'triton' is not installed", packages.how_to_install(["triton"])
        )
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
def sum_of_blocks(sums, first, count, TILE: tl.constexpr):
    """The sum of sums[first : first + count] in float64, in an order that only `count` decides."""
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, count, TILE):
        places = start + tl.arange(0, TILE)
        total += tl.load(sums + first + places, mask=places < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@_kernel
def parameter_sums(sums, first_blocks, blocks, out, TILE: tl.constexpr):
    """out[i] = the sum over the blocks of parameter i, in float64."""
    i = tl.program_id(0)
    total = sum_of_blocks(sums, tl.load(first_blocks + i), tl.load(blocks + i), TILE)
    tl.store(out + i, total)


@_kernel
def inverse_bias_correction(beta, updates):
    """1 / (1 - beta^updates) in float64, by squaring; in float32, 1 - 0.999 has five digits."""
    power = beta * 0.0 + 1.0
    while updates > 0:
        power = tl.where(updates % 2 == 1, power * beta, power)
        beta *= beta
        updates = updates // 2
    return 1.0 / (1.0 - power)


@_kernel
def scheduled_rate(constants, updates):
    """`Schedule.at`."""
    peak, max_steps = tl.load(constants + 3), tl.load(constants + 4)
    warmup, start = tl.load(constants + 5), tl.load(constants + 6)
    made = updates.to(tl.float64)
    since_start = made - start
    rate = peak * (1.0 - tl.minimum(made / max_steps, 1.0))
    warming = peak * tl.maximum(since_start, 0.0) / tl.maximum(warmup, 1.0)
    return tl.where((warmup > 0.0) & (since_start < warmup), warming, rate)


@_kernel
def update_loss_scale(constants, scale_ptr, good_ptr, skipped_ptr, finite, DYNAMIC: tl.constexpr):
    """`LossScale.update`."""
    scale = tl.load(scale_ptr)
    tl.store(skipped_ptr, tl.where(finite, 0, tl.load(skipped_ptr) + 1))
    if DYNAMIC:
        interval = tl.load(constants + 7)
        minimum = tl.load(constants + 8).to(tl.float32)
        good = tl.where(finite, tl.load(good_ptr) + 1, 0)
        grows = good.to(tl.float64) >= interval
        grown = tl.where(grows, scale * 2.0, scale)
        tl.store(scale_ptr, tl.where(finite, grown, tl.maximum(scale * 0.5, minimum)))
        tl.store(good_ptr, tl.where(grows, 0, good))
    else:
        tl.store(scale_ptr, tl.where(finite, scale, float("nan")))


@_kernel
def begin(
    squares, parameters, constants, given, updates_ptr, scale_ptr, good_ptr, skipped_ptr,
    norm_ptr, finite_ptr, scalars,
    SCHEDULED: tl.constexpr, DYNAMIC: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """From the sums of squares of all parameters to what the other kernels read.

    constants: float64; see `TritonKernels`. given: float64, learning rate and inverse loss scale;
    with SCHEDULED they come from the constants and the loss scale instead. scalars: float64,
    receives the factor of the gradient, both inverse bias corrections and the learning rate.
    """
    places = tl.arange(0, SIZE)
    total = tl.sum(tl.load(squares + places, mask=places < parameters, other=0.0), axis=0)
    updates = tl.load(updates_ptr)
    if SCHEDULED:
        rate = scheduled_rate(constants, updates)
        inverse_scale = 1.0 / tl.load(scale_ptr).to(tl.float64)
    else:
        rate, inverse_scale = tl.load(given), tl.load(given + 1)
    norm = tl.sqrt(total) * inverse_scale
    rounded = norm.to(tl.float32)
    finite = tl.abs(rounded) <= 3.4028234663852886e38  # false for NaN too
    updates += finite.to(tl.int64)
    tl.store(norm_ptr, rounded)
    tl.store(finite_ptr, finite.to(tl.uint8))
    tl.store(updates_ptr, updates)
    tl.store(scalars, inverse_scale / tl.maximum(norm / tl.load(constants + 2), 1.0))
    count = tl.maximum(updates, 1)  # it is 0 where the first step of all is skipped
    tl.store(scalars + 1, inverse_bias_correction(tl.load(constants), count))
    tl.store(scalars + 2, inverse_bias_correction(tl.load(constants + 1), count))
    tl.store(scalars + 3, rate)
    if SCHEDULED:
        update_loss_scale(constants, scale_ptr, good_ptr, skipped_ptr, finite, DYNAMIC)


@_kernel
def parameter_rates(
    sums, all_blocks, first_blocks, blocks, has_ratio, scalars, rates, TILE: tl.constexpr
):
    """rates[i] = learning rate times trust ratio of parameter i."""
    i = tl.program_id(0)
    first, count = tl.load(first_blocks + i), tl.load(blocks + i)
    weights = sum_of_blocks(sums, first, count, TILE)
    updates = sum_of_blocks(sums + all_blocks, first, count, TILE)
    both = (tl.load(has_ratio + i) != 0) & (weights > 0.0) & (updates > 0.0)
    ratio = tl.where(both, tl.sqrt(weights / tl.where(both, updates, 1.0)), 1.0)
    tl.store(rates + i, (ratio * tl.load(scalars + 3)).to(tl.float32))


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
    factor = tl.load(scalars).to(tl.float32)
    first_factor = tl.load(scalars + 1).to(tl.float32)
    second_factor = tl.load(scalars + 2).to(tl.float32)
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
    master, rounded, first, second, rates, parameter_of_block, decay_of_block, scalars, finite,
    epsilon, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- p - rate * u, also rounded to the parameters' dtype."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first_factor = tl.load(scalars + 1).to(tl.float32)
    second_factor = tl.load(scalars + 2).to(tl.float32)
    # The mask is a comparison, because Triton 3.9's interpreter accepts no other mask.
    keep = tl.arange(0, BLOCK) < tl.where(tl.load(finite) != 0, BLOCK, 0)
    p = tl.load(master + places)
    m, v = tl.load(first + places), tl.load(second + places)
    u = adam_update(m, v, p, first_factor, second_factor, epsilon, tl.load(decay_of_block + block))
    p -= tl.load(rates + tl.load(parameter_of_block + block)) * u
    tl.store(master + places, p, mask=keep)
    if ROUND:
        tl.store(rounded + places, p.to(rounded.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class TritonStep:
    """A `Step`, and what kernels read on the device.

    finite_byte: 0-d uint8, `finite` as a number. scalars: (4,) float64, see `begin`.
    """

    norm: Tensor
    finite: Tensor
    epsilon: float
    betas: tuple[float, float]
    finite_byte: Tensor
    scalars: Tensor


class TritonKernels:
    """For float32, bfloat16 or float16 parameters, with float32 masters. See `FlatKernels`."""

    takes_schedules = True

    def __init__(self) -> None:
        self._constants: dict[tuple, Tensor] = {}
        self._rates: Tensor | None = None

    def square_sums(self, shard: Shard, out: Tensor) -> None:
        """The sum of squares of the gradient in each block. See `FlatKernels`."""
        square_sums[(len(shard.decay_of_block),)](shard.gradient, out, BLOCK=flat.BLOCK)

    def begin(self, sums: Tensor, table: ParameterTable, request: Request) -> TritonStep:
        """Two launches, or four for a rate and a scale that are given. See `FlatKernels`."""
        count, device = len(table.blocks), sums.device
        squares = torch.empty(count, dtype=torch.float64, device=device)
        parameter_sums[(count,)](
            sums, table.first_blocks, table.blocks, squares, TILE=TILE, num_warps=TILE_WARPS
        )
        norm = torch.empty((), device=device)
        finite = torch.empty((), dtype=torch.uint8, device=device)
        scalars = torch.empty(4, dtype=torch.float64, device=device)
        constants, scale, given = self._constants_of(request, device), request.scale, scalars
        scheduled = isinstance(scale, LossScale)
        state = [request.updates] * 3  # not used
        if scheduled:
            state = [scale.scale, scale.good_steps, scale.skipped_in_a_row]
        else:
            given = torch.empty(2, dtype=torch.float64, device=device)
            for place, value in zip(given.unbind(), (request.rate, scale), strict=True):
                place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
        begin[(1,)](
            squares, count, constants, given, request.updates, *state, norm, finite, scalars,
            SCHEDULED=scheduled, DYNAMIC=scheduled and scale.dynamic,
            SIZE=triton.next_power_of_2(count),
        )  # fmt: skip
        settings = request.settings
        betas = (settings.beta_1, settings.beta_2)
        return TritonStep(norm, finite.view(torch.bool), settings.epsilon, betas, finite, scalars)

    def _constants_of(self, request: Request, device: torch.device) -> Tensor:
        """Numbers that `begin` reads; sent once for a run, because the host waits for the copy.

        As float64 in memory, because Triton takes numbers as float32.
        """
        settings, schedule, interval = request.settings, Schedule(0.0, 1), 0
        if isinstance(request.scale, LossScale):
            schedule, interval = request.rate, request.scale.growth_interval
        key = (settings, schedule, interval)
        if key not in self._constants:
            numbers = (
                settings.beta_1, settings.beta_2, settings.max_gradient_norm,
                schedule.learning_rate, schedule.max_steps, schedule.warmup_steps,
                schedule.start_warmup_step, interval, MINIMUM_SCALE,
            )  # fmt: skip
            self._constants[key] = torch.tensor(numbers, dtype=torch.float64, device=device)
        return self._constants[key]

    def first_stage(self, shard: Shard, step: TritonStep, out: Tensor) -> None:
        """Update m and v. See `FlatKernels`."""
        blocks, (beta_1, beta_2) = len(shard.decay_of_block), step.betas
        first_stage[(blocks,)](
            shard.gradient, shard.master, shard.first, shard.second, shard.decay_of_block,
            step.scalars, step.finite_byte, out, blocks,
            beta_1, 1.0 - beta_1, beta_2, 1.0 - beta_2, step.epsilon, BLOCK=flat.BLOCK,
        )  # fmt: skip

    def rates(self, sums: Tensor, table: ParameterTable, step: TritonStep) -> Tensor:
        """Trust ratio times learning rate. See `FlatKernels`."""
        count = len(table.blocks)
        if self._rates is None:
            self._rates = torch.zeros(count + 1, device=sums.device)
        parameter_rates[(count,)](
            sums, sums.shape[1], table.first_blocks, table.blocks,
            table.has_ratio.view(torch.uint8), step.scalars, self._rates,
            TILE=TILE, num_warps=TILE_WARPS,
        )  # fmt: skip
        return self._rates

    def second_stage(self, shard: Shard, step: TritonStep, rates: Tensor) -> None:
        """Update p and round it. See `FlatKernels`."""
        rounded = shard.master if shard.rounded is None else shard.rounded
        second_stage[(len(shard.decay_of_block),)](
            shard.master, rounded, shard.first, shard.second, rates, shard.parameter_of_block,
            shard.decay_of_block, step.scalars, step.finite_byte, step.epsilon,
            ROUND=shard.rounded is not None, BLOCK=flat.BLOCK,
        )  # fmt: skip
