"""8-bit floating point: formats, casts and scales.

A tensor x is stored as cast(scale * x), with scale = the format's largest number / the largest |x|
of the update before ("delayed", a history of one). So one pass over x casts it and finds the
maximum for the next update. Activations and weights are e4m3 (4 bits of exponent, 3 of mantissa),
gradients e5m2. See docs/fp8.md for the bounds of the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INPUT, WEIGHT, GRADIENT = range(3)  # the tensors of a linear layer that have a scale each
FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = tuple(torch.finfo(dtype).max for dtype in FORMATS)  # 448, 448, 57344
# Scales stay below it, so that their inverses are normal float32 numbers.
MAX_SCALE = 2.0**100
MULTIPLE = 16  # cuBLASLt takes fp8 matrices whose rows are multiples of 16 bytes


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cast(scale * x), and the largest |x| as a 0-d float32 tensor (0 for an empty x).

    x: of any shape and float dtype. scale: 0-d float32. dtype: one of FORMATS.
    A finite number too large for the format becomes its largest number. Infinity and NaN become
    NaN: an overflow that happened before must not vanish here, or the optimizer would not see it.
    """
    wide = x.float()
    largest = torch.finfo(dtype).max
    # The limits are applied here, because the versions of PyTorch cast larger numbers differently.
    scaled = torch.where(torch.isfinite(wide), (wide * scale).clamp(-largest, largest), torch.nan)
    return scaled.to(dtype), largest_of(wide)


def cast_bound(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """How far cast(scale * x) / scale may be from x, elementwise, where no element was too large.

    Half the distance of two neighbours: |x| / 17 in e4m3 and |x| / 9 in e5m2 at most, or half the
    least number of the format, 2^-10 or 2^-17, / scale, if that is more.
    """
    info = torch.finfo(dtype)
    half = info.eps / 2.0  # of the distance between 1 and the next number
    relative, least = half / (1.0 + half), info.tiny * half
    # The scale, its inverse and both products are rounded to float32: up to 2^-22 of the number,
    # and so 17 times as much of the bound.
    return (x.abs() * relative).clamp(min=least / float(scale)) * (1.0 + 2.0**-17)


def largest_of(x: Tensor) -> Tensor:
    """The largest |x|, 0-d float32; NaN if an element is NaN, 0 for an empty x."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


class Quantised(NamedTuple):
    """A matrix in fp8, in both orders, since a product reads both of its factors row by row.

    rows: (T, C). columns: its transpose, (C, T'), where T' may be T padded with zeros.
    """

    rows: Tensor
    columns: Tensor


class Cast(NamedTuple):
    """How to cast a matrix: the scale, 0-d float32, and the format, one of FORMATS.

    amax: 0-d float32, raised to the largest |x|; None where nothing is recorded.
    """

    scale: Tensor
    dtype: torch.dtype
    amax: Tensor | None


def emulated_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """Cast a matrix; the largest |x| goes into `amax` if that is larger. columns is a view."""
    rows, largest = quantise(x, scale, dtype)
    if amax is not None:
        torch.maximum(amax, largest, out=amax)  # NaN stays
    return Quantised(rows, rows.t())


def padded_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """As `emulated_cast`, but columns is contiguous and its rows are multiples of 16."""
    rows, columns = emulated_cast(x, scale, dtype, amax)
    count = x.shape[0]
    padded = -(-count // MULTIPLE) * MULTIPLE
    # Bytes, because PyTorch fills no fp8 tensors. A byte of 0 is the number 0.
    whole = torch.zeros((x.shape[1], padded), dtype=torch.uint8, device=x.device)
    whole[:, :count] = columns.view(torch.uint8)
    return Quantised(rows, whole.view(dtype))


def scale_for(amax: Tensor, largest: Tensor | float, before: Tensor) -> Tensor:
    """largest / amax; the scale before where amax is 0 or not finite."""
    known = torch.isfinite(amax) & (amax > 0.0)
    return torch.where(known, (largest / amax).clamp(max=MAX_SCALE), before)


def update_scales(table: Tensor) -> None:
    """Set scales and inverses from the maxima, and the maxima to 0, in place.

    table: (3, layers, 3) float32: scales, inverses, maxima, each by layer and INPUT, WEIGHT,
    GRADIENT.
    """
    scales, inverses, maxima = table
    largest = torch.tensor(LARGEST, device=table.device)
    scales.copy_(scale_for(maxima, largest, scales))
    inverses.copy_(1.0 / scales)
    maxima.zero_()
