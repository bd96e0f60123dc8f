"""LayerNorm(residual + dropout(x + bias)) as one Triton kernel forward and one backward.

LayerNorm: Ba, Kiros and Hinton 2016, equation 4. With y = xhat * w + b, g = dy * w and means over
a row, dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(variance + epsilon).

The forward pass saves residual + dropout(x + bias), its mean and 1 / standard deviation; the
backward pass recomputes the dropout mask from the seed. Parameter gradients are summed in float32
in a fixed order: each program sums a group of rows, then `triton_sums.add_partial_sums` adds the
groups. Without atomics, the same input always gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.pairs import Pair, Saved
from bert_pretraining.kernels.triton_common import (
    NOT_SPECIALISED,
    divide_up,
    kept,
    mask_constants,
    only_stream_keys,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_sums import add_partial_sums
from bert_pretraining.runtime.compat import custom_op

# The backward pass aims at this many programs: a few for each multiprocessor of a large GPU, but
# few enough that their partial sums are small compared with the activations.
BACKWARD_PROGRAMS = 512


@triton.jit
def normalise(values, inside, epsilon, COLUMNS: tl.constexpr):
    """Each row's xhat, mean and 1 / standard deviation; values outside must be 0."""
    mean = tl.sum(values, axis=1) / COLUMNS
    centred = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / COLUMNS
    inverse_deviation = 1.0 / tl.sqrt(variance + epsilon)
    return centred * inverse_deviation[:, None], mean, inverse_deviation


@triton.jit
def normalise_backward(gradient, weight, normal, inverse_deviation, COLUMNS: tl.constexpr):
    """The gradient of LayerNorm's input; everything outside the rows must be 0."""
    scaled = gradient * weight[None, :]
    mean = tl.sum(scaled, axis=1) / COLUMNS
    projection = tl.sum(scaled * normal, axis=1) / COLUMNS
    centred = scaled - mean[:, None] - normal * projection[:, None]
    return centred * inverse_deviation[:, None]


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
    mean_ptr,
    inverse_deviation_ptr,
    num_rows,
    epsilon,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    inside = (rows < num_rows)[:, None] & column_inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]

    bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    if THRESHOLD > 0:
        first_key, second_key = only_stream_keys(seed_ptr)
        keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
        x = tl.where(keep, x * KEEP_SCALE, 0.0)
    summed = x + tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(summed_ptr + offsets, summed, mask=inside)

    normal, mean, inverse_deviation = normalise(summed, inside, epsilon, COLUMNS)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(inverse_deviation_ptr + rows, inverse_deviation, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, normal * weight[None, :] + norm_bias[None, :], mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def backward_kernel(
    gradient_ptr,
    summed_ptr,
    mean_ptr,
    inverse_deviation_ptr,
    weight_ptr,
    seed_ptr,
    x_gradient_ptr,
    residual_gradient_ptr,
    partial_ptr,
    num_rows,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if THRESHOLD > 0:
        first_key, second_key = only_stream_keys(seed_ptr)

    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        row_inside = rows < num_rows
        inside = row_inside[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        summed = tl.load(summed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_inside, other=0.0)
        inverse_deviation = tl.load(inverse_deviation_ptr + rows, mask=row_inside, other=0.0)
        normal = (summed - mean[:, None]) * inverse_deviation[:, None]
        normal = tl.where(column_inside[None, :], normal, 0.0)
        weight_sum += tl.sum(gradient * normal, axis=0)
        norm_bias_sum += tl.sum(gradient, axis=0)
        total = normalise_backward(gradient, weight, normal, inverse_deviation, COLUMNS)
        tl.store(residual_gradient_ptr + offsets, total, mask=inside)
        if THRESHOLD > 0:
            keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
            total = tl.where(keep, total * KEEP_SCALE, 0.0)
            tl.store(x_gradient_ptr + offsets, total, mask=inside)
        bias_sum += tl.sum(total, axis=0)

    partial_ptr += program * 3 * COLUMNS + columns
    tl.store(partial_ptr, bias_sum, mask=column_inside)
    tl.store(partial_ptr + COLUMNS, weight_sum, mask=column_inside)
    tl.store(partial_ptr + 2 * COLUMNS, norm_bias_sum, mask=column_inside)


@functools.cache
def row_blocks(num_columns: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a block of whole rows: about 32 numbers per thread."""
    columns = power_of_two_at_least(num_columns, 16)
    rows = min(max(4096 // columns, 1), 16)
    return rows, columns, 8 if columns > 4096 else 4


def program_rows(num_rows: int, block_rows: int) -> int:
    """Rows that a backward program sums: a power of two, so that few variants are compiled."""
    return power_of_two_at_least(divide_up(num_rows, BACKWARD_PROGRAMS), block_rows)


def forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Saved]:
    """LayerNorm(residual + dropout(x + bias)), and what `backward` needs.

    x, residual: (T, C); bias, weight, norm_bias: (C,); all contiguous. seed: (2,) int32, or None
    without dropout. Returns the output, (T, C), and residual + dropout(x + bias), (T, C), with
    each row's mean and 1 / standard deviation, (T,) float32.
    """
    num_rows, num_columns = x.shape
    output, summed, mean, inverse_deviation = _empty_outputs(x, residual)
    if num_rows:
        block_rows, block_columns, num_warps = row_blocks(num_columns)
        forward_kernel[(divide_up(num_rows, block_rows),)](
            x,
            bias,
            residual,
            weight,
            norm_bias,
            seed,
            output,
            summed,
            mean,
            inverse_deviation,
            num_rows,
            epsilon,
            num_columns,
            *mask_constants(dropout),
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
    return output, (summed, mean, inverse_deviation)


def _empty_outputs(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:1], dtype=torch.float32),
        x.new_empty(x.shape[:1], dtype=torch.float32),
    )


def backward(
    gradient: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    saved: Saved,
    bias_gradient: Tensor,
    weight_gradient: Tensor,
    norm_bias_gradient: Tensor,
    add: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the residual, (T, C) each; the same tensor without dropout.

    Their dtype is that of the sum of x and residual. The gradients of bias, weight and norm_bias
    are added to the last three tensors, or written over them without `add`. All are contiguous.
    """
    summed, mean, inverse_deviation = saved
    num_rows, num_columns = gradient.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    rows = program_rows(num_rows, block_rows)
    programs = divide_up(num_rows, rows)
    residual_gradient = torch.empty_like(summed)
    x_gradient = torch.empty_like(summed) if dropout else residual_gradient
    partial = mean.new_empty((programs, 3, num_columns))
    if num_rows:
        backward_kernel[(programs,)](
            gradient,
            summed,
            mean,
            inverse_deviation,
            weight,
            seed,
            x_gradient,
            residual_gradient,
            partial,
            num_rows,
            num_columns,
            *mask_constants(dropout),
            rows,
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
    add_partial_sums(partial, (bias_gradient, weight_gradient, norm_bias_gradient), add)
    return x_gradient, residual_gradient


PAIR = Pair(forward, backward)


@custom_op("bert_pretraining::residual_layer_norm")
def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    epsilon: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` for any strides; the output and what is saved in one tuple."""
    tensors = (each.contiguous() for each in (x, bias, residual, weight, norm_bias))
    output, saved = forward(*tensors, epsilon, dropout, seed)
    return output, *saved


@residual_layer_norm.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_outputs(x, residual)


@custom_op("bert_pretraining::residual_layer_norm_backward")
def residual_layer_norm_backward(
    gradient: Tensor,
    summed: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual_layer_norm`: of x, residual, bias, weight and norm_bias.

    The gradient of x is empty, (0, C), without dropout, where it equals the residual's: an operator
    must not return one tensor twice.
    """
    x_gradient, residual_gradient, *parameters = _gradients(
        gradient, summed, mean, inverse_deviation, weight, bias, norm_bias, seed, dropout
    )
    if not dropout:
        x_gradient = x_gradient.new_empty((0, x_gradient.shape[1]))
    return x_gradient, residual_gradient, *parameters


@residual_layer_norm_backward.register_fake
def _(gradient: Tensor, summed: Tensor, _mean: Tensor, _deviation: Tensor, weight: Tensor,
      bias: Tensor, norm_bias: Tensor, _seed: Tensor | None, dropout: float):  # fmt: skip
    rows, columns = summed.shape
    return (
        summed.new_empty((rows if dropout else 0, columns)),
        summed.new_empty((rows, columns)),
        *(each.new_empty(each.shape) for each in (bias, weight, norm_bias)),
    )


def _gradients(
    gradient: Tensor,
    summed: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, ...]:
    parameters = [each.new_empty(each.shape) for each in (bias, weight, norm_bias)]
    saved = (summed, mean, inverse_deviation)
    inputs = (gradient.contiguous(), weight.contiguous(), dropout, seed, saved)
    return *backward(*inputs, *parameters, add=False), *parameters


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, bias, residual, weight, norm_bias, seed, _, dropout = inputs
    _, summed, mean, inverse_deviation = output
    ctx.mark_non_differentiable(summed, mean, inverse_deviation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, mean, inverse_deviation, weight, bias, norm_bias, seed)
    ctx.dropout, ctx.dtypes = dropout, (x.dtype, residual.dtype)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: object) -> tuple:
    if gradient is None:
        return (None,) * 8
    x, residual, bias, weight, norm_bias = residual_layer_norm_backward(
        gradient, *ctx.saved_tensors, ctx.dropout
    )
    x, residual = (x if ctx.dropout else residual).to(ctx.dtypes[0]), residual.to(ctx.dtypes[1])
    return x, bias, residual, weight, norm_bias, None, None, None


residual_layer_norm.register_autograd(_differentiate, setup_context=_save)
