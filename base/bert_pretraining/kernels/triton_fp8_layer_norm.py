"""LayerNorm(residual + dropout(x + bias)) with a result in fp8, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.kernels.fp8_casts import Cast, Quantised
from bert_pretraining.kernels.pairs import AddSums, Saved
from bert_pretraining.kernels.triton_common import (
    divide_up,
    mask_constants,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_fp8 import empty_copies, kernel_arguments, padded
from bert_pretraining.kernels.triton_fp8_layer_norm_kernels import (
    backward_kernel,
    forward_kernel,
)
from bert_pretraining.kernels.triton_layer_norm import empty_outputs, program_rows, row_blocks

# Rows of a program, which it transposes at a time: at least a multiple of 16 bytes.
FORWARD_ROWS, BACKWARD_ROWS = 16, 32


def tile_columns(num_columns: int) -> int:
    """Columns that are transposed at a time."""
    return min(power_of_two_at_least(num_columns, 16), 128)


def forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
    seed: Tensor | None,
    how: Cast,
) -> tuple[Tensor, Saved, Quantised]:
    """As `triton_layer_norm.forward`, and the output in fp8 besides."""
    num_rows, num_columns = x.shape
    output, summed, statistics = empty_outputs(x, residual)
    copies = empty_copies(num_rows, num_columns, how, x.device)
    if num_rows:
        block_rows, block_columns, num_warps = row_blocks(num_columns)
        forward_kernel[(divide_up(num_rows, FORWARD_ROWS),)](
            x,
            bias,
            residual,
            weight,
            norm_bias,
            seed,
            output,
            summed,
            statistics,
            *kernel_arguments(copies, how),
            num_rows,
            padded(num_rows),
            epsilon,
            how.dtype == torch.float8_e5m2,
            how.amax is not None,
            num_columns,
            *mask_constants(dropout),
            FORWARD_ROWS,
            block_rows,
            block_columns,
            FORWARD_ROWS,
            tile_columns(num_columns),
            num_warps=num_warps,
        )
    return output, (summed, statistics), copies


def backward(
    gradient: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    saved: Saved,
    bias_gradient: Tensor,
    weight_gradient: Tensor,
    norm_bias_gradient: Tensor,
    add_sums: AddSums,
    how: Cast,
) -> tuple[Quantised, Tensor]:
    """As `triton_layer_norm.backward`, but the gradient of x is in fp8 only."""
    summed, statistics = saved
    num_rows, num_columns = gradient.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    rows = max(program_rows(num_rows, block_rows), BACKWARD_ROWS)
    programs = divide_up(num_rows, rows)
    residual_gradient = torch.empty_like(summed)
    copies = empty_copies(num_rows, num_columns, how, gradient.device)
    partial = statistics.new_empty((programs, 3, num_columns))
    if num_rows:
        backward_kernel[(programs,)](
            gradient,
            summed,
            statistics,
            weight,
            seed,
            residual_gradient,
            partial,
            *kernel_arguments(copies, how),
            num_rows,
            padded(num_rows),
            how.dtype == torch.float8_e5m2,
            how.amax is not None,
            num_columns,
            *mask_constants(dropout),
            rows,
            block_rows,
            block_columns,
            BACKWARD_ROWS,
            tile_columns(num_columns),
            num_warps=num_warps,
        )
    add_sums(partial, (bias_gradient, weight_gradient, norm_bias_gradient))
    return copies, residual_gradient
