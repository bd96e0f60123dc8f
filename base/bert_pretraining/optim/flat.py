"""Parameters, gradients and optimizer state in a few long 1-D tensors.

Every parameter starts at a multiple of BLOCK elements and is padded with zeros to a multiple of
BLOCK, so that no block has elements of two parameters. Padding stays zero, because its gradient,
moments and weight are zero, and hence its update.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.optimizer import OptimizerSettings
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.runtime import device as devices

# Elements per block. Kernels write one partial norm per block. It is small because each bias is
# padded to a whole block.
BLOCK = 1024


class FlatLayout:
    """The position of each parameter in a flat tensor.

    The last parameter comes first: backward computes gradients in about that order, so that a flat
    gradient is completed from its front.

    Attributes:
        length: elements of a flat tensor, padding included; a multiple of `multiple`.
        offsets: first element of each parameter, in the order of `shapes`.
        sizes: elements of each parameter without padding, in the order of `shapes`.
        blocks: number of blocks of each parameter, in the order of `shapes`.
    """

    def __init__(self, shapes: list[torch.Size], multiple: int | None = None) -> None:
        """multiple: a multiple of BLOCK, or None for BLOCK."""
        multiple = multiple or BLOCK
        self._shapes = shapes
        self.sizes = [shape.numel() for shape in shapes]
        self.blocks = [-(-size // BLOCK) for size in self.sizes]
        ends = list(itertools.accumulate(reversed(self.blocks), initial=0))
        self.length = -(-ends.pop() * BLOCK // multiple) * multiple
        self.offsets = [end * BLOCK for end in reversed(ends)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor that belong to the parameters, in their shapes."""
        return [
            flat[offset : offset + shape.numel()].view(shape)
            for offset, shape in zip(self.offsets, self._shapes, strict=True)
        ]

    def filled(self, tensors: list[Tensor]) -> Tensor:
        """A flat tensor, (length,), with copies of `tensors`, one for each parameter."""
        flat = tensors[0].new_zeros(self.length)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.copy_(tensor)
        return flat

    def parameter_of_block(self, device: torch.device) -> Tensor:
        """(length / BLOCK,) int32: each block's parameter; len(self.blocks) for unused blocks."""
        table = torch.full((self.length // BLOCK,), len(self.blocks), dtype=torch.int32)
        for index, (offset, blocks) in enumerate(zip(self.offsets, self.blocks, strict=True)):
            table[offset // BLOCK : offset // BLOCK + blocks] = index
        return table.to(device)

    def sum_by_parameter(self, sums: Tensor, blocks_of: Tensor) -> Tensor:
        """For each parameter the sum over its blocks: (parameters,), of the dtype `devices.wide`.

        sums: (length / BLOCK,), one number per block. blocks_of: `blocks` as (parameters,)
        integers on the device of `sums`. The order of addition depends only on the layout.
        """
        used = sums[: sum(self.blocks)].to(devices.wide(sums.device))
        if not _has_segment_reduce(sums.device):
            return torch.stack([part.sum() for part in used.split(self.blocks[::-1])][::-1])
        # unsafe=True skips a check of the lengths, which would wait for a GPU.
        in_memory = torch.segment_reduce(used, "sum", lengths=blocks_of.long().flip(0), unsafe=True)
        return in_memory.flip(0)


@functools.cache
def _has_segment_reduce(device: torch.device) -> bool:
    one = torch.ones(1, device=device)
    return devices.runs(lambda: torch.segment_reduce(one, "sum", lengths=one.long(), unsafe=True))


@dataclass(frozen=True)
class Shard:
    """The flat tensors that one rank updates: n elements, a multiple of BLOCK.

    gradient: (n,) of any dtype. A step may overwrite it.
    master, first, second: (n,) float32, or float64 for float64 parameters.
    rounded: (n,) `master` rounded to the parameters' dtype; None if the master is the parameter.
    parameter_of_block: (n / BLOCK,) int32.
    decay_of_block: (n / BLOCK,) weight decay, of the masters' dtype.
    """

    gradient: Tensor
    master: Tensor
    first: Tensor
    second: Tensor
    rounded: Tensor | None
    parameter_of_block: Tensor
    decay_of_block: Tensor


@dataclass(frozen=True)
class ParameterTable:
    """What is computed per parameter needs these of all parameters of a layout, (parameters,) each.

    first_blocks, blocks: int32, the first block and the number of blocks. has_ratio: bool, whether
    it has a trust ratio.
    """

    layout: FlatLayout
    first_blocks: Tensor
    blocks: Tensor
    has_ratio: Tensor

    @classmethod
    def of(cls, layout: FlatLayout, has_ratio: list[bool], device: torch.device) -> ParameterTable:
        """The table of a layout on a device."""
        first = [offset // BLOCK for offset in layout.offsets]
        return cls(
            layout,
            torch.tensor(first, dtype=torch.int32, device=device),
            torch.tensor(layout.blocks, dtype=torch.int32, device=device),
            torch.tensor(has_ratio, device=device),
        )


class Step(Protocol):
    """What `FlatKernels.begin` finds out for the later passes; kernels add to it what they need.

    norm: 0-d, of the gradients, of the masters' dtype. finite: 0-d bool, whether the norm is; if
    False, the later passes change nothing.
    """

    norm: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Request:
    """What a step is asked for.

    updates: 0-d int64; `begin` adds 1 if the gradients are finite. rate: the learning rate, or the
    schedule that gives it for `updates`. scale: the inverse of the loss scale, or the loss scale
    itself, which `begin` then updates.

    Only kernels with `takes_schedules` take a Schedule and a LossScale.
    """

    settings: OptimizerSettings
    updates: Tensor
    rate: float | Tensor | Schedule
    scale: float | Tensor | LossScale


class FlatKernels(Protocol):
    """The passes of a step over a rank's shard, and what comes between; none waits for the device.

    Sums over blocks are of the masters' dtype. Blocks are added to parameters, and these to the
    whole, in an order that depends only on the layout.

    takes_schedules: whether `begin` takes a Schedule and a LossScale.
    """

    takes_schedules: bool

    def square_sums(self, shard: Shard, out: Tensor) -> None:
        """out: (n / BLOCK,), receives the sums of squares of the gradient in each block."""

    def begin(self, sums: Tensor, table: ParameterTable, request: Request) -> Step:
        """From the sums of squares to norm and clipping, and everything that no element needs.

        sums: (layout.length / BLOCK,), from all ranks.
        """

    def first_stage(self, shard: Shard, step: Step, out: Tensor) -> None:
        """Update both moments.

        out: (2, n / BLOCK), receives the sums of squares of the weights and of the updates.
        """

    def rates(self, sums: Tensor, table: ParameterTable, step: Step) -> Tensor:
        """Learning rate times trust ratio: (parameters + 1,); the last is for unused blocks.

        sums: (2, layout.length / BLOCK), those of `first_stage` from all ranks.
        """

    def second_stage(self, shard: Shard, step: Step, rates: Tensor) -> None:
        """Apply the updates and round the masters. rates: what `rates` returned."""
