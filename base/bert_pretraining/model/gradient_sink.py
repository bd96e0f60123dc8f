"""Where the backward pass of a fused layer puts the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class GradientSink(Protocol):
    """What an optimizer offers that keeps all gradients in memory of its own."""

    def target(self, parameter: nn.Parameter) -> Tensor:
        """What to add the parameter's gradient to; of its shape, maybe of a wider dtype."""

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients that one micro-batch gives these parameters are in their targets."""


class OwnGradients:
    """Each parameter's gradient is its `grad`, as autograd leaves it."""

    def target(self, parameter: nn.Parameter) -> Tensor:
        """See `GradientSink`."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `GradientSink`."""


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor over parts of equal shape that follow each other in memory; None elsewhere.

    parts: contiguous, (n, ...) each. The result, (len(parts) * n, ...), shares their memory.
    """
    first = parts[0]
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    for number, part in enumerate(parts):
        if part.data_ptr() != start + number * size or not part.is_contiguous():
            return None
    whole = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if whole < len(parts) * first.numel():  # neighbours in memory, but of different storages
        return None
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters of equal shape into one tensor, one behind the other."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.chunk(len(parameters)), strict=True):
        parameter.data = part
