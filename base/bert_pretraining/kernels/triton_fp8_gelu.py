"""GELU(x + bias) with its result in fp8, as one Triton kernel forward and one backward.

Each gives the bits that the kernel of `triton_bias_gelu.py` and a cast after it would give; the
16-bit numbers between them are never stored. Only sums over rows are added in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.fp8_casts import Cast, Quantised
from bert_pretraining.kernels.pairs import AddSums
from bert_pretraining.kernels.triton_bias_gelu import sigmoid_of_twice_u
from bert_pretraining.kernels.triton_common import divide_up
from bert_pretraining.kernels.triton_fp8 import (
    NOT_SPECIALISED_CAST,
    NUM_WARPS,
    empty_copies,
    kernel_arguments,
    magnitude,
    padded,
    record_maximum,
    store_both,
    to_fp8,
)
from bert_pretraining.kernels.triton_launch import launched_directly

# Half of a cast's block: with 16 numbers a thread instead of 32, more blocks run at a time.
BLOCK = (64, 64)
# Rows over which one backward program sums the bias gradient.
PROGRAM_ROWS = 128


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED_CAST)
def forward_kernel(
    x_ptr,
    bias_ptr,
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
    bias = tl.load(bias_ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    sigmoid, _ = sigmoid_of_twice_u(z)
    result = (z * sigmoid).to(x_ptr.dtype.element_ty).to(tl.float32)
    result = tl.where(inside, result, 0.0)
    cast = to_fp8(result, tl.load(scale_ptr), E5M2)
    store_both(cast, rows, columns, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(tl.max(magnitude(result), axis=1), axis=0))


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED_CAST)
def backward_kernel(
    gradient_ptr,
    x_ptr,
    bias_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    maximum_ptr,
    partial_ptr,
    num_rows,
    row_stride,
    E5M2: tl.constexpr,
    RECORD: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    largest = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        inside = (rows < num_rows)[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        sigmoid, slope = sigmoid_of_twice_u(z)
        gradient *= sigmoid * (1.0 + z * (1.0 - sigmoid) * slope)
        gradient = tl.where(inside, gradient, 0.0)
        total += gradient
        rounded = gradient.to(x_ptr.dtype.element_ty).to(tl.float32)
        cast = to_fp8(rounded, scale, E5M2)
        store_both(cast, rows, columns, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS)
        if RECORD:
            largest = tl.maximum(largest, tl.max(magnitude(rounded), axis=0))
    sums = tl.sum(total, axis=0)
    tl.store(partial_ptr + program * COLUMNS + columns, sums, mask=column_inside)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(largest, axis=0))


def forward(x: Tensor, bias: Tensor, how: Cast) -> Quantised:
    """GELU(x + bias), rounded to the dtype of x, in fp8. x: (T, C); bias: (C,); contiguous."""
    num_rows, num_columns = x.shape
    copies = empty_copies(num_rows, num_columns, how, x.device)
    if num_rows:
        stride = padded(num_rows)
        forward_kernel[(divide_up(stride, BLOCK[0]), divide_up(num_columns, BLOCK[1]))](
            x,
            bias,
            *kernel_arguments(copies, how),
            num_rows,
            stride,
            how.dtype == torch.float8_e5m2,
            how.amax is not None,
            num_columns,
            *BLOCK,
            num_warps=NUM_WARPS,
        )
    return copies


def backward(
    gradient: Tensor, x: Tensor, bias: Tensor, bias_gradient: Tensor, add_sums: AddSums, how: Cast
) -> Quantised:
    """The gradient of x, rounded to the dtype of x, in fp8. All tensors are contiguous.

    The gradient of the bias goes to bias_gradient, (C,), as add_sums does it.
    """
    num_rows, num_columns = x.shape
    programs = divide_up(num_rows, PROGRAM_ROWS)
    copies = empty_copies(num_rows, num_columns, how, x.device)
    partial = x.new_empty((programs, num_columns), dtype=torch.float32)
    if num_rows:
        backward_kernel[(programs, divide_up(num_columns, BLOCK[1]))](
            gradient,
            x,
            bias,
            *kernel_arguments(copies, how),
            partial,
            num_rows,
            padded(num_rows),
            how.dtype == torch.float8_e5m2,
            how.amax is not None,
            num_columns,
            PROGRAM_ROWS,
            *BLOCK,
            num_warps=NUM_WARPS,
        )
    add_sums(partial, (bias_gradient,))
    return copies
