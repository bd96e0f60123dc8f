"""Casts to fp8 as Triton kernels: cast, transpose and maximum in one launch; all scales in one.

See `fp8.py` for the definition. The maximum is added by an atomic maximum of integers: the bits of
floats that are not negative are in the order of their values (infinity and NaN last), and a
maximum does not depend on the order of its parts. So results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.fp8 import LARGEST, MAX_SCALE, MULTIPLE, Quantised
from bert_pretraining.kernels.triton_common import divide_up, power_of_two_at_least
from bert_pretraining.kernels.triton_launch import launched_directly

# A block's lines have 64 bytes in one order and 128 in the other: whole sectors of memory in both.
BLOCK = (64, 128)
NUM_WARPS = 8
_NOT_A_NUMBER = tl.constexpr(0x7F)  # in e4m3 and in e5m2
_LARGEST_E4M3 = tl.constexpr(LARGEST[0])
_LARGEST_E5M2 = tl.constexpr(LARGEST[2])
_MAX_SCALE = tl.constexpr(MAX_SCALE)


@triton.jit
def magnitude(x):
    """The bits of |x|, x float32, as int32: in the order of the values, infinity and NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_fp8(x, scale, E5M2: tl.constexpr):
    """cast(scale * x), x float32, as bytes. See `fp8.quantise`."""
    scaled = x * scale
    if E5M2:
        scaled = tl.minimum(tl.maximum(scaled, -_LARGEST_E5M2), _LARGEST_E5M2)
        cast = scaled.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        scaled = tl.minimum(tl.maximum(scaled, -_LARGEST_E4M3), _LARGEST_E4M3)
        cast = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    # Infinity and NaN have all bits of the exponent set.
    return tl.where(magnitude(x) < 0x7F800000, cast, _NOT_A_NUMBER).to(tl.uint8)


@triton.jit
def record_maximum(maximum_ptr, largest):
    """Raise a maximum to `largest`, the bits of a float that is not negative."""
    # Most blocks do not raise the maximum, and do without the atomic operation.
    tl.atomic_max(maximum_ptr, largest, mask=largest > tl.load(maximum_ptr))


@launched_directly
@triton.jit(do_not_specialize=["num_rows", "scale_ptr", "maximum_ptr"])
def cast_kernel(
    x_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    maximum_ptr,
    num_rows,
    row_stride,
    E5M2: tl.constexpr,
    RECORD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    cast = to_fp8(x, tl.load(scale_ptr), E5M2)
    tl.store(rows_ptr + offsets, cast, mask=inside)
    # The transpose's rows are padded, with zeros, since x was read as zero there.
    transposed = columns.to(tl.int64)[:, None] * row_stride + rows[None, :]
    inside = (columns < COLUMNS)[:, None] & (rows < row_stride)[None, :]
    tl.store(columns_ptr + transposed, tl.trans(cast), mask=inside)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(tl.max(magnitude(x), axis=1), axis=0))


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """As `fp8.padded_cast`: x, (T, C), in fp8; columns is (C, T padded to a multiple of 16)."""
    x = x.contiguous()
    num_rows, num_columns = x.shape
    padded = divide_up(num_rows, MULTIPLE) * MULTIPLE
    rows = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    columns = torch.empty((num_columns, padded), dtype=dtype, device=x.device)
    if x.numel():
        grid = (divide_up(padded, BLOCK[0]), divide_up(num_columns, BLOCK[1]))
        cast_kernel[grid](
            x,
            rows.view(torch.uint8),
            columns.view(torch.uint8),
            scale,
            None if amax is None else amax.view(torch.int32),
            num_rows,
            padded,
            dtype == torch.float8_e5m2,
            amax is not None,
            num_columns,
            *BLOCK,
            num_warps=NUM_WARPS,
        )
    return Quantised(rows, columns)


@launched_directly
@triton.jit
def update_kernel(table_ptr, COUNT: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    places = tl.arange(0, BLOCK_COUNT)
    inside = places < COUNT
    before = tl.load(table_ptr + places, mask=inside, other=1.0)
    maxima = tl.load(table_ptr + 2 * COUNT + places, mask=inside, other=0.0)
    largest = tl.where(places % 3 == 2, _LARGEST_E5M2, _LARGEST_E4M3)
    known = (maxima > 0.0) & (maxima < float("inf"))
    scales = tl.where(known, tl.minimum(largest / tl.where(known, maxima, 1.0), _MAX_SCALE), before)
    tl.store(table_ptr + places, scales, mask=inside)
    tl.store(table_ptr + COUNT + places, 1.0 / scales, mask=inside)
    tl.store(table_ptr + 2 * COUNT + places, tl.zeros((BLOCK_COUNT,), tl.float32), mask=inside)


def update(table: Tensor) -> None:
    """As `fp8.update_scales`, in one launch."""
    count = table[0].numel()
    if count:
        block = power_of_two_at_least(count)
        update_kernel[(1,)](table, count, block)
