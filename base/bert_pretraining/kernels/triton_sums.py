"""Sums over rows in float32 and in a fixed order, without atomics: gradients of parameters.

A backward kernel of many programs writes one partial sum each. One small kernel then adds up the
partial sums of all its parameters, and adds the results to the given gradients. So the same input
always gives the same bits, and neither a conversion nor an addition needs a kernel of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.pairs import AddSums
from bert_pretraining.kernels.triton_common import (
    NOT_SPECIALISED,
    divide_up,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_launch import launched_directly

# A row of 32 float32 numbers is the 128 bytes that a warp reads at once. With few columns per
# program, even the 1,024 columns of one parameter occupy many multiprocessors.
PARTS_BLOCK = (64, 32)
COLUMN_BLOCK = (4, 1024)
_PROGRAM_ROWS = 128  # rows over which one program of `partial_sums_kernel` sums


@triton.jit
def _write(output_ptr, columns, sums, inside, ADD: tl.constexpr):
    if ADD:
        sums += tl.load(output_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + columns, sums, mask=inside)


@triton.jit
def add_sums_of_columns(
    partial_ptr, first_ptr, second_ptr, third_ptr, num_parts, row, block,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one block of columns of one row of partial, (num_parts, COUNT, COLUMNS)."""
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < COLUMNS
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLUMNS), tl.float32)
    partial_ptr += row * COLUMNS
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        offsets = parts[:, None] * (COUNT * COLUMNS) + columns[None, :]
        mask = (parts < num_parts)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    sums = tl.sum(total, axis=0)
    if row == 0:
        _write(first_ptr, columns, sums, inside, ADD)
    # The compiler decides the outer conditions, so that it never sees a pointer that is None.
    if COUNT > 1:  # noqa: SIM102
        if row == 1:
            _write(second_ptr, columns, sums, inside, ADD)
    if COUNT > 2:  # noqa: SIM102
        if row >= 2:
            _write(third_ptr + (row - 2) * COLUMNS, columns, sums, inside, ADD)


@launched_directly
@triton.jit(do_not_specialize=["num_parts"])
def add_partial_sums_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr, num_parts,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum partial, (num_parts, COUNT, COLUMNS), over its parts. The third takes all the rest."""
    add_sums_of_columns(
        partial_ptr, first_ptr, second_ptr, third_ptr, num_parts, tl.program_id(1),
        tl.program_id(0), COLUMNS, COUNT, ADD, BLOCK_PARTS, BLOCK_COLUMNS,
    )  # fmt: skip


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def partial_sums_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write each program's sum over its rows into partial, (programs, COLUMNS)."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < COLUMNS
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        total += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + program * COLUMNS + columns, tl.sum(total, axis=0), mask=inside)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def stack_kernel(
    first_ptr, second_ptr, third_ptr, stacked_ptr, partial_ptr, num_rows,
    COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy one of three (num_rows, COLUMNS), and write each program's sum over its rows."""
    program, part = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < COLUMNS
    source_ptr = first_ptr
    if part == 1:
        source_ptr = second_ptr
    if part == 2:
        source_ptr = third_ptr
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        places = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        values = tl.load(source_ptr + places, mask=mask, other=0.0)
        places = (rows.to(tl.int64)[:, None] * 3 + part) * COLUMNS + columns[None, :]
        tl.store(stacked_ptr + places, values, mask=mask)
        total += values.to(tl.float32)
    partial_ptr += (program * 3 + part) * COLUMNS + columns
    tl.store(partial_ptr, tl.sum(total, axis=0), mask=inside)


@functools.cache
def block_shape(block: tuple[int, int], num_columns: int) -> tuple[int, int]:
    """(rows, columns) of a block. If there are few columns, it has more rows instead."""
    columns = min(block[1], power_of_two_at_least(num_columns, 16))
    return min(block[0] * block[1] // columns, 64), columns


def add_partial_sums(partial: Tensor, outputs: Sequence[Tensor], add: bool = True) -> None:
    """Sum partial over its first dimension in float32, and add the sums to the outputs.

    partial: (parts, ..., C) float32, contiguous, with R rows of C numbers a part; parts may be 0.
    outputs: one to three contiguous tensors of any float dtypes. The first two take a row each, and
        the third takes all further rows.
    add: False writes the sums over what the outputs hold.
    """
    num_columns = partial.shape[-1]
    count = partial.stride(0) // num_columns
    first, second, third = (*outputs, None, None)[:3]
    add_partial_sums_kernel[(divide_up(num_columns, PARTS_BLOCK[1]), count)](
        partial,
        first,
        second,
        third,
        partial.shape[0],
        num_columns,
        count,
        add,
        *PARTS_BLOCK,
    )


def stack(parts: Sequence[Tensor], sums: Tensor, add_sums: AddSums = add_partial_sums) -> Tensor:
    """Three contiguous tensors, (T, heads, D) each, in one, (T, 3, heads, D).

    Its sum over the rows is added to sums, (3 * heads * D,), as add_sums does it.
    """
    first, second, third = parts
    num_rows, num_columns = first.shape[0], first.stride(0)
    stacked = first.new_empty((num_rows, 3, *first.shape[1:]))
    programs = divide_up(num_rows, _PROGRAM_ROWS)
    partial = first.new_empty((programs, 3 * num_columns), dtype=torch.float32)
    block_rows, block_columns = block_shape(COLUMN_BLOCK, num_columns)
    if num_rows:
        stack_kernel[(programs, divide_up(num_columns, block_columns), 3)](
            first, second, third, stacked, partial, num_rows, num_columns, _PROGRAM_ROWS,
            block_rows, block_columns,
        )  # fmt: skip
        add_sums(partial, (sums,))
    return stacked


write_partial_sums = functools.partial(add_partial_sums, add=False)


def column_sum(x: Tensor, out: Tensor, add_sums: AddSums = add_partial_sums) -> None:
    """Add the sum over the rows of x, (T, C) contiguous, to out, (C,), as add_sums does it."""
    num_rows, num_columns = x.shape
    programs = divide_up(num_rows, _PROGRAM_ROWS)
    partial = x.new_empty((programs, num_columns), dtype=torch.float32)
    block_rows, block_columns = block_shape(COLUMN_BLOCK, num_columns)
    if num_rows:
        partial_sums_kernel[(programs, divide_up(num_columns, block_columns))](
            x, partial, num_rows, num_columns, _PROGRAM_ROWS, block_rows, block_columns
        )
        add_sums(partial, (out,))
