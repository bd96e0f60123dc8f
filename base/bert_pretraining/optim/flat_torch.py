"""The passes of flat LAMB in PyTorch operators, for any device.

Each pass processes the memory in chunks that stay in a CPU's cache from one operator to the next.
One operator, PyTorch's fused Adam, computes m, v and u of a chunk: it runs with learning rate 1 on
a "parameter" that starts as -weight_decay p, which then becomes -u. On devices without that
operator, several others do the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.optim.flat import BLOCK, ParameterTable, Request, Shard
from bert_pretraining.optim.optimizer import OptimizerSettings, bias_correction
from bert_pretraining.runtime import device as devices

# Elements per chunk. On a CPU the size hardly matters (docs/LOG.md, 2026-11-23). On a GPU fewer and
# longer calls are faster, and the memory for a chunk's gradient is the limit.
CPU_CHUNK = 2**19
DEVICE_CHUNK = 2**25


@dataclass(frozen=True)
class TorchStep:
    """A `Step` with what the passes share.

    factor: 0-d float64, multiplies the gradient: inverse loss scale times clipping.
    updates: 0-d int64, t of the formulas. rate: the learning rate.
    """

    norm: Tensor
    finite: Tensor
    settings: OptimizerSettings
    factor: Tensor
    updates: Tensor
    rate: float | Tensor


class TorchKernels:
    """Stores -u between the passes: over the gradient if dtypes match, else in new memory."""

    takes_schedules = False

    def __init__(self) -> None:
        self._update: Tensor | None = None
        self._scratch: Tensor | None = None

    def _prepare(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """Memory for -u of the shard, and for the gradient of one chunk."""
        if self._update is None or self._scratch is None:
            same = shard.gradient.dtype == shard.master.dtype
            self._update = shard.gradient if same else torch.empty_like(shard.master)
            length = min(_chunk(shard), len(shard.master))
            self._scratch = shard.master.new_empty(length)
        return self._update, self._scratch

    def square_sums(self, shard: Shard, out: Tensor) -> None:
        """The sum of squares of the gradient in each block. See `FlatKernels`."""
        scratch = self._prepare(shard)[1]
        for place, blocks in _chunks(shard):
            gradient = shard.gradient[place]
            if gradient.dtype != scratch.dtype:
                gradient = scratch[: len(gradient)].copy_(gradient)
            _norms(gradient, out[blocks])
        out.square_()

    def begin(self, sums: Tensor, table: ParameterTable, request: Request) -> TorchStep:
        """Norm, clipping and the number of updates. See `FlatKernels`."""
        settings, inverse_scale = request.settings, request.scale
        squares = table.layout.sum_by_parameter(sums, table.blocks)
        norm = squares.sum().sqrt() * inverse_scale
        found = norm.to(sums.dtype)
        finite = torch.isfinite(found)
        request.updates.add_(finite)
        factor = inverse_scale / torch.clamp(norm / settings.max_gradient_norm, min=1.0)
        return TorchStep(found, finite, settings, factor, request.updates, request.rate)

    def first_stage(self, shard: Shard, step: TorchStep, out: Tensor) -> None:
        """Compute m, v and -u. See `FlatKernels`."""
        update, scratch = self._prepare(shard)
        adam = _fused_adam if _has_fused_adam(update.device) else _plain_adam
        for place, blocks in _chunks(shard):
            weights, direction = shard.master[place], update[place]
            gradient = scratch[: len(weights)].copy_(shard.gradient[place]).mul_(step.factor)
            decay = -shard.decay_of_block[blocks, None]
            torch.mul(weights.view(-1, BLOCK), decay, out=direction.view(-1, BLOCK))
            adam(direction, gradient, shard.first[place], shard.second[place], step)
            _norms(weights, out[0, blocks])
            _norms(direction, out[1, blocks])
        out.square_()

    def rates(self, sums: Tensor, table: ParameterTable, step: TorchStep) -> Tensor:
        """Trust ratio times learning rate. See `FlatKernels`."""
        weights, updates = (table.layout.sum_by_parameter(row, table.blocks) for row in sums)
        both = table.has_ratio & (weights > 0) & (updates > 0)
        rates = torch.where(both, (weights / updates).sqrt(), 1.0) * step.rate
        return torch.cat([rates, rates.new_zeros(1)]).to(sums.dtype)

    def second_stage(self, shard: Shard, step: TorchStep, rates: Tensor) -> None:
        """Update p and round it. See `FlatKernels`."""
        update = self._prepare(shard)[0]
        rates = rates[shard.parameter_of_block.long()] * step.finite
        for place, blocks in _chunks(shard):
            direction, weights = update[place], shard.master[place]
            # Multiply, then add: two roundings. A fused multiply-add rounds once, but the last
            # elements of a thread may be computed without it, and the bits would depend on the
            # number of threads.
            direction.view(-1, BLOCK).mul_(rates[blocks, None])
            weights.add_(direction)
            if shard.rounded is not None:
                shard.rounded[place].copy_(weights)


def _chunk(shard: Shard) -> int:
    return CPU_CHUNK if shard.master.device.type == "cpu" else DEVICE_CHUNK


def _chunks(shard: Shard) -> Iterator[tuple[slice, slice]]:
    """The slices of elements and of blocks for each chunk."""
    length, size = len(shard.master), _chunk(shard)
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(start // BLOCK, end // BLOCK)


def _fused_adam(update: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: TorchStep) -> None:
    """Add to `update` what Adam with learning rate 1 would; all are (n,), m and v its moments.

    A step that is not finite changes nothing.
    """
    settings = step.settings
    torch._fused_adam_(
        [update],
        [gradient],
        [m],
        [v],
        [],
        [step.updates.float()],
        lr=1.0,
        beta1=settings.beta_1,
        beta2=settings.beta_2,
        weight_decay=0.0,
        eps=settings.epsilon,
        amsgrad=False,
        maximize=False,
        found_inf=(~step.finite).float(),
    )


def _plain_adam(update: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: TorchStep) -> None:
    """As `_fused_adam`, from operators that every device has; overwrites the gradient."""
    settings = step.settings
    m.copy_(torch.where(step.finite, torch.lerp(m, gradient, 1.0 - settings.beta_1), m))
    squares = gradient.square_()
    v.copy_(torch.where(step.finite, torch.lerp(v, squares, 1.0 - settings.beta_2), v))
    first = bias_correction(settings.beta_1, step.updates).to(m.dtype)
    second = bias_correction(settings.beta_2, step.updates).to(v.dtype)
    change = (m / first).div_((v / second).sqrt_().add_(settings.epsilon))
    update.sub_(torch.where(step.finite, change, 0.0))


@functools.cache
def _has_fused_adam(device: torch.device) -> bool:
    one = torch.ones(1, device=device)
    values = [one.clone() for _ in range(4)]
    settings = OptimizerSettings()
    step = TorchStep(one[0], one[0] > 0, settings, one[0], one[0].long(), 1.0)
    return devices.runs(lambda: _fused_adam(*values, step))


def _norms(values: Tensor, out: Tensor) -> None:
    """Write the norm of each block of `values`, (k x BLOCK,), to `out`, (k,)."""
    torch.linalg.vector_norm(values.view(-1, BLOCK), dim=1, out=out)
