"""The LayerNorm's kernels of `triton_layer_norm_kernels.py`, with a result in fp8.

Each gives the bits that the other kernel and a cast after it would give. A program has a few whole
rows in registers at a time, too few to write a transpose in long pieces. So it writes the fp8 rows
first, and then reads them again, from its multiprocessor's cache, to transpose them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_pretraining.kernels.triton_common import kept, only_stream_keys
from bert_pretraining.kernels.triton_fp8 import (
    NOT_SPECIALISED_CAST,
    magnitude,
    record_maximum,
    row_pointers,
    store_transposed,
    to_fp8,
)
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.kernels.triton_layer_norm_kernels import (
    backward_rows,
    forward_rows,
    store_sums,
)

NOT_SPECIALISED = ("seed_ptr", *NOT_SPECIALISED_CAST)


@triton.jit
def _store_rows(
    values, rows, columns, num_rows, rows_ptr, scale, like_ptr,
    E5M2: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round to the dtype of a pointer, cast, and write; each column's largest magnitude."""
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    values = tl.where(inside, values.to(like_ptr.dtype.element_ty).to(tl.float32), 0.0)
    pointers = row_pointers(rows_ptr, rows, columns, COLUMNS, 8)
    tl.store(pointers, to_fp8(values, scale, E5M2), mask=inside)
    return tl.max(magnitude(values), axis=0)


@triton.jit
def _transpose(
    first_row, num_rows, row_stride, rows_ptr, columns_ptr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the transpose of ROWS rows that this program has written before."""
    tl.debug_barrier()
    for step in range(0, ROWS, TILE_ROWS):
        rows = first_row + step + tl.arange(0, TILE_ROWS)
        for start in range(0, COLUMNS, TILE_COLUMNS):
            columns = start + tl.arange(0, TILE_COLUMNS)
            inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
            pointers = row_pointers(rows_ptr, rows, columns, COLUMNS, 16)
            cast = tl.load(pointers, mask=inside, other=0)
            store_transposed(cast, rows, columns, row_stride, columns_ptr, COLUMNS)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    norm_bias_ptr,
    seed_ptr,
    output_ptr,
    summed_ptr,
    statistics_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    maximum_ptr,
    num_rows,
    row_stride,
    epsilon,
    E5M2: tl.constexpr,
    RECORD: tl.constexpr,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0) * PROGRAM_ROWS
    columns = tl.arange(0, BLOCK_COLUMNS)
    scale = tl.load(scale_ptr)
    largest = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = first_row + step + tl.arange(0, BLOCK_ROWS)
        output = forward_rows(
            x_ptr, bias_ptr, residual_ptr, weight_ptr, norm_bias_ptr, seed_ptr, summed_ptr,
            statistics_ptr, rows, columns, num_rows, epsilon, COLUMNS, THRESHOLD, KEEP_SCALE,
        )  # fmt: skip
        inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        tl.store(output_ptr + offsets, output, mask=inside)
        found = _store_rows(
            output, rows, columns, num_rows, rows_ptr, scale, output_ptr, E5M2, COLUMNS
        )
        largest = tl.maximum(largest, found)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(largest, axis=0))
    _transpose(
        first_row, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS, PROGRAM_ROWS,
        TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def backward_kernel(
    gradient_ptr,
    summed_ptr,
    statistics_ptr,
    weight_ptr,
    seed_ptr,
    residual_gradient_ptr,
    partial_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    maximum_ptr,
    num_rows,
    row_stride,
    E5M2: tl.constexpr,
    RECORD: tl.constexpr,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0) * PROGRAM_ROWS
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if THRESHOLD > 0:
        first_key, second_key = only_stream_keys(seed_ptr)
    scale = tl.load(scale_ptr)
    largest = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = first_row + step + tl.arange(0, BLOCK_ROWS)
        total, weight_sum, norm_bias_sum = backward_rows(
            gradient_ptr, summed_ptr, statistics_ptr, weight, residual_gradient_ptr, weight_sum,
            norm_bias_sum, rows, columns, num_rows, COLUMNS,
        )  # fmt: skip
        if THRESHOLD > 0:
            keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
            total = tl.where(keep, total * KEEP_SCALE, 0.0)
        bias_sum += tl.sum(total, axis=0)
        found = _store_rows(
            total, rows, columns, num_rows, rows_ptr, scale, summed_ptr, E5M2, COLUMNS
        )
        largest = tl.maximum(largest, found)
    store_sums(partial_ptr, columns, bias_sum, weight_sum, norm_bias_sum, COLUMNS)
    if RECORD:
        record_maximum(maximum_ptr, tl.max(largest, axis=0))
    _transpose(
        first_row, num_rows, row_stride, rows_ptr, columns_ptr, COLUMNS, PROGRAM_ROWS,
        TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip
