"""Parameters, gradients and optimizer state in a few long 1-D tensors.

Every parameter starts at a multiple of BLOCK elements and is padded with zeros to one, so that
no block of elements belongs to two parameters. Padding stays zero: its gradient, moments, weight
and hence update are zero.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bert_pretraining.optim.optimizer import OptimizerSettings

# Elements of a block: one partial norm each. Small, for it is also what a bias is padded to.
BLOCK = 1024


class FlatLayout:
    """Where each parameter lies in a flat tensor.

    The last parameter lies first: backward makes gradients in about that order, so that a flat
    gradient is complete from its front on.

    Attributes:
        length: elements of a flat tensor, padding included; a multiple of `multiple`.
        offsets: first element of each parameter, in the order given.
        blocks: how many blocks each parameter has, in the order given.
    """

    def __init__(self, shapes: list[torch.Size], multiple: int = BLOCK) -> None:
        """multiple: a multiple of BLOCK."""
        self._shapes = shapes
        self.blocks = [-(-shape.numel() // BLOCK) for shape in shapes]
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
        """(length,) a flat tensor that holds copies of the parameters' `tensors`."""
        flat = tensors[0].new_zeros(self.length)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.copy_(tensor)
        return flat

    def parameter_of_block(self, device: torch.device) -> Tensor:
        """(length / BLOCK,) int32: each block's parameter; their number for blocks of none."""
        table = torch.full((self.length // BLOCK,), len(self.blocks), dtype=torch.int32)
        for index, (offset, blocks) in enumerate(zip(self.offsets, self.blocks, strict=True)):
            table[offset // BLOCK : offset // BLOCK + blocks] = index
        return table.to(device)

    def sum_by_parameter(self, sums: Tensor, blocks_of: Tensor) -> Tensor:
        """(parameters,) float64: the sums over each parameter's blocks, added up one by one.

        sums: (length / BLOCK,), one number a block. blocks_of: `blocks` as int64 (parameters,)
        on the device of `sums`. The order of adding follows from the layout alone.
        """
        used = sums[: sum(self.blocks)].double()
        # unsafe leaves out a check of the lengths, which would wait for a GPU.
        in_memory = torch.segment_reduce(used, "sum", lengths=blocks_of.flip(0), unsafe=True)
        return in_memory.flip(0)


@dataclass(frozen=True)
class Share:
    """The flat tensors that one rank updates: n elements, a multiple of BLOCK.

    gradient: (n,) of the parameters' dtype. A step may overwrite it.
    master, first, second: (n,) float32, or float64 for float64 parameters.
    rounded: (n,) `master` in the parameters' dtype, or None where the master is the parameter.
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
class Step:
    """What the passes of one step share.

    factor: 0-d float64, multiplies the gradient: loss scale and clipping.
    updates: 0-d int64, t of the formulas. finite: 0-d bool; False makes the step change nothing.
    """

    settings: OptimizerSettings
    factor: Tensor
    updates: Tensor
    finite: Tensor


class FlatKernels(Protocol):
    """The three passes of a step over a rank's share; none waits for the device.

    Sums are one number a block, of the masters' dtype, written to `out`.
    """

    def square_sums(self, share: Share, out: Tensor) -> None:
        """out: (n / BLOCK,) the sums of the gradient's squares."""

    def first_stage(self, share: Share, step: Step, out: Tensor) -> None:
        """Advance both moments.

        out: (2, n / BLOCK), the sums of the weights' and of the updates' squares.
        """

    def second_stage(self, share: Share, step: Step, rates: Tensor) -> None:
        """Apply the updates and round the masters.

        rates: (n / BLOCK,) learning rate times trust ratio of each block, of the masters' dtype.
        """
