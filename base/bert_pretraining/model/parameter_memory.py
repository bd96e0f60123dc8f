"""Gradients in the parameters' own `grad`, and parameters that lie side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OwnGradients:
    """Each parameter's gradient is its `grad`, as autograd leaves it."""

    def target(self, parameter: nn.Parameter) -> Tensor:
        """See `runtime/gradient_sink.py`."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `runtime/gradient_sink.py`."""


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
