"""LayerNorm(residual + dropout(x + bias)) as one Triton kernel forward and one backward.

LayerNorm: Ba, Kiros and Hinton 2016, equation 4. With y = xhat * w + b, g = dy * w and means over
a row, dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(variance + epsilon).

The forward pass saves residual + dropout(x + bias), its mean and 1 / standard deviation; the
backward pass recomputes the dropout mask from the seed. Parameter gradients are summed in float32
in a fixed order: each program sums a group of rows, then `triton_sums.add_partial_sums` adds the
groups. Without atomics, the same input always gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_pretraining.kernels.triton_common import NOT_SPECIALISED, kept, only_stream_keys
from bert_pretraining.kernels.triton_launch import launched_directly


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


@triton.jit
def store_statistics(statistics_ptr, rows, num_rows, mean, inverse_deviation):
    """Write into (2, num_rows)."""
    tl.store(statistics_ptr + rows, mean, mask=rows < num_rows)
    tl.store(statistics_ptr + num_rows + rows, inverse_deviation, mask=rows < num_rows)


@triton.jit
def load_statistics(statistics_ptr, rows, num_rows):
    """The rows' mean and 1 / standard deviation; 0 outside."""
    mean = tl.load(statistics_ptr + rows, mask=rows < num_rows, other=0.0)
    deviations_ptr = statistics_ptr + num_rows + rows
    return mean, tl.load(deviations_ptr, mask=rows < num_rows, other=0.0)


@triton.jit
def forward_rows(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, norm_bias_ptr, seed_ptr, summed_ptr,
    statistics_ptr, rows, columns, num_rows, epsilon,
    COLUMNS: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
):  # fmt: skip
    """The output of some whole rows in float32; what the backward pass needs is written."""
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
    store_statistics(statistics_ptr, rows, num_rows, mean, inverse_deviation)
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    return normal * weight[None, :] + norm_bias[None, :]


@triton.jit
def backward_rows(
    gradient_ptr, summed_ptr, statistics_ptr, weight, residual_gradient_ptr, weight_sum,
    norm_bias_sum, rows, columns, num_rows, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the residual for some whole rows, float32, and both sums with theirs added.

    The gradient of the residual is also written.
    """
    column_inside = columns < COLUMNS
    inside = (rows < num_rows)[:, None] & column_inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    summed = tl.load(summed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    mean, inverse_deviation = load_statistics(statistics_ptr, rows, num_rows)
    normal = (summed - mean[:, None]) * inverse_deviation[:, None]
    normal = tl.where(column_inside[None, :], normal, 0.0)
    weight_sum += tl.sum(gradient * normal, axis=0)
    norm_bias_sum += tl.sum(gradient, axis=0)
    total = normalise_backward(gradient, weight, normal, inverse_deviation, COLUMNS)
    tl.store(residual_gradient_ptr + offsets, total, mask=inside)
    return total, weight_sum, norm_bias_sum


@triton.jit
def store_sums(partial_ptr, columns, bias_sum, weight_sum, norm_bias_sum, COLUMNS: tl.constexpr):
    """Write this program's sums into partial, (programs, 3, COLUMNS)."""
    inside = columns < COLUMNS
    partial_ptr += tl.program_id(0) * 3 * COLUMNS + columns
    tl.store(partial_ptr, bias_sum, mask=inside)
    tl.store(partial_ptr + COLUMNS, weight_sum, mask=inside)
    tl.store(partial_ptr + 2 * COLUMNS, norm_bias_sum, mask=inside)


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
    output = forward_rows(
        x_ptr, bias_ptr, residual_ptr, weight_ptr, norm_bias_ptr, seed_ptr, summed_ptr,
        statistics_ptr, rows, columns, num_rows, epsilon, COLUMNS, THRESHOLD, KEEP_SCALE,
    )  # fmt: skip
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    tl.store(output_ptr + offsets, output, mask=inside)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def backward_kernel(
    gradient_ptr,
    summed_ptr,
    statistics_ptr,
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
        total, weight_sum, norm_bias_sum = backward_rows(
            gradient_ptr, summed_ptr, statistics_ptr, weight, residual_gradient_ptr, weight_sum,
            norm_bias_sum, rows, columns, num_rows, COLUMNS,
        )  # fmt: skip
        if THRESHOLD > 0:
            keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
            total = tl.where(keep, total * KEEP_SCALE, 0.0)
            inside = (rows < num_rows)[:, None] & column_inside[None, :]
            offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
            tl.store(x_gradient_ptr + offsets, total, mask=inside)
        bias_sum += tl.sum(total, axis=0)
    store_sums(partial_ptr, columns, bias_sum, weight_sum, norm_bias_sum, COLUMNS)
