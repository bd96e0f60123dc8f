"""The fp8 copies of all weights: their memory, and how PyTorch's operators fill it.

A weight changes once an update, and so it is cast once an update: after the optimizer's step, with
the scale that follows from the weights of the update before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bert_pretraining.kernels.fp8_casts import FORMATS, WEIGHT, Quantised, quantise


def empty_copies(weights: Sequence[Sequence[Tensor]]) -> list[Quantised]:
    """Memory for each weight, as rows (N, K) and columns (K, N); all of them in one tensor.

    weights: for each layer its parts, (n, K) each, of which the weight has N rows together.
    """
    shapes = [(sum(len(part) for part in parts), parts[0].shape[1]) for parts in weights]
    sizes = [rows * columns for rows, columns in shapes]
    device = weights[0][0].device
    whole = torch.empty(2 * sum(sizes), dtype=FORMATS[WEIGHT], device=device)
    rows, columns = (half.split(sizes) for half in whole.chunk(2))
    return [
        Quantised(one.view(shape), other.view(shape[::-1]))
        for one, other, shape in zip(rows, columns, shapes, strict=True)
    ]


class WeightCast(Protocol):
    """Casts the weights of all layers into memory that stays where it is.

    Attributes:
        kept: for each layer its weight, as rows (N, K) and columns (K, N), both contiguous.
    """

    kept: Sequence[Quantised]

    def __call__(self, table: Tensor) -> None:
        """Cast by the scales of this table, and add the largest numbers to its maxima.

        table: see `update_scales`.
        """


class EachWeight:
    """A `WeightCast` that casts one weight after the other.

    weights: see `empty_copies`.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]]) -> None:
        self._weights = weights
        self.kept = empty_copies(weights)

    def __call__(self, table: Tensor) -> None:
        """See `WeightCast`."""
        scales, _, maxima = table[:, :, WEIGHT]
        for number, (parts, copies) in enumerate(zip(self._weights, self.kept, strict=True)):
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            cast, largest = quantise(whole, scales[number], FORMATS[WEIGHT])
            torch.maximum(maxima[number], largest, out=maxima[number])
            # As bytes, because not every version of PyTorch copies fp8 tensors.
            copies.rows.view(torch.uint8).copy_(cast.view(torch.uint8))
            copies.columns.view(torch.uint8).copy_(cast.view(torch.uint8).t())
