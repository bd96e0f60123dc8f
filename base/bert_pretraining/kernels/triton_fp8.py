"""Casts to fp8 as Triton kernels: cast, transpose and maximum in one launch; all scales in one.

See `fp8_casts.py` for the definition. The maximum is added by an atomic maximum of integers: the
bits of floats that are not negative are in the order of their values (infinity and NaN last), and
a maximum does not depend on the order of its parts. So results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.fp8_casts import LARGEST, MAX_SCALE, MULTIPLE, Cast, Quantised
from bert_pretraining.kernels.triton_common import divide_up, power_of_two_at_least
from bert_pretraining.kernels.triton_launch import launched_directly

# A block's lines have 64 bytes in one order and 128 in the other: whole sectors of memory in both.
BLOCK = (64, 128)
NUM_WARPS = 8
# Scales and maxima lie at any multiple of 4 bytes, and the number of rows changes with each batch.
# Of rows_ptr, see `row_pointers`.
NOT_SPECIALISED_CAST = ("num_rows", "scale_ptr", "maximum_ptr", "rows_ptr")
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
    """cast(scale * x), x float32, as bytes. See `fp8_casts.quantise`."""
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


@triton.jit
def row_pointers(rows_ptr, rows, columns, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Pointers to bytes of fp8 rows, of which a thread takes AT_ONCE neighbours at a time.

    8 where it has read 16 bytes of 16-bit numbers: if the compiler knew that 16 could be written at
    a time, it would exchange numbers between threads, which costs registers.
    """
    pointers = rows_ptr + (rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :])
    if COLUMNS % AT_ONCE == 0:
        pointers = tl.multiple_of(pointers, (1, AT_ONCE))
    return pointers


@triton.jit
def store_both(
    cast, rows, columns, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS: tl.constexpr
):
    """Write bytes of these rows and columns, (R, C), and their transpose, which has longer rows.

    The bytes of rows that do not exist must be zeros: they pad the transpose.
    """
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(row_pointers(rows_ptr, rows, columns, COLUMNS, 8), cast, mask=inside)
    store_transposed(cast, rows, columns, row_stride, columns_ptr, COLUMNS)


@triton.jit
def store_transposed(cast, rows, columns, row_stride, columns_ptr, COLUMNS: tl.constexpr):
    """The transpose alone; see `store_both`."""
    inside = (columns < COLUMNS)[:, None] & (rows < row_stride)[None, :]
    offsets = columns.to(tl.int64)[:, None] * row_stride + rows[None, :]
    tl.store(columns_ptr + offsets, tl.trans(cast), mask=inside)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED_CAST)
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
    store_both(cast, rows, columns, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(tl.max(magnitude(x), axis=1), axis=0))


def empty_copies(rows: int, columns: int, how: Cast, device: torch.device) -> Quantised:
    """Memory for a matrix in fp8, (T, C), and for its transpose, (C, T padded to 16)."""
    return Quantised(
        torch.empty((rows, columns), dtype=how.dtype, device=device),
        torch.empty((columns, padded(rows)), dtype=how.dtype, device=device),
    )


def padded(rows: int) -> int:
    """The length of a row of the transpose."""
    return divide_up(rows, MULTIPLE) * MULTIPLE


def kernel_arguments(copies: Quantised, how: Cast) -> tuple[Tensor | None, ...]:
    """rows_ptr, columns_ptr, scale_ptr and maximum_ptr of a kernel that casts."""
    amax = None if how.amax is None else how.amax.view(torch.int32)
    return copies.rows.view(torch.uint8), copies.columns.view(torch.uint8), how.scale, amax


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """As `fp8_casts.padded_cast`: x, (T, C), and its transpose, (C, T padded to 16)."""
    x = x.contiguous()
    how = Cast(scale, dtype, amax)
    num_rows, num_columns = x.shape
    copies = empty_copies(num_rows, num_columns, how, x.device)
    if x.numel():
        stride = padded(num_rows)
        cast_kernel[(divide_up(stride, BLOCK[0]), divide_up(num_columns, BLOCK[1]))](
            x,
            *kernel_arguments(copies, how),
            num_rows,
            stride,
            dtype == torch.float8_e5m2,
            amax is not None,
            num_columns,
            *BLOCK,
            num_warps=NUM_WARPS,
        )
    return copies


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
    """As `fp8_casts.update_scales`, in one launch."""
    count = table[0].numel()
    if count:
        block = power_of_two_at_least(count)
        update_kernel[(1,)](table, count, block)
